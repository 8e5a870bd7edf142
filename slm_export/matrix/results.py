"""What came of every cell, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slm_export.matrix.cells import Cell, Skipped

Outcome = Literal["made", "kept", "failed"]


@dataclass(frozen=True)
class Result:
    """One cell."""

    cell: Cell
    outcome: Outcome
    """kept: it was made before, from the same inputs."""
    code: int
    """The exit code of its export; below 0: the signal that ended it."""
    reason: str
    """Why it failed, or empty."""
    seconds: float | None
    peak_rss_mb: float | None
    predicted_bytes: int | None
    """Of memory; None where nothing is known of such a model."""
    folder: Path
    """Its settings, its log, and what its export printed."""
    bundle: Path | None
    """None where it failed."""


@dataclass(frozen=True)
class Summary:
    """All of a matrix."""

    out: Path
    results: tuple[Result, ...]
    skipped: tuple[Skipped, ...]

    @property
    def failed(self) -> tuple[Result, ...]:
        """The cells that failed."""
        return tuple(one for one in self.results if one.outcome == "failed")

    @property
    def exit_code(self) -> int:
        """0 where all is well, else that of the failure which another try mends least: a gate before a machine."""
        return min((one.code if one.code > 0 else 4 for one in self.failed), default=0)
