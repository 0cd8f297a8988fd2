"""Compiles the Triton kernel for architectures that this machine need not have."""

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from qexport.runtime.kernels.triton_matmul import _kernel

ARCHITECTURES = {80: 4, 89: 1, 90: 4, 100: 1, 120: 1}  # and how many of the cases
# activations, bits of the planes, fields, inputs in one group, tokens in a tile, zero points
CASES = (
    ("fp16", 2, 0, 16, 64, 16, False),
    ("bf16", 2, 1, 32, 128, 16, False),
    ("bf16", 4, 0, 8, 32, 64, True),
    ("fp32", 8, 0, 4, 64, 16, False),
)


def main() -> None:
    """A line for each cubin."""
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
