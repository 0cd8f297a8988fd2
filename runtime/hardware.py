"""GPUs and CPUs as their makers describe them: what a roofline needs to know."""

from dataclasses import dataclass

__all__ = ["CPUS", "GPUS", "Hardware"]


@dataclass(frozen=True)
class Hardware:
    """One device, at its best.

    memory      bytes; None where the maker does not say, as for CPUs
    bandwidth   of the memory, bytes per second
    flops       operations per second on dense weights: float16 or bfloat16 with float32 sums on
                GPUs, float32 on CPUs
    int8        dense int8, operations per second; 0 where there is none, or it was not measured
    kind        `cuda` or `cpu`
    capability  NVIDIA's number of the architecture, as in 90
    """

    name: str
    memory: float | None
    bandwidth: float
    flops: float
    int8: float
    kind: str = "cuda"
    capability: int = 0

    @property
    def ridge(self) -> float:
        """Operations for each byte at which arithmetic takes as long as memory."""
        return self.flops / self.bandwidth

    @property
    def dense(self) -> str:
        """The dtype of weights that are not packed: NVIDIA has bfloat16 from Ampere on."""
        return "float16" if self.kind == "cuda" and self.capability < 80 else "bfloat16"


def _gpu(
    name: str, capability: int, gigabytes: float, terabytes: float, flops: float, int8: float
) -> Hardware:
    memory, bandwidth = gigabytes * 1e9, terabytes * 1e12
    return Hardware(name, memory, bandwidth, flops * 1e12, int8 * 1e12, "cuda", capability)


def _cpu(
    name: str,
    channels: int,
    transfers: float,
    cores: int,
    gigahertz: float,
    lanes: int,
    int8: int = 4,
) -> Hardware:
    """Memory of `transfers` MT/s on channels of 8 bytes; cores at their base clock.

    Rates are those of the instructions that our kernels use: FMA and VPDPBUSD, or VPMADDUBSW where
    there is no AVX-512. AMX and AVX512_BF16 go beyond them.

    lanes   float32 operations of a core in a cycle; int8: times as many by int8
    """
    flops = cores * gigahertz * 1e9 * lanes
    return Hardware(name, None, channels * transfers * 8e6, flops, int8 * flops, "cpu")


# data sheets of NVIDIA, without sparsity; of GeForce cards those with float32 sums
GPUS = {
    "b200": _gpu("NVIDIA B200", 100, 180, 8.0, 2250, 4500),
    "h200": _gpu("NVIDIA H200", 90, 141, 4.8, 989, 1979),
    "h100": _gpu("NVIDIA H100 SXM", 90, 80, 3.35, 989, 1979),
    "h100-pcie": _gpu("NVIDIA H100 PCIe", 90, 80, 2.0, 756, 1513),
    "a100-80": _gpu("NVIDIA A100 80 GB SXM", 80, 80, 2.039, 312, 624),
    "a100-40": _gpu("NVIDIA A100 40 GB", 80, 40, 1.555, 312, 624),
    "l40s": _gpu("NVIDIA L40S", 89, 48, 0.864, 362, 733),
    "l4": _gpu("NVIDIA L4", 89, 24, 0.3, 121, 242),
    "a10": _gpu("NVIDIA A10", 86, 24, 0.6, 125, 250),
    "t4": _gpu("NVIDIA T4", 75, 16, 0.32, 65, 130),
    "rtx5090": _gpu("NVIDIA RTX 5090", 120, 32, 1.792, 209.5, 838),
    "rtx4090": _gpu("NVIDIA RTX 4090", 89, 24, 1.008, 165.2, 660.6),
    "rtx3090": _gpu("NVIDIA RTX 3090", 86, 24, 0.936, 71, 284),
}

# data sheets of AMD and Intel: one socket, all channels filled
CPUS = {
    "epyc-9754": _cpu("AMD EPYC 9754", 12, 4800, 128, 2.25, 32),
    "epyc-9654": _cpu("AMD EPYC 9654", 12, 4800, 96, 2.4, 32),
    "xeon-8592": _cpu("Intel Xeon Platinum 8592+", 8, 5600, 64, 1.9, 64),
    "xeon-8480": _cpu("Intel Xeon Platinum 8480+", 8, 4800, 56, 2.0, 64),
    "ryzen-9950x": _cpu("AMD Ryzen 9 9950X", 2, 5600, 16, 4.3, 64),
    "ryzen-7950x": _cpu("AMD Ryzen 9 7950X", 2, 5200, 16, 4.5, 32),
    "core-14900k": _cpu("Intel Core i9-14900K", 2, 5600, 8, 3.2, 32, int8=2),
}
