"""Win back what compression cost: a short self-distillation to the source model's outputs.

Given   a compressed checkpoint, the model folder it came from, and text
Result  of linear layers on the grid codes and scales as learned, of those of floats a factor on each row and a change
        of ``rank``, merged into the matrix; norms and biases. Same grid, same types, same sizes

The compressed model is the student and the source its own teacher (Hinton et al., "Distilling the Knowledge in a
Neural Network", 2015; for quantized models Liu et al., "LLM-QAT", 2023): the KL divergence of its next-token
probabilities, or 1 - cosine of its embeddings, is lessened by Adam. What is kept is the best of the states that were
measured on held-out windows, the first one among them: never worse there than before.

All of the model is in memory as float32, and as much again twice where codes are learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar

import torch
from torch import Tensor

from slm_export.checkpoint import Checkpoint, PassResult
from slm_export.compression.distillation import Student, Teacher, batches_of
from slm_export.compression.workbench import DEFAULT, Workbench
from slm_export.errors import InputError
from slm_export.source.load import load_checkpoint
from slm_export.weights import Weight

_MEASURED = 8
"""Times that the student is measured on held-out windows."""
_SEED = 4


@dataclass(frozen=True)
class Recover:
    """Options: how long, how fast, and whether codes may turn."""

    name: ClassVar[str] = "recover"
    calibrated: ClassVar[bool] = True
    quantizes: ClassVar[bool] = False
    structural: ClassVar[bool] = False

    steps: int = 200
    tokens: int = 2048
    """Of text in each step."""
    code_rate: float = 0.02
    """Largest change of a number behind a code in one step, in units of its scale; 0: codes stay as they are."""
    rate: float = 0.001
    """The same of scales, norms and biases, as a share of their size."""
    rank: int = 0
    """Of the change that linear layers of floats learn (LoRA); it is merged before anything is quantized. 0: none."""
    rank_rate: float = 0.002
    """Largest change of a value of its two thin matrices in one step."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.tokens < 1:
            raise InputError(f"{self.name}: steps and tokens must be at least 1")
        if self.rate < 0 or self.code_rate < 0 or not (self.rate or self.code_rate or self.rank):
            raise InputError(
                f"{self.name}: rate and code_rate must not be negative, and not both 0 without a rank"
            )
        if self.rank < 0 or self.rank_rate <= 0:
            raise InputError(f"{self.name}: rank must not be negative, and rank_rate must be positive")

    def check(self, checkpoint: Checkpoint) -> None:
        """Any model can be its own teacher."""

    def run(self, checkpoint: Checkpoint, work: Workbench = DEFAULT) -> PassResult:
        """Learn, and return the checkpoint with what was best on held-out windows."""
        work.text(self.name)
        student = Student(checkpoint, codes=self.code_rate > 0, others=self.rate > 0, rank=self.rank)
        if self.rank and not student.thin:
            raise InputError(
                f"{self.name}: a change of rank {self.rank} is merged into matrices of floats, and here all linear "
                "layers are quantized; let this pass come before the quantization, or leave out rank"
            )
        notes: list[str] = []
        made = cache(lambda: self._learn(student, checkpoint, work, notes))
        changed: dict[str, Weight] = {
            name: work.keeper.keep(name, partial(lambda name: made()[name], name)) for name in student.names
        }
        skipped = {
            name: "not learned: no linear layer, norm or bias"
            for name in checkpoint.weights
            if name not in changed
        }
        return PassResult(checkpoint.with_weights(changed), skipped, tuple(notes))

    def _learn(
        self, student: Student, checkpoint: Checkpoint, work: Workbench, notes: list[str]
    ) -> dict[str, Weight]:
        text = work.text(self.name)
        teacher = Teacher(load_checkpoint(checkpoint.folder), checkpoint)
        held_out = batches_of(text.held_out)
        best = first = self._measure(student, teacher, held_out)
        kept = student.weights()
        optimizer = torch.optim.Adam(
            [
                {"params": student.codes, "lr": self.code_rate, "betas": (0.9, 0.95)},
                {"params": student.others, "lr": self.rate},
                {"params": student.thin, "lr": self.rank_rate},
            ]
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.steps)
        batches = self._endless(batches_of(text.learning))
        for step in range(1, self.steps + 1):
            optimizer.zero_grad()
            self._backward(student, teacher, next(batches))
            optimizer.step()
            schedule.step()
            student.clip()
            work.advance(1, f"step {step} of {self.steps}, loss {best:.5f} at best")
            if step * _MEASURED // self.steps > (step - 1) * _MEASURED // self.steps:
                loss = self._measure(student, teacher, held_out)
                if loss < best:
                    best, kept = loss, student.weights()
        notes.append(f"loss on held-out windows {first:.5f} before, {best:.5f} after")
        return kept

    def _endless(self, batches: list[Tensor]) -> Iterator[list[Tensor]]:
        """Yield batches of about so many tokens, in another order each time round."""
        generator = torch.Generator().manual_seed(_SEED)
        taken: list[Tensor] = []
        while True:
            for index in torch.randperm(len(batches), generator=generator).tolist():
                taken.append(batches[index])
                if sum(ids.numel() for ids in taken) >= self.tokens:
                    yield taken
                    taken = []

    def _backward(self, student: Student, teacher: Teacher, batches: list[Tensor]) -> None:
        total = sum(ids.numel() for ids in batches)
        for ids in batches:
            loss = student.loss(ids, teacher(ids)) * (ids.numel() / total)
            loss.backward()  # type: ignore[no-untyped-call]

    @staticmethod
    @torch.no_grad()
    def _measure(student: Student, teacher: Teacher, batches: list[Tensor]) -> float:
        losses = [student.loss(ids, teacher(ids)) * ids.numel() for ids in batches]
        return float(sum(losses)) / sum(ids.numel() for ids in batches)
