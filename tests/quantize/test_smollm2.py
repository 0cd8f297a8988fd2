"""Layers of a real model: every method loses less than rounding to nearest does."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qexport.blocks import Blocks, Stream
from qexport.data import documents, tokenize, windows
from qexport.formats import open_checkpoint
from qexport.grid import GRIDS, K_QUANTS, Scheme
from qexport.modelling import load_tokenizer
from qexport.quantization.activations import STAGES, Passage, Seen, output_error
from qexport.quantization.awq import awq_factors
from qexport.quantization.equalize import tie
from qexport.quantization.gptq import GptqOptions, Inputs, gptq
from qexport.quantization.rounding import nearest
from qexport.quantization.signround import SignRoundOptions, learn
from qexport.quantization.smooth import smooth_factors

pytestmark = pytest.mark.slow
WINDOWS, LENGTH = 8, 128
ROWS = [slice(0, WINDOWS)]


@pytest.fixture(scope="module")
def passage(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Passage:
    """Text that passes through the second block of SmolLM2."""
    model = smollm2
    folder = tmp_path_factory.mktemp("streams")
    tokenizer = load_tokenizer(model)
    text = tokenize(list(documents("builtin", "calibration", tokenizer)), tokenizer)
    tokens = windows(text, LENGTH, "--length")[:WINDOWS]
    blocks = Blocks(open_checkpoint(model), torch.bfloat16, torch.device("cpu"))
    streams = [
        Stream(folder / f"{n}.bin", (WINDOWS, LENGTH, blocks.width), torch.bfloat16) for n in (0, 1)
    ]
    streams[0].write(ROWS[0], blocks.embed(tokens))
    Passage(blocks, 0, blocks.make(0), streams[0], ROWS, "fp32").write(streams[1])
    return Passage(blocks, 1, blocks.make(1), streams[1], ROWS, "fp32")


@pytest.fixture(scope="module")
def seen(passage: Passage) -> dict[str, Seen]:
    found = passage.look([stage[0] for stage in STAGES])
    return {name: found[stage[0]] for stage in STAGES for name in stage}


def weight_of(passage: Passage, name: str) -> Tensor:
    layer = passage.block.get_submodule(name)
    assert isinstance(layer, torch.nn.Linear)
    return layer.weight.detach().clone()


@pytest.mark.parametrize("grid", ["seq2", "uint2", "int3", "int4", "nf4"])
def test_gptq_and_awq(passage: Passage, seen: dict[str, Seen], grid: str) -> None:
    scheme = Scheme(GRIDS[grid], 64)
    for stage in STAGES:
        tied = tie(passage.block, stage[0])
        for name in stage:
            weight, own = weight_of(passage, name), seen[name]

            def lost(made: Tensor, weight: Tensor = weight, own: Seen = own) -> float:
                return output_error(weight, made, own.hessian)

            rtn = lost(nearest(weight, scheme, None).tensor().dequantize())
            first = nearest(weight, scheme, own)
            inputs = Inputs.of(own.hessian)
            by_gptq = gptq(weight, inputs, first.fit, scheme).tensor().dequantize()
            assert lost(by_gptq) < 0.6 * rtn, name
            if tied is not None:
                factors = awq_factors([weight], [scheme], own, tied)
                smaller = Seen(own.hessian / torch.outer(factors, factors), own.largest / factors)
                larger = nearest(weight * factors, scheme, smaller).tensor().dequantize()
                assert lost(larger / factors) < rtn, name


def test_int8_of_whole_channels(passage: Passage, seen: dict[str, Seen]) -> None:
    """As `w8a8` has it: smoothed, and rounded by GPTQ."""
    scheme = Scheme(GRIDS["int8"])
    for stage in STAGES:
        tied = tie(passage.block, stage[0])
        if tied is None:
            continue
        weights = [weight_of(passage, name) for name in stage]
        factors = smooth_factors(weights, seen[stage[0]], tied, 0.5)
        for name, weight in zip(stage, weights, strict=True):
            hessian = seen[name].hessian
            rtn = nearest(weight, scheme, None).tensor().dequantize()
            smooth = hessian / torch.outer(factors, factors)
            first = nearest(weight * factors, scheme, None)
            found = gptq(weight * factors, Inputs.of(smooth), first.fit, scheme).tensor()
            made = found.dequantize() / factors
            assert output_error(weight, made, hessian) < output_error(weight, rtn, hessian), name


@pytest.mark.parametrize("name", list(K_QUANTS))
def test_k_quants(passage: Passage, seen: dict[str, Seen], name: str) -> None:
    """Of the layer whose rows are whole super-blocks."""
    block = K_QUANTS[name]
    scheme = Scheme(block.grid, block.group_size, torch.float32, block)
    layer = "mlp.down_proj"
    weight, own = weight_of(passage, layer), seen[layer]
    rtn = nearest(weight, scheme, None).tensor().dequantize()
    first = nearest(weight, scheme, own)
    found = gptq(weight, Inputs.of(own.hessian), first.fit, scheme, GptqOptions(refits=0)).tensor()
    weighted = output_error(weight, first.tensor().dequantize(), own.hessian)
    compensated = output_error(weight, found.dequantize(), own.hessian)
    assert compensated < weighted < output_error(weight, rtn, own.hessian)


def test_what_signround_learns(passage: Passage, seen: dict[str, Seen], tmp_path: Path) -> None:
    """From GPTQ's roundings, in a few steps: the block's own error."""
    scheme = Scheme(GRIDS["uint2"], 64)
    targets = Stream(tmp_path / "targets.bin", (WINDOWS, LENGTH, 576), torch.bfloat16)
    passage.write(targets)
    kept = {name: weight_of(passage, name) for name in seen}
    roundings = {
        name: gptq(weight, Inputs.of(seen[name].hessian), nearest(weight, scheme, own).fit, scheme)
        for name, weight in kept.items()
        for own in [seen[name]]
    }
    for name, rounding in roundings.items():
        layer = passage.block.get_submodule(name)
        layer.weight.data.copy_(rounding.tensor().dequantize())  # type: ignore[operator]
    _, before, after = learn(passage, roundings, targets, SignRoundOptions(iterations=20), 0)
    for name, weight in kept.items():  # others have the same block
        passage.block.get_submodule(name).weight.data.copy_(weight)  # type: ignore[operator]
    assert after < 0.97 * before
