"""GPTQ: a second decoder written from the layout alone, both versions, every width."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file

from qexport.errors import CheckpointError, RefusedError
from qexport.formats import FORMATS, Options, open_checkpoint
from qexport.formats.pack import pack
from qexport.grid import GRIDS, Scheme
from qexport.tensor import QuantizedTensor
from tests.conftest import WIDTHS, Runs
from tests.formats.models import Tensors, checkpoint, decoder_layer, tensor
from tests.formats.test_native import numpy_file

GRIDS_OF_GPTQ = sorted(grid.name for grid in FORMATS["gptq"].grids)


def field(words: NDArray[np.int32], index: int, bits: int) -> int:
    """Field `index` of a column of int32 words, fields of a dense little-endian bitstream."""
    start = index * bits
    word, shift = divmod(start, 32)
    value = int(np.uint32(words[word])) >> shift
    if shift + bits > 32:  # it straddles into the next word
        value |= int(np.uint32(words[word + 1])) << (32 - shift)
    return value & ((1 << bits) - 1)


def layout_decode(folder: Path, module: str) -> NDArray[np.float32]:
    """A weight [out, in] by the published layout: config, words, g_idx, the version's zeros."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config == json.loads((folder / "quantize_config.json").read_text())
    assert config["quant_method"] == "gptq"
    offset = {"gptq": 1, "gptq_v2": 0}[config["checkpoint_format"]]
    bits = config["bits"]
    file = numpy_file(folder / "model.safetensors")
    qweight, qzeros = file[f"{module}.qweight"], file[f"{module}.qzeros"]
    scales, g_idx = file[f"{module}.scales"], file[f"{module}.g_idx"]
    assert {qweight.dtype, qzeros.dtype, g_idx.dtype} == {np.dtype(np.int32)}
    assert scales.dtype == np.float16
    inputs, out = len(g_idx), qweight.shape[1]
    assert qweight.shape == (inputs * bits // 32, out)
    size = config["group_size"] if config["group_size"] > 0 else inputs
    assert scales.shape == (-(-inputs // size), out)
    assert qzeros.shape == (scales.shape[0], out * bits // 32)
    assert g_idx.tolist() == [i // size for i in range(inputs)]
    values = np.empty((out, inputs), np.float32)
    for o in range(out):
        for i in range(inputs):
            group = g_idx[i]
            zero = (field(qzeros[group], o, bits) + offset) % (1 << bits)
            code = field(qweight[:, o], i, bits)
            values[o, i] = np.float32(scales[group, o]) * (code - zero)
    return values


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_every_trained_width_decodes_by_the_layout(
    runs: Runs, tmp_path: Path, form: str, bits: str, group_size: int | None
) -> None:
    source = open_checkpoint(runs(bits, group_size))
    report = pack(source, FORMATS[form], tmp_path / "out")
    assert report.exact
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["bits"] == {"1": 2, "1.58": 2, "2": 3, "3": 3, "4": 4}[bits]
    assert config["sym"] is True
    assert config["desc_act"] is False
    for module in list(source.modules)[:7]:
        expected = source.quantized(f"{module}.weight").dequantize().numpy()
        assert np.array_equal(layout_decode(tmp_path / "out", module), expected)


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("grid", GRIDS_OF_GPTQ)
def test_every_grid_decodes_by_the_layout(tmp_path: Path, form: str, grid: str) -> None:
    mine = tensor(grid, 64, 96, 32, seed=3)
    pack(checkpoint(tmp_path, {"a.weight": mine}), FORMATS[form], tmp_path / "out")
    decoded = layout_decode(tmp_path / "out", "a")
    assert np.array_equal(decoded, mine.dequantize().numpy())
    again = open_checkpoint(tmp_path / "out").quantized("a.weight")
    assert torch.equal(again.codes, mine.codes)


def test_three_bit_words_straddle_where_the_layout_says(tmp_path: Path) -> None:
    """Element 10 lies in words 0 and 1 (2 + 1 bits), element 21 in words 1 and 2 (1 + 2)."""
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[:, 10], codes[:, 21] = 0b101, 0b110
    layer = QuantizedTensor(codes, torch.ones(32, 1).half(), Scheme(GRIDS["int3"]))
    pack(checkpoint(tmp_path, {"a.weight": layer}), FORMATS["gptq"], tmp_path / "out")
    words = numpy_file(tmp_path / "out" / "model.safetensors")["a.qweight"][:, 0].view(np.uint32)
    assert words.tolist() == [0b01 << 30, 1 | (0b0 << 31), 0b11]


@pytest.mark.parametrize(
    ("form", "bits", "word"),
    [
        ("gptq", 4, 0x77777777),
        ("gptq_v2", 4, 0x88888888),
        ("gptq", 2, 0x55555555),
        ("gptq_v2", 2, 0xAAAAAAAA),
        ("gptq", 8, 0x7F7F7F7F),
    ],
)
def test_golden_zero_words(tmp_path: Path, form: str, bits: int, word: int) -> None:
    layer = tensor(f"int{bits}", 32, 32, None)
    pack(checkpoint(tmp_path, {"a.weight": layer}), FORMATS[form], tmp_path / "out")
    zeros = numpy_file(tmp_path / "out" / "model.safetensors")["a.qzeros"].view(np.uint32)
    assert np.unique(zeros).tolist() == [word]


def test_seq_embeds_in_3_or_4_bits_and_refuses_2(runs: Runs, tmp_path: Path) -> None:
    source = open_checkpoint(runs("2"))
    for bits in (3, 4, 8):
        report = pack(source, FORMATS["gptq"], tmp_path / "out", Options(bits=bits))
        assert report.exact
        phrase = f"seq2 as int{bits} codes at half the step, exact, "
        assert all(held.startswith(phrase) for held in report.held)
    with pytest.raises(RefusedError, match=r"at 2 bits has no grid that holds seq2.*native"):
        pack(source, FORMATS["gptq"], tmp_path / "two", Options(bits=2))
    assert not (tmp_path / "two").exists()


def test_float32_scales_are_refused_or_rounded_when_asked(runs: Runs, tmp_path: Path) -> None:
    source = open_checkpoint(runs("3", scale_dtype="float32"))
    with pytest.raises(RefusedError, match=r"stores float16 scales.*native"):
        pack(source, FORMATS["gptq"], tmp_path / "out")
    report = pack(source, FORMATS["gptq"], tmp_path / "out", Options(allow_lossy=True))
    assert not report.exact
    assert report.verification.differing_codes == 0
    assert 0 < report.verification.largest_error < 1e-3
    assert pack(source, FORMATS["native"], tmp_path / "native").exact


def test_zero_points_of_zero_want_version_2(tmp_path: Path) -> None:
    """Engines add 1 to whole words of version 1, so that a wrapped 0 carries into the next."""
    layer = tensor("uint4", 32, 64, 32)
    assert layer.zeros is not None
    layer.zeros[3, 1] = 0
    source = checkpoint(tmp_path, {"a.weight": layer})
    with pytest.raises(RefusedError, match=r"a has zero points of 0.*gptq_v2"):
        pack(source, FORMATS["gptq"], tmp_path / "out")
    for form in ("gptq_v2", "awq", "compressed-tensors", "humming", "native"):
        assert pack(source, FORMATS[form], tmp_path / form).exact


def test_shapes_that_words_do_not_divide_are_refused(tmp_path: Path) -> None:
    for shape, what in (((32, 48), "48 inputs"), ((48, 32), "48 outputs")):
        source = checkpoint(tmp_path, {"a.weight": tensor("int4", *shape, None)})
        with pytest.raises(RefusedError, match=f"a layer has {what}"):
            pack(source, FORMATS["gptq"], tmp_path / "out")


@pytest.mark.parametrize("form", ["gptq", "awq", "gguf"])
def test_bfloat16_scales_are_exact_or_refused(tiny_model: Path, tmp_path: Path, form: str) -> None:
    """As other tools write them: float16 has the bits of such a number, and not its range."""
    grid = "uint4" if form == "awq" else "int4"
    layer = decoder_layer(tiny_model, grid, 64, 32)
    scheme = Scheme(GRIDS[grid], 32, torch.bfloat16)
    for first, fits in ((0.01, True), (2.0**-17, False), (204800.0, False)):
        tensors: Tensors = {name: layer[name] for name in layer}
        for name in layer.modules:
            held = layer.quantized(f"{name}.weight")
            scales = held.scales.bfloat16()
            scales[0, 0] = first
            tensors[f"{name}.weight"] = QuantizedTensor(held.codes, scales, scheme, held.zeros)
        source = checkpoint(tiny_model, tensors, layer.config)
        if fits:
            assert pack(source, FORMATS[form], tmp_path / "out").exact
            continue
        with pytest.raises(RefusedError, match=r"beyond float16's normal numbers.*native holds"):
            pack(source, FORMATS[form], tmp_path / "other")
        assert not (tmp_path / "other").exists()
        assert pack(source, FORMATS["native"], tmp_path / f"native-{first}").exact


def test_mixed_schemes_are_refused(tmp_path: Path) -> None:
    """And the width is named that holds them all, where there is one."""
    wide, narrow = tensor("int4", 32, 32, None), tensor("int3", 32, 32, None)
    source = checkpoint(tmp_path, {"a.weight": wide, "b.weight": narrow})
    with pytest.raises(RefusedError, match=r"has 2 schemes; --bits 4 holds them all, native"):
        pack(source, FORMATS["gptq"], tmp_path / "out")
    assert pack(source, FORMATS["gptq"], tmp_path / "out", Options(bits=4)).exact
    grouped = tensor("int4", 32, 32, 16)
    source = checkpoint(tmp_path / "grouped", {"a.weight": wide, "b.weight": grouped})
    with pytest.raises(RefusedError, match=r"has 2 schemes; native holds them"):
        pack(source, FORMATS["gptq"], tmp_path / "other")


def rewrite(folder: Path, **tensors: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    held = load_torch(path)
    save_file({**held, **{f"a.{name}": t for name, t in tensors.items()}}, path)


def test_act_order_and_mislabelled_versions_are_told(tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(checkpoint(tmp_path, {"a.weight": tensor("int4", 32, 64, 32)}), FORMATS["gptq"], out)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="names the wrong version"):
        open_checkpoint(out).quantized("a.weight")
    config["quantization_config"]["checkpoint_format"] = "gptq"
    (out / "config.json").write_text(json.dumps(config))
    rewrite(out, g_idx=torch.arange(63, -1, -1, dtype=torch.int32) // 32)
    with pytest.raises(CheckpointError, match="reordered groups"):
        open_checkpoint(out).quantized("a.weight")


@pytest.mark.parametrize(
    "damage",
    [
        {"g_idx": torch.zeros(0, dtype=torch.int32)},
        {"qweight": torch.zeros(5, 32, dtype=torch.int32)},
        {"qzeros": torch.zeros(2, 5, dtype=torch.int32)},
        {"scales": torch.ones(3, 32).half()},
        {"scales": torch.ones(2, 32, dtype=torch.int8)},
        {"qweight": torch.zeros(8, 32)},
    ],
)
def test_shapes_that_do_not_fit_are_damage(tmp_path: Path, damage: dict[str, torch.Tensor]) -> None:
    out = tmp_path / "out"
    pack(checkpoint(tmp_path, {"a.weight": tensor("int4", 32, 64, 32)}), FORMATS["gptq"], out)
    rewrite(out, **damage)
    with pytest.raises(CheckpointError, match=r"GPTQ|json says|its scheme|has dtype"):
        open_checkpoint(out)
