"use strict";

const at = (id) => document.getElementById(id);
let conversation = [];
let model = null;
let running = null; // the AbortController of an answer that is being made

function headers() {
  const key = at("key").value;
  const found = { "Content-Type": "application/json" };
  if (key) found.Authorization = `Bearer ${key}`;
  return found;
}

function notice(text) {
  at("notice").textContent = text;
}

function addTurn(role, text) {
  const turn = document.createElement("article");
  turn.className = `turn ${role}`;
  const name = document.createElement("b");
  name.textContent = role === "user" ? "You" : "Model";
  const body = document.createElement("span");
  body.textContent = text;
  turn.append(name, body);
  at("talk").append(turn);
  at("talk").scrollTop = at("talk").scrollHeight;
  return body;
}

function settings() {
  const found = {};
  for (const name of ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"]) {
    const value = at(name).value;
    if (value !== "") found[name] = Number(value);
  }
  return found;
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}.`;
  }
}

// Adds text to an answer, at most once for each frame: tokens may come faster than that.
function shower(body) {
  const shown = body.appendChild(document.createTextNode(""));
  let waiting = "";
  return (more) => {
    if (!waiting) {
      requestAnimationFrame(() => {
        shown.appendData(waiting);
        waiting = "";
        at("talk").scrollTop = at("talk").scrollHeight;
      });
    }
    waiting += more;
  };
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function answer(conversation) {
  const system = at("system").value.trim();
  const messages = system ? [{ role: "system", content: system }, ...conversation] : conversation;
  const body = addTurn("assistant", "");
  const show = shower(body);
  const began = performance.now();
  let first = null;
  let usage = null;
  let text = "";
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal: running.signal,
      body: JSON.stringify({
        model, messages, stream: true, stream_options: { include_usage: true }, ...settings(),
      }),
    });
    if (!response.ok) throw new Error(await reason(response));
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) usage = chunk.usage;
      const more = chunk.choices[0]?.delta?.content;
      if (!more) continue;
      first ??= performance.now();
      text += more;
      show(more);
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      notice(error instanceof TypeError ? "The server does not answer." : error.message);
    }
  }
  if (text) conversation.push({ role: "assistant", content: text });
  else {
    // a question without an answer goes back to be asked anew, unless the talk was cleared meanwhile
    const asked = body.parentElement.previousElementSibling;
    if (asked) {
      const { content } = conversation.pop();
      if (!at("question").value) at("question").value = content;
      asked.remove();
    }
    body.parentElement.remove();
  }
  tell(began, first, usage);
}

function tell(began, first, usage) {
  if (first === null) return;
  const parts = [`first token after ${((first - began) / 1000).toFixed(2)} s`];
  const count = usage?.completion_tokens;
  const seconds = (performance.now() - first) / 1000;
  if (count > 1 && seconds > 0) parts.unshift(`${((count - 1) / seconds).toFixed(1)} tokens/s`);
  if (count) parts.push(`${count} tokens`);
  at("speed").textContent = parts.join(" · ");
}

async function send(event) {
  event.preventDefault();
  const question = at("question").value.trim();
  if (!question || running || model === null) return;
  notice("");
  at("speed").textContent = "";
  conversation.push({ role: "user", content: question });
  addTurn("user", question);
  at("question").value = "";
  running = new AbortController();
  at("send").disabled = true;
  at("stop").disabled = false;
  at("talk").setAttribute("aria-busy", "true");
  try {
    await answer(conversation);
  } finally {
    running = null;
    at("send").disabled = false;
    at("stop").disabled = true;
    at("talk").removeAttribute("aria-busy");
    at("question").focus();
  }
}

async function look() {
  try {
    const response = await fetch("status", { headers: headers() });
    if (!response.ok) throw new Error(await reason(response));
    const state = await response.json();
    model = state.model;
    at("model").textContent = state.model;
    at("send").title = state.chat ? "" : "This model has no chat template.";
    if (!state.chat && !at("notice").textContent) {
      notice("This model has no chat template: it completes text (/v1/completions), but cannot chat.");
    }
    for (const name of ["running", "waiting", "slots", "kernels", "context"]) {
      at(name).textContent = state[name];
    }
    if (at("notice").dataset.from === "look") {
      notice("");
      delete at("notice").dataset.from;
    }
  } catch (error) {
    for (const name of ["running", "waiting"]) at(name).textContent = "–";
    if (!at("notice").textContent) {
      notice(error instanceof TypeError ? "The server does not answer." : error.message);
      at("notice").dataset.from = "look";
    }
  }
}

at("ask").addEventListener("submit", send);
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
at("stop").addEventListener("click", () => running?.abort());
at("clear").addEventListener("click", () => {
  running?.abort();
  conversation = [];
  at("talk").replaceChildren();
  at("speed").textContent = "";
  notice("");
});
at("settings").addEventListener("submit", (event) => event.preventDefault());
at("key").value = sessionStorage.getItem("key") ?? "";
at("key").addEventListener("change", () => {
  sessionStorage.setItem("key", at("key").value);
  notice("");
  look();
});
look();
setInterval(() => { if (!document.hidden) look(); }, 1000);
