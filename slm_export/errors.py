"""What can go wrong, and the exit code of each.

    SlmExportError
      GateError               1  a gate failed: fidelity, size, latency
      InputError              2  the input or the options are wrong
      MissingComponentError   3  a needed component is not installed
      MachineError            4  the machine failed us: disk full, out of memory, a child that died

An interrupted command (Ctrl-C, SIGTERM) exits with 130.
Every message says what, where and what to do, on one line or a few, without a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar


class SlmExportError(Exception):
    """Base of every error that a user can cause or mend."""

    exit_code: ClassVar[int] = 4


class GateError(SlmExportError):
    """An artifact was made, measured and found wanting; nothing of it is kept."""

    exit_code = 1


class InputError(SlmExportError):
    """The model, a file or an option given by the user is wrong."""

    exit_code = 2


class MissingComponentError(SlmExportError):
    """A package that this export needs is not installed."""

    exit_code = 3


class MachineError(SlmExportError):
    """The disk, the memory or a child process failed."""

    exit_code = 4


_LONGEST = 3000
"""Characters of a message; what a file says in an endless name is cut."""


def shown(message: str) -> str:
    """Return a message as a terminal may have it: names in it come from strangers.

    Control characters and halves of characters are written out; of an endless one the middle is left out.
    """
    text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in message)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


def known_errors() -> dict[str, type[SlmExportError]]:
    """Return the errors of this module by name."""
    return {cls.__name__: cls for cls in SlmExportError.__subclasses__()}


@contextmanager
def needs(format: str, packages: str) -> Iterator[None]:
    """Turn the import of a package that is not installed into what to install; a mistake of ours stays one."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").split(".")[0] == "slm_export":
            raise
        raise MissingComponentError(
            f"the {format} format needs {packages}, which cannot be imported ({error}); "
            f"pip install 'slm-export[{format}]'"
        ) from error


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known word, else ``"; known: a, b"``."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(names)}" if names else ""
