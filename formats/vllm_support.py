"""What vLLM makes of a packed folder: on which devices it reads it, and the same in a sentence."""

from collections.abc import Iterable
from dataclasses import dataclass

from qexport.checkpoint import Checkpoint
from qexport.grid import GRIDS

__all__ = ["VllmSupport", "unlike_parts", "vllm_support"]

_BOTH = frozenset({"cpu", "cuda"})
_GPU = frozenset({"cuda"})
_NONE: frozenset[str] = frozenset()

# vLLM's own readers hold the layers of a tuple as one, and want them quantized alike
_FUSES = ("gptq", "gptq_v2", "awq", "compressed-tensors", "int-quantized")
_FUSED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)


@dataclass(frozen=True)
class VllmSupport:
    """What vLLM 0.32 and 0.33 make of a folder, qexport being installed beside it.

    devices     types of torch devices that it was seen, or is known, to read the folder on
    sentence    the same for a reader, with what to do instead
    """

    devices: frozenset[str]
    sentence: str


def unlike_parts(source: Checkpoint) -> str | None:
    """The first layers that vLLM fuses into one and that are not all quantized alike, or None."""
    modules = source.modules
    for parts in _FUSED:
        end = f"{parts[0]}.weight"
        for block in (name.removesuffix(end) for name in source if name.endswith(end)):
            there = [block + part for part in parts if f"{block}{part}.weight" in source]
            if len({modules[name][0] if name in modules else None for name in there}) > 1:
                return ", ".join(there)
    return None


def vllm_support(
    form: str, stored: Iterable[str], *, experts: bool = False, unlike: str | None = None
) -> VllmSupport:
    """For a folder of format `form` whose layers are held as grids named `stored`.

    `experts`: whether experts are among its layers; `unlike`: what `unlike_parts` finds.
    """
    if experts and form != "gguf":
        return _experts(form)
    if unlike is not None and form in _FUSES:
        return VllmSupport(
            _NONE,
            f"vLLM does not read it: it makes one layer of {unlike}, which have to be quantized "
            "alike; --format native is for such a model.",
        )
    grids = set(stored)
    if form in ("gptq", "gptq_v2"):
        return _gptq(form, grids)
    if form == "native" and not all(GRIDS[name].uniform for name in grids):
        return VllmSupport(
            _NONE, "vLLM does not read it: no kernel of the plugin takes these grids."
        )
    if form == "compressed-tensors" and not grids <= {"int4", "uint4"}:
        return VllmSupport(
            _BOTH, "vLLM reads it on NVIDIA GPUs, and on CPUs with qexport installed beside it."
        )
    return _BY_FORMAT.get(form, _UNKNOWN)


_READS = VllmSupport(_BOTH, "vLLM reads it.")
_UNKNOWN = VllmSupport(_NONE, "qexport reads it. vLLM does not read it, as far as is known.")
_BY_FORMAT = {
    "awq": _READS,
    "compressed-tensors": _READS,
    "int-quantized": _READS,
    "native": VllmSupport(_BOTH, "vLLM reads it where qexport is installed beside it."),
    "humming": VllmSupport(_GPU, "vLLM reads it on NVIDIA GPUs, with the package humming-kernels."),
    "bitsandbytes": VllmSupport(
        _NONE, "vLLM does not read it: it has dropped bitsandbytes; transformers reads it."
    ),
    "gguf": VllmSupport(
        _NONE, "llama.cpp reads it. vLLM does not read it; native, gptq, awq … are for that."
    ),
}


def _experts(form: str) -> VllmSupport:
    if form in ("native", "humming", "bitsandbytes"):
        return VllmSupport(
            _NONE,
            "vLLM does not read it: experts in this format are served by `qexport serve` alone.",
        )
    return VllmSupport(
        _BOTH, "vLLM has loaders for experts in this format, which were not tried here."
    )


def _gptq(form: str, grids: set[str]) -> VllmSupport:
    if not grids <= {"int4", "int8"}:
        instead = "`--format awq`" if "uint4" in grids else "`qexport pack --bits 4`"
        return VllmSupport(
            _NONE,
            "GPTQModel and transformers read it. vLLM does not read it: of GPTQ it takes symmetric "
            f"grids at 4 and 8 bits ({instead}).",
        )
    if form == "gptq_v2":
        return VllmSupport(
            _NONE, "vLLM reads GPTQ files as version 1; `qexport pack --format gptq` is for it."
        )
    if grids <= {"int4"}:
        return _READS
    return VllmSupport(_GPU, "vLLM reads it on NVIDIA GPUs; on CPUs it takes GPTQ of 4 bits alone.")
