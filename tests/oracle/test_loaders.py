"""Our files in the loaders of transformers, and in the decompressor of compressed-tensors."""

import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qexport.formats import FORMATS, Options, open_checkpoint
from qexport.formats.pack import pack
from tests.conftest import Runs
from tests.formats.models import decoder_layer
from tests.oracle.install import FOLDER
from tests.oracle.marks import NEEDS_ENVIRONMENT

with warnings.catch_warnings():  # what another package warns of while it is imported is its own
    warnings.simplefilter("ignore")
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

pytestmark = pytest.mark.oracle
HERE = Path(__file__).parent


def in_oracle(script: str, *arguments: Path) -> None:
    command = [FOLDER / "bin" / "python", HERE / script, *arguments]
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("group", [None, 32, 64, 128])
@pytest.mark.parametrize(
    ("grid", "bits"),
    [
        ("binary", 2),
        ("ternary", 2),
        ("seq2", 3),
        ("int3", 3),
        ("int4", 4),
        ("int8", 8),
        ("uint4", 4),
    ],
)
def test_the_decompressor_of_compressed_tensors(
    tiny_model: Path, tmp_path: Path, grid: str, bits: int, group: int | None
) -> None:
    source = decoder_layer(tiny_model, grid, 256, group)
    pack(source, FORMATS["compressed-tensors"], tmp_path / "out")
    file = load_file(tmp_path / "out" / "model.safetensors")
    for module in source.modules:
        shape = torch.Size(file[f"{module}.weight_shape"].tolist())
        scales = file[f"{module}.weight_scale"].float()
        codes = unpack_from_int32(file[f"{module}.weight_packed"], bits, shape).float()
        zeros = torch.zeros_like(scales)
        if grid == "uint4":
            packed = file[f"{module}.weight_zero_point"]
            zeros = unpack_from_int32(packed, bits, scales.shape, packed_dim=0).float()
        values = (codes.view(*scales.shape, -1) - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)
        assert torch.equal(values.view(shape), source.quantized(f"{module}.weight").dequantize())


@NEEDS_ENVIRONMENT
@pytest.mark.parametrize("inputs", [192, 256])
def test_three_bits_as_older_libraries_pack_them(
    tiny_model: Path, tmp_path: Path, inputs: int
) -> None:
    """compressed-tensors up to 0.17 puts ten codes in a word; the shape says which it is."""
    source = decoder_layer(tiny_model, "int3", inputs, 32)
    pack(source, FORMATS["compressed-tensors"], tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    file = load_file(path)
    for module in source.modules:
        codes = source.quantized(f"{module}.weight").codes.to(torch.int16) - 4
        save_file({"codes": codes.to(torch.int8)}, tmp_path / "codes.safetensors")
        in_oracle(
            "padded_codes.py", tmp_path / "codes.safetensors", tmp_path / "padded.safetensors"
        )
        padded = load_file(tmp_path / "padded.safetensors")["packed"]
        assert padded.shape[1] == -(-inputs // 10) != file[f"{module}.weight_packed"].shape[1]
        file[f"{module}.weight_packed"] = padded
        break
    save_file(file, path)
    again = open_checkpoint(tmp_path / "out")
    for module in source.modules:
        mine, theirs = (side.quantized(f"{module}.weight") for side in (source, again))
        assert torch.equal(mine.codes, theirs.codes)


def loaded(folder: Path, **kwargs: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("bits", "options"), [("2", Options()), ("3", Options()), ("4", Options())]
)
def test_transformers_loads_compressed_tensors(
    runs: Runs, tmp_path: Path, bits: str, options: Options
) -> None:
    source = open_checkpoint(runs(bits))
    pack(source, FORMATS["compressed-tensors"], tmp_path / "out", options)
    model = loaded(tmp_path / "out")
    model(torch.tensor([[1, 2, 3]]))  # weights are decompressed at the first call
    for module in source.modules:
        expected = source.quantized(f"{module}.weight").dequantize()
        assert torch.equal(model.get_submodule(module).weight, expected)


@NEEDS_ENVIRONMENT
@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "bits"), [("gptq", 2), ("gptq", 3), ("gptq", 4), ("gptq", 8), ("awq", 4)]
)
def test_transformers_loads_gptq_and_awq(
    tiny_model: Path, tmp_path: Path, form: str, bits: int
) -> None:
    """Through gptqmodel, to the bit: the zero points, their offset, orders and groups are right."""
    grid = "ternary" if bits == 2 else "seq2"
    source = decoder_layer(tiny_model, grid, 256, 64)
    pack(source, FORMATS[form], tmp_path / "out", Options(bits=bits))
    in_oracle("transformers_weights.py", tmp_path / "out", tmp_path / "weights.safetensors")
    weights = load_file(tmp_path / "weights.safetensors")
    assert set(weights) == set(source.modules)
    for module, found in weights.items():
        assert torch.equal(found, source.quantized(f"{module}.weight").dequantize()), module
