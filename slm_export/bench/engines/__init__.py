"""The runtimes of this machine that an artifact can be measured in, one file each.

A module has ``open_engine(path, task, threads, room)``, which returns an `Engine`; ``room`` is how many tokens of
context will be needed, for runtimes that are told.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Protocol


class Engine(Protocol):
    """An artifact that is open in its own runtime."""

    runtime: str
    """Name and version."""
    context: int
    """Tokens that the context holds; of an encoder, the longest input."""
    generates: bool
    """Whether it is a decoder."""
    load_s: float
    empty_mb: float
    """Resident memory of the process with the runtime loaded and no artifact, MiB."""

    def turn(self, prompt: int, generated: int) -> tuple[float, float | None]:
        """Read a prompt of this many tokens from the beginning, then generate; return the seconds of both.

        An encoder is called once, with an input of the length of the prompt.
        """

    def close(self) -> None:
        """Let go of the artifact and of its memory."""


def open_engine(name: str, path: Path, task: str, threads: int, room: int) -> Engine:
    """Open an artifact in the runtime called ``name``.

    Raises:
        InputError: the runtime cannot load it.
        MissingComponentError: the runtime is not installed.
    """
    module = importlib.import_module(f"slm_export.bench.engines.{name}")
    engine: Engine = module.open_engine(path, task, threads, room)
    return engine


def version(package: str) -> str:
    """Return ``package 1.2.3``."""
    from importlib.metadata import version

    return f"{package} {version(package)}"
