r"""Whether an answer is right: found in a solution, and held against the one that is known.

A solution ends with its answer on a line ``Answer: 42``; \boxed{42}, in which mathematics likes to put it, counts too.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Protocol

from slm_export.learning.problems import Problem, normalised

MARK = "Answer:"
_MARKED = re.compile(r"^[\s*#>-]*answer[\s*]*:[\s*]*(.*?)[\s*]*$", re.IGNORECASE | re.MULTILINE)
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*[1-9]\d*)?|[-+]?\.\d+")
_DIGITS = 400
"""Of a number that is compared as one; a longer one is compared as a text."""


class Judge(Protocol):
    """Tells whether a solution is right."""

    def __call__(self, problem: Problem, solution: str) -> str | None:
        """Return None for a right solution, else in a few words why it is rejected."""


def answer_in(solution: str) -> str | None:
    r"""Return the answer of a solution: behind the last ``Answer:``, else in the last \boxed{}; None without one."""
    marked = [match for match in _MARKED.findall(solution) if match.strip()]
    if marked:
        boxed = _BOXED.findall(marked[-1])
        return str(boxed[-1] if boxed else marked[-1]).strip()
    boxed = _BOXED.findall(solution)
    return str(boxed[-1]).strip() if boxed else None


def same_answer(given: str, known: str) -> bool:
    """Whether two answers say the same: equal numbers however they are written, else equal normalised texts."""
    first, second = _plain(given), _plain(known)
    if first == second:
        return True
    numbers = _number(first), _number(second)
    return None not in numbers and numbers[0] == numbers[1]


def known_answers(problem: Problem, solution: str) -> str | None:
    """Judge by the known answer; see `Judge`."""
    assert problem.answer is not None, "problems without an answer need a checker"
    given = answer_in(solution)
    if given is None:
        return "no answer"
    return None if same_answer(given, problem.answer) else "wrong"


def _plain(text: str) -> str:
    """Return an answer without the signs that writers put around it."""
    return normalised(text).strip(" $*`\"'").rstrip(".").rstrip(" $*`\"'")


def _number(text: str) -> Fraction | None:
    if len(text) > _DIGITS or not _NUMBER.fullmatch(text):
        return None
    return Fraction(re.sub(r"[,\s]", "", text)) if "." not in text or "/" not in text else None
