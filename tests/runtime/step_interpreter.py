"""Decoding steps under Triton's interpreter; test_triton.py runs this file, too.

`CudaDecoder` without graphs against `TorchDecoder`: every family, batches, long contexts.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from qexport.checkpoint import Checkpoint
from qexport.runtime.cuda_model import CudaDecoder
from qexport.runtime.device_sampler import NO_TOKEN, Draw, choose, effort
from qexport.runtime.model import Span, TorchDecoder
from qexport.runtime.sampler import Sampler, Sampling
from tests.runtime.families import FAMILIES, make, minicpm
from tests.runtime.test_decoder import CPU, config_of, quantized, tokens

KINDS = (*FAMILIES, "minicpm")


def checkpoint_of(kind: str, folder: Path) -> Checkpoint:
    if kind == "minicpm":
        return minicpm(make(folder, "llama"))[0]
    return make(folder, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_torchs(kind: str, tmp_path: Path) -> None:
    """Prompts of different lengths, then tokens in batches that are filled up."""
    checkpoint = checkpoint_of(kind, tmp_path)
    options = {"slots": 3, "context": 128, "device": CPU}
    plain = TorchDecoder(checkpoint, config_of(checkpoint), **options)  # type: ignore[arg-type]
    stepped = CudaDecoder(checkpoint, config_of(checkpoint), dtype=torch.float32, **options)  # type: ignore[arg-type]
    prompts = [tokens(slot, 7 + 31 * slot) for slot in range(3)]
    prompt = [Span(slot, 0, ids, len(ids)) for slot, ids in enumerate(prompts)]
    torch.testing.assert_close(stepped.forward(prompt), plain.forward(prompt))
    for step in range(2):
        spans = [
            Span(slot, len(ids) + step, [17 * slot + step], len(ids) + step + 1)
            for slot, ids in enumerate(prompts)
        ]
        want = plain.forward(spans)
        torch.testing.assert_close(stepped.forward(spans), want, atol=2e-5, rtol=1e-4)
    assert stepped.slots == 3
    greedy = [Draw()] * 3
    assert stepped.choose(spans, greedy) == want.argmax(-1).tolist()


def test_half_precision_and_packed_weights(tmp_path: Path) -> None:
    checkpoint = quantized(make(tmp_path, "llama"), "seq2", 32)
    options = {"slots": 2, "context": 128, "device": CPU, "dtype": torch.float16}
    plain = TorchDecoder(checkpoint, config_of(checkpoint), kernel="triton", **options)  # type: ignore[arg-type]
    stepped = CudaDecoder(checkpoint, config_of(checkpoint), kernel="triton", **options)  # type: ignore[arg-type]
    ids = tokens(1, 40)
    for decoder in (plain, stepped):
        decoder.forward([Span(1, 0, ids, 40, logits=False)])
    span = [Span(1, 40, [5], 41)]
    torch.testing.assert_close(stepped.forward(span), plain.forward(span), atol=4e-3, rtol=4e-3)


def test_prompts_and_tokens_in_one_step(tmp_path: Path) -> None:
    """Answers stand in the order of the spans, those that want none left out."""
    checkpoint = make(tmp_path, "smollm")
    config = config_of(checkpoint)
    options = {"slots": 4, "context": 128, "device": CPU}
    plain = TorchDecoder(checkpoint, config, **options)  # type: ignore[arg-type]
    stepped = CudaDecoder(checkpoint, config, dtype=torch.float32, **options)  # type: ignore[arg-type]
    first = [Span(slot, 0, tokens(slot, 9), 9) for slot in (0, 2)]
    mixed = [
        Span(0, 9, [3], 10),
        Span(1, 0, tokens(1, 12), 30, logits=False),
        Span(3, 0, tokens(3, 5), 5),
        Span(2, 9, [4], 10),
    ]
    for decoder in (plain, stepped):
        decoder.forward(first)
    want = plain.forward(mixed)
    torch.testing.assert_close(stepped.forward(mixed), want, atol=2e-5, rtol=1e-4)
    assert stepped.choose(mixed, [Draw()] * 3) == want.argmax(-1).tolist()
    assert stepped.forward([Span(1, 12, [1], 30, logits=False)]).shape == (0, stepped.vocabulary)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 0.9, "top_p": 0.6},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 2.0, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    ],
)
def test_tokens_are_the_samplers(settings: dict[str, float]) -> None:
    """Seed for seed, what `Sampler` chooses of the same logits."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(40, 300, generator=generator) * 3
    options = [Sampling(seed=seed, **settings) for seed in range(40)]  # type: ignore[arg-type]
    want = [
        Sampler(sampling, []).choose(row.numpy())[0]
        for sampling, row in zip(options, logits, strict=True)
    ]
    samplers = [Sampler(sampling, []) for sampling in options]
    assert all(sampler.plain for sampler in samplers)
    draws = [sampler.draw() for sampler in samplers]
    rows = torch.tensor([draw.row(300) for draw in draws], dtype=torch.float64).T
    for how in range(effort(draws), 3):
        assert choose(logits, rows, how).tolist() == want


def test_a_batch_of_different_draws() -> None:
    logits = torch.randn(3, 50)
    logits[1, 7] = torch.nan
    draws = [Draw(), Draw(temperature=1.0, number=0.5), Draw(temperature=1.0, top_k=1, number=0.9)]
    rows = torch.tensor([draw.row(50) for draw in draws], dtype=torch.float64).T
    found = choose(logits, rows, effort(draws)).tolist()
    assert effort(draws) == 2
    assert found == [int(logits[0].argmax()), NO_TOKEN, int(logits[2].argmax())]
    logits[1] = -np.inf
    assert choose(logits, rows, 2).tolist()[1] == NO_TOKEN


def test_what_needs_logits_is_not_plain() -> None:
    for settings in (
        {"logprobs": 0},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"logit_bias": {1: 1.0}},
    ):
        assert not Sampler(Sampling(**settings), []).plain
