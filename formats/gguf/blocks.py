"""The block types of GGUF: a codec for each, from codes and scales to bytes and back."""

from qexport.formats.gguf.block import Block
from qexport.formats.gguf.k_blocks import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
from qexport.formats.gguf.plain_blocks import (
    IQ4_NL,
    Q1_0,
    Q2_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    TQ1_0,
    TQ2_0,
)

__all__ = ["BLOCKS", "BY_ID"]


# Narrowest first, and among equals the ones that more backends have kernels for.
BLOCKS: dict[str, Block] = {
    block.name: block
    for block in sorted(
        (
            *(Q1_0(), TQ1_0(), TQ2_0(), Q2_0(), Q2_K(), Q3_K(), Q4_0(), Q4_K(), IQ4_NL(), Q4_1()),
            *(Q5_0(), Q5_K(), Q5_1(), Q6_K(), Q8_0()),
        ),
        key=lambda block: block.bits_per_weight,
    )
}
BY_ID = {block.id: block for block in BLOCKS.values()}
