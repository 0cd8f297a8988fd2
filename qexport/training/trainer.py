"""transformers' Trainer with our state on disk and an order of data that a kill does not change."""

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from qexport.errors import QexportError
from qexport.ranks import count_processes, is_main
from qexport.training import state, zero
from qexport.training.config import TrainConfig
from qexport.training.distill import SoftTargets, Teacher, distillation_loss
from qexport.training.mix import Mixing
from qexport.training.progress import ProgressReport, TensorBoardLog
from qexport.training.recipe import Recipe
from qexport.training.text import IGNORED, MixedWindows, Text

__all__ = ["QatTrainer", "make_trainer"]


class QatTrainer(Trainer):
    """Trainer with our checkpoints (`qexport.training.state`) and the dataset's own order.

    settings   rates and loss; teacher: who answers where part of the loss is distillation
    seconds    that its steps have taken, those before a kill included
    """

    settings: Recipe
    optimizer: Any
    teacher: Teacher | None = None
    began: float | None = None  # as time.monotonic has it
    loss_is_scaled_for_ga = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy, and in training the divergence from the teacher."""
        window = inputs.pop("window")
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        tokens, labels = inputs["input_ids"], inputs["labels"]
        outputs = model(input_ids=tokens, use_cache=False)
        targets = self.teacher.targets(window, tokens)
        labels = labels[:, 1:].flatten()
        count = num_items_in_batch if num_items_in_batch is not None else (labels != IGNORED).sum()
        loss = distillation_loss(
            outputs.logits[:, :-1].flatten(0, 1),
            labels,
            SoftTargets(*(part[:, :-1].flatten(0, 1) for part in targets)),
            self.settings.distill,
            self.settings.temperature,
        )
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP takes the mean of what each counted
        return (loss / count, outputs) if return_outputs else loss / count

    @property
    def seconds(self) -> float:
        return 0.0 if self.began is None else time.monotonic() - self.began

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW without decay, with a rate of their own for scales."""
        if self.optimizer is None:
            named = list((self.model if model is None else model).named_parameters())
            scales = [p for name, p in named if name.endswith(".alpha")]
            others = [p for name, p in named if not name.endswith(".alpha")]
            if "bnb" in self.args.optim:
                _keep_precise(self.model)
            kind, arguments = self.get_optimizer_cls_and_kwargs(self.args)
            groups = [
                {"params": others, "lr": self.settings.lr},
                {"params": scales, "lr": self.settings.scale_lr},
            ]
            self.optimizer = kind(groups, **{**arguments, "weight_decay": 0.0})
        made: torch.optim.Optimizer = self.optimizer
        return made

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        progress = {
            "loss_sum": self._total_loss_scalar,
            "loss_pending": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
            "seconds": self.seconds,
            "scaler": None
            if self.accelerator.scaler is None
            else self.accelerator.scaler.state_dict(),
        }
        state.save(
            Path(self.args.output_dir),
            self.state,
            self.model,
            zero.moments(self.model, self.optimizer)
            if self.is_deepspeed_enabled
            else self.optimizer.state,
            self.lr_scheduler,
            progress,
        )

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        if not self.is_deepspeed_enabled or resume_from_checkpoint is None:
            return super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
        # Trainer would have DeepSpeed load pickles of its own
        self._load_from_checkpoint(resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state.load_masters(Path(resume_from_checkpoint), self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if self.is_deepspeed_enabled:
            found = state.load_moments(folder, self.model)
            step = torch.tensor(float(state.step_of(folder)))
            zero.load_moments(self.optimizer, found, step)
        else:
            state.load_optimizer(folder, self.model, self.optimizer)
        state.load_schedule(folder, self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Called once the loader has drawn its own seed, as it had when the state was saved."""
        if checkpoint is not None:
            state.load_random(Path(checkpoint))
            if not is_main():  # the state is the first one's, and dropout is to differ
                torch.manual_seed(self.args.seed + self.state.global_step + self.args.process_index)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's own, and the end of a run that has diverged."""
        if not math.isfinite(logs.get("loss", 0.0)):
            raise QexportError(
                f"the loss is {logs['loss']} at step {self.state.global_step}; lower --lr, or "
                "check the model for NaN."
            )
        super().log(logs, start_time)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.load_progress(Path(checkpoint))["scaler"])


def _keep_precise(model: nn.Module) -> None:
    """Moments of embeddings stay in 32 bits: their gradients are rare and large."""
    # it warns of kernels for other things than moments
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes.optim import GlobalOptimManager

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            for parameter in module.parameters():
                GlobalOptimManager.get_instance().override_config(parameter, "optim_bits", 32)


class _SoFar(TrainerCallback):
    """Gives a resumed run the loss and the time of the steps before the kill, and its own settings.

    Trainer takes how often it saves and logs from the checkpoint; a resume may change that.
    """

    def __init__(self, trainer: QatTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state_: Any, control: Any, **_: Any) -> None:
        self._trainer.began = time.monotonic()
        folder = state.last_checkpoint(Path(args.output_dir))
        if folder is None:
            return
        state_.save_steps, state_.logging_steps = args.save_steps, args.logging_steps
        progress = state.load_progress(folder)
        self._trainer._total_loss_scalar = progress["loss_sum"]
        self._trainer._tr_loss += progress["loss_pending"]
        self._trainer._globalstep_last_logged = progress["last_logged"]
        self._trainer._initial_global_step = 0
        self._trainer.began -= progress["seconds"]


def make_trainer(
    config: TrainConfig,
    model: nn.Module,
    text: Text,
    max_steps: int,
    precision: str,
    report: ProgressReport,
) -> QatTrainer:
    """A trainer for a prepared `model` over a text's windows, told of by `report`."""
    arguments = _arguments(config, max_steps, precision)
    if config.deepspeed is not None:
        count_processes()
    arguments._n_gpu = min(arguments.n_gpu, 1)  # DataParallel would multiply the batch
    total = max(max_steps, 1) * config.windows_per_step
    dataset = MixedWindows(text.rows, total, config.seed, text.sizes, text.weights)
    trainer = QatTrainer(model=model, args=arguments, train_dataset=dataset)
    trainer.settings = config.settings
    if config.settings.mix_steps:
        trainer.add_callback(Mixing(config.settings.mix_steps, config.settings.mix))
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(callback)
    trainer.add_callback(report)
    if is_main():
        trainer.add_callback(TensorBoardLog(str(config.output / "logs")))
    trainer.add_callback(_SoFar(trainer))
    return trainer


def _arguments(config: TrainConfig, max_steps: int, precision: str) -> TrainingArguments:
    deepspeed = None
    if config.deepspeed is not None:
        deepspeed = zero.configuration(
            config.deepspeed,
            batch_size=config.batch_size,
            gradient_accumulation=config.gradient_accumulation,
            bf16=precision == "bf16",
        )
    return TrainingArguments(
        output_dir=str(config.output),
        max_steps=max(max_steps, 1),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=config.settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=int(max_steps * config.warmup),
        weight_decay=0.0,
        seed=config.seed,
        bf16=precision == "bf16" and deepspeed is None,
        fp16=precision == "fp16",
        optim="adamw_bnb_8bit" if config.optimizer == "adamw8bit" else "adamw_torch_fused",
        deepspeed=deepspeed,
        use_cpu=not torch.cuda.is_available() and deepspeed is None,
        ddp_find_unused_parameters=False,
        save_strategy="steps",
        save_steps=config.steps_between_saves(max_steps),
        save_only_model=config.shard,  # Trainer cannot save the rest of these; our state does
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        restore_callback_states_from_checkpoint=False,
    )
