"""`qexport plan`: sizes are those of real files, times those of the arithmetic."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.gpu_decode import LLAMA
from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.pack import pack
from qexport.grid import GRIDS, Scheme
from qexport.runtime.families import DecoderConfig, decoder_config
from qexport.runtime.hardware import CPUS, GPUS
from qexport.runtime.plan import Model, Roofline, crossover, file_sizes, most_sequences
from qexport.svg import line_chart
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
        (("--group-size", "100"), "groups of 100 do not divide"),
        (("--group-size", "0"), "--group-size is positive"),
    ):
        result = cli(*asked, *wrong)
        assert result.returncode == 2
        assert said in result.stderr and "Traceback" not in result.stderr


def test_charts_are_whole() -> None:
    text = line_chart("a < b", "x", "y", {"one": [(1, 2), (10, 30)], "two & three": [(1, 1)]})
    root = ElementTree.fromstring(text)
    labels = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "a < b" in labels and "two & three" in labels
    for wrong in ({}, {"a": [(0, 1)]}, {"a": [(1, -1)]}):
        with pytest.raises(ValueError, match="logarithmic"):
            line_chart("t", "x", "y", wrong)
