"""`qexport plan`: sizes are those of real files, times those of the arithmetic."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from benchmarks.gpu_decode import LLAMA
from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.pack import pack
from qexport.grid import GRIDS, Scheme
from qexport.runtime import timing
from qexport.runtime.bench.noise import Noise
from qexport.runtime.families import DecoderConfig, decoder_config
from qexport.runtime.hardware import CPUS, GPUS
from qexport.runtime.plan import (
    Model,
    Roofline,
    crossover,
    file_sizes,
    kernel_rows,
    memory_bytes,
    most_sequences,
)
from qexport.runtime.timing import Measured
from qexport.svg import line_chart
from qexport.tiny import write_tiny_model
from tests.conftest import Cli, Runs

SEQ2, INT4 = Scheme(GRIDS["seq2"], 128), Scheme(GRIDS["int4"], 128)
H200 = GPUS["h200"]


@pytest.fixture(scope="module")
def llama() -> Model:
    config = decoder_config(LLAMA)
    assert isinstance(config, DecoderConfig)
    return Model(config)


def test_parameters_are_the_models(llama: Model) -> None:
    assert llama.stored + llama.dense == 8_030_261_248  # as its card says
    assert llama.computed == llama.stored == 6_979_321_856
    assert llama.cache_bytes() == 128 * 1024


@pytest.mark.parametrize("bits", ["2", "4"])
def test_sizes_are_those_of_files(runs: Runs, tmp_path: Path, bits: str) -> None:
    """What `pack` writes, but for headers and tokenizers: within a hundredth."""
    source = open_checkpoint(runs(bits))
    (scheme, _), *_ = source.modules.values()
    config = decoder_config(source.config)
    assert isinstance(config, DecoderConfig)
    model = Model(config)
    assert model.stored == sum(out * inputs for _, (out, inputs) in source.modules.values())
    for row in file_sizes(model, scheme):
        if row["bytes"] is None:
            continue
        out = tmp_path / row["format"]
        pack(source, FORMATS[row["format"]], out)
        weights = [out] if out.is_file() else [*out.glob("*.safetensors"), *out.glob("*.gguf")]
        written = sum(_tensors(path) for path in weights)
        dense_width = 2 if source.config.get("dtype") == "bfloat16" else 4
        expected = row["bytes"] + model.dense * (dense_width - 2)
        head = 16384 if row["format"] == "gguf" else 4096  # the tokenizer is in its header
        assert abs(written - expected) < 0.01 * expected + head, row["format"]


def _tensors(path: Path) -> int:
    """Bytes of a file without a safetensors header."""
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        return size
    with path.open("rb") as file:
        return size - 8 - int.from_bytes(file.read(8), "little")


def test_a_step_waits_for_memory_and_then_for_arithmetic(llama: Model) -> None:
    packed, dense = Roofline(llama, H200, INT4), Roofline(llama, H200, None)
    head = 2 * 128256 * 4096
    by_hand = (6_979_321_856 * 4.125 / 8 + head + 512 * 131072) / 4.8e12
    assert packed.decode_seconds(1, 512) == pytest.approx(by_hand)
    assert dense.decode_seconds(1, 1) / packed.decode_seconds(1, 1) == pytest.approx(3.2, rel=0.02)
    large = 4096
    flops = 2 * large * (6_979_321_856 + 128256 * 4096) + 4 * large * 32 * 128 * 32
    assert packed.decode_seconds(large, 1) == pytest.approx(flops / 989e12)
    assert packed.decode_seconds(large, 1) == dense.decode_seconds(large, 1)
    assert packed.prompt_seconds(4096) == dense.prompt_seconds(4096)


def test_where_weight_only_stops_paying(llama: Model) -> None:
    """bfloat16 waits for arithmetic from the device's ridge on, W8A8 earlier overtakes."""
    others = {
        "bfloat16": Roofline(llama, H200, None),
        "w8a8": Roofline(llama, H200, Scheme(GRIDS["int8"]), int8=True),
    }
    found = crossover(Roofline(llama, H200, INT4), others, context=1)
    assert found["bfloat16"] is not None and found["w8a8"] is not None
    assert found["bfloat16"] == pytest.approx(0.9 * H200.ridge, rel=0.02)
    assert 0.4 * H200.ridge < found["w8a8"] < 0.6 * H200.ridge
    batch = found["bfloat16"]
    packed, dense = Roofline(llama, H200, INT4), Roofline(llama, H200, None)
    assert packed.decode_seconds(batch // 2, 1) < dense.decode_seconds(batch // 2, 1)
    assert packed.decode_seconds(2 * batch, 1) == dense.decode_seconds(2 * batch, 1)


def test_measured_times_may_cross_more_than_once() -> None:
    """What counts is from where on packed weights are not ahead any more."""
    packed = Measured({1: 1.0, 2: 1.0, 4: 1.0, 8: 2.0}, 0.0)
    other = Measured({1: 2.0, 2: 1.0, 4: 2.0, 8: 2.0}, 0.0)
    assert crossover(packed, {"other": other}, 0, most=4) == {"other": None}
    found = crossover(packed, {"other": other}, 0, most=8)["other"]
    assert found is not None and 5 < found <= 8
    assert crossover(other, {"other": packed}, 0, most=8) == {"other": 1}


def test_what_fits(llama: Model) -> None:
    assert most_sequences(llama, GPUS["t4"], None, 4096) == 0
    room = [most_sequences(llama, GPUS["t4"], scheme, 4096) or 0 for scheme in (None, INT4, SEQ2)]
    assert 0 < room[1] < room[2]
    assert most_sequences(llama, CPUS["epyc-9654"], SEQ2, 4096) is None


def test_the_command(tmp_path: Path, cli: Cli) -> None:
    """A config alone is enough."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    plot = tmp_path / "plan.svg"
    asked = ("plan", tmp_path, "--bits", "2", "--group-size", "128", "--gpu", "h200")
    result = cli(*asked, "--json", "--plot", plot)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["tpot_seconds"]["seq2 g128"]["1"] < found["tpot_seconds"]["bfloat16"]["1"] / 4
    assert {row["format"] for row in found["formats"]} == set(FORMATS)
    root = ElementTree.fromstring(plot.read_text())
    assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == 3
    text = cli(*asked)
    assert "seq2 g128 takes less than nine tenths of bfloat16's time below" in text.stdout
    for wrong, said in (
        (("--gpu", "abacus"), "there is no --gpu abacus"),
        (("--cpu", "epyc-9654"), "name one device, by --gpu or by --cpu"),
        (("--for", "gpu-serving"), "either --bits, or a purpose"),
        (("--plot", "plan.png"), "call it plan.svg"),
        (("--context", "131072"), "has a context of"),
        (("--group-size", "100"), "groups of 100 do not divide"),
        (("--group-size", "0"), "--group-size is positive"),
    ):
        result = cli(*asked, *wrong)
        assert result.returncode == 2
        assert said in result.stderr and "Traceback" not in result.stderr


def test_what_does_not_fit_is_marked(tmp_path: Path, cli: Cli) -> None:
    """No time is told for a batch that there is no room for, nor a crossover beyond."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    asked = ("plan", tmp_path, "--bits", "4", "--group-size", "128", "--batch", "1,4,64")
    t4 = cli(*asked, "--gpu", "T4")
    rows = [line.split() for line in t4.stdout.splitlines() if line.startswith("  batch ")]
    assert [row.count("no") for row in rows] == [1, 1, 3]
    assert "float16" in t4.stdout and "bfloat16" not in t4.stdout
    assert "up to the" in t4.stdout and "that fit" in t4.stdout
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 320}))
    huge = cli(*asked, "--gpu", "t4").stdout
    assert huge.count("no room") == 3 * 3 + 3 and "does not fit, with 4096 tokens" in huge


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers is 1000000000, not a number"),
        ("hidden_size", 4096.0, "hidden_size is 4096.0, not a number"),
        ("vocab_size", True, "vocab_size is True, not a number"),
        ("intermediate_size", "x" * 999, "not a number"),
        ("num_attention_heads", -32, "num_attention_heads is -32"),
        ("hidden_size", None, "does not say hidden_size"),
    ],
)
def test_sizes_that_make_no_sense(
    tmp_path: Path, cli: Cli, field: str, value: object, said: str
) -> None:
    """A sentence, before anything as large is made."""
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, field: value}))
    result = cli("plan", tmp_path, "--bits", "4", "--gpu", "t4")
    assert result.returncode == 1 and said in result.stderr and len(result.stderr) < 200


def test_another_family_is_not_supported(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "model_type": "mamba"}))
    result = cli("plan", tmp_path, "--bits", "4", "--gpu", "t4")
    assert result.returncode == 4 and "'mamba' is no family" in result.stderr


def test_kernels_by_their_own_rules(llama: Model) -> None:
    """What a device of another kind or age does not run is named; the rest is `refuses`."""
    found = {row["kernel"]: row["reason"] for row in kernel_rows(llama, SEQ2, H200)}
    assert found["cuda"] is found["triton"] is found["reference"] is None
    assert found["cpu"] == "it runs on cpu"
    old = {row["kernel"]: row["reason"] for row in kernel_rows(llama, SEQ2, GPUS["t4"])}
    assert old["cuda"] == "it needs compute capability 8.0" and old["triton"] is None
    odd = Scheme(GRIDS["int3"], 8)
    cpu = {row["kernel"]: row["reason"] for row in kernel_rows(llama, odd, CPUS["epyc-9654"])}
    assert cpu["cpu"] == "groups of 8 are no multiple of 32" and cpu["reference"] is None
    wide = {row["kernel"]: row["reason"] for row in kernel_rows(llama, Scheme(GRIDS["int8"]), H200)}
    assert wide["cuda"] == "codes of 8 bits are more than 4"


def test_memory_is_weights_and_cache(llama: Model) -> None:
    one = memory_bytes(llama, SEQ2, 1, 1000)
    assert one == pytest.approx(llama.weight_bytes(SEQ2) + 1000 * 131072, rel=0.01)
    assert memory_bytes(llama, SEQ2, 9, 1000) - one > 8 * 1000 * 131072


def test_times_between_and_beyond_what_was_measured() -> None:
    found = Measured({1: 1.0, 4: 4.0, 8: 6.0}, 0.5)
    assert [found.decode_seconds(batch, 0) for batch in (1, 2, 6, 8, 10)] == [1, 2, 5, 6, 7]
    assert Measured({4: 2.0}, 0.5).decode_seconds(9, 0) == 2.0


@pytest.mark.parametrize("layers", [2, 9])
def test_this_machine_is_measured(cli: Cli, tmp_path: Path, layers: int) -> None:
    """From a config alone; more layers than are made up take more time."""
    model = write_tiny_model(tmp_path / "model", num_hidden_layers=layers)
    (model / "model.safetensors").unlink()
    asked = ("plan", model, "--bits", "2", "--group-size", "32", "--cpu", "here", "--batch", "1,4")
    result = cli(*asked, "--context", "64", "--prompt", "32", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["times_are"] == "measured with random weights"
    assert all(isinstance(reason, str) for reason in found["noise"]["reasons"])
    assert set(found["tpot_seconds"]) == {"seq2 g32", "bfloat16", "w8a8"}
    assert all(0 < times["1"] < 5 for times in found["tpot_seconds"].values())
    assert found["runtime_bytes"] > 100 << 20
    assert found["memory_bytes"]["seq2 g32"]["4"] > found["runtime_bytes"]
    assert cli(*asked, "--context", "1000").returncode == 2
    assert cli(*asked[:-4], "--gpu", "here").returncode == (2 if torch.cuda.is_available() else 4)


def test_times_of_a_shortened_model_are_stretched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of a layers + b milliseconds is that for every number of layers."""
    monkeypatch.setattr(timing, "_DEEP_BYTES", 1)
    asked: list[int] = []

    def run(config: dict[str, Any], *_: object) -> list[float]:
        layers = config["num_hidden_layers"]
        assert len(config["layer_types"]) == layers
        asked.append(layers)
        return [7.0 + 2.0 * layers, 1.0 + layers]

    monkeypatch.setattr(timing, "_run", run)
    fields = {**LLAMA, "num_hidden_layers": 20, "layer_types": ["full_attention"] * 20}
    found = timing.measure_times(fields, SEQ2, [1], 16, 16, Noise())
    assert asked == [4, 1]
    assert found.steps[1] == pytest.approx(47.0) and found.prompt == pytest.approx(21.0)


def test_charts_are_whole() -> None:
    text = line_chart("a < b", "x", "y", {"one": [(1, 2), (10, 30)], "two & three": [(1, 1)]})
    root = ElementTree.fromstring(text)
    labels = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "a < b" in labels and "two & three" in labels
    narrow = line_chart("t", "x", "y", {"a": [(x, 0.7 + x / 1e3) for x in range(90)]}, linear="x")
    numbers = [e.text for e in ElementTree.fromstring(narrow).iter() if e.get("text-anchor")]
    assert {"0", "20", "40", "60", "80", "0.72", "0.74", "0.76", "0.78"} <= set(numbers)
    for wrong in ({}, {"a": [(0, 1)]}, {"a": [(1, -1)]}):
        with pytest.raises(ValueError, match="logarithmic"):
            line_chart("t", "x", "y", wrong)
