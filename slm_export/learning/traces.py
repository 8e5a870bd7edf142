"""Solutions that a child may learn from: right, finished, of its own problem alone, none twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slm_export.learning.judging import MARK, Judge, answer_in
from slm_export.learning.problems import Leaks, Problem, normalised
from slm_export.learning.teaching import Solution

EXAMPLES = 3
"""Rejected solutions of each kind that are shown."""
_SHOWN = 300
DUPLICATE, LEAKED, UNFINISHED, EMPTY, LONGER = (
    "duplicate",
    "leaked",
    "unfinished",
    "empty",
    "not the shortest",
)


@dataclass(frozen=True)
class Trace:
    """A problem with a solution to learn from; the solution ends with its answer on a line of its own."""

    problem: Problem
    solution: str


@dataclass(frozen=True)
class Selection:
    """What is kept of all solutions, and why the others are not."""

    traces: tuple[Trace, ...]
    asked: int
    rejected: Mapping[str, int]
    examples: Mapping[str, tuple[Mapping[str, str], ...]]
    """Some of each kind of rejected ones, to look at."""
    unsolved: int
    """Problems without any trace."""

    @property
    def rejected_rows(self) -> list[dict[str, str]]:
        """The examples as rows: reason, problem, solution."""
        return [{"reason": kind, **one} for kind, some in sorted(self.examples.items()) for one in some]

    def as_json(self) -> dict[str, Any]:
        """Return what is recorded: counts, no text of a problem, because it goes where a bundle goes."""
        return {
            "solutions": self.asked,
            "kept": len(self.traces),
            "rejected": dict(sorted(self.rejected.items())),
            "problems_without": self.unsolved,
        }


def select(
    problems: Sequence[Problem],
    solutions: Mapping[tuple[str, int], Solution],
    judge: Judge,
    leaks: Leaks,
    advance: Callable[[int], None],
    length: Callable[[str], int] | None = None,
) -> Selection:
    """Judge every solution, and keep what is right, in the order of the problems.

    Given   solutions: (key of the problem, sample) -> what the teacher wrote
            length: of a solution; where given, only the shortest right one of a problem is kept, the first of equals
    """
    kept: list[Trace] = []
    rejected: dict[str, int] = {}
    examples: dict[str, list[Mapping[str, str]]] = {}

    def reject(reason: str, problem: Problem, text: str) -> None:
        rejected[reason] = rejected.get(reason, 0) + 1
        if len(some := examples.setdefault(reason, [])) < EXAMPLES:
            some.append({"problem": problem.text[:_SHOWN], "solution": text[:_SHOWN]})

    by_problem: dict[str, list[Solution]] = {}
    for (key, _), solution in sorted(solutions.items(), key=lambda item: item[0][1]):
        by_problem.setdefault(key, []).append(solution)
    unsolved = 0
    for problem in problems:
        right: list[Trace] = []
        seen: set[str] = set()
        for solution in by_problem.get(problem.key, ()):
            reason = _fault(problem, solution, seen, judge, leaks)
            seen.add(normalised(solution.text))
            if reason is None:
                right.append(Trace(problem, _ended(solution.text)))
            else:
                reject(reason, problem, solution.text)
            advance(1)
        if length is not None and right:
            shortest = min(right, key=lambda trace: length(trace.solution))
            for trace in right:
                if trace is not shortest:
                    reject(LONGER, problem, trace.solution)
            right = [shortest]
        kept += right
        unsolved += not right
    shown = {kind: tuple(some) for kind, some in examples.items()}
    return Selection(tuple(kept), len(solutions), rejected, shown, unsolved)


def _fault(problem: Problem, solution: Solution, seen: set[str], judge: Judge, leaks: Leaks) -> str | None:
    """Return why a solution is rejected, the cheapest reasons first; None for one that is kept."""
    if not solution.text.strip():
        return EMPTY
    if not solution.finished:
        return UNFINISHED
    if normalised(solution.text) in seen:
        return DUPLICATE
    if leaks.in_text(solution.text) is not None:
        return LEAKED
    return judge(problem, solution.text)


def _ended(solution: str) -> str:
    """Return a solution that ends with its answer on a line of its own, as the child is to write it."""
    text = solution.strip()
    answer = answer_in(text)
    last = text.rpartition("\n")[2]
    if answer is None or (answer_in(last) is not None and MARK in last):
        return text
    return f"{text}\n{MARK} {answer}"
