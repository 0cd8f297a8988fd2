"""What a training run is asked to do, checked before anything heavy starts."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qexport.errors import InputError
from qexport.grid import Scheme
from qexport.paretoq import WIDTHS

__all__ = ["TrainConfig"]

# Not part of what the run computes: changing these between a kill and a resume is harmless.
_FREE_FIELDS = ("output", "resume", "save_steps", "log_steps")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run.

    model, output          folders; data, eval_data as in `qexport.data.documents`
    bits                   "1", "1.58", "2", "3" or "4"; group_size None is per channel
    max_steps              optimizer steps; None is one pass over the data
    max_length             tokens in a window; batch_size windows in a forward pass
    gradient_accumulation  forward passes in a step
    lr                     peak learning rate; None is the paper's 2e-5 up to 2 bits, else 1e-5
    warmup                 share of the steps in which the rate rises, before its cosine falls
    """

    model: Path
    data: str
    output: Path
    bits: str
    group_size: int | None = None
    max_steps: int | None = None
    max_length: int = 512
    batch_size: int = 4
    gradient_accumulation: int = 1
    lr: float | None = None
    warmup: float = 0.05
    seed: int = 0
    eval_data: str | None = None
    scale_init: Literal["paper", "mse"] = "mse"
    scale_dtype: Literal["portable", "float32"] = "portable"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    gradient_checkpointing: bool = False
    save_steps: int = 200
    log_steps: int = 1
    resume: bool = True

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise InputError(f"--bits {self.bits} is not a width; choose 1, 1.58, 2, 3 or 4.")
        if self.group_size is not None and self.group_size < 1:
            raise InputError(f"--group-size {self.group_size} is not a group; use -1 per channel.")
        if self.max_steps is not None and self.max_steps < 0:
            raise InputError(f"--max-steps {self.max_steps} is negative.")
        if self.lr is not None and not 0 < self.lr < 1:
            raise InputError(f"--lr {self.lr} is not between 0 and 1.")
        if not 0 <= self.warmup < 1:
            raise InputError(f"--warmup {self.warmup} is not a share between 0 and 1.")
        for name in ("max_length", "batch_size", "gradient_accumulation", "save_steps"):
            smallest = 2 if name == "max_length" else 1
            if getattr(self, name) < smallest:
                option = name.replace("_", "-")
                raise InputError(f"--{option} {getattr(self, name)} is less than {smallest}.")

    @property
    def scheme(self) -> Scheme:
        dtype = torch.float16 if self.scale_dtype == "portable" else torch.float32
        return Scheme(WIDTHS[self.bits].grid, self.group_size, dtype)

    @property
    def learning_rate(self) -> float:
        if self.lr is not None:
            return self.lr
        return 1e-5 if self.bits in ("3", "4") else 2e-5

    @property
    def tokens_per_step(self) -> int:
        return self.max_length * self.batch_size * self.gradient_accumulation

    def identity(self) -> dict[str, Any]:
        """What must be equal for one run to continue another, as it stands in the marker."""
        fields = {key: v for key, v in asdict(self).items() if key not in _FREE_FIELDS}
        fields["model"] = str(self.model.resolve())
        fields["model_files"] = [_state(path) for path in sorted(self.model.glob("*.safetensors"))]
        for name in ("data", "eval_data"):
            path = Path(fields[name] or "")
            if path.is_file():
                fields[name] = str(path.resolve())
                fields[f"{name}_file"] = _state(path)
        return fields


def _state(path: Path) -> list[int]:
    """Size and time of a file: another content under the same name is another run."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]
