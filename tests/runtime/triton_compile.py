"""Compiles the Triton kernels for architectures that this machine need not have."""

from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from qexport.runtime.kernels import step
from qexport.runtime.kernels.triton_matmul import _kernel

ARCHITECTURES = {80: 4, 89: 1, 90: 4, 100: 1, 120: 1}  # and how many of the cases
# activations, bits of the planes, fields, inputs in one group, tokens in a tile, zero points
CASES = (
    ("fp16", 2, 0, 16, 64, 16, False),
    ("bf16", 2, 1, 32, 128, 16, False),
    ("bf16", 4, 0, 8, 32, 64, True),
    ("fp32", 8, 0, 4, 64, 16, False),
)
# the kernels of a decoding step: pointers to activations, others, and constants
_HEADS = {"DIM": 128, "BLOCK": 128}
STEPS: dict[Any, tuple[str, dict[str, str], dict[str, Any]]] = {
    step._add_norm: ("x delta out", {"weight": "*fp32"}, {"HAS_DELTA": True, "BLOCK": 4096}),
    step._rotate_and_store: (
        "heads queries cache",
        dict.fromkeys(("q_norm", "k_norm", "cos", "sin"), "*fp32"),
        {"ROTATED": True, "NORMED": True, **_HEADS},
    ),
    step._attend: (
        "queries cache",
        {"sums": "*fp32", "tops": "*fp32"},
        {"GROUP": 4, "ROWS": 16, "KEYS": 64, "SPLITS": 4, **_HEADS},
    ),
    step._join: ("out", {"sums": "*fp32", "tops": "*fp32"}, {"SPLITS": 4, "PARTS": 4, **_HEADS}),
    step._gate: ("gated out", {}, {"BLOCK": 1024}),
}
_NUMBERS = {"scale": "fp32", "eps": "fp32", "slots": "*i64", "positions": "*i64"}


def compile_steps(architecture: int, dtype: str) -> None:
    for kernel, (activations, others, constants) in STEPS.items():
        types = {
            **dict.fromkeys(kernel.arg_names, "i32"),
            **{name: kind for name, kind in _NUMBERS.items() if name in kernel.arg_names},
            **dict.fromkeys(activations.split(), f"*{dtype}"),
            **others,
            **dict.fromkeys(constants, "constexpr"),
        }
        made = compile(
            ASTSource(fn=kernel, signature=types, constexprs=constants),
            target=GPUTarget("cuda", architecture, 32),
            options={"num_warps": 4, "enable_fp_fusion": False},
        )
        name = kernel.__name__
        print(f"sm_{architecture} {dtype} {name}: cubin of {len(made.asm['cubin'])}")


def main() -> None:
    """A line for each cubin."""
    for architecture, dtype in ((80, "fp16"), (90, "bf16"), (100, "bf16")):
        compile_steps(architecture, dtype)
    for architecture, count in ARCHITECTURES.items():
        for dtype, low, high, fields, span, tokens, zeros in CASES[:count]:
            constants = {
                **{"ZERO": 1.5, "HAS_ZEROS": zeros, "HAS_BIAS": True, "LOW": low, "HIGH": high},
                **{"FIELDS": fields, "SPAN": span, "BLOCK_M": tokens, "BLOCK_N": 64},
                "WIDE": False,
            }
            types = {
                **dict.fromkeys(_kernel.arg_names, "i32"),
                **{"x": f"*{dtype}", "out": f"*{dtype}", "low": "*i32", "high": "*i32"},
                **{"scales": "*fp16", "zeros": "*u8", "bias": "*fp32"},
                **dict.fromkeys(constants, "constexpr"),
            }
            made = compile(
                ASTSource(fn=_kernel, signature=types, constexprs=constants),
                target=GPUTarget("cuda", architecture, 32),
                options={"num_warps": 4, "enable_fp_fusion": True},
            )
            print(f"sm_{architecture} {dtype} {low}+{high}: cubin of {len(made.asm['cubin'])}")


if __name__ == "__main__":
    main()
