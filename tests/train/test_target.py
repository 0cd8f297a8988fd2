"""Training for a K-quant: scales that share one, and the GGUF holds the model exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from qexport.errors import CheckpointError
from qexport.formats import FORMATS, open_checkpoint
from qexport.formats.base import Options
from qexport.formats.gguf.blocks import BLOCKS
from qexport.formats.gguf.k_blocks import SuperBlocked
from qexport.formats.pack import pack
from qexport.formats.verify import verify
from qexport.grid import INT4, SUPER_BLOCKS, Scheme
from qexport.paretoq import effective_scale, fake_quantize, initial_alpha
from qexport.tensor import factors, portable, quantize, shared
from qexport.tiny import write_tiny_model
from qexport.training import TrainConfig, train
from tests.conftest import Cli

NAMES = list(SUPER_BLOCKS)


def scheme_of(name: str) -> Scheme:
    block = SUPER_BLOCKS[name]
    return Scheme(block.grid, block.group_size, torch.float16, block)


@given(
    name=st.sampled_from(NAMES),
    exponent=st.integers(-30, 18),
    spread=st.floats(0, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_scales_are_multiples_and_portable(
    name: str, exponent: int, spread: float, seed: int
) -> None:
    """Whatever comes in: exact in float16 and bfloat16, halves too, and found again."""
    block = SUPER_BLOCKS[name]
    dice = torch.Generator().manual_seed(seed)
    scale = 2.0 ** (exponent + spread * torch.rand(3, 32, generator=dice))
    found = shared(scale, block)
    assert torch.equal(portable(found), found)
    d, multiples = factors(found.half().view(3, 2, 16), block)
    assert torch.equal((d.unsqueeze(-1) * multiples).view(3, 32), found)
    assert int(multiples.min()) >= 1 and int(multiples.max()) <= block.most
    for part in (d, 1.5 * d) if name == "Q2_K" else (d,):
        assert torch.equal(part.half().float(), part)


@pytest.mark.parametrize("name", NAMES)
def test_ordinary_scales_lose_little(name: str) -> None:
    """Groups of gaussian weights: a relative step of the factor, half of it at most."""
    scale = torch.rand(64, 64) * 0.5 + 0.5
    block = SUPER_BLOCKS[name]
    error = (shared(scale, block) - scale).abs() / scale
    assert float(error.max()) < 1 / block.most + 2.0 ** (block.most.bit_length() - 8)
    assert float(error.mean()) < {"Q2_K": 0.05, "Q3_K": 0.06}[name]


@pytest.mark.parametrize("name", NAMES)
def test_bytes_say_what_was_trained(name: str) -> None:
    """Through the codec and back by the type's own decoder, which knows no schemes."""
    scheme = scheme_of(name)
    weight = torch.randn(8, 512) * 0.02 * (1 + torch.arange(512) // 16 % 7)
    scale = effective_scale(initial_alpha(weight, scheme, "mse"), scheme)
    tensor = quantize(weight, scale, scheme)
    block = BLOCKS[name]
    codes, scales = tensor.codes.view(8, 2, 256), tensor.scales.view(8, 2, 16)
    assert isinstance(block, SuperBlocked)
    raw = block.encode_super(SUPER_BLOCKS[name], codes, scales, None)
    assert raw.shape == (8, 2, block.bytes)
    assert torch.equal(block.decode(raw).weights(), tensor.dequantize())


def test_gguf_py_reads_the_same_values() -> None:
    gguf = pytest.importorskip("gguf")
    for name in NAMES:
        scheme = scheme_of(name)
        weight = torch.randn(4, 256)
        tensor = quantize(
            weight, effective_scale(initial_alpha(weight, scheme, "mse"), scheme), scheme
        )
        codes, scales = tensor.codes.view(4, 1, 256), tensor.scales.view(4, 1, 16)
        block = BLOCKS[name]
        assert isinstance(block, SuperBlocked)
        raw = block.encode_super(SUPER_BLOCKS[name], codes, scales, None)
        kind = gguf.GGMLQuantizationType[name]
        values = torch.from_numpy(gguf.dequantize(raw.view(4, -1).numpy(), kind))
        assert torch.equal(values, tensor.dequantize())


def test_scales_that_share_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no multiples that Q2_K can hold"):
        factors(portable(torch.rand(1, 16) + 0.5), SUPER_BLOCKS["Q2_K"])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_pass_to_the_scales(name: str) -> None:
    scheme = scheme_of(name)
    weight = torch.randn(4, 256)
    alpha = initial_alpha(weight, scheme, "mse").requires_grad_()
    fake_quantize(weight, alpha, scheme).square().sum().backward()  # type: ignore[no-untyped-call]
    assert alpha.grad is not None and bool((alpha.grad != 0).all())


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose every layer has a multiple of 256 inputs."""
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    return write_tiny_model(tmp_path_factory.mktemp("wide") / "model", **sizes)


@pytest.mark.parametrize(("name", "bits"), [("Q2_K", "2"), ("Q3_K", "3")])
def test_a_run_for_a_block_is_exact_in_it(wide: Path, tmp_path: Path, name: str, bits: str) -> None:
    """Also after the block-wise start with GPTQ's rounding; in every other format too."""
    config = TrainConfig(
        wide,
        "builtin",
        tmp_path / "run",
        bits,
        target=f"gguf:{name}",
        max_steps=3,
        max_length=32,
        lr=1e-3,
        precision="fp32",
        block_epochs=1,
        block_windows=16,
        block_compensated=16,
    )
    train(config, Console(quiet=True))
    source = open_checkpoint(config.output)
    scheme, _ = source.modules["model.layers.0.mlp.up_proj"]
    assert scheme == scheme_of(name)
    tensor = source.quantized("model.layers.0.mlp.up_proj.weight")
    assert len(set(tensor.scales.flatten().tolist())) > 20
    report = pack(source, FORMATS["gguf"], tmp_path / "gguf")
    assert report.exact and name in str(report.held)
    again = open_checkpoint(tmp_path / "gguf")
    assert again.modules["model.layers.0.mlp.up_proj"][0] == scheme
    assert verify(source, again).exact
    for other in ("native", "compressed-tensors", "gptq"):
        options = Options()
        assert pack(source, FORMATS[other], tmp_path / other, options).exact, other


def test_mistakes_in_a_sentence(tiny_model: Path, tmp_path: Path, cli: Cli) -> None:
    common = ("train", tiny_model, "--data", "builtin", "-o", tmp_path / "run")
    for said, *extra in (
        ("there is no --target gguf:Q9; there are gguf:Q2_K, gguf:Q3_K", "--target", "gguf:Q9"),
        ("--target gguf:Q2_K is of 2 bits, not 3", "--target", "gguf:Q2_K", "--bits", "3"),
        ("has groups of 16 and portable scales", "--target", "gguf:Q3_K", "--group-size", "64"),
        ("Q2_K wants multiples of 256 inputs", "--target", "gguf:Q2_K"),
    ):
        result = cli(*common, *extra)
        assert result.returncode == 2 and said in result.stderr, result.stderr
    assert not (tmp_path / "run").exists()


def test_a_scheme_that_was_tampered_with() -> None:
    good = scheme_of("Q2_K").to_json()
    assert Scheme.from_json(good) == scheme_of("Q2_K")
    for change in ({"super_block": "Q9_K"}, {"super_block": "Q3_K"}, {"group_size": 32}):
        with pytest.raises(CheckpointError, match="not one this version knows"):
            Scheme.from_json({**good, **change})
    assert "super_block" not in Scheme(INT4, 32).to_json()
