"""transformers' Trainer with our state on disk and an order of data that a kill does not change."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from qexport.errors import QexportError
from qexport.train import state
from qexport.train.config import TrainConfig
from qexport.train.progress import ProgressReport, TensorBoardLog

__all__ = ["QatTrainer", "ShuffledWindows", "make_trainer"]


class ShuffledWindows(Dataset[dict[str, Tensor]]):
    """Windows [n, length] in a seeded order, a new one for each pass, `total` items long.

    The order is a function of the index alone, so that a resumed run sees what it would have seen.
    """

    def __init__(self, rows: Tensor, total: int, seed: int) -> None:
        self._rows = rows
        self._total = total
        self._seed = seed
        self._pass = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number, position = divmod(index, len(self._rows))
        if number != self._pass:
            generator = torch.Generator().manual_seed(self._seed + (number << 32))
            self._order = torch.randperm(len(self._rows), generator=generator)
            self._pass = number
        row = self._rows[self._order[position]]
        return {"input_ids": row, "labels": row}


class QatTrainer(Trainer):
    """Trainer with our checkpoints (`qexport.train.state`) and the dataset's own order."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        progress = {
            "loss_sum": self._total_loss_scalar,
            "loss_pending": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
        }
        state.save(
            Path(self.args.output_dir),
            self.state,
            self.model,
            self.optimizer,
            self.lr_scheduler,
            progress,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state.load_into(Path(resume_from_checkpoint), self.model, None, None)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state.load_into(Path(checkpoint), self.model, self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Called once the loader has drawn its own seed, as it had when the state was saved."""
        if checkpoint is not None:
            state.load_random(Path(checkpoint))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's own, and the end of a run that has diverged."""
        if not math.isfinite(logs.get("loss", 0.0)):
            raise QexportError(
                f"the loss is {logs['loss']} at step {self.state.global_step}; lower --lr, or "
                "check the model for NaN."
            )
        super().log(logs, start_time)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is none: bfloat16 and float32 need no loss scaling."""


class _LossSoFar(TrainerCallback):
    """Gives a resumed run the loss that was summed before the kill, so that its mean is whole."""

    def __init__(self, trainer: QatTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state_: Any, control: Any, **_: Any) -> None:
        folder = state.last_checkpoint(Path(args.output_dir))
        if folder is None:
            return
        progress = state.load_progress(folder)
        self._trainer._total_loss_scalar = progress["loss_sum"]
        self._trainer._tr_loss += progress["loss_pending"]
        self._trainer._globalstep_last_logged = progress["last_logged"]
        self._trainer._initial_global_step = 0


def make_trainer(
    config: TrainConfig,
    model: nn.Module,
    training: Tensor,
    max_steps: int,
    precision: str,
    report: ProgressReport,
) -> QatTrainer:
    """A trainer for a prepared `model` over windows [n, max_length], told of by `report`."""
    arguments = TrainingArguments(
        output_dir=str(config.output),
        max_steps=max(max_steps, 1),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=int(max_steps * config.warmup),
        weight_decay=0.0,
        seed=config.seed,
        bf16=precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        save_strategy="steps",
        save_steps=config.save_steps,
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        restore_callback_states_from_checkpoint=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # DataParallel would multiply the batch
    total = max(max_steps, 1) * config.batch_size * config.gradient_accumulation
    dataset = ShuffledWindows(training, total, config.seed)
    trainer = QatTrainer(model=model, args=arguments, train_dataset=dataset)
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(callback)
    trainer.add_callback(report)
    trainer.add_callback(TensorBoardLog(str(config.output / "logs")))
    trainer.add_callback(_LossSoFar(trainer))
    return trainer
