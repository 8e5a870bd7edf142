"""The parts of tuning on reasoning: ask and judge, make lessons of what proves right, tune, score.

Rejection sampling as in STaR (Zelikman et al. 2022) and its kin, with a teacher in the place of the model itself:
solutions are judged by their answer alone, wrong, duplicate and leaked ones are rejected, and the child is tuned on the
rest with the loss on the solution, not on the problem. Held-out problems, which the teacher's solutions may not
mention, are solved by the child before and after.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slm_export.errors import InputError
from slm_export.learning import models
from slm_export.learning.asked import ask
from slm_export.learning.chats import completion_ids, prompt_ids
from slm_export.learning.judging import Judge
from slm_export.learning.models import Model
from slm_export.learning.places import Place
from slm_export.learning.problems import Leaks, Problem, Problems
from slm_export.learning.reason_settings import Reasoning
from slm_export.learning.scoring import Score, score
from slm_export.learning.teaching import ReasoningTeacher, Solution
from slm_export.learning.traces import Selection, Trace, select
from slm_export.learning.trainer import IGNORED, Curve, Example, causal_loss
from slm_export.learning.updating import update
from slm_export.progress import Progress
from slm_export.source.tasks import GENERATION
from slm_export.tokenization.tokenizer import SourceTokenizer


@dataclass(frozen=True)
class Collected:
    """What a teacher gave."""

    selection: Selection
    """Of its solutions to the problems that teach."""
    score: Score
    """Its own, on held-out problems."""
    held_out: tuple[Trace, ...]
    """Its right solutions of those: text to judge exports of the child on."""


@dataclass(frozen=True)
class Lessons:
    """What a child is tuned on."""

    examples: tuple[Example, ...]
    traces: tuple[Trace, ...]
    too_long: int
    """Traces that do not fit the length of an example, and were left out."""

    @property
    def rows(self) -> list[dict[str, str | None]]:
        """What can be written down of the traces."""
        return [
            {"problem": each.problem.text, "answer": each.problem.answer, "solution": each.solution}
            for each in self.traces
        ]

    @property
    def sha256(self) -> str:
        """Of the examples in their order."""
        return hashlib.sha256(json.dumps([dict(example) for example in self.examples]).encode()).hexdigest()


def collect(
    teacher: ReasoningTeacher,
    problems: Problems,
    judge: Judge,
    settings: Reasoning,
    tokenizer: SourceTokenizer,
    progress: Progress,
) -> Collected:
    """Ask the teacher, and judge what it wrote; the held-out problems too, once each.

    Raises:
        InputError, MachineError: as of the teacher; or nothing that it wrote can be learned from.
    """
    solutions = ask(teacher, problems.training, settings.samples, settings.training.seed, progress)
    with progress.stage("judge the solutions", total=len(solutions)) as stage:
        length = (lambda text: len(tokenizer.encode(text))) if settings.shortest else None
        selection = select(
            problems.training, solutions, judge, Leaks(problems.held_out), stage.advance, length
        )
    if not selection.traces:
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(selection.rejected.items()))
        words = getattr(judge, "last_words", "")
        said = f"; the checker's last words: {words}" if words else ""
        raise InputError(
            f"none of the teacher's {selection.asked} solutions can be learned from ({why}){said}; see that it ends "
            "them with a line `Answer: ...`, and that the known answers are right"
        )
    tested = ask(teacher, problems.held_out, 1, settings.training.seed, progress)
    return Collected(selection, *_teacher_score(problems.held_out, tested, judge))


def lessons(traces: Sequence[Trace], tokenizer: SourceTokenizer, length: int) -> Lessons:
    """Return traces as examples of at most ``length`` tokens, the loss on the solution alone.

    Raises:
        InputError: all of them are longer.
    """
    examples: list[Example] = []
    kept: list[Trace] = []
    for trace in traces:
        prompt = prompt_ids(tokenizer, trace.problem.text)
        completion = completion_ids(tokenizer, trace.problem.text, trace.solution)
        if len(prompt) + len(completion) <= length:
            labels = [IGNORED] * len(prompt) + completion
            examples.append({"input_ids": prompt + completion, "labels": labels})
            kept.append(trace)
    if not kept:
        raise InputError(
            f"all {len(traces)} solutions are longer than {length} tokens with their problem; raise --length, or ask "
            "the teacher for shorter ones"
        )
    return Lessons(tuple(examples), tuple(kept), len(traces) - len(kept))


def tune(model: Model, taught: Lessons, settings: Reasoning, place: Place, progress: Progress) -> Curve:
    """Tune a model on lessons in place."""
    rank, grid = settings.low_rank, settings.grid
    return update(
        model,
        taught.examples,
        causal_loss,
        settings.training,
        place,
        progress,
        "tune the child",
        rank=rank,
        grid=grid,
    )


def scored_once(
    place: Place,
    name: str,
    model: Model,
    problems: Sequence[Problem],
    judge: Judge,
    settings: Reasoning,
    progress: Progress,
) -> Score:
    """Score a model, unless a run that was killed has done so."""
    kept = place.folder / f"{name}.json"
    if kept.is_file():
        return Score(**json.loads(kept.read_text(encoding="utf-8")))
    found = score(model, problems, judge, settings.answer_tokens, progress, f"score the child {name}")
    part = kept.with_suffix(".part")
    part.write_text(json.dumps(vars(found)), encoding="utf-8")
    part.replace(kept)
    return found


def child_of(folder: Path) -> Model:
    """Load the model that is to learn; InputError where it does not generate text."""
    model = models.load(folder)
    if model.task != GENERATION:
        raise InputError(
            f"{folder}: a model for {model.task}; only one that generates text can learn to reason"
        )
    return model


def _teacher_score(
    problems: Sequence[Problem], solutions: Mapping[tuple[str, int], Solution], judge: Judge
) -> tuple[Score, tuple[Trace, ...]]:
    rejected: dict[str, int] = {}
    right: list[Trace] = []
    for problem in problems:
        text = solutions[problem.key, 0].text
        reason = judge(problem, text)
        if reason is None:
            right.append(Trace(problem, text.strip()))
        else:
            rejected[reason] = rejected.get(reason, 0) + 1
    return Score(len(right), len(problems), rejected), tuple(right)
