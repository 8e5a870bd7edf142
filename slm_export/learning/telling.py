"""What the loop tells, and whom: the live line, the measurements, the watchers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slm_export.errors import InputError
from slm_export.learning.processes import world
from slm_export.learning.settings import Training
from slm_export.progress import Stage
from slm_export.reports.words import seconds

if TYPE_CHECKING:
    from slm_export.learning.trainer import Batch, Measure, Watcher


class Teaching:
    """What the loop tells, and whom: the live line, the measurements, the watchers."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self._stage: Stage | None = None
        self._measure: Measure | None = None
        self._watchers: tuple[Watcher, ...] = ()
        self._tokens = 0
        self._first = self._done = 0
        self._began = time.monotonic()
        self._loss: Tensor | None = None

    def begin(self, stage: Stage, measure: Measure | None, watchers: tuple[Watcher, ...]) -> None:
        """Take what belongs to one run."""
        self._stage, self._measure, self._watchers = stage, measure, watchers

    def started(self, step: int) -> None:
        """Begin to count, at ``step`` where a run goes on."""
        self._first = self._done = step
        self._began, self._tokens = time.monotonic(), 0
        assert self._stage is not None
        self._stage.advance(step, f"going on from step {step}" if step else None)

    def prepare(self, step: int) -> None:
        """Let the watchers prepare a step."""
        for watcher in self._watchers:
            watcher.before_step(step)

    def saw(self, loss: Tensor, batch: Batch) -> None:
        """Take note of a batch; InputError where its loss is not finite."""
        if not bool(torch.isfinite(loss)):
            raise InputError(
                f"the loss is {float(loss.detach()):g} in step {self._done + 1}: training has diverged; lower the "
                f"learning rate (it is {self.training.rate:g})"
            )
        self._loss = loss.detach()
        self._tokens += int(batch["attention_mask"].sum()) * world()

    def stepped(self, step: int) -> None:
        """Tell how far it is: loss, tokens per second, time left."""
        assert self._stage is not None
        self._done = step
        elapsed = time.monotonic() - self._began
        speed = self._tokens / max(elapsed, 1e-9)
        left = elapsed / max(1, step - self._first) * (self.training.steps - step)
        loss = "" if self._loss is None else f"loss {float(self._loss):.4f}, "
        self._stage.advance(1, f"{loss}{speed:,.0f} tokens/s, {seconds(left)} left")

    def measure(self, module: nn.Module) -> dict[str, float]:
        """Measure on held-out text, in evaluation mode."""
        if self._measure is None:
            return {}
        was_training = module.training
        module.eval()
        with torch.no_grad():
            found = dict(self._measure(module))
        module.train(was_training)
        return found

    @property
    def measures(self) -> bool:
        """Whether there is anything to measure on the way."""
        return self._measure is not None
