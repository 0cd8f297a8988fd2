"""What a training run is asked to do, checked before anything heavy starts."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from qexport.errors import InputError
from qexport.grid import Scheme
from qexport.paretoq import WIDTHS, Gradient
from qexport.precision import Precision
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
from qexport.training import zero
from qexport.training.recipe import RECIPES, Recipe

__all__ = ["TrainConfig"]


# Not part of what the run computes: changing these between a kill and a resume is harmless.
# So is how a step's windows are shared out: what counts is how many tokens it has.
_FREE_FIELDS = (
    *("output", "resume", "save_steps", "log_steps", "batch_size", "gradient_accumulation"),
    *("gradient_checkpointing", "teacher", "shard", "offload", "compile", "deepspeed"),
)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run.

    model, output          folders
    data, eval_data        as in `qexport.data.documents`; several of data are mixed, by the weights
                           of SOURCE=WEIGHT or else by their sizes
    bits                   "1", "1.58", "2", "3" or "4"; "16" is a dense fine-tuning, by which to
                           judge the others; group_size None is per channel
    target                 name in TARGETS: a block of GGUF that is to hold the layers exactly,
                           which says their groups, and how scales are tied
    include, exclude       patterns of the names of layers that are quantized, and that are not
    module_bits            "PATTERN=BITS" or "PATTERN=BITS:GROUP" for layers with a width of their
                           own; the first one that fits counts
    init                   a RUN of `quantize` to begin with, in place of a start by blocks
    loss_on                all tokens, or in conversations what the assistant says alone
    max_steps              optimizer steps; None is one pass over the data
    max_length             tokens in a window; batch_size windows in a forward pass
    gradient_accumulation  forward passes in a step
    warmup                 share of the steps in which the rate rises, before its cosine falls
    recipe                 name in RECIPES; lr to block_scale_lr are its own where they are None
    precision              of products; fp16 with loss scaling. Masters are float32 in any case
    optimizer              adamw8bit keeps moments in 8 bits by bitsandbytes, embeddings' in 32
    phase                  the block-wise start alone, end to end alone, or both
    compile                fuse the quantizers by torch.compile; None: where the model is large
    shard, offload         spread the model over all processes (FSDP2), in their hosts' memory
    deepspeed              the file of a ZeRO configuration
    teacher                whether the dense model stays in memory, or what it says is kept on disk;
                           of its `teacher_top_k` likeliest tokens (0: of all)
    """

    model: Path
    data: str | tuple[str, ...]
    output: Path
    bits: str
    group_size: int | None = None
    target: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    module_bits: tuple[str, ...] = ()
    init: Path | None = None
    max_steps: int | None = None
    max_length: int = 512
    batch_size: int = 4
    gradient_accumulation: int = 1
    warmup: float = 0.05
    recipe: str = "paretoq"
    lr: float | None = None
    scale_lr: float | None = None
    distill: float | None = None
    temperature: float | None = None
    gradient: Gradient | None = None
    mix_steps: int | None = None
    mix: float | None = None
    block_epochs: int | None = None
    block_windows: int | None = None
    block_batch: int | None = None
    block_compensated: int | None = None
    block_lr: float | None = None
    block_scale_lr: float | None = None
    phase: Literal["all", "block", "end"] = "all"
    teacher: Literal["cached", "live"] = "cached"
    teacher_top_k: int = 64
    seed: int = 0
    loss_on: Literal["all", "assistant"] = "all"
    eval_data: str | None = None
    scale_init: Literal["paper", "mse"] = "mse"
    scale_dtype: Literal["portable", "float32"] = "portable"
    precision: Precision = "auto"
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    gradient_checkpointing: bool = False
    compile: bool | None = None
    shard: bool = False
    offload: bool = False
    deepspeed: Path | None = None
    save_steps: int | None = None
    log_steps: int = 1
    resume: bool = True

    def __post_init__(self) -> None:
        as_given(self)
        if self.bits not in (*WIDTHS, DENSE):
            raise InputError(f"--bits {self.bits} is not a width; choose 1, 1.58, 2, 3, 4 or 16.")
        if self.group_size is not None and self.group_size < 1:
            raise InputError(f"--group-size {self.group_size} is not a group; use -1 per channel.")
        if self.target is not None:
            self._check_target(self.target)
        _ = self._rules
        weighted = [weight is not None for _, weight in self.sources]
        if not weighted or any(weighted) != all(weighted):
            raise InputError("--data: give a weight to every source, as in FILE=0.5, or to none.")
        if self.recipe not in RECIPES:
            raise InputError(f"there is no --recipe {self.recipe}; there are {', '.join(RECIPES)}.")
        self._check_numbers()
        self._check_settings(self.settings)
        self._check_processes()

    def _check_numbers(self) -> None:
        if not 0 <= self.warmup < 1:
            raise InputError(f"--warmup {self.warmup} is not a share between 0 and 1.")
        smallest = {
            **{"max_length": 2, "batch_size": 1, "gradient_accumulation": 1, "save_steps": 1},
            **{"log_steps": 1, "max_steps": 0, "teacher_top_k": 0, "seed": 0},
        }
        for name, least in smallest.items():
            value = getattr(self, name)
            if value is not None and value < least:
                option = name.replace("_", "-")
                said = "is negative" if least == 0 else f"is less than {least}"
                raise InputError(f"--{option} {value} {said}.")

    def _check_settings(self, settings: Recipe) -> None:
        """Of the recipe, and of what was given in its place."""
        for name in ("lr", "scale_lr", "block_lr", "block_scale_lr"):
            if not 0 < getattr(settings, name) < 1:
                raise InputError(f"{_flag(name, self)} is not between 0 and 1, both excluded.")
        for name in ("distill", "mix"):
            if not 0 <= getattr(settings, name) <= 1:
                raise InputError(f"{_flag(name, self)} is not a share from 0 to 1.")
        if not 0 < settings.temperature < 100:
            raise InputError(f"{_flag('temperature', self)} is not between 0 and 100.")
        for name in ("mix_steps", "block_epochs", "block_compensated"):
            if getattr(settings, name) < 0:
                raise InputError(f"{_flag(name, self)} is negative.")
        for name in ("block_windows", "block_batch"):
            if getattr(settings, name) < 1:
                raise InputError(f"{_flag(name, self)} is less than 1.")
        if self.bits == DENSE and settings.has_start:
            raise InputError(
                "--bits 16 has no blocks to start with; leave out --block-epochs and -compensated."
            )
        if self.init is not None and (self.phase == "block" or self.bits == DENSE):
            raise InputError("--init is a start of its own; leave out --phase block and --bits 16.")
        if self.phase == "block" and not settings.has_start:
            raise InputError(
                f"--phase block: the recipe {self.recipe} trains no blocks; --recipe fast does, or "
                "give --block-epochs."
            )

    def _check_processes(self) -> None:
        """What spreads a run over processes, and what does not go with it."""
        if self.shard and world_size() == 1:
            raise InputError("--shard wants several processes; start them with torchrun.")
        if self.offload and not self.shard:
            raise InputError("--offload goes with --shard.")
        if self.optimizer == "adamw8bit" and (self.shard or self.deepspeed is not None):
            raise InputError("--optimizer adamw8bit goes with neither --shard nor --deepspeed.")
        if self.deepspeed is None:
            return
        if self.shard or self.settings.mix_steps:
            raise InputError("--deepspeed goes with neither --shard nor --mix-steps.")
        if self.precision == "fp16":
            raise InputError("--precision fp16 does not go with --deepspeed; use bf16.")
        if "LOCAL_RANK" not in os.environ:
            raise InputError("--deepspeed wants torchrun, or accelerate launch.")
        zero.configuration(self.deepspeed, batch_size=1, gradient_accumulation=1, bf16=False)

    def _check_target(self, target: str) -> None:
        if self.bits != target_bits(target):
            raise InputError(
                f"--target {target} is of {target_bits(target)} bits, not {self.bits}."
            )
        block = TARGETS[target]
        if self.group_size not in (None, block.group_size) or self.scale_dtype != "portable":
            raise InputError(
                f"--target {target} has groups of {block.group_size} and portable scales; leave "
                "--group-size and --scale-dtype out."
            )

    @property
    def scheme(self) -> Scheme | None:
        """Of layers without a rule of their own; None where nothing is quantized."""
        found = self._scheme(self.bits, self.group_size)
        if self.target is None or found is None:
            return found
        block = TARGETS[self.target]
        return replace(found, group_size=block.group_size, super_block=block)

    def _scheme(self, bits: str, group_size: int | None) -> Scheme | None:
        if bits == DENSE:
            return None
        dtype = torch.float16 if self.scale_dtype == "portable" else torch.float32
        return Scheme(WIDTHS[bits].grid, group_size, dtype)

    def scheme_of(self, layer: str) -> Scheme | None:
        """By the name of a layer; None where it stays dense."""
        rule = rule_of(layer, self._rules)
        if rule is not None:
            if rule.group_size == 0:
                same = self.target is not None and rule.bits == self.bits
                return self.scheme if same else self._scheme(rule.bits, self.group_size)
            return self._scheme(rule.bits, rule.group_size)
        return self.scheme if is_selected(layer, self.include, self.exclude) else None

    def check_patterns(self, layers: Iterable[str]) -> None:
        """Raise InputError for a pattern that fits no layer."""
        rules = (rule.pattern for rule in self._rules)
        check_patterns((*self.include, *self.exclude, *rules), layers)

    @property
    def _rules(self) -> list[Rule]:
        return [parse_rule(text, (*WIDTHS, DENSE)) for text in self.module_bits]

    @property
    def sources(self) -> list[tuple[str, float | None]]:
        """Names of the data, and weights where they are given: for all, or for none."""
        names = (self.data,) if isinstance(self.data, str) else self.data
        return [_parse_source(name) for name in names]

    @property
    def starts_by_blocks(self) -> bool:
        """Whether blocks are trained one by one before the steps end to end."""
        return self.phase != "end" and self.init is None and self.settings.has_start

    @property
    def settings(self) -> Recipe:
        """The recipe's, with what was given in their place; rates of scales go with the others."""
        recipe = RECIPES[self.recipe][self.bits]
        given = {field.name: getattr(self, field.name) for field in fields(Recipe)}
        own = {name: value for name, value in given.items() if value is not None}
        for rate, follows in (("lr", "scale_lr"), ("block_lr", "block_scale_lr")):
            if rate in own:
                share = getattr(recipe, follows) / getattr(recipe, rate)
                own.setdefault(follows, own[rate] * share)
        return replace(recipe, **own)

    @property
    def tokens_per_step(self) -> int:
        return self.max_length * self.windows_per_step

    def steps_between_saves(self, max_steps: int) -> int:
        """Of a run of `max_steps`: as told, or a tenth of it within bounds."""
        return self.save_steps or min(200, max(20, max_steps // 10))

    @property
    def windows_per_step(self) -> int:
        """Of all processes together."""
        return self.batch_size * self.gradient_accumulation * world_size()

    def identity(self) -> dict[str, Any]:
        """What must be equal for one run to continue another, as it stands in the marker."""
        found = {key: v for key, v in asdict(self).items() if key not in _FREE_FIELDS}
        found["tokens_per_step"] = self.tokens_per_step
        found["settings"] = asdict(self.settings)  # a recipe that has changed is another one
        found["model"] = str(self.model.resolve())
        found["model_files"] = model_state(self.model)
        if self.init is not None:
            found["init"] = [str(self.init.resolve()), model_state(self.init)]
        found["data"] = [[*text_state(name), weight] for name, weight in self.sources]
        if self.eval_data is not None:
            found["eval_data"] = text_state(self.eval_data)
        marked: dict[str, Any] = json.loads(json.dumps(found, default=str))  # lists, not tuples
        return marked


def _flag(name: str, config: TrainConfig) -> str:
    return f"--{name.replace('_', '-')} {getattr(config.settings, name)}"


def _parse_source(text: str) -> tuple[str, float | None]:
    """`SOURCE` or `SOURCE=WEIGHT`. Raises InputError for a weight that is not positive."""
    if Path(text).is_file():
        return text, None
    name, sign, weight = text.rpartition("=")
    try:
        found = float(weight)
    except ValueError:
        if Path(name).is_file():
            raise InputError(f"--data {text}: {weight!r} is no weight; give a number.") from None
        return text, None
    if not sign:
        return text, None
    if not 0 < found < float("inf"):
        raise InputError(f"--data {text}: its weight is not a positive number.")
    return name, found
