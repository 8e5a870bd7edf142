"""Personal data in prompts that could leave: found by the anonymiser, and kept here or replaced.

Patterns and checksums see e-mail addresses, numbers of accounts and the like; names of people they see where a word
says that one comes (docs/privacy.md has what was found and what was not). It is a net under the rule, not a proof.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from slm_export.errors import MissingComponentError


class Span(Protocol):
    """What was found: text[start:end]."""

    @property
    def start(self) -> int:
        """Where it begins."""

    @property
    def end(self) -> int:
        """Where it ends."""

    @property
    def kind(self) -> str:
        """What it is."""


Find = Callable[[str], Sequence[Span]]


def presidio() -> Find:
    """Return what finds every kind of personal data that is known.

    Raises:
        MissingComponentError: it is not installed.
    """
    try:
        from slm_export.privacy.finder import Finder
    except ImportError as error:
        raise MissingComponentError(_words(str(error))) from error
    try:
        return Finder().find
    except MissingComponentError as error:
        raise MissingComponentError(_words(str(error))) from error


class Screen:
    """Looks through prompts; what looks is made once, when it is needed."""

    def __init__(self, make: Callable[[], Find] = presidio) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._find: Find | None = None

    def ready(self) -> None:
        """Make what looks; raises what that raises."""
        self._finding("")

    def kinds(self, text: str) -> tuple[str, ...]:
        """Return the kinds of personal data in a text."""
        return tuple(sorted({span.kind for span in self._finding(text)}))

    def replaced(self, text: str) -> str:
        """Return a text with the same mark wherever the same data stood: ``<EMAIL_ADDRESS_1>``."""
        made, at = [], 0
        numbers: dict[tuple[str, str], int] = {}
        for span in self._finding(text):
            known = (span.kind, text[span.start : span.end])
            numbers.setdefault(known, 1 + sum(kind == span.kind for kind, _ in numbers))
            made += [text[at : span.start], f"<{span.kind}_{numbers[known]}>"]
            at = span.end
        return "".join((*made, text[at:]))

    def _finding(self, text: str) -> Sequence[Span]:
        with self._lock:
            if self._find is None:
                self._find = self._make()
            return self._find(text)


def _words(reason: str) -> str:
    return (
        f"inputs that could leave are looked through for personal data, which needs what is not there ({reason}); "
        "pip install 'slm-export[privacy]', or write personal_data = \"send\" to let all of it leave"
    )
