"""What to make of a model for a purpose: width, groups and format, with the reasons.

Accuracies that the rules go by are those of the literature: at 4 bits in groups of 128 Llama-3-8B
loses a fifth of a point in the mean of its tasks, at 3 bits 1.2, at 2 bits 8 to 9 after a short
block-wise training (EfficientQAT, Chen et al. 2024); ParetoQ (Liu et al. 2025) has 67.0 of 70.3 at
2 bits after some 30 billion tokens, and 69.0 at 4 bits after 10.
"""

from dataclasses import dataclass

from qexport.errors import InputError
from qexport.grid import GRIDS, INT8, Scheme
from qexport.runtime.hardware import Hardware
from qexport.runtime.plan import Model, Roofline, most_sequences

__all__ = ["Advice", "advise"]

_USERS = 8  # sequences that a server is to have room for
_READING = 0.1  # seconds a token: people read no faster
_TRAINING_BYTES = 16  # of a weight: float32 master, gradient, two moments
_ACTIVATIONS = 1.25  # times as much, with checkpointing
_LARGEST_BATCH = 1024
_Q4_0 = "int4 in groups of 32 is exactly Q4_0, for llama.cpp and for us"
_NAMES = {"int4": "4", "int3": "3", "seq2": "2"}


@dataclass(frozen=True)
class Advice:
    """A recommendation; bits None is bfloat16 as it is.

    method   in words; group_size None is one scale per channel
    """

    method: str
    bits: str | None
    group_size: int | None
    format: str | None
    reasons: list[str]


def advise(purpose: str, model: Model, hardware: Hardware, context: int) -> Advice:
    """What to do for a purpose. Raises InputError where it is one for another kind of device."""
    if purpose == "finetune":
        return _finetune(model, hardware)
    if (purpose == "cpu") != (hardware.kind == "cpu"):
        raise InputError(f"--for {purpose} goes with --{'cpu' if purpose == 'cpu' else 'gpu'}.")
    if purpose == "gpu-serving":
        return _gpu_serving(model, hardware, context)
    return (_offline if purpose == "offline-batch" else _cpu)(model, hardware, context)


def _scheme(grid: str, model: Model, largest: int) -> Scheme:
    """In the largest groups up to `largest` that divide every matrix."""
    sizes = (size for size in (128, 64, 32) if size <= largest)
    fits = [size for size in sizes if all(inputs % size == 0 for _, inputs in model.linears)]
    return Scheme(GRIDS[grid], fits[0] if fits else None)


def _method(grid: str) -> str:
    if grid == "int4":
        return "QAT, short (qexport train --bits 4)"
    return f"QAT (qexport train --bits {_NAMES[grid]})"


def _gpu_serving(model: Model, hardware: Hardware, context: int) -> Advice:
    """The widest of 4, 3 and 2 bits that leaves room for some users."""
    reasons = []
    for grid in ("int4", "int3", "seq2"):
        scheme = _scheme(grid, model, 128)
        fit = most_sequences(model, hardware, scheme, context) or 0
        if fit < _USERS and grid != "seq2":
            reasons.append(
                f"{grid} leaves room for {_sequences(fit, context)}, fewer than {_USERS}"
            )
            continue
        if fit == 0:
            reasons.append(_too_large(grid, context))
            break
        faster = Roofline(model, hardware, None).decode_seconds(1, context) / Roofline(
            model, hardware, scheme
        ).decode_seconds(1, context)
        reasons.append(
            f"{grid} leaves room for {_sequences(fit, context)}, and one alone is up to "
            f"{faster:.1f} times as fast as in bfloat16"
        )
        break
    form = {"int4": "gptq", "int3": "compressed-tensors", "seq2": "native"}[grid]
    reasons.append(
        {
            "gptq": "every engine reads 4-bit GPTQ, and has its fastest kernels for it",
            "compressed-tensors": "vLLM reads 3 bits as compressed-tensors",
            "native": "no other format holds SEQ-2 at 2 bits; vLLM reads it with our plugin",
        }[form]
    )
    return Advice(_method(grid), _NAMES[grid], scheme.group_size, form, reasons)


def _offline(model: Model, hardware: Hardware, context: int) -> Advice:
    """Tokens per second at the largest batch that fits."""
    rates: dict[str, tuple[float, int]] = {}
    int4 = _scheme("int4", model, 128)
    sides = {"bfloat16": Roofline(model, hardware, None), "int4": Roofline(model, hardware, int4)}
    if hardware.int8:
        sides["W8A8"] = Roofline(model, hardware, Scheme(INT8), int8=True)
    for name, side in sides.items():
        batch = min(_LARGEST_BATCH, most_sequences(model, hardware, side.scheme, context) or 0)
        if batch:
            rates[name] = batch / side.decode_seconds(batch, context), batch
    if not rates:
        reasons = [_too_large("int4", context)]
        return Advice(_method("int4"), "4", int4.group_size, "gptq", reasons)
    reasons = [
        f"{name}: at most {rate:,.0f} tokens/s, with {_sequences(batch, context)}"
        for name, (rate, batch) in rates.items()
    ]
    ours = {name: rate for name, (rate, _) in rates.items() if name != "W8A8"}
    if ours.get("bfloat16", 0.0) >= 0.9 * ours.get("int4", 0.0):
        reasons.append(
            "at such batches arithmetic is what steps wait for, or keys and values, and packed "
            "weights shorten neither; vLLM can round to W8A8 or FP8 by itself"
        )
        return Advice("none", None, None, None, reasons)
    reasons.append("packed weights leave room for more sequences at a time")
    return Advice(_method("int4"), "4", int4.group_size, "gptq", reasons)


def _cpu(model: Model, hardware: Hardware, context: int) -> Advice:
    """The widest that is as fast as people read; else the fastest."""
    reasons, found = [], "seq2"
    for grid in ("int4", "int3", "seq2"):
        scheme = _scheme(grid, model, 64 if grid != "int4" else 32)
        seconds = Roofline(model, hardware, scheme).decode_seconds(1, context)
        reasons.append(f"{grid}: {1 / seconds:,.1f} tokens/s for one sequence, at best")
        if most_sequences(model, hardware, scheme, context) == 0:
            reasons[-1] = _too_large(grid, context)
        elif seconds <= _READING:
            found = grid
            pace = f"{1 / _READING:.0f} tokens a second, as people read"
            reasons.append(f"{grid} is the widest that makes {pace}")
            break
    else:
        reasons.append("no width makes 10 tokens a second; 2 bits come closest")
    form = "gguf" if found == "int4" else "native"
    if found == "int4":
        reasons.append(_Q4_0)
    return Advice(_method(found), _NAMES[found], scheme.group_size, form, reasons)


def _sequences(count: int, context: int) -> str:
    return f"{count} sequence{'' if count == 1 else 's'} of {context} tokens"


def _too_large(grid: str, context: int) -> str:
    return f"{grid} does not fit this device, with {context} tokens; take several, or a larger one"


def _finetune(model: Model, hardware: Hardware) -> Advice:
    """Memory that training takes."""
    weights = model.stored + model.dense
    wanted = weights * _TRAINING_BYTES * _ACTIVATIONS
    reasons = [
        f"training {weights / 1e9:.2f} billion weights with Adam takes some "
        f"{wanted / 1e9:,.0f} GB: {_TRAINING_BYTES} bytes each, and activations"
    ]
    if hardware.memory is not None:
        devices = -(-wanted // hardware.memory)
        reasons.append(
            "which fits this device"
            if devices <= 1
            else f"which is {devices:.0f} of this device, sharded (FSDP)"
        )
    reasons.append(
        "4 bits lose next to nothing after a short training; 2 bits want billions of tokens to "
        "come near, and pay where memory or speed at small batches is what counts"
    )
    form, largest = ("gguf", 32) if hardware.kind == "cpu" else ("gptq", 64)
    if hardware.kind == "cpu":
        reasons.append(_Q4_0)
    scheme = _scheme("int4", model, largest)
    return Advice(_method("int4"), "4", scheme.group_size, form, reasons)
