"""The decoders against transformers, logit for logit, in float32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qexport.checkpoint import Checkpoint, Entry
from qexport.errors import CheckpointError, UnsupportedError
from qexport.grid import GRIDS, Scheme
from qexport.runtime.any_model import AnyDecoder
from qexport.runtime.cpu_model import CpuDecoder
from qexport.runtime.families import DecoderConfig, decoder_config
from qexport.runtime.kernels.cpu_library import library
from qexport.runtime.loader import load_model
from qexport.runtime.model import Decoder, Span, TorchDecoder
from qexport.runtime.serving import Serving, open_decoder
from qexport.tensor import portable, quantize
from tests.runtime.families import FAMILIES, make, minicpm

CPU = torch.device("cpu")
LENGTH = 72

compiled = pytest.mark.skipif(library() is None, reason="installed without a C++ compiler")


def in_torch(checkpoint: Checkpoint, slots: int = 3) -> Decoder:
    return TorchDecoder(checkpoint, config_of(checkpoint), slots=slots, context=128, device=CPU)


def in_cpp(checkpoint: Checkpoint, slots: int = 3, **options: Any) -> Decoder:
    settings = {"cache": torch.float32, "exact": True, "threads": 2, **options}
    return CpuDecoder(checkpoint, config_of(checkpoint), slots=slots, context=128, **settings)


def in_transformers(checkpoint: Checkpoint, slots: int = 3) -> Decoder:
    return AnyDecoder(checkpoint, slots=slots, context=128, device=CPU, dtype=torch.float32)


DECODERS = [
    pytest.param(in_torch, id="torch"),
    pytest.param(in_cpp, id="cpp", marks=compiled),
    pytest.param(in_transformers, id="transformers"),
]
Make = Callable[[Checkpoint], Decoder]


def config_of(checkpoint: Checkpoint) -> DecoderConfig:
    config = decoder_config(checkpoint.config)
    assert isinstance(config, DecoderConfig), config
    return config


def quantized(checkpoint: Checkpoint, grid: str, group: int | None) -> Checkpoint:
    """The checkpoint with its linear layers rounded, when read."""
    scheme = Scheme(GRIDS[grid], group)

    def rounded(name: str) -> Any:
        values = checkpoint.dense(name).float()
        groups = values.view(len(values), scheme.groups(values.shape[1]), -1)
        return quantize(values, portable(groups.abs().amax(-1) / 2), scheme)

    entries = {
        name: Entry(entry.shape, torch.float16, lambda name=name: rounded(name), scheme)  # type: ignore[misc]
        if name.endswith("_proj.weight")
        else entry
        for name, entry in checkpoint.entries.items()
    }
    return Checkpoint(checkpoint.folder, "run", checkpoint.config, entries)


def tokens(seed: int, count: int = LENGTH) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), generator=generator).tolist()


def expected(checkpoint: Checkpoint, ids: list[int]) -> Tensor:
    """Logits [tokens, vocabulary] of transformers' own model."""
    model = load_model(checkpoint, torch.float32, CPU)
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def close(found: Tensor, want: Tensor) -> None:
    assert (found - want).abs().max() <= 1e-5 * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode(tmp_path: Path, family: str, decoder: Make) -> None:
    checkpoint = make(tmp_path / "model", family)
    ids, made = tokens(0), decoder(checkpoint)
    short = 40  # longrope: below and above the length that it was trained for
    want = expected(checkpoint, ids[:short])
    close(made.forward([Span(0, 0, ids[:short], short)])[0], want[-1])
    for length in (short + 1, short + 2):
        row = made.forward([Span(0, length - 1, ids[length - 1 : length], length)])[0]
        close(row, expected(checkpoint, ids[:length])[-1])
    chunk = 24 if made.chunked else LENGTH
    for begin in range(0, LENGTH, chunk):
        part = ids[begin : begin + chunk]
        rows = made.forward([Span(1, begin, part, LENGTH, begin + chunk >= LENGTH)])
    close(rows[0], expected(checkpoint, ids)[-1])


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen3"])
def test_ragged_batches(tmp_path: Path, family: str, decoder: Make) -> None:
    """Prompts, continued prompts and single tokens of three sequences in one step."""
    checkpoint = make(tmp_path / "model", family)
    ids = [tokens(seed) for seed in range(3)]
    want = [expected(checkpoint, one) for one in ids]
    made = decoder(checkpoint)
    made.forward([Span(2, 0, ids[2][:30], LENGTH, False), Span(1, 0, ids[1][:5], LENGTH, False)])
    rows = made.forward(
        [
            Span(0, 0, ids[0][:33], 33),
            Span(2, 30, ids[2][30:31], 31),
            Span(1, 5, ids[1][5:27], LENGTH),
        ]
    )
    for row, logits, at in zip(rows, want, (32, None, None), strict=True):
        if at is not None:
            close(row, logits[at])
    close(rows[1], want[2][30])
    close(rows[2], want[1][26])


@compiled
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_sequence_does_not_depend_on_its_batch(tmp_path: Path, threads: int) -> None:
    checkpoint = quantized(make(tmp_path / "model", "llama"), "seq2", 32)
    ids = tokens(0)
    for exact in (True, False):
        alone = in_cpp(checkpoint, slots=4, exact=exact, threads=threads)
        together = in_cpp(checkpoint, slots=4, exact=exact, threads=threads)
        first = alone.forward([Span(0, 0, ids[:40], 40)])[0]
        others = [Span(slot, 0, tokens(slot, 17 * slot), 17 * slot) for slot in (1, 2, 3)]
        mixed = together.forward([others[0], Span(0, 0, ids[:40], 40), *others[1:]])[1]
        assert torch.equal(first, mixed)
        for at in range(40, 50):
            span = Span(0, at, ids[at : at + 1], at + 1)
            rows = [Span(s, 60, [at], 61) for s in (1, 2, 3)]
            assert torch.equal(alone.forward([span])[0], together.forward([*rows, span])[3])


@compiled
@pytest.mark.parametrize("family", ["llama", "wide-heads"])
def test_caches_of_fewer_bits(tmp_path: Path, family: str) -> None:
    checkpoint = make(tmp_path / "model", family)
    ids = tokens(0)
    want = in_cpp(checkpoint).forward([Span(0, 0, ids, LENGTH)])[0]
    spread = float(want.std())
    for cache, most in ((torch.float16, 0.01), (torch.bfloat16, 0.08), (torch.int8, 0.08)):
        made = in_cpp(checkpoint, cache=cache)
        made.forward([Span(0, 0, ids[:50], LENGTH, False)])
        found = made.forward([Span(0, 50, ids[50:], LENGTH)])[0]
        assert 0 < float((found - want).abs().max()) < most * spread, cache


@pytest.mark.parametrize("decoder", DECODERS[:2])
def test_minicpm_scales(tmp_path: Path, decoder: Make) -> None:
    ours, folded = minicpm(make(tmp_path / "model", "llama"))
    ids = tokens(0)
    found = decoder(ours).forward([Span(0, 0, ids, LENGTH)])[0]
    close(found, expected(folded, ids)[-1])


@pytest.mark.parametrize("decoder", DECODERS[:2])
def test_mobilellm_shares_layers(tmp_path: Path, decoder: Make) -> None:
    """Liu et al. 2024: neighbouring blocks share weights, each with keys and values of its own."""
    checkpoint = make(tmp_path / "model", "smollm")
    shared = {"model_type": "mobilellm", "layer_sharing": True, "share_embedding": True}
    ours = Checkpoint(
        checkpoint.folder, "dense", {**checkpoint.config, **shared}, dict(checkpoint.entries)
    )
    entries = {}
    for name, entry in checkpoint.entries.items():
        head, _, rest = name.removeprefix("model.layers.").partition(".")
        if not head.isdigit():
            entries[name] = entry
            continue
        for copy in (2 * int(head), 2 * int(head) + 1):
            entries[f"model.layers.{copy}.{rest}"] = entry
    twin = Checkpoint(
        checkpoint.folder, "dense", {**checkpoint.config, "num_hidden_layers": 6}, entries
    )
    ids = tokens(0)
    close(decoder(ours).forward([Span(0, 0, ids, LENGTH)])[0], expected(twin, ids)[-1])


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("grid", "group"), [("seq2", 32), ("int4", None), ("ternary", 32), ("int8", 16)]
)
def test_quantized_layers(tmp_path: Path, decoder: Make, grid: str, group: int | None) -> None:
    """int8 in groups of 16 is what the C++ kernel refuses: those layers are dense."""
    checkpoint = quantized(make(tmp_path / "model", "qwen2"), grid, group)
    ids = tokens(0)
    made = decoder(checkpoint)
    if isinstance(made, CpuDecoder):
        assert ("groups of 16" in made.kernels) == (group == 16)
        close(made.forward([Span(0, 0, ids, LENGTH)])[0], expected(checkpoint, ids)[-1])
    else:  # the fastest kernel: int8 activations
        found, want = made.forward([Span(0, 0, ids, LENGTH)])[0], expected(checkpoint, ids)[-1]
        assert float((found - want).abs().max()) < 0.1 * float(want.std())


@compiled
def test_int8_activations_stay_close(tmp_path: Path) -> None:
    checkpoint = quantized(make(tmp_path / "model", "llama"), "int4", 32)
    ids = tokens(0)
    found = in_cpp(checkpoint, exact=False).forward([Span(0, 0, ids, LENGTH)])[0]
    want = expected(checkpoint, ids)[-1]
    assert float((found - want).abs().max()) < 0.1 * float(want.std())


@compiled
@pytest.mark.parametrize(("bits", "share"), [(8, 0.05), (4, 0.6)])
def test_a_rounded_head(tmp_path: Path, bits: int, share: float) -> None:
    checkpoint = make(tmp_path / "model", "llama")
    ids = tokens(0)
    want = in_cpp(checkpoint).forward([Span(0, 0, ids, LENGTH)])[0]
    found = in_cpp(checkpoint, head_bits=bits).forward([Span(0, 0, ids, LENGTH)])[0]
    assert 0 < float((found - want).abs().max()) < share * float(want.std())


@pytest.mark.parametrize("decoder", DECODERS[:2])
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.1.mlp.down_proj.weight", (96, 161), "config.json makes it"),
        ("model.norm.weight", (95,), "config.json makes it"),
        ("model.layers.0.self_attn.sinks", (6,), "has no use for"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, decoder: Make, name: str, shape: tuple[int, ...], message: str
) -> None:
    checkpoint = make(tmp_path / "model", "llama")
    entry = Entry(shape, torch.float32, lambda: torch.zeros(shape))
    wrong = Checkpoint(
        checkpoint.folder, "dense", checkpoint.config, {**checkpoint.entries, name: entry}
    )
    with pytest.raises(CheckpointError, match=message):
        decoder(wrong)


@pytest.mark.parametrize("decoder", DECODERS)
def test_fields_that_are_another_familys(tmp_path: Path, decoder: Make) -> None:
    """Llama has no window and no layers without rope, whatever its config.json says."""
    checkpoint = make(tmp_path / "model", "llama")
    foreign = {"sliding_window": 4, "no_rope_layers": [0] * 8}
    config = {**checkpoint.config, **foreign}
    checkpoint = Checkpoint(checkpoint.folder, "dense", config, checkpoint.entries)
    ids = tokens(0)
    (row,) = decoder(checkpoint).forward([Span(0, 0, ids, LENGTH)])
    close(row, expected(checkpoint, ids)[-1])


def test_options_that_a_decoder_does_not_have(tmp_path: Path) -> None:
    llama, other = make(tmp_path / "llama", "llama"), make(tmp_path / "other", "llama")
    other.config["hidden_act"] = "gelu"
    for checkpoint, wrong, said in (
        (llama, {"kernel": "reference", "cache": "int8"}, "--kv-cache is of the CPU decoder"),
        (other, {"head_bits": 8}, "--head-bits is of qexport's own decoders"),
    ):
        with pytest.raises(UnsupportedError, match=said):
            open_decoder(checkpoint, Serving(**wrong))
    with pytest.raises(UnsupportedError, match="--kernel cuda: it runs on NVIDIA GPUs"):
        open_decoder(llama, Serving(kernel="cuda"))  # a dense model, none of whose layers asks
    before = torch.get_num_threads()
    try:
        open_decoder(llama, Serving(kernel="reference", threads=before + 1))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_what_is_left_to_transformers() -> None:
    base: dict[str, Any] = {
        **{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 8},
        **{"intermediate_size": 64, "num_hidden_layers": 1},
    }
    cases: dict[str, dict[str, Any]] = {
        "'gpt2' is no family": {"model_type": "gpt2"},
        "its activation is gelu": {**base, "hidden_act": "gelu"},
        "its positions are of kind 'dynamic'": {
            **base,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        },
    }
    for reason, config in cases.items():
        found = decoder_config(config)
        assert isinstance(found, str)
        assert reason in found


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("family", ["llama", "mistral-window", "longrope"])
def test_a_kept_prefix_changes_nothing(tmp_path: Path, family: str, decoder: Make) -> None:
    """Whatever a decoder lets a prompt take over of another's cache, the answer is its own."""
    made = decoder(make(tmp_path / "model", family))
    first, other = tokens(0), tokens(1)
    left = (20, LENGTH, 40)  # a long prompt whose client left while it ran
    for ran, held, length in (
        *((20, 20, 40), (LENGTH, LENGTH, 40), (40, 40, LENGTH), (LENGTH, LENGTH, LENGTH)),
        *([left] if made.chunked else []),
    ):
        prompt = [*first[:16], *other[16:length]]
        want = made.forward([Span(1, 0, prompt, length)]).clone()
        made.forward([Span(0, 0, first[:ran], held)])
        kept = made.reusable(0, held, 16, length)
        assert 0 <= kept <= 16
        close(made.forward([Span(0, kept, prompt[kept:], length)]), want)
