"""`QuantizedTensor`: codes, scales, and the only `dequantize` of the project."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qexport.double_quant import doubled
from qexport.grid import SEQ2, Grid, Scheme, SuperBlock

__all__ = ["QuantizedTensor", "factors", "portable", "quantize", "shared", "storable"]

_LARGEST_PORTABLE = 65280.0  # 255 * 2**8, the largest 8-bit significand below fp16's maximum


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight matrix [out, in] as codes on a grid.

    codes   uint8 [out, in], unpacked
    scales  [out, groups], in `scheme.scale_dtype`
    zeros   uint8 [out, groups] zero points of an asymmetric scheme, else None
    minima  float32 [out, groups] of a grid with minima, else None
    """

    codes: Tensor
    scales: Tensor
    scheme: Scheme
    zeros: Tensor | None = None
    minima: Tensor | None = None

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
        grid = self.scheme.grid
        if (self.zeros is not None, self.minima is not None) != (grid.zeros, grid.minima):
            raise ValueError(
                "zero points and minima belong to grids that have them, and only there"
            )
        if self.zeros is not None and tuple(self.zeros.shape) != groups:
            raise ValueError(f"zero points are {groups}, not {tuple(self.zeros.shape)}")
        if self.minima is not None:
            found = (self.minima.dtype, tuple(self.minima.shape))
            if found != (torch.float32, groups):
                raise ValueError(f"minima are float32 {groups}, not {found}")

    @property
    def shape(self) -> tuple[int, int]:
        out, inputs = self.codes.shape
        return out, inputs

    def to(self, device: torch.device) -> "QuantizedTensor":
        """The same codes and scales on `device`."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        minima = None if self.minima is None else self.minima.to(device)
        codes, scales = self.codes.to(device), self.scales.to(device)
        return QuantizedTensor(codes, scales, self.scheme, zeros, minima)

    def rows(self, part: slice | Tensor) -> "QuantizedTensor":
        """Some output channels of it."""
        zeros = None if self.zeros is None else self.zeros[part]
        minima = None if self.minima is None else self.minima[part]
        return QuantizedTensor(self.codes[part], self.scales[part], self.scheme, zeros, minima)

    @classmethod
    def of_rows(cls, parts: "Sequence[QuantizedTensor]") -> "QuantizedTensor":
        """One matrix of the rows of all `parts`, which have one scheme."""
        zeros = [part.zeros for part in parts if part.zeros is not None]
        minima = [part.minima for part in parts if part.minima is not None]
        return cls(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scales for part in parts]),
            parts[0].scheme,
            torch.cat(zeros) if zeros else None,
            torch.cat(minima) if minima else None,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """`scale * (code - zero)` in float32, rounded once to `dtype`. Returns [out, in].

        Of a codebook it is `scale * values[code]`, and of a grid with minima `code * scale -
        minimum`, in this order.
        """
        (out, groups), grid = self.scales.shape, self.scheme.grid
        if grid.values is None:
            values = self.codes.to(torch.float32).view(out, groups, -1)
        else:
            book = torch.tensor(grid.values, device=self.codes.device)
            values = book[self.codes.to(torch.int32)].view(out, groups, -1)
        if self.zeros is not None:
            values.sub_(self.zeros.to(torch.float32).unsqueeze(-1))
        elif grid.zero is not None:
            values.sub_(grid.zero)
        values.mul_(self.scales.to(torch.float32).unsqueeze(-1))
        if self.minima is not None:
            values.sub_(self.minima.unsqueeze(-1))
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
    """Round positive float32 scales [out, groups] to portable ones that super-blocks can hold.

    A super-block's `d` is its largest scale divided by `most`, rounded; each scale becomes the
    nearest multiple of that, and at least one of it.
    """
    out, groups = scale.shape
    grouped = scale.view(out, -1, block.size // block.group_size)
    digits, exponent = torch.frexp(grouped.amax(-1, keepdim=True) / block.most)
    steps = 2.0 ** (8 - block.most.bit_length())
    d = torch.ldexp((digits * steps).round() / steps, exponent)
    d = ((d * 2.0**23).round() / 2.0**23).clamp(2.0**-23, 2.0**11)
    return ((grouped / d).round().clamp(1, block.most) * d).view(out, groups)


def storable(scale: Tensor, scheme: Scheme) -> Tensor:
    """Round float32 scales [out, groups] to what a scheme stores; positive, but for float32."""
    if scheme.double_quant:
        return doubled(scale)
    if scheme.scale_dtype == torch.float32:
        return scale
    return portable(scale) if scheme.super_block is None else shared(scale, scheme.super_block)


def factors(values: Tensor, block: SuperBlock, least: int = 1) -> tuple[Tensor, Tensor]:
    """Float32 d [...] and int64 factors [..., groups] whose products are `values` [..., groups].

    Factors go from `least` to `most`. Raises ValueError where there are none.
    """
    grouped = values.float()
    sizes = grouped.abs()
    smallest = sizes.masked_fill(sizes == 0, torch.inf).amin(-1, keepdim=True)
    d, found = torch.zeros_like(smallest), torch.zeros_like(grouped)
    nothing = smallest.isinf()
    for factor in range(max(block.most, -least), 0, -1):
        candidate = torch.where(nothing, 0.0, smallest / factor)
        ratio = torch.where(nothing, 0.0, grouped / candidate)
        fits = (ratio == ratio.round()) & (ratio >= least) & (ratio <= block.most)
        fits &= ratio * candidate == grouped
        halves = torch.cat((candidate, 1.5 * candidate), dim=-1)  # the latter is SEQ's minimum
        halves = halves if block.grid.zero == SEQ2.zero else candidate
        exact = (halves.half().float() == halves).all(-1, keepdim=True)
        holds = fits.all(-1, keepdim=True) & exact
        d, found = torch.where(holds, candidate, d), torch.where(holds, ratio, found)
    if bool(((d == 0) & ~nothing).any()) or (least > 0 and bool(nothing.any())):
        raise ValueError(f"scales of a super-block are no multiples that {block.name} can hold")
    return d.squeeze(-1), found.long()


def quantize(
    weight: Tensor,
    scale: Tensor,
    scheme: Scheme,
    zeros: Tensor | None = None,
    minima: Tensor | None = None,
) -> QuantizedTensor:
    """Nearest codes of a float32 `weight` [out, in] for float32 `scale` [out, groups].

    Ties go to the even multiple of the step below (ParetoQ's `round(v - 1/2) + 1/2` on grids with
    a half-integer zero, `round(v)` on the others); on the binary grid the code is the sign, zero
    counted as positive. `zeros` uint8 or `minima` float32 [out, groups] are those of a grid that
    has them. Training, packing, quantization and evaluation all come through here.
    """
    out, groups = scale.shape
    grid = scheme.grid
    if grid.levels == 2:
        codes = (weight >= 0).to(torch.uint8)
        return QuantizedTensor(codes, scale.to(scheme.scale_dtype), scheme)
    steps = weight.reshape(out, groups, -1)
    if minima is not None:
        steps = steps + minima.unsqueeze(-1)
    steps = steps / scale.unsqueeze(-1)
    if grid.values is not None:
        book = torch.tensor(grid.values, dtype=steps.dtype, device=steps.device)
        codes = torch.bucketize(steps, (book[1:] + book[:-1]) / 2).view(weight.shape)
        return QuantizedTensor(codes.to(torch.uint8), scale.to(scheme.scale_dtype), scheme)
    if zeros is not None:
        steps.round_().add_(zeros.unsqueeze(-1))
    elif grid.zero is not None:
        half = grid.zero % 1
        if half:
            steps.sub_(half)
        steps.round_().add_(grid.zero + half)
    else:
        steps.round_()
    codes = steps.clamp_(0, grid.levels - 1).view(weight.shape).to(torch.uint8)
    return QuantizedTensor(codes, scale.to(scheme.scale_dtype), scheme, zeros, minima)
