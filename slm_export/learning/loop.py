"""transformers' Trainer as `trainer` drives it. Imported only when something is trained: it takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from slm_export.errors import InputError
from slm_export.learning.processes import rank, wait_for_all, world
from slm_export.learning.settings import Training
from slm_export.learning.sharding import read_state, write_state

_KEPT = 2
"""Checkpoints: while one is written, the one before is complete."""
_SCHEDULER = "scheduler.pt"
_LOGGED = 200
"""Points of a curve, about."""


def arguments(training: Training, folder: Path) -> TrainingArguments:
    """Return the Trainer's arguments for our settings.

    Raises:
        InputError: a batch that so many processes cannot share.
    """
    share, left = divmod(training.batch, world())
    if left:
        raise InputError(f"a batch of {training.batch} cannot be shared by {world()} processes evenly")
    together = next(n for n in range(min(training.together, share), 0, -1) if share % n == 0)
    gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=training.steps,
        per_device_train_batch_size=together,
        gradient_accumulation_steps=share // together,
        learning_rate=training.rate,
        lr_scheduler_type=training.schedule if training.schedule != "constant" else "constant_with_warmup",
        warmup_steps=round(training.warmup * training.steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.largest_gradient,
        seed=training.seed,
        data_seed=training.seed,
        use_cpu=not gpu,
        bf16=gpu and torch.cuda.is_bf16_supported(),
        logging_strategy="steps",
        logging_steps=max(1, training.steps // _LOGGED),
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=training.measure_steps,
        save_strategy="steps",
        save_steps=training.checkpoint_steps,
        save_total_limit=_KEPT,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
    )


class Loop(Trainer):  # type: ignore[misc]  # transformers has no types
    """The Trainer with a loss that is a plain callable, in an order that is settled."""

    def __init__(self, loss: Callable[..., Tensor], teaching: Any, **options: Any) -> None:
        super().__init__(**options)
        self.teaching = teaching
        self._loss = loss
        # Otherwise it would scale by counts of labels that only its own losses know of.
        self.model_accepts_loss_kwargs = False
        if world() > 1:
            # Shared out already: accelerate would make a copy for every process of it.
            self.accelerator.prepare_model = lambda model, *_, **__: model

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """Return the loss of a batch."""
        loss = self._loss(model, inputs)
        self.teaching.saw(loss, inputs)
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure, and put the figures into the curve."""
        found = {f"eval_{name}": value for name, value in self.teaching.measure(self.model).items()}
        if found:
            self.log(found)
        return found

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights of a checkpoint; shared out, they are written with the optimizer."""
        if world() == 1:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if world() == 1:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        write_state(self.model, self.optimizer.optimizer, Path(output_dir))
        if rank() == 0:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if world() == 1:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if world() == 1:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            read_state(self.model, self.optimizer.optimizer, Path(checkpoint))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / _SCHEDULER, weights_only=True))


class Manners(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Tells of every step, and marks checkpoints that are complete."""

    def __init__(self, teaching: Any, mark_complete: Callable[[Path], None]) -> None:
        self._teaching, self._mark = teaching, mark_complete

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count from where the run goes on."""
        self._teaching.started(int(state.global_step))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let the watchers prepare."""
        self._teaching.prepare(int(state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tell how far it is."""
        self._teaching.stepped(int(state.global_step))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark what has been written whole, by all processes."""
        wait_for_all()
        if rank() == 0:
            self._mark(Path(args.output_dir) / f"checkpoint-{state.global_step}")
