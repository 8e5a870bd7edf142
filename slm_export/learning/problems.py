"""Problems with known answers: read strictly, and parted into those that teach and those that judge.

A file of them is JSONL, an object on each line: ``{"problem": "12 + 30", "answer": "42"}``. The answer may be left out
where a checker judges. Which problems are held out follows from their words alone: in another order of the file they
are the same.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slm_export.errors import InputError
from slm_export.learning.jsonlines import Line, read_lines

HELD_OUT_SHARE = 0.2
MOST_HELD_OUT = 500
LEAST_HELD_OUT = 10
_KEYS = ("problem", "answer")
_WORD = re.compile(r"[0-9]+|[^\W\d]+|[^\w\s]")


@dataclass(frozen=True)
class Problem:
    """A problem, and the answer that is known to be right; None where only a checker can tell."""

    text: str
    answer: str | None
    where: str
    """File and line, as errors name them."""

    @property
    def key(self) -> str:
        """sha256 of the problem's normalised words."""
        return hashlib.sha256(normalised(self.text).encode()).hexdigest()


@dataclass(frozen=True)
class Problems:
    """Problems that teach and problems that judge; none is in both."""

    training: tuple[Problem, ...]
    held_out: tuple[Problem, ...]


def normalised(text: str) -> str:
    """Return the words of a text without what does not tell two problems apart: case, spacing, forms of characters."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split())


def read_problems(path: Path, *, answers_needed: bool) -> tuple[Problem, ...]:
    """Return the problems of a JSONL file in order.

    Raises:
        InputError: the file cannot be read, a line is no such object, an answer is missing though it is needed, or
            two lines hold the same problem.
    """
    problems = tuple(_problem(line, answers_needed) for line in read_lines(path, _KEYS))
    first: dict[str, Problem] = {}
    for problem in problems:
        earlier = first.setdefault(problem.key, problem)
        if earlier is not problem:
            raise InputError(f"{problem.where}: the same problem as {earlier.where}; keep one of them")
    return problems


def part(problems: Sequence[Problem], count: int | None = None) -> Problems:
    """Hold out ``count`` problems, or a fifth of them up to 500; both parts keep the order of the file.

    Raises:
        InputError: too few would be left to judge by or to teach with.
    """
    wanted = min(MOST_HELD_OUT, math.ceil(len(problems) * HELD_OUT_SHARE)) if count is None else count
    if wanted < LEAST_HELD_OUT or len(problems) - wanted < 1:
        raise InputError(
            f"{len(problems)} problems, {wanted} of them held out: at least {LEAST_HELD_OUT} are needed to judge by "
            "and one to teach with; give more problems, or another --held-out-problems"
        )
    chosen = {problem.key for problem in sorted(problems, key=lambda problem: problem.key)[:wanted]}
    return Problems(
        tuple(problem for problem in problems if problem.key not in chosen),
        tuple(problem for problem in problems if problem.key in chosen),
    )


def joined(training: Sequence[Problem], held_out: Sequence[Problem]) -> Problems:
    """Return two files of problems as they are.

    Raises:
        InputError: a held-out problem is among those that teach, or there are too few.
    """
    taught = {problem.key: problem for problem in training}
    for problem in held_out:
        if problem.key in taught:
            raise InputError(
                f"{problem.where}: held out, but {taught[problem.key].where} teaches it; remove one of them"
            )
    if len(held_out) < LEAST_HELD_OUT or not training:
        raise InputError(
            f"{len(training)} problems to teach with and {len(held_out)} to judge by; "
            f"at least 1 and {LEAST_HELD_OUT} are needed"
        )
    return Problems(tuple(training), tuple(held_out))


class Leaks:
    """Finds held-out problems in other texts, as whole words."""

    def __init__(self, held_out: Sequence[Problem]) -> None:
        self._words = {_words(problem.text): problem for problem in held_out}

    def in_text(self, text: str) -> Problem | None:
        """Return a held-out problem that stands in a text, or None."""
        words = _words(text)
        return next((problem for own, problem in self._words.items() if own in words), None)


def _words(text: str) -> str:
    """Return words, numbers and signs with single spaces between and around them."""
    return f" {' '.join(_WORD.findall(normalised(text)))} "


def _problem(line: Line, answer_needed: bool) -> Problem:
    text = line.text("problem")
    answer = line.values.get("answer")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    if answer is not None and (not isinstance(answer, str) or not answer.strip()):
        raise InputError(f"{line.where}: 'answer' must be a text or a number")
    if answer is None and answer_needed:
        raise InputError(f"{line.where}: no 'answer'; give one, or a --checker that can tell without")
    return Problem(text, answer, line.where)
