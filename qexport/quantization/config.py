"""What a quantization is asked to do, checked before anything heavy starts."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from qexport.errors import InputError
from qexport.grid import GRIDS, INT5, INT8, IQ4_NL, K_QUANTS, KQ2, KQ4, KQ5, NF4, Scheme
from qexport.precision import Precision
from qexport.quantization.gptq import GptqOptions
from qexport.quantization.signround import SignRoundOptions
from qexport.ranks import world_size
from qexport.run_folder import model_state, text_state
from qexport.selection import (
    DENSE,
    TARGETS,
    Rule,
    check_patterns,
    is_selected,
    parse_rule,
    rule_of,
    target_bits,
)
from qexport.settings import as_given
from qexport.widths import GRID_OF

__all__ = ["METHODS", "ROUNDINGS", "Method", "QuantizeConfig"]


@dataclass(frozen=True)
class Method:
    """What is done to a block, in this order.

    scaling    fold factors of the inputs into the weights: `awq`'s, or SmoothQuant's (`smooth`)
    rounding   `nearest` codes, or `gptq`'s
    learned    change roundings by what they do to the block's output
    looks      needs calibration text
    """

    scaling: Literal["none", "awq", "smooth"] = "none"
    rounding: Literal["rtn", "gptq"] = "rtn"
    learned: bool = False
    looks: bool = True


METHODS = {
    "rtn": Method(looks=False),
    "gptq": Method(rounding="gptq"),
    "awq": Method(scaling="awq"),
    "signround": Method(rounding="gptq", learned=True),
    "w8a8": Method(scaling="smooth", rounding="gptq"),
    "kquant": Method(rounding="gptq"),
    "nf4": Method(looks=False),
}
ROUNDINGS = ("rtn", "gptq")  # methods that a layer may have for itself
_K_GRIDS = {f"{block.grid.bits}": block for block in K_QUANTS.values()}
# where a row is no whole number of super-blocks: grids of GGUF's blocks of 32
_K_BESIDE = {"2": IQ4_NL, "3": IQ4_NL, "4": IQ4_NL, "5": INT5, "6": INT8}
_FREE_FIELDS = ("output", "resume")  # may differ between a kill and a resume
_MIXED = ("2", "3", "4", "8")


@dataclass(frozen=True)
class QuantizeConfig:
    """Settings of one quantization.

    model, output     folders
    method            name in METHODS
    bits, sym         say the grid; `grid` names another one
    target_bpw        bits per weight, scales counted, that the model is to come to: each layer gets
                      2, 3, 4 or 8 bits by what its rounding costs, and `bits` is not used
    target            name in TARGETS: a block of GGUF that is to hold the layers exactly, which
                      says their bits and groups, and how scales are tied
    group_size        inputs that share a scale; None is one per channel
    per_tensor        one scale for a whole layer, in place of groups
    double_quant      whether scales of NF4 are rounded to 8 bits
    calibration       text as in `qexport.data.documents`, of which `samples` windows of `length`
                      tokens are taken; a method that looks at no activations needs none
    include, exclude  patterns of the names of layers that are quantized, and that are not
    module_bits       "PATTERN=BITS[:GROUP[:METHOD]]", the method one of ROUNDINGS; the first that
                      fits counts
    true_sequential   layers of a block see what the ones before them have become
    unseen_experts    `nearest` rounds experts that saw less than half a percent of the tokens to
                      nearest; `error` stops
    smooth            what share of the activations' range SmoothQuant moves to the weights
    batch_size        windows in a forward pass
    """

    model: Path
    output: Path
    method: str
    bits: str
    target_bpw: float | None = None
    target: str | None = None
    sym: bool = True
    grid: str | None = None
    group_size: int | None = None
    per_tensor: bool = False
    double_quant: bool = True
    calibration: str | None = None
    samples: int = 128
    length: int = 512
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    module_bits: tuple[str, ...] = ()
    gptq: GptqOptions = field(default_factory=GptqOptions)
    signround: SignRoundOptions = field(default_factory=SignRoundOptions)
    unseen_experts: Literal["nearest", "error"] = "nearest"
    smooth: float = 0.5
    true_sequential: bool = True
    precision: Precision = "auto"
    batch_size: int = 8
    seed: int = 0
    resume: bool = True

    def __post_init__(self) -> None:
        as_given(self)
        if self.method not in METHODS:
            raise InputError(f"there is no --method {self.method}; there are {', '.join(METHODS)}.")
        if self.bits not in GRID_OF:
            raise InputError(f"--bits {self.bits} is not a width; choose {', '.join(GRID_OF)}.")
        if self.grid is not None:
            self._check_grid(self.grid)
        if self.group_size is not None and self.group_size < 1:
            raise InputError(f"--group-size {self.group_size} is not a group; use -1 per channel.")
        if self.target_bpw is not None and (self.grid is not None or self.calibration is None):
            raise InputError("--target-bpw wants --calibration, and no --grid.")
        if self.looks and self.calibration is None:
            raise InputError(f"--method {self.method} wants --calibration; builtin will do.")
        for name, least in {"samples": 1, "length": 8, "batch_size": 1}.items():
            if getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')} is less than {least}.")
        if not 0 <= self.smooth <= 1:
            raise InputError(f"--smooth {self.smooth} is not a share from 0 to 1.")
        if not 0 < self.gptq.percdamp < 1:
            raise InputError(f"--percdamp {self.gptq.percdamp} is not between 0 and 1.")
        lr = 0.1 if self.signround.lr is None else self.signround.lr
        if self.signround.iterations < 1 or not 0 < lr < 1:
            raise InputError("--iterations is at least 1, and --lr between 0 and 1.")
        for name in ("block_size", "refits"):
            if getattr(self.gptq, name) < (0 if name == "refits" else 1):
                raise InputError(f"--{name.replace('_', '-')} is too small.")
        if self.target is not None:
            self._check_target(self.target)
        if self.method in ("kquant", "nf4"):
            self._check_own_grid()
        if METHODS[self.method].learned and self.grid in (NF4.name, IQ4_NL.name):
            raise InputError(f"signround learns of uniform grids alone, not of {self.grid}.")
        if self.grid in (KQ2.name, KQ4.name, KQ5.name):
            raise InputError(f"--grid {self.grid} is of --method kquant alone.")
        if self.method == "w8a8" and self._scheme(self.bits, self.group_size) != Scheme(INT8):
            raise InputError("--method w8a8 is of --bits 8 and --group-size -1, symmetric.")
        if self.per_tensor and (self.group_size is not None or METHODS[self.method].learned):
            raise InputError("--per-tensor goes neither with --group-size nor with signround.")
        if self.per_tensor and any(rule.group_size != 0 for rule in self._rules):
            raise InputError("--per-tensor is of all layers; give no group to --module-bits.")
        if self.target_bpw is not None and not 2 <= self.target_bpw <= 9:
            raise InputError(f"--target-bpw {self.target_bpw} is not between 2 and 9.")
        _ = self._rules, self._scheme(self.bits, self.group_size)

    def _check_grid(self, name: str) -> None:
        if name not in GRIDS:
            raise InputError(f"there is no --grid {name}; there are {', '.join(GRIDS)}.")
        grid = GRIDS[name]
        if str(grid.bits) != self.bits.replace("1.58", "2"):
            raise InputError(f"--grid {name} is of {grid.bits} bits, and --bits says {self.bits}.")
        if grid.zeros == self.sym:
            other = "--asym" if grid.zeros else "--sym"
            raise InputError(f"--grid {name} goes with {other}.")

    def _check_target(self, target: str) -> None:
        if (self.bits, self.sym, self.grid) != (target_bits(target), True, None):
            raise InputError(
                f"--target {target} is symmetric, of {target_bits(target)} bits; leave out others."
            )
        if self.group_size not in (None, TARGETS[target].group_size) or self.per_tensor:
            raise InputError(f"--target {target} has groups of its own; leave --group-size out.")
        if self.target_bpw is not None:
            raise InputError("--target-bpw does not go with --target.")

    def _check_own_grid(self) -> None:
        """Methods that say the grid, and kquant's groups too."""
        if self.grid is not None or not self.sym or self.target_bpw is not None or self.per_tensor:
            raise InputError(
                f"--method {self.method} has a grid of its own; leave --grid, --asym, --per-tensor "
                "and --target-bpw out."
            )
        if self.target is not None:
            raise InputError("--target goes with gptq or rtn; --method kquant says --bits alone.")
        if self.method == "nf4" and self.bits != "4":
            raise InputError("--method nf4 is of --bits 4.")
        if self.method == "kquant" and self.bits not in _K_GRIDS:
            raise InputError(f"--method kquant is of --bits {', '.join(_K_GRIDS)}.")
        if self.method == "kquant" and self.group_size is not None:
            raise InputError("--method kquant has groups of its own; leave --group-size out.")

    def fitting(self, layer: str, inputs: int) -> Scheme | None:
        """`scheme_of`, and another one where a row of the layer is no whole super-blocks."""
        scheme = self.scheme_of(layer)
        if self.method != "kquant" or scheme is None or scheme.super_block is None:
            return scheme
        if inputs % scheme.super_block.size == 0:
            return scheme
        if inputs % 32:
            raise InputError(
                f"--method kquant wants multiples of 32 inputs, and {layer} has {inputs}; give it "
                "--module-bits of its own, or leave it out by --exclude."
            )
        return Scheme(_K_BESIDE[str(scheme.grid.bits)], 32)

    @property
    def looks(self) -> bool:
        """Whether activations are looked at, by a method or for a target."""
        if self.target_bpw is not None:
            return True
        methods = {self.method, *(rule.method or self.method for rule in self._rules)}
        return any(METHODS[name].looks for name in methods)

    def choices(self, layer: str) -> list[tuple[str, Scheme]]:
        """Widths and schemes that a layer may have where a target is given."""
        rule = rule_of(layer, self._rules)
        if rule is not None:
            scheme = self.scheme_of(layer)
            return [] if scheme is None else [(rule.bits, scheme)]
        return [(bits, self._scheme(bits, self.group_size)) for bits in _MIXED]

    def scheme_of(self, layer: str) -> Scheme | None:
        """By the name of a layer; None where it stays dense."""
        rule = rule_of(layer, self._rules)
        if rule is not None:
            if rule.bits == DENSE:
                return None
            if rule.group_size == 0:
                return self._scheme(rule.bits, self.group_size)
            return self._scheme(rule.bits, rule.group_size, plain=True)
        if not is_selected(layer, self.include, self.exclude):
            return None
        return self._scheme(self.bits, self.group_size)

    def _scheme(self, bits: str, group_size: int | None, *, plain: bool = False) -> Scheme:
        """Of a width; `plain` ones are no super-blocks, whatever the method and the target."""
        name = self.grid if bits == self.bits else None
        if self.method == "kquant" and not plain and bits in _K_GRIDS:
            block = _K_GRIDS[bits]
            return Scheme(block.grid, block.group_size, torch.float32, block)
        if self.method == "nf4" and bits == self.bits:
            name = NF4.name
        if name is None:
            name = GRID_OF[bits][0 if self.sym else 1]
        if name is None:
            raise InputError(f"--asym: there is no such grid of {bits} bits.")
        if self.target is not None and bits == self.bits and not plain:
            block = TARGETS[self.target]
            return Scheme(block.grid, block.group_size, super_block=block)
        if name == NF4.name:  # bitsandbytes has float32 scales
            return Scheme(NF4, group_size, torch.float32, double_quant=self.double_quant)
        return Scheme(GRIDS[name], group_size)

    def rounding_of(self, layer: str) -> str:
        """`rtn` or `gptq`, by the name of a layer."""
        rule = rule_of(layer, self._rules)
        return METHODS[rule.method if rule and rule.method else self.method].rounding

    def check_patterns(self, layers: Iterable[str]) -> None:
        """Raise InputError for a pattern that fits no layer."""
        rules = (rule.pattern for rule in self._rules)
        check_patterns((*self.include, *self.exclude, *rules), layers)

    @property
    def _rules(self) -> list[Rule]:
        return [parse_rule(text, (*GRID_OF, DENSE), ROUNDINGS) for text in self.module_bits]

    def identity(self) -> dict[str, Any]:
        """What must be equal for one run to continue another, as it stands in the marker."""
        found = {key: v for key, v in asdict(self).items() if key not in _FREE_FIELDS}
        found["model"] = str(self.model.resolve())
        found["processes"] = world_size()  # each has its part of the text
        found["model_files"] = model_state(self.model)
        if self.calibration is not None:
            found["calibration"] = text_state(self.calibration)
        marked: dict[str, Any] = json.loads(json.dumps(found, default=str))
        return marked
