"""What a pass works with, beside the checkpoint: where its weights are kept, text to calibrate on, a sign of life."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from slm_export.bundles.finished import IN_MEMORY, Keeper
from slm_export.compression.calibration import Calibration
from slm_export.errors import InputError

Advance = Callable[[int, str], None]


def _silent(count: int, what: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Workbench:
    """Handed to every pass; the defaults serve tests and scripts."""

    keeper: Keeper = IN_MEMORY
    calibration: Calibration | None = None
    """Text that activations are measured on; None where no pass of the recipe asked for one."""
    advance: Advance = _silent
    """Counts steps that are done and names the one at hand; see `progress.Stage.advance`."""

    def text(self, asking: str) -> Calibration:
        """Return the calibration text; ``asking`` is the name of the pass."""
        if self.calibration is None:
            raise InputError(f"{asking}: needs calibration text, and was given none")
        return self.calibration

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """Yield a folder for what does not fit in memory.

        It lies beside the finished weights, so that what it holds is found again after a kill; without a keeper on
        disk it is a temporary one.
        """
        kept: Path | None = getattr(self.keeper, "folder", None)
        if kept is not None:
            scratch = kept / "scratch"
            scratch.mkdir(parents=True, exist_ok=True)
            yield scratch
            return
        with tempfile.TemporaryDirectory(prefix="slm-export-") as made:
            yield Path(made)


DEFAULT = Workbench()
