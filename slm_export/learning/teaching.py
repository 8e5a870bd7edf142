"""What a teacher of reasoning is asked, and what it answers; `endpoint` and `local_teacher` are the two kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from slm_export.learning.judging import MARK

INSTRUCTION = (
    "Solve the problem step by step. Keep every step short. End with a last line that holds the answer alone, "
    f"in the form `{MARK} ...`."
)


@dataclass(frozen=True)
class Question:
    """A problem that a teacher is asked for the ``sample``-th time, counted from 0."""

    key: str
    problem: str
    sample: int
    seed: int


@dataclass(frozen=True)
class Solution:
    """What a teacher wrote, and whether it came to an end by itself."""

    text: str
    finished: bool


class ReasoningTeacher(Protocol):
    """Writes step-by-step solutions."""

    identity: Mapping[str, object]
    """JSON values: whatever decides what it answers; recorded, so no secret is among them."""
    chunk: int
    """Questions that are always answered together: sampling in batches depends on what else is in the batch."""
    at_once: int
    """Chunks that may be asked at the same time."""

    def solve(self, questions: Sequence[Question]) -> list[Solution]:
        """Return a solution for each question.

        Raises:
            InputError: the teacher refuses: a wrong key, an unknown model.
            MachineError: it cannot be reached, or fails.
        """
