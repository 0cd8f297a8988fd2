"""Every endpoint and field through OpenAI's client: sync, async, streams, tools, schemas."""

import asyncio
import contextlib
import json
from typing import Any

import httpx
import openai
import pytest

from qexport.runtime.server.requests import Message
from qexport.runtime.templates import TemplateWorker
from tests.runtime.server.conftest import Server

MODEL = "tiny-4bit"
MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}
SCHEMA: Any = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "maximum": 99}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    common = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    return client.chat.completions.create(**{**common, **fields})


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    common = {"model": MODEL, "prompt": "ab", "max_tokens": 8, "temperature": 0}
    return client.completions.create(**{**common, **fields})


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_several_choices(client: openai.OpenAI) -> None:
    """Greedy ones agree; drawn ones differ, and a seed repeats all of them."""
    assert len({choice.message.content for choice in chat(client, n=3).choices}) == 1

    def drawn() -> list[str]:
        answer = chat(client, n=4, temperature=2, seed=3, max_tokens=12)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        return [choice.message.content for choice in answer.choices]

    first = drawn()
    assert first == drawn()
    assert len(set(first)) > 1


def test_streams_of_several_choices_are_the_whole_answer(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"n": 3, "temperature": 1.5, "seed": 11, "max_tokens": 10}
    whole = [choice.message.content for choice in chat(client, **fields).choices]
    texts, reasons = ["", "", ""], [None, None, None]
    for chunk in chat(client, **fields, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == whole
    assert set(reasons) <= {"stop", "length"}


def test_several_prompts(client: openai.OpenAI) -> None:
    alone = [complete(client, prompt=prompt).choices[0].text for prompt in ("ab", "hello")]
    both = complete(client, prompt=["ab", "hello"], n=2)
    assert [choice.text for choice in both.choices] == [alone[0]] * 2 + [alone[1]] * 2
    ids = complete(client, prompt=[[5, 6], [7]])
    assert len(ids.choices) == 2
    assert ids.usage.prompt_tokens == 3


def test_echo(client: openai.OpenAI) -> None:
    plain, echoed = complete(client), complete(client, echo=True)
    assert echoed.choices[0].text == "ab" + plain.choices[0].text
    streamed = "".join(c.choices[0].text for c in complete(client, echo=True, stream=True))
    assert streamed == echoed.choices[0].text


def test_logprobs_of_chats(client: openai.OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=3, max_tokens=5)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens == 5
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob <= 0
        assert entry.top_logprobs[0].logprob == entry.logprob  # greedy: the best one
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
    chunks = chat(client, logprobs=True, top_logprobs=3, max_tokens=5, stream=True)
    streamed = [e for c in chunks for x in c.choices if x.logprobs for e in x.logprobs.content]
    assert streamed == content


def test_logprobs_of_completions(client: openai.OpenAI) -> None:
    found = complete(client, logprobs=2, max_tokens=4).choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == 4
    assert all(len(top) <= 2 for top in found.top_logprobs)
    assert found.text_offset[0] == 0 and found.text_offset == sorted(found.text_offset)


def test_sampling_fields(client: openai.OpenAI) -> None:
    """Each does what its name says: seen in the tokens that it lets through."""
    greedy = chat(client).choices[0].message.content
    for extra in ({"top_k": 1}, {"min_p": 1.0}, {"repetition_penalty": 1.0}):
        drawn = chat(client, temperature=2, seed=1, extra_body=extra).choices[0].message.content
        assert (drawn == greedy) == ("repetition_penalty" not in extra)
    assert chat(client, temperature=2, top_p=1e-6).choices[0].message.content == greedy
    first = chat(client, logprobs=True, top_logprobs=1, max_tokens=1).choices[0].logprobs
    token = _token_of(client, first.content[0].bytes)
    banned = chat(client, logit_bias={str(token): -100}).choices[0].message.content
    assert banned != greedy
    forced = chat(client, logit_bias={"40": 100}, frequency_penalty=0, presence_penalty=0)
    text = forced.choices[0].message.content
    assert len(set(text)) == 1
    penal = chat(client, logit_bias={"40": 2}, frequency_penalty=2, presence_penalty=2)
    assert penal.choices[0].message.content != text


def _token_of(client: openai.OpenAI, spelled: list[int]) -> int:
    text = bytes(spelled).decode(errors="replace")
    url = str(client.base_url).removesuffix("/v1/")
    found = httpx.post(f"{url}/tokenize", json={"prompt": text}).json()
    return int(found["tokens"][0])


def test_neutral_fields_are_taken(client: openai.OpenAI) -> None:
    answer = chat(
        client,
        **{"n": 1, "stop": None, "logit_bias": None, "logprobs": False, "seed": None},
        **{"presence_penalty": 0, "frequency_penalty": 0, "user": "me", "store": False},
        **{"response_format": {"type": "text"}, "service_tier": "auto"},
        stream=False,
    )
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_usage_tells_cached_tokens(server: Server) -> None:
    body = {"model": MODEL, "prompt": "the same long beginning ", "max_tokens": 2, "temperature": 0}
    usages = [server.post("/v1/completions", body).json()["usage"] for _ in range(2)]
    assert usages[1]["prompt_tokens_details"]["cached_tokens"] == usages[1]["prompt_tokens"] - 1


@pytest.mark.parametrize("stream", [False, True])
def test_answers_follow_a_schema(client: openai.OpenAI, stream: bool) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    for seed in range(5):
        fields = {"response_format": wanted, "temperature": 1.8, "seed": seed, "max_tokens": 60}
        made = chat(client, **fields, stream=stream)
        if stream:
            text = "".join(c.choices[0].delta.content or "" for c in made if c.choices)
        else:
            text = made.choices[0].message.content
            assert made.choices[0].finish_reason == "stop"
        value = json.loads(text)
        assert set(value) == {"ok", "n"}
        assert isinstance(value["ok"], bool) and value["n"] <= 99


def test_answers_are_json_objects(client: openai.OpenAI) -> None:
    """A random model ends its object when the tokens run out, or before."""
    made = chat(client, response_format={"type": "json_object"}, temperature=1.5, max_tokens=200)
    text = made.choices[0].message.content
    assert text.lstrip().startswith("{")
    if made.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_tools_that_have_to_be_called(client: openai.OpenAI, choice: Any) -> None:
    fields = {"tools": [WEATHER, CLOCK], "tool_choice": choice, "temperature": 1.5}
    for seed in range(4):
        made = chat(client, **fields, seed=seed, max_tokens=150).choices[0]
        if made.finish_reason == "length":
            continue
        assert made.finish_reason == "tool_calls"
        call = made.message.tool_calls[0]
        assert call.function.name == "weather" or choice == "required"
        arguments = json.loads(call.function.arguments)
        if call.function.name == "weather":
            assert arguments["city"] in ("Paris", "Rome")
    chunks = list(chat(client, **fields, seed=0, max_tokens=150, stream=True))
    calls = [c for k in chunks if k.choices for c in k.choices[0].delta.tool_calls or []]
    assert [json.loads(call.function.arguments) for call in calls]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_results_of_tools_go_back(client: openai.OpenAI, server: Server) -> None:
    call = {"name": "weather", "arguments": '{"city": "Rome"}'}
    conversation = [
        *MESSAGES,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    for choice in ("auto", "none"):
        made = chat(client, messages=conversation, tools=[WEATHER], tool_choice=choice)
        assert made.choices[0].message.content is not None
    for wrong in ("sunny", "[1]", '{"city": '):
        call["arguments"] = wrong
        answer = server.post("/v1/chat/completions", {"model": MODEL, "messages": conversation})
        assert answer.status_code == 400
        assert "the arguments of a call of weather are no JSON object" in answer.text


def test_what_is_wrong_with_a_part_is_told_where_it_is(server: Server) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]
    body = {"model": MODEL, "messages": [{"role": "user", "content": parts}]}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 400
    assert "messages.0.content.1.type: Input should be 'text'" in answer.json()["error"]["message"]
    body["messages"] = [{"role": "user", "content": 5}]
    answer = server.post("/v1/chat/completions", body)
    assert answer.json()["error"]["message"].startswith("messages.0.content: Input should be")


def test_calls_stand_in_the_prompt_as_templates_write_them() -> None:
    """Qwen's and Llama's take arguments as an object, and write it as JSON."""
    template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
        "{% endfor %}{% endfor %}"
    )
    for given, written in (('{"city": "Rome"}', '{"city": "Rome"}'), ("", "{}")):
        function = {"name": "weather", "arguments": given}
        call = {"id": "call_1", "type": "function", "function": function}
        message = Message.model_validate({"role": "assistant", "tool_calls": [call]})
        with contextlib.closing(TemplateWorker()) as worker:
            text = worker.render(template, [message.for_template()])
        assert text == f'{{"name": "weather", "arguments": {written}}}'


def test_responses(client: openai.OpenAI) -> None:
    made = client.responses.create(
        model=MODEL, input="hello there", instructions="be kind", max_output_tokens=8, temperature=0
    )
    assert made.status in ("completed", "incomplete")
    assert made.usage is not None and made.usage.output_tokens <= 8
    events = list(
        client.responses.create(
            model=MODEL,
            input=[{"role": "user", "content": [{"type": "input_text", "text": "hello there"}]}],
            instructions="be kind",
            max_output_tokens=8,
            temperature=0,
            stream=True,
        )
    )
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == f"response.{made.status}"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    last: Any = events[-1]
    assert text == made.output_text == last.response.output_text


def test_answers_go_back_as_they_came(client: openai.OpenAI) -> None:
    """A conversation goes on with what the client has of our answers, nulls and all."""
    made = chat(client, max_tokens=3)
    message = made.choices[0].message.model_dump()
    again = chat(client, messages=[*MESSAGES, message, *MESSAGES], max_tokens=3)
    assert again.choices[0].finish_reason in ("stop", "length")
    first = client.responses.create(model=MODEL, input="x", max_output_tokens=4)
    conversation: Any = [{"role": "user", "content": "x"}, *first.output]
    conversation.append({"role": "user", "content": "y"})
    second = client.responses.create(
        model=MODEL,
        input=conversation,
        max_output_tokens=4,
        truncation="disabled",
        tool_choice="auto",
        parallel_tool_calls=True,
        background=False,
    )
    assert second.status in ("completed", "incomplete")


def test_a_call_and_an_answers_form(client: openai.OpenAI) -> None:
    """Where a call has to be made there is no other form; where it may be, either comes."""
    wanted = _schema(SCHEMA)
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, tools=[CLOCK], tool_choice="required", response_format=wanted)
    assert caught.value.param == "response_format"
    ended = []
    for seed in range(8):
        made = chat(
            client,
            **{"tools": [CLOCK], "response_format": wanted, "seed": seed},
            **{"temperature": 1.5, "max_tokens": 150},
        ).choices[0]
        ended.append(made.finish_reason)
        if made.finish_reason == "stop":
            assert set(json.loads(made.message.content)) == {"ok", "n"}
        elif made.finish_reason == "tool_calls":
            assert made.message.tool_calls[0].function.name == "clock"
    assert set(ended) - {"length"}


def test_responses_follow_a_schema(client: openai.OpenAI) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    made = client.responses.create(model=MODEL, input="x", text=form, max_output_tokens=60)
    assert set(json.loads(made.output_text)) == {"ok", "n"}
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model=MODEL, input="x", previous_response_id="resp_1")


def test_async_client(server: Server) -> None:
    async def ask() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="x") as client:
            common: Any = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
            whole = await client.chat.completions.create(**common)
            text = ""
            async for chunk in await client.chat.completions.create(**common, stream=True):
                text += chunk.choices[0].delta.content or ""
            return whole.choices[0].message.content or "", text

    whole, streamed = asyncio.run(ask())
    assert whole == streamed


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        chat(client, model="other")
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, top_logprobs=2)
    assert "logprobs: true" in str(caught.value)
    for fields, param in (
        ({"n": 17}, "n"),
        ({"stop": ["x" * 300]}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"extra_body": {"guided_json": {}}}, "guided_json"),
        ({"extra_body": {"chat_template_kwargs": {"chat_template": "x"}}}, "chat_template_kwargs"),
        ({"tools": [WEATHER], "tool_choice": _named("nobody")}, "tool_choice"),
        ({"response_format": _schema({"type": "banana"})}, "response_format"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 4, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"tools": [CLOCK, CLOCK]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            chat(client, **fields)
        assert caught.value.param == param, caught.value
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, max_tokens=10**6)
    assert caught.value.code == "context_length_exceeded"


def _named(name: str) -> Any:
    return {"type": "function", "function": {"name": name}}


def _schema(schema: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def test_tokens_there_and_back(server: Server) -> None:
    for text in ("hello", "häßlich 🙂", ""):
        made = server.post("/tokenize", {"prompt": text}).json()
        assert made["count"] == len(made["tokens"])
        assert server.post("/detokenize", {"tokens": made["tokens"]}).json()["prompt"] == text
    chatted = server.post("/tokenize", {"messages": MESSAGES, "return_token_strs": True}).json()
    assert len(chatted["token_strs"]) == chatted["count"] > 5
    assert server.post("/tokenize", {}).status_code == 400
    assert server.post("/detokenize", {"tokens": [10**7]}).status_code == 400


def test_what_the_server_says_of_itself(server: Server) -> None:
    for path in ("/health", "/ready", "/version", "/status", "/metrics", "/", "/page.js"):
        assert httpx.get(f"{server.root}{path}").status_code == 200, path
    assert server.status()["slots"] == 8
