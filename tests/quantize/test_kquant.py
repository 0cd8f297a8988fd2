"""K-quants: as good as a group by itself can be, nearly, and exact in the bytes of GGUF."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from qexport.checkpoint import modules_from_json
from qexport.errors import CheckpointError
from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.base import Options
from qexport.formats.gguf.blocks import BLOCKS
from qexport.formats.gguf.k_blocks import SuperBlocked
from qexport.formats.pack import pack
from qexport.formats.verify import verify
from qexport.grid import GRIDS, K_QUANTS, Scheme
from qexport.quantization import quantize_model
from qexport.quantization.fit import fit
from qexport.quantization.kquant import fit_super_blocks
from qexport.tensor import factors
from qexport.tiny import write_tiny_model
from tests.conftest import Cli
from tests.quantize.test_run import config

QUIET = Console(quiet=True)
NAMES = list(K_QUANTS)


def scheme_of(name: str) -> Scheme:
    block = K_QUANTS[name]
    return Scheme(block.grid, block.group_size, torch.float32, block)


def weights(rows: int = 16, width: int = 512) -> torch.Tensor:
    """Groups of unlike sizes, not about zero."""
    torch.manual_seed(0)
    sizes = torch.rand(rows, width // 16, 1) + 0.2
    return (torch.randn(rows, width // 16, 16) * sizes + 0.1 * sizes).view(rows, width) * 0.03


def lost(weight: torch.Tensor, made: torch.Tensor, matters: torch.Tensor | None = None) -> float:
    squares = (made - weight).square()
    return float((squares if matters is None else squares * matters).sum())


@pytest.mark.parametrize("name", NAMES)
def test_bytes_say_the_same(name: str) -> None:
    """By our decoder, and by gguf-py's."""
    scheme, weight = scheme_of(name), weights()
    weight[3, 256:] = 0
    tensor = fit_super_blocks(weight, scheme).codes(weight, scheme)
    block = BLOCKS[name]
    assert isinstance(block, SuperBlocked)
    codes, scales = tensor.codes.view(16, 2, 256), tensor.scales.view(16, 2, -1)
    minima = None if tensor.minima is None else tensor.minima.view(scales.shape)
    raw = block.encode_super(K_QUANTS[name], codes, scales, minima)
    assert torch.equal(block.decode(raw).weights(), tensor.dequantize())
    kind = gguf.GGMLQuantizationType[name]
    theirs = torch.from_numpy(gguf.dequantize(raw.view(16, -1).numpy(), kind))
    assert torch.equal(theirs, tensor.dequantize())
    assert scheme.bits_per_weight(512) == block.bits_per_weight


@pytest.mark.parametrize("name", NAMES)
def test_sharing_a_step_costs_little(name: str) -> None:
    """Against groups that have a float32 scale, and zero points, of their own."""
    scheme, weight = scheme_of(name), weights()
    found = lost(weight, fit_super_blocks(weight, scheme).codes(weight, scheme).dequantize())
    own = {"Q2_K": "uint2", "Q3_K": "int3", "Q4_K": "uint4", "Q6_K": "int6"}.get(name, "int5")
    alone = Scheme(GRIDS[own], scheme.group_size, torch.float32)
    free = lost(weight, fit(weight, alone).codes(weight, alone).dequantize())
    assert found < {"Q2_K": 1.0, "Q3_K": 1.05, "Q6_K": 1.1}.get(name, 1.0) * free


def test_what_matters_is_rounded_better() -> None:
    weight, scheme = weights(), scheme_of("Q4_K")
    matters = torch.logspace(-2, 2, 512)[torch.randperm(512)]
    plain = fit_super_blocks(weight, scheme).codes(weight, scheme).dequantize()
    found = fit_super_blocks(weight, scheme, matters).codes(weight, scheme).dequantize()
    assert lost(weight, found, matters) < 0.7 * lost(weight, plain, matters)
    assert lost(weight, plain) < lost(weight, found)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    return write_tiny_model(tmp_path_factory.mktemp("wide") / "model", **sizes)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_exact_in_gguf_and_native(wide: Path, tmp_path: Path, name: str) -> None:
    run, scheme = tmp_path / "run", scheme_of(name)
    asked = config(wide, run, method="kquant", bits=name[1], group_size=None)
    results = quantize_model(asked, QUIET)
    assert results["bits_per_weight"] == pytest.approx(BLOCKS[name].bits_per_weight)
    source = open_checkpoint(run)
    assert {found for found, _ in source.modules.values()} == {scheme}
    for layer in results["layers"].values():
        assert layer["error"] < layer["rtn_error"]
    for form in ("gguf", "native"):
        report = pack(source, FORMATS[form], tmp_path / form)
        assert report.exact, form
        again = open_checkpoint(tmp_path / form)
        assert again.modules["model.layers.0.mlp.up_proj"][0] == scheme
        assert verify(source, again).exact
    assert name in str(pack(source, FORMATS["gguf"], tmp_path / "again").held)


def test_they_are_not_trained(wide: Path, tmp_path: Path, cli: Cli) -> None:
    run = tmp_path / "run"
    quantize_model(config(wide, run, method="kquant", bits="4", group_size=None), QUIET)
    common = ("train", wide, "--data", "builtin", "--bits", 4, "--group-size", 32)
    result = cli(*common, "--init", run, "-o", tmp_path / "trained")
    assert result.returncode == 2 and "a grid that is not trained" in result.stderr


def test_minima_are_refused_elsewhere() -> None:
    scheme = scheme_of("Q4_K")
    for group, dtype in ((None, torch.float16), (256, torch.float32)):  # of no super-block
        alone = Scheme(scheme.grid, group, dtype)
        assert FORMATS["gguf"].verdict(alone, (256, 512), Options(allow_lossy=True)).holder is None
    for name, form in FORMATS.items():
        verdict = form.verdict(scheme, (256, 512), Options(allow_lossy=True))
        assert verdict.exact == (name in ("gguf", "native")), name
        if not verdict.exact:
            assert verdict.reason is not None


def test_rows_that_are_no_super_blocks(tiny_model: Path, tmp_path: Path) -> None:
    """Blocks of 32, as llama.cpp does."""
    run = tmp_path / "run"
    quantize_model(config(tiny_model, run, method="kquant", bits="4", group_size=None), QUIET)
    source = open_checkpoint(run)
    assert {scheme.label for scheme, _ in source.modules.values()} == {"iq4_nl g32"}
    report = pack(source, FORMATS["gguf"], tmp_path / "gguf")
    assert report.exact and "IQ4_NL" in str(report.held)
    again = open_checkpoint(tmp_path / "gguf")
    assert verify(source, again).exact


def test_minima_that_are_damaged(wide: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    quantize_model(config(wide, run, method="kquant", bits="4", group_size=None), QUIET)
    path = run / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.weight_minimum"][0, 0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="a minimum that is not finite"):
        open_checkpoint(run).quantized(f"{name}.weight")


def test_layers_with_groups_of_their_own(wide: Path, tmp_path: Path) -> None:
    rules = ("*.down_proj=4:-1", "*.q_proj=3:32", "*.k_proj=6")
    asked = config(
        wide, tmp_path / "run", method="kquant", bits="4", group_size=None, module_bits=rules
    )
    quantize_model(asked, QUIET)
    found = {
        name.rpartition(".")[2]: scheme.label
        for name, (scheme, _) in open_checkpoint(tmp_path / "run").modules.items()
    }
    assert found["down_proj"] == "int4 per channel" and found["q_proj"] == "int3 g32"
    assert found["k_proj"] == "int6 g16 Q6_K" and found["up_proj"] == "kq4 g32 Q4_K"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"minima": False}, "not one this version knows"),
        ({"double_quant": True}, "not one this version knows"),
        ({"modules": {"a": [4, 96]}}, "super-blocks of 256 do not fit the 96 inputs of a"),
    ],
)
def test_schemes_that_were_tampered_with(change: dict[str, Any], said: str) -> None:
    group = {**scheme_of("Q4_K").to_json(), "modules": {"a": [4, 256]}, **change}
    with pytest.raises(CheckpointError, match=said):
        modules_from_json({"version": 1, "config_groups": [group]})


def test_factors_of_nothing() -> None:
    block = K_QUANTS["Q4_K"]
    d, each = factors(torch.zeros(1, 8), block, least=0)
    assert float(d) == 0 and int(each.max()) == 0
    with pytest.raises(ValueError, match="no multiples that Q4_K can hold"):
        factors(torch.zeros(1, 8), block)


def test_mistakes_in_a_sentence(tiny_model: Path, tmp_path: Path, cli: Cli) -> None:
    common = ("quantize", tiny_model, "--calibration", "builtin", "-o", tmp_path / "run")
    for said, *extra in (
        ("--method kquant is of --bits 2, 3, 4, 5, 6.", "--method", "kquant", "--bits", "8"),
        ("groups of its own", "--method", "kquant", "--bits", "4", "--group-size", "32"),
        ("has a grid of its own", "--method", "kquant", "--bits", "4", "--asym"),
        ("is of --bits 4", "--method", "nf4", "--bits", "3"),
        ("is of --method kquant alone", *("--method", "gptq", "--bits", "4", "--grid", "kq4")),
        ("uniform grids alone", *("--method", "signround", "--bits", "4", "--grid", "nf4")),
    ):
        result = cli(*common, *extra)
        assert result.returncode == 2 and said in result.stderr, result.stderr
    assert not (tmp_path / "run").exists()
