"""`qexport bench latency`: real engines on a tiny model, and what the report says of them."""

import csv
import json
import os
import signal
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qexport.checkpoint import Checkpoint
from qexport.errors import QexportError
from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.pack import pack
from qexport.page import cell
from qexport.runtime.bench.backends import Answers, Options, note_event
from qexport.runtime.bench.contender import Contender, Running
from qexport.runtime.bench.latency import SCHEMA, crossovers
from qexport.runtime.bench.noise import Noise
from qexport.runtime.bench.statistics import percentiles, request_times
from qexport.tiny import write_tiny_model
from tests.conftest import Cli, Runs


@pytest.fixture(scope="module")
def packed(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "packed"
    assert pack(open_checkpoint(runs("2")), FORMATS["native"], folder).exact
    return folder


class Texts(HTMLParser):
    """Tags and what is in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [str(value) for name, value in attrs if name in ("src", "href")]


def test_times_of_requests() -> None:
    found = request_times([[1.0, 1.5, 2.5], [2.0]])
    assert found == {"ttft": [1.0, 2.0], "tpot": [0.75], "itl": [0.5, 1.0], "e2e": [2.5, 2.0]}
    middle = percentiles([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (middle["p50"], middle["p25"]) == (3.0, 2.0)
    assert middle["p90"] == pytest.approx(4.6)
    assert percentiles([]) == {"count": 0}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(None, "–"), (0.0, "0"), (1234.56, "1,235"), (12.345, "12.3"), (1.2345, "1.23")],
        *[(0.012345, "0.0123"), (1.6e-7, "1.6e-07"), (3, "3"), ("a", "a"), (1.0, "1.00")],
    ],
)
def test_numbers_for_people(value: object, text: str) -> None:
    assert cell(value) == text


def test_a_busy_machine_is_not_called_quiet() -> None:
    """Somebody else's process, and repeats that lie apart."""
    quiet = Noise()
    quiet.spread("x", [1.0, 1.01, 1.02, 1.03, 1.01])
    assert not quiet.reasons()
    quiet.spread("y", [1.0, 1.0, 2.0, 2.0, 2.0])
    assert quiet.reasons() == [
        "repeats of 1 of 2 measurements lie more than 10% apart, those of y 50%"
    ]
    assert Noise().reasons() == ["fewer than 4 repeats are too few to tell"]
    noise = Noise()
    noise.spread("x", [1.0] * 4)
    noise.begin(0.0)
    code = "import time; end = time.time() + 1\nwhile time.time() < end: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    noise.end(0.0)
    noise.stolen = 0.0  # what a hypervisor takes meanwhile is another reason
    assert "other processes took" in noise.reasons()[0]
    mine = Noise()
    mine.spread("x", [1.0] * 4)
    mine.begin(0.0)
    subprocess.run([sys.executable, "-c", code], check=True)
    mine.end(1e6)  # it was ours, and more
    mine.stolen = 0.0
    assert not mine.reasons()
    mine.stolen = 1e3
    assert "the hypervisor took" in mine.reasons()[0]


def test_where_another_is_overtaken() -> None:
    def row(name: str, batch: int, step: float) -> dict[str, Any]:
        about = {"contender": name, "batch": batch, "prompt": 8, "output": 4}
        return {**about, "itl": {"p50": step}}

    cells = [row("a", 1, 1.0), row("b", 1, 2.0), row("a", 8, 3.0), row("b", 8, 3.2)]
    cells.append({"contender": "b", "batch": 16, "prompt": 8, "output": 4, "failure": "no"})
    (found,) = crossovers(cells, "a")
    assert (found["against"], found["batch"]) == ("b", 8)
    assert crossovers(cells[:2], "a")[0]["batch"] is None
    assert crossovers(cells[2:4], "a")[0]["batch"] == 8
    even = [row("a", 1, 2.0), row("b", 1, 2.0), row("a", 2, 1.0), row("b", 2, 2.0)]
    assert crossovers(even, "a")[0]["batch"] is None  # ahead at the largest


def test_the_report_of_two_engines(packed: Path, cli: Cli, tmp_path: Path) -> None:
    """With float32 activations both answer the same, and every file says so."""
    out = tmp_path / "report"
    result = cli(
        *("bench", "latency", packed, "--peer", "transformers", "--batch", "1,3"),
        *("--prompt", "8,20", "--tokens", "6", "--repeats", "4", "--kernel", "cpu-exact"),
        *("--kv-cache", "float32", "--dtype", "float32", "-o", out, "--json"),
    )
    assert result.returncode == 0, result.stderr
    assert "clean" in result.stderr.lower() or "noisy" in result.stderr.lower()
    found = json.loads(result.stdout)
    assert found == json.loads((out / "report.json").read_text())
    assert found["schema"] == SCHEMA
    names = [one["name"] for one in found["contenders"]]
    assert names == ["native packed", "transformers packed"]
    ours, theirs = found["contenders"]
    assert ours["schemes"] == ["seq2 g32, float16 scales"] and "cpu-exact" in ours["kernel"]
    assert theirs["kernel"] == "torch, dense float32"
    assert 0 < ours["step_weight_bytes"] < theirs["step_weight_bytes"]
    assert min(one["peak_memory_bytes"] for one in found["contenders"]) > 50 << 20
    assert len(found["cells"]) == 2 * 2 * 2
    for one in found["cells"]:
        assert one["same_answers"] == 1.0
        assert 0 < one["ttft"]["p50"] <= one["e2e"]["p50"]
        assert one["tpot"]["count"] == 4 * one["batch"] == one["ttft"]["count"]
        assert one["itl"]["count"] == 5 * one["tpot"]["count"]
        for sample in one["samples"]:
            assert all(times == sorted(times) and len(times) == 6 for times in sample["times"])
        lasts = [max(times[-1] for times in sample["times"]) for sample in one["samples"]]
        rate = statistics.median(6 * one["batch"] / last for last in lasts)
        assert one["tokens_per_second"]["p50"] == pytest.approx(rate, rel=1e-3)
        assert one["achieved_gbps"] > 0
    _check_files(out, names)


def _check_files(out: Path, names: list[str]) -> None:
    with (out / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and {row["contender"] for row in rows} == set(names)
    assert all(float(row["TPOT p50 ms"]) > 0 for row in rows)
    text = (out / "report.md").read_text()
    assert text.startswith("# Latency") and "TTFT = t1" in text
    assert {row["clean"] for row in rows} <= {"True", "False"}
    page = Texts((out / "report.html").read_text())
    assert page.tags.count("svg") == 2 * 4 and page.tags.count("table") == 3
    assert "script" not in page.tags and not page.sources


def test_mistakes_in_a_sentence(packed: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "report"
    for code, said, *arguments in (
        (2, "there is no backend onnx", "--peer", "onnx"),
        (2, "does not exist", "--peer", "native=nowhere"),
        (2, "same name", "--peer", "native"),
        (2, "is not one or more positive numbers", "--batch", "1,x"),
        (2, "is not one or more positive numbers", "--batch", "0"),
        (2, "positive numbers below 16777216", "--batch", str(1 << 24)),
        (2, "No such option", "--context", "64"),
        (4, "server is not nowhere", "--peer", "llama.cpp", "--llama-server", "nowhere"),
        (2, "holds no GGUF file", "--peer", "llama.cpp", "--llama-server", sys.executable),
        (4, "--vllm-python", "--peer", "vllm", "--vllm-python", "nowhere"),
        (4, "--vllm-python", "--peer", "vllm"),
        (2, "the model has a context of 512", "--prompt", "1000"),
        (2, "there is no kernel 'magic'", "--kernel", "magic"),
    ):
        result = cli("bench", "latency", packed, "--batch", "1", *arguments, "-o", out)
        assert result.returncode == code, result.stderr
        assert said in result.stderr and "Traceback" not in result.stderr
        assert list(tmp_path.iterdir()) == []
        assert "loading" not in result.stderr or code == 2
    kept = tmp_path / "mine"
    kept.mkdir()
    (kept / "thesis.txt").write_text("x")
    result = cli("bench", "latency", packed, "--batch", "1", "-o", kept)
    assert result.returncode == 2 and "was not written by qexport" in result.stderr


def test_an_engine_that_dies_is_told(packed: Path, cli: Cli, tmp_path: Path) -> None:
    """A checkpoint that breaks while it is loaded, in the worker."""
    broken = tmp_path / "broken"
    broken.mkdir()
    source: Checkpoint = open_checkpoint(packed)
    for file in source.folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "tokenizer.json").write_text("{")
    result = cli("bench", "latency", packed, "--peer", f"native={broken}", "--batch", "1")
    assert result.returncode == 1 and "native broken" in result.stderr
    assert "Traceback" not in result.stderr


def test_what_llama_server_says_of_tokens() -> None:
    """Events of its /completion stream: parts of a character come late, with their number alone."""
    found = Answers([[]], [[]])
    events = (
        {"tokens": [40], "content": "I", "tokens_predicted": 1},
        {"tokens": [9], "content": " é", "tokens_predicted": 4},  # two parts before it
        {"tokens": [], "content": "", "stop": True, "tokens_predicted": 5},  # the last is a part
    )
    for now, event in enumerate(events):
        note_event(found, 0, event, float(now))
    assert found.tokens == [[40, -1, -1, 9, -1]] and found.times == [[0.0, 1.0, 1.0, 1.0, 2.0]]


def test_a_worker_that_is_killed(packed: Path) -> None:
    """Every batch that it is asked for fails in a sentence, and its memory is not known."""
    one = Running(Contender("native", packed), Options(1, 16, 1, {}))
    try:
        assert [len(times) for times in one.run([[1, 2]], 2).times] == [2]
        os.kill(one.pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(QexportError, match="native packed has ended"):
                one.run([[1, 2]], 2)
        assert one.peaks() == (0, 0)
    finally:
        one.close()


def test_a_contender_that_fails_is_in_the_report(packed: Path, cli: Cli, tmp_path: Path) -> None:
    """A model that makes NaN loads well, and answers nothing; the other one's figures stay."""
    broken = write_tiny_model(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    out = tmp_path / "report"
    result = cli(
        *("bench", "latency", packed, "--peer", f"native={broken}", "--batch", "1,2"),
        *("--prompt", "4", "--tokens", "3", "--repeats", "1", "-o", out),
    )
    assert result.returncode == 1 and "native broken" in result.stderr
    assert "Traceback" not in result.stderr
    cells = json.loads((out / "report.json").read_text())["cells"]
    assert ["failure" in one for one in cells] == [False, True] * 2
    assert "At batch 1, prompts of 4: native broken: " in (out / "report.md").read_text()
