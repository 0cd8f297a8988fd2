"""GPUs as their makers describe them: what a roofline needs to know."""

from dataclasses import dataclass

__all__ = ["GPUS", "Hardware"]


@dataclass(frozen=True)
class Hardware:
    """One device, at its best.

    memory      bytes
    bandwidth   of the memory, bytes per second
    flops       dense float16 or bfloat16 with float32 sums, operations per second
    int8        dense int8, operations per second; 0 where there is none
    """

    name: str
    memory: float
    bandwidth: float
    flops: float
    int8: float

    @property
    def ridge(self) -> float:
        """Operations for each byte at which arithmetic takes as long as memory."""
        return self.flops / self.bandwidth


def _gpu(name: str, gigabytes: float, terabytes: float, flops: float, int8: float) -> Hardware:
    return Hardware(name, gigabytes * 1e9, terabytes * 1e12, flops * 1e12, int8 * 1e12)


# data sheets of NVIDIA, without sparsity; of GeForce cards those with float32 sums
GPUS = {
    "b200": _gpu("NVIDIA B200", 180, 8.0, 2250, 4500),
    "h200": _gpu("NVIDIA H200", 141, 4.8, 989, 1979),
    "h100": _gpu("NVIDIA H100 SXM", 80, 3.35, 989, 1979),
    "h100-pcie": _gpu("NVIDIA H100 PCIe", 80, 2.0, 756, 1513),
    "a100-80": _gpu("NVIDIA A100 80 GB SXM", 80, 2.039, 312, 624),
    "a100-40": _gpu("NVIDIA A100 40 GB", 40, 1.555, 312, 624),
    "l40s": _gpu("NVIDIA L40S", 48, 0.864, 362, 733),
    "l4": _gpu("NVIDIA L4", 24, 0.3, 121, 242),
    "a10": _gpu("NVIDIA A10", 24, 0.6, 125, 250),
    "t4": _gpu("NVIDIA T4", 16, 0.32, 65, 130),
    "rtx5090": _gpu("NVIDIA RTX 5090", 32, 1.792, 209.5, 838),
    "rtx4090": _gpu("NVIDIA RTX 4090", 24, 1.008, 165.2, 660.6),
    "rtx3090": _gpu("NVIDIA RTX 3090", 24, 0.936, 71, 284),
}
