"""`QuantizedTensor`: codes, scales, and the only `dequantize` of the project."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qexport.grid import Grid, Scheme, SuperBlock

__all__ = ["QuantizedTensor", "factors", "portable", "quantize", "shared", "storable"]

_LARGEST_PORTABLE = 65280.0  # 255 * 2**8, the largest 8-bit significand below fp16's maximum


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight matrix [out, in] as codes on a grid.

    codes   uint8 [out, in], unpacked
    scales  [out, groups], in `scheme.scale_dtype`
    zeros   uint8 [out, groups] zero points of an asymmetric scheme, else None
    """

    codes: Tensor
    scales: Tensor
    scheme: Scheme
    zeros: Tensor | None = None

    def __post_init__(self) -> None:
        out, inputs = self.codes.shape
        groups = (out, self.scheme.groups(inputs))
        if self.codes.dtype != torch.uint8:
            raise ValueError(f"codes are uint8, not {self.codes.dtype}")
        if tuple(self.scales.shape) != groups or self.scales.dtype != self.scheme.scale_dtype:
            raise ValueError(
                f"scales are {self.scheme.scale_dtype} {groups}, not "
                f"{self.scales.dtype} {tuple(self.scales.shape)}"
            )
        if (self.zeros is None) != self.scheme.symmetric:
            raise ValueError("zero points belong to asymmetric schemes, and only to them")
        if self.zeros is not None and tuple(self.zeros.shape) != groups:
            raise ValueError(f"zero points are {groups}, not {tuple(self.zeros.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        out, inputs = self.codes.shape
        return out, inputs

    def to(self, device: torch.device) -> "QuantizedTensor":
        """The same codes and scales on `device`."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        return QuantizedTensor(self.codes.to(device), self.scales.to(device), self.scheme, zeros)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """`scale * (code - zero)` in float32, rounded once to `dtype`. Returns [out, in]."""
        out, groups = self.scales.shape
        values = self.codes.to(torch.float32).view(out, groups, -1)
        if self.zeros is None:
            assert self.scheme.grid.zero is not None
            values.sub_(self.scheme.grid.zero)
        else:
            values.sub_(self.zeros.to(torch.float32).unsqueeze(-1))
        values.mul_(self.scales.to(torch.float32).unsqueeze(-1))
        return values.view(self.codes.shape).to(dtype)

    def embed(self, grid: Grid) -> "QuantizedTensor":
        """The same values re-coded in a wider grid. Raises ValueError where it is not exact."""
        if grid == self.scheme.grid:
            return self
        factor = self.scheme.grid.factor_into(grid)
        if factor is None:
            raise ValueError(f"{self.scheme.grid.name} does not embed in {grid.name}")
        scales = self.scales / factor
        if not torch.equal(scales * factor, self.scales):
            raise ValueError("a scale is too small to be halved exactly")
        scheme = Scheme(grid, self.scheme.group_size, self.scheme.scale_dtype)
        if self.zeros is None:
            assert self.scheme.grid.zero is not None
            codes = self.codes * factor + int(grid.middle - self.scheme.grid.zero * factor)
            middle = None if grid.zero is not None else int(grid.middle)
            zeros = None if middle is None else torch.full(scales.shape, middle, dtype=torch.uint8)
            return QuantizedTensor(codes, scales, scheme, zeros)
        if grid.zero is None:
            return QuantizedTensor(self.codes, scales, scheme, self.zeros)
        if int(self.zeros.max()) >= self.scheme.grid.levels:
            raise ValueError("a zero point lies outside its grid")
        # In uint8 arithmetic, which wraps, and comes out right since the result is in range.
        shift = (int(grid.zero) - self.zeros.to(torch.int16)).to(torch.uint8).unsqueeze(-1)
        codes = (self.codes.view(*scales.shape, -1) + shift).view(self.codes.shape)
        return QuantizedTensor(codes, scales, scheme)


def portable(scale: Tensor) -> Tensor:
    """Round a positive float32 scale to a value that fp16 and bf16 both hold, and whose half too.

    Such a value has at most 8 significant bits and is a multiple of 2**-23. Values from 2**-16 up
    are rounded to bfloat16, whose spacing there is no finer than 2**-23; smaller ones to the
    multiple itself. Ties go to even.
    """
    steps = (scale * 2.0**23).round() / 2.0**23
    rounded = torch.where(scale < 2.0**-16, steps, scale.to(torch.bfloat16).to(torch.float32))
    return rounded.clamp(2.0**-23, _LARGEST_PORTABLE)


def shared(scale: Tensor, block: SuperBlock) -> Tensor:
    """Round positive float32 scales [out, groups] to what super-blocks can hold.

    A super-block's `d` is that of its largest scale's nearest factor of `most`; each scale becomes
    the nearest multiple of it, but never nothing.
    """
    out, groups = scale.shape
    grouped = scale.view(out, -1, block.size // block.group_size)
    digits, exponent = torch.frexp(grouped.amax(-1, keepdim=True) / block.most)
    rounded = (digits * 2.0**block.digits).round() / 2.0**block.digits
    d = torch.ldexp(rounded, exponent)
    d = ((d * 2.0**23).round() / 2.0**23).clamp(2.0**-23, 2.0**11)
    return ((grouped / d).round().clamp(1, block.most) * d).view(out, groups)


def storable(scale: Tensor, scheme: Scheme) -> Tensor:
    """Round positive float32 scales [out, groups] to what a scheme stores."""
    if scheme.super_block is not None:
        return shared(scale, scheme.super_block)
    return scale if scheme.scale_dtype == torch.float32 else portable(scale)


def factors(scales: Tensor, block: SuperBlock) -> tuple[Tensor, Tensor]:
    """Float32 d [...] and int64 factors [..., groups] whose products are `scales` [..., groups].

    Raises ValueError where there are none: other scales than `shared` makes.
    """
    grouped = scales.float()
    least = grouped.amin(-1, keepdim=True)
    d, found = torch.zeros_like(least), torch.zeros_like(grouped)
    for factor in range(block.most, 0, -1):
        candidate = least / factor
        ratio = grouped / candidate
        fits = (ratio == ratio.round()) & (ratio <= block.most) & (ratio * candidate == grouped)
        halves = torch.cat((candidate, 1.5 * candidate), dim=-1)  # the latter is SEQ's minimum
        exact = (halves.half().float() == halves).all(-1, keepdim=True)
        holds = fits.all(-1, keepdim=True) & exact
        d, found = torch.where(holds, candidate, d), torch.where(holds, ratio, found)
    if bool((d == 0).any()):
        raise ValueError(f"scales of a super-block are no multiples that {block.name} can hold")
    return d.squeeze(-1), found.long()


def quantize(
    weight: Tensor, scale: Tensor, scheme: Scheme, zeros: Tensor | None = None
) -> QuantizedTensor:
    """Nearest codes of a float32 `weight` [out, in] for float32 `scale` [out, groups].

    Ties go to the even multiple of the step below (ParetoQ's `round(v - 1/2) + 1/2` on grids with
    a half-integer zero, `round(v)` on the others); on the binary grid the code is the sign, zero
    counted as positive. `zeros` uint8 [out, groups] are those of an asymmetric grid. Training,
    packing, quantization and evaluation all come through here.
    """
    out, groups = scale.shape
    grid = scheme.grid
    if grid.levels == 2:
        codes = (weight >= 0).to(torch.uint8)
    else:
        steps = weight.reshape(out, groups, -1) / scale.unsqueeze(-1)
        if zeros is not None:
            steps.round_().add_(zeros.unsqueeze(-1))
        else:
            assert grid.zero is not None
            half = grid.zero % 1
            if half:
                steps.sub_(half)
            steps.round_().add_(grid.zero + half)
        codes = steps.clamp_(0, grid.levels - 1).view(weight.shape).to(torch.uint8)
    return QuantizedTensor(codes, scale.to(scheme.scale_dtype), scheme, zeros)
