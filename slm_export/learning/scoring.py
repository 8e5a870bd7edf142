"""How many held-out problems a model solves, with an interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slm_export.learning.chats import prompt_ids
from slm_export.learning.generating import write
from slm_export.learning.judging import Judge
from slm_export.learning.measures import Interval, share
from slm_export.learning.models import Model
from slm_export.learning.problems import Problem
from slm_export.progress import Progress


@dataclass(frozen=True)
class Score:
    """Right answers among all, and what the others were rejected for."""

    right: int
    problems: int
    rejected: dict[str, int]

    @property
    def accuracy(self) -> Interval:
        """Right answers over problems, with Wilson's interval of 95%."""
        return share(self.right, self.problems)

    def as_json(self) -> dict[str, Any]:
        """Return the figures that are recorded."""
        return {
            "right": self.right,
            "problems": self.problems,
            **vars(self.accuracy),
            "rejected": dict(sorted(self.rejected.items())),
        }


def score(
    model: Model,
    problems: Sequence[Problem],
    judge: Judge,
    most: int,
    progress: Progress,
    what: str,
    batch: int = 32,
) -> Score:
    """Let a model solve problems greedily, and judge what it wrote; ``most`` tokens for each."""
    rejected: dict[str, int] = {}
    model.module.eval()
    # Alike in length together: the less padding, the less work. What is written does not depend on it.
    prompts = {problem.key: prompt_ids(model.tokenizer, problem.text) for problem in problems}
    ordered = sorted(problems, key=lambda problem: (len(prompts[problem.key]), problem.key))
    with progress.stage(what, total=len(problems)) as stage:
        for at in range(0, len(ordered), batch):
            some = ordered[at : at + batch]
            texts = write(model, [prompts[problem.key] for problem in some], most)
            for problem, written in zip(some, texts, strict=True):
                reason = judge(problem, written.text)
                if reason is not None:
                    rejected[reason] = rejected.get(reason, 0) + 1
                stage.advance(1)
    return Score(len(problems) - sum(rejected.values()), len(problems), rejected)
