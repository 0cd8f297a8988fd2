"""What a model will take, reckoned from its config alone: bytes, memory, and a roofline.

A step reads every weight once and every sequence's keys and values, and computes two operations a
weight for each sequence. It takes at least the longer of both: memory at small batches, arithmetic
at large ones. Packed weights shorten the first and not the second, which is why they pay at small
batches (Williams, Waterman, Patterson 2009, "Roofline").
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qexport.errors import InputError
from qexport.formats.base import Options
from qexport.formats.registry import FORMATS
from qexport.formats.vllm_support import vllm_support
from qexport.grid import INT8, Scheme
from qexport.runtime.families import DecoderConfig
from qexport.runtime.hardware import Hardware
from qexport.runtime.kernels import KERNELS

__all__ = [
    "PAYS",
    "Model",
    "Roofline",
    "Times",
    "crossover",
    "file_sizes",
    "kernel_rows",
    "memory_bytes",
    "most_sequences",
    "reckon",
    "with_times",
]

_DENSE_BYTES = 2  # of a bfloat16 number
_LARGEST_BATCH = 1 << 16
_USABLE = 0.9  # of a memory
PAYS = 0.9  # of another's time: what weight-only has to stay below


@dataclass(frozen=True)
class Model:
    """Numbers of a model's weights, from its config.json."""

    config: DecoderConfig

    @property
    def linears(self) -> Counter[tuple[int, int]]:
        """[out, in] of the matrices that are quantized, and how many of each are stored."""
        c = self.config
        queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
        shapes = [(queries, c.hidden), (keys, c.hidden), (keys, c.hidden), (c.hidden, queries)]
        shapes += [(c.inter, c.hidden), (c.inter, c.hidden), (c.hidden, c.inter)]
        return Counter(shapes * len(set(c.weights)))

    @property
    def stored(self) -> int:
        """Weights of these matrices in a file."""
        return sum(out * inputs * count for (out, inputs), count in self.linears.items())

    @property
    def computed(self) -> int:
        """Weights of these matrices that a token meets: layers may share theirs."""
        return self.stored * self.config.layers // len(set(self.config.weights))

    @property
    def head(self) -> int:
        return self.config.vocabulary * self.config.hidden

    @property
    def dense(self) -> int:
        """Numbers that stay as they are: embeddings, a head of its own, norms."""
        norms = (2 * len(set(self.config.weights)) + 1) * self.config.hidden
        return self.head * (1 if self.config.tied else 2) + norms

    def cache_bytes(self, itemsize: int = 2) -> int:
        """Keys and values of one token."""
        c = self.config
        return 2 * c.layers * c.kv_heads * c.head_dim * itemsize

    def linear_bytes(self, scheme: Scheme | None) -> float:
        """The quantized matrices, scales included; bfloat16 for None."""
        if scheme is None:
            return float(self.stored * _DENSE_BYTES)
        return sum(
            out * inputs * count * scheme.bits_per_weight(inputs) / 8
            for (out, inputs), count in self.linears.items()
        )

    def weight_bytes(self, scheme: Scheme | None) -> float:
        """All weights, the dense ones in bfloat16."""
        return self.linear_bytes(scheme) + self.dense * _DENSE_BYTES

    def check(self, scheme: Scheme) -> None:
        """Raise InputError where a group does not divide a matrix."""
        for _, inputs in self.linears:
            if scheme.group_size is not None and inputs % scheme.group_size:
                raise InputError(
                    f"groups of {scheme.group_size} do not divide {inputs} inputs of this model."
                )


def file_sizes(model: Model, scheme: Scheme) -> list[dict[str, Any]]:
    """A row for each format: {format, verdict, stored, bytes, vllm}; bytes None where refused.

    By the rules of `qexport pack`: the narrowest exact holder that the format has.
    """
    rows: list[dict[str, Any]] = []
    for name, form in FORMATS.items():
        verdicts = {shape: form.verdict(scheme, shape, Options()) for shape in model.linears}
        reasons = [verdict.reason for verdict in verdicts.values() if verdict.holder is None]
        row: dict[str, Any] = {"format": name}
        if reasons:
            rows.append({**row, "verdict": "refused", "reason": reasons[0], "bytes": None})
            continue
        packed = sum(
            out * inputs * model.linears[out, inputs] * verdict.bits_per_weight / 8
            for (out, inputs), verdict in verdicts.items()
        )
        stored = sorted({verdict.stored for verdict in verdicts.values()})
        rows.append(
            {
                **row,
                "verdict": next(iter(verdicts.values())).kind(scheme),
                "stored": stored,
                "bytes": round(packed + model.dense * _DENSE_BYTES),
                "vllm": vllm_support(name, stored).sentence,
            }
        )
    return rows


class Times(Protocol):
    """How long a model takes on a device, reckoned or measured."""

    def decode_seconds(self, batch: int, context: int) -> float:
        """One step of `batch` sequences that have `context` tokens each (TPOT)."""

    def prompt_seconds(self, tokens: int) -> float:
        """A prompt alone, to its first token (TTFT)."""


@dataclass(frozen=True)
class Roofline:
    """Least times of a model on one device; what is measured is above them.

    On GPUs packed weights are multiplied as float16, on CPUs as int8.

    scheme       of weights; None for bfloat16
    int8         whether activations are int8 too (W8A8), and products run at that rate
    """

    model: Model
    hardware: Hardware
    scheme: Scheme | None
    int8: bool = False

    def decode_seconds(self, batch: int, context: int) -> float:
        """One step of `batch` sequences that have `context` tokens each (TPOT)."""
        model = self.model
        read = model.linear_bytes(self.scheme) + model.head * _DENSE_BYTES
        read += batch * context * model.cache_bytes()
        return max(read / self.hardware.bandwidth, self._compute(batch, batch * context))

    def prompt_seconds(self, tokens: int) -> float:
        """A prompt alone, to its first token (TTFT)."""
        read = self.model.linear_bytes(self.scheme) + self.model.head * _DENSE_BYTES
        computed = self._compute(tokens, tokens * tokens / 2, heads=1)
        return max(read / self.hardware.bandwidth, computed)

    def _compute(self, tokens: int, pairs: float, heads: int | None = None) -> float:
        """Seconds of arithmetic: `pairs` of a token and one that it looks at."""
        model, hardware = self.model, self.hardware
        as_int8 = self.int8 or (hardware.kind == "cpu" and self.scheme is not None)
        rate = hardware.int8 if as_int8 and hardware.int8 else hardware.flops
        attention = 4 * pairs * model.config.heads * model.config.head_dim * model.config.layers
        head = 2 * (tokens if heads is None else heads) * model.head
        return 2 * tokens * model.computed / rate + (attention + head) / hardware.flops


def crossover(
    packed: Times, others: Mapping[str, Times], context: int, most: int | None = None
) -> dict[str, int | None]:
    """The batch from which on weight-only takes nine tenths of bfloat16's, and of W8A8's, time.

    None where that is at no batch up to `most`. A last hundredth is gained for long: with many long
    sequences a step waits for their keys and values, whatever the weights are.
    """
    return {
        name: _reckoned(packed, other, context)
        if most is None
        else _measured(packed, other, context, most)
        for name, other in others.items()
    }


def _ahead(packed: Times, other: Times, context: int, batch: int) -> bool:
    return packed.decode_seconds(batch, context) < PAYS * other.decode_seconds(batch, context)


def _reckoned(packed: Times, other: Times, context: int) -> int | None:
    """Rooflines cross once."""
    low, high = 0, _LARGEST_BATCH  # ahead at low, or nowhere; not at high
    if _ahead(packed, other, context, high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _ahead(packed, other, context, middle) else (low, middle)
    return high


def _measured(packed: Times, other: Times, context: int, most: int) -> int | None:
    """Measurements may cross again and again, and the last time counts."""
    last = next((b for b in range(most, 0, -1) if _ahead(packed, other, context, b)), 0)
    return None if last == most else last + 1


def kernel_rows(model: Model, scheme: Scheme, hardware: Hardware) -> list[dict[str, Any]]:
    """A row for each kernel: {kernel, reason}, None where it takes every matrix of the model.

    By the kernels' own rules, without asking what is installed here.
    """
    rows: list[dict[str, Any]] = []
    for name, kernel in KERNELS.items():
        reasons = [kernel.refuses_scheme(scheme, shape) for shape in model.linears]
        reason = next((reason for reason in reasons if reason is not None), None)
        if kernel.device not in (None, hardware.kind):
            reason = f"it runs on {kernel.device}"
        elif hardware.kind == "cuda" and hardware.capability < kernel.capability:
            reason = f"it needs compute capability {kernel.capability / 10}"
        rows.append({"kernel": name, "reason": reason})
    return rows


def memory_bytes(model: Model, scheme: Scheme | None, batch: int, context: int) -> float:
    """Weights, keys and values of so many sequences, and the buffers of a step."""
    config = model.config
    widest = config.vocabulary + 2 * config.inter + 4 * config.hidden
    cache = batch * context * model.cache_bytes()
    return model.weight_bytes(scheme) + cache + 4 * batch * widest


def most_sequences(
    model: Model, hardware: Hardware, scheme: Scheme | None, context: int, runtime: int = 0
) -> int | None:
    """Sequences of `context` tokens that fit in nine tenths of the memory; None: it is unknown.

    runtime   bytes of the process without a model
    """
    if hardware.memory is None:
        return None
    none, one = (memory_bytes(model, scheme, batch, context) for batch in (0, 1))
    room = _USABLE * hardware.memory - runtime - none
    return max(0, int(room // (one - none)))


def reckon(
    model: Model,
    scheme: Scheme,
    hardware: Hardware,
    context: int,
    prompt: int,
    batches: Sequence[int],
    runtime: int = 0,
) -> dict[str, Any]:
    """A plan as JSON has it, with times of a roofline; no run is needed.

    Packed weights are compared with dense ones, and with W8A8 where the device's int8 is known.

    runtime   bytes of the process without a model
    """
    name = scheme.label
    sides = {name: Roofline(model, hardware, scheme)}
    sides[hardware.dense] = Roofline(model, hardware, None)
    if hardware.int8:
        sides["w8a8"] = Roofline(model, hardware, Scheme(INT8), int8=True)
    found = {
        "scheme": name,
        "unpacked": hardware.dense,
        "hardware": hardware.name,
        "context": context,
        "prompt": prompt,
        "weights": {
            "quantized": model.stored,
            "dense": model.dense,
            "bytes": round(model.weight_bytes(scheme)),
            "unpacked_bytes": round(model.weight_bytes(None)),
        },
        "cache_bytes_per_token": model.cache_bytes(),
        "sequences_that_fit": {
            name: most_sequences(model, hardware, side.scheme, context, runtime)
            for name, side in sides.items()
        },
        "runtime_bytes": runtime,
        "memory_bytes": {
            name: {
                batch: round(runtime + memory_bytes(model, side.scheme, batch, context))
                for batch in batches
            }
            for name, side in sides.items()
        },
        "formats": file_sizes(model, scheme),
        "kernels": kernel_rows(model, scheme, hardware),
        "batches": list(batches),
    }
    return with_times(found, sides, "a roofline")


def with_times(
    found: dict[str, Any], sides: Mapping[str, Times], kind: str, most: int | None = None
) -> dict[str, Any]:
    """The plan with these times: of what kind they are, and the batches at which they cross.

    most   the largest batch that was measured; None for rooflines
    """
    context, batches = found["context"], found["batches"]
    packed = sides[found["scheme"]]
    others = {name: side for name, side in sides.items() if side is not packed}
    return {
        **found,
        "times_are": kind,
        "ttft_seconds": {n: side.prompt_seconds(found["prompt"]) for n, side in sides.items()},
        "tpot_seconds": {
            name: {batch: side.decode_seconds(batch, context) for batch in batches}
            for name, side in sides.items()
        },
        "weight_only_pays_below": crossover(packed, others, context, most),
    }
