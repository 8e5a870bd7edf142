"""What people see while a matrix is made: a line for everything that ends, and under it a table of what runs.

On a terminal the table is kept up to date; elsewhere a line comes for every start, and every half minute one for each
export that runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from slm_export.matrix.cells import Cell
from slm_export.matrix.results import Result
from slm_export.progress import is_terminal
from slm_export.reports.words import printable, seconds

_HEARTBEAT_S = 30.0
_TAIL = 4096  # bytes of a log that hold its last line


@dataclass
class _Running:
    cell: Cell
    log: Path
    predicted: int | None
    began: float = field(default_factory=time.monotonic)

    def row(self) -> tuple[str, str, str, str]:
        memory = "" if self.predicted is None else f"{self.predicted / 1e9:.1f} GB"
        return self.cell.name, seconds(time.monotonic() - self.began), memory, last_line(self.log)


class Board:
    """A watch of `run`; a context manager."""

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total = console, total
        self._running: dict[str, _Running] = {}
        self._over = 0
        self._beat = time.monotonic()
        self._live = (
            Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False)
            if is_terminal(console)
            else None
        )
        self._broken = False

    def __enter__(self) -> Board:
        """Show the table, where there is a terminal."""
        with self._unless_broken():
            if self._live:
                self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Take the table away."""
        with self._unless_broken():
            if self._live:
                self._live.stop()

    def started(self, cell: Cell, log: Path, predicted: int | None) -> None:
        """Add a row, or print a line."""
        self._running[cell.name] = running = _Running(cell, log, predicted)
        if not self._live:
            memory = running.row()[2]
            self._say(f"{cell.name} ..." + (f"  {memory} of memory predicted" if memory else ""))

    def ended(self, result: Result) -> None:
        """Print how a cell ended."""
        self._running.pop(result.cell.name, None)
        self._over += 1
        took = "" if result.seconds is None or result.outcome == "kept" else f", {seconds(result.seconds)}"
        text = f"{result.cell.name}: {result.outcome}{took}  ({self._over} of {self._total})"
        if result.outcome == "failed":
            text += f"\n  {result.reason}"
        self._say(text, "red" if result.outcome == "failed" else "")

    def beat(self, waiting: int) -> None:
        """Bring the table up to date."""
        if self._live and not self._broken:
            self._draw(self._live, waiting)
        elif time.monotonic() - self._beat >= _HEARTBEAT_S:
            self._beat = time.monotonic()
            for running in self._running.values():
                name, took, _, stage = running.row()
                self._say(f"  {name}  {took}  {stage}", "dim")

    def _draw(self, live: Live, waiting: int) -> None:
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        for head in (f"{len(self._running)} running, {waiting} waiting", "for", "memory", ""):
            table.add_column(head, no_wrap=True, overflow="ellipsis")
        for running in self._running.values():
            table.add_row(*(Text(printable(text)) for text in running.row()))
        with self._unless_broken():
            live.update(table, refresh=True)

    def _say(self, text: str, style: str = "") -> None:
        with self._unless_broken():
            for line in text.splitlines():
                if not self._broken:
                    self._console.print(Text(printable(line), style), soft_wrap=True)

    @contextmanager
    def _unless_broken(self) -> Iterator[None]:
        """Show nothing more on a terminal that is closed or gone: what is made matters, not that it is shown."""
        try:
            yield
        except (OSError, ValueError):
            self._broken = True


def last_line(path: Path) -> str:
    """Return the last line of a log, or nothing where there is none yet."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            lines = file.read().decode("utf-8", errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
