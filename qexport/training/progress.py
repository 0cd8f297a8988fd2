"""What a user sees while a run trains: a bar on a terminal, a line now and then elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

__all__ = ["ProgressReport", "TensorBoardLog"]

_SECONDS_BETWEEN_LINES = 15.0


class ProgressReport(TrainerCallback):
    """Loss, tokens per second and time left, on `console` (stderr)."""

    def __init__(self, console: Console, tokens_per_step: int) -> None:
        self._console = console
        self._tokens_per_step = tokens_per_step
        self._loss = float("nan")
        self._bar: Progress | None = None
        self._started = self._last_line = time.monotonic()
        self._first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = self._last_line = time.monotonic()
        self._first_step = state.global_step
        if self._console.is_terminal:
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.3f}"),
                TextColumn("{task.fields[speed]:.0f} tokens/s"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console)
            self._bar.add_task(
                "", total=state.max_steps, completed=state.global_step, loss=self._loss, speed=0.0
            )
            self._bar.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" not in (logs or {}):
            return  # the summary at the end, or an evaluation
        self._loss = logs["loss"]
        now = time.monotonic()
        done = state.global_step - self._first_step
        speed = done * self._tokens_per_step / max(now - self._started, 1e-9)
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0], completed=state.global_step, loss=self._loss, speed=speed
            )
        elif now - self._last_line >= _SECONDS_BETWEEN_LINES and done:
            self._last_line = now
            left = (state.max_steps - state.global_step) * (now - self._started) / done
            self._console.print(
                f"step {state.global_step}/{state.max_steps}  loss {self._loss:.3f}  "
                f"{speed:.0f} tokens/s  {left:.0f} s left",
                highlight=False,
            )

    def close(self) -> None:
        """Give the terminal back, however the training ended."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class TensorBoardLog(TrainerCallback):
    """Every logged number as a TensorBoard scalar under `<run>/logs`."""

    def __init__(self, folder: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        for key, value in (logs or {}).items():
            if isinstance(value, int | float):
                self._writer.add_scalar(f"train/{key}", value, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._writer.close()
