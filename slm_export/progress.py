"""A sign of life in every long stage: what is being done, for how long, with how much memory.

    progress = Progress()
    with progress.stage("lower to ExecuTorch", total=16) as stage:
        stage.advance(1, "layer 3")

On a terminal one line is kept up to date; elsewhere (a CI log, a pipe) a line is written when a stage
starts, every ten seconds while it runs, and when it ends. Everything goes to stderr. A stderr that
is closed or broken silences the display and disturbs nothing else.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from slm_export.interrupts import still_an_interrupt
from slm_export.memory import peak_resident_mb, resident_mb
from slm_export.reports.words import printable, seconds

_SAMPLE_S = 0.2
_HEARTBEAT_S = 10.0
_JOIN_S = 2.0


@dataclass
class Stage:
    """A stage under way; `advance` says how far it is and what it is at."""

    name: str
    total: int | None = None
    done: int = 0
    note: str = ""
    peak_mb: float = 0.0
    """Highest resident memory seen during this stage."""
    started: float = field(default_factory=time.monotonic)

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count ``count`` further steps as done; ``note`` names the one at hand."""
        self.done += count
        if note is not None:
            self.note = note

    @property
    def elapsed(self) -> float:
        """Seconds since the stage began."""
        return time.monotonic() - self.started

    def sample(self) -> float:
        """Return the resident memory now, and remember the highest."""
        now = resident_mb()
        self.peak_mb = max(self.peak_mb, now)
        return now

    def describe(self, memory_mb: float) -> str:
        """Return ``lower to ExecuTorch  12.3 s, 1,204 MiB, 3/16, layer 3``."""
        parts = [seconds(self.elapsed), f"{memory_mb:,.0f} MiB"]
        if self.total is not None:
            parts.append(f"{self.done}/{self.total}")
        if self.note:
            parts.append(self.note)
        return printable(f"{self.name}  {', '.join(parts)}")


class StderrConsole(Console):
    """A console on stderr that reports a vanished reader as an OSError.

    rich would end the process with exit code 1 instead, and point stdout at /dev/null before that.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        super().__init__(stderr=True, file=file)

    def on_broken_pipe(self) -> None:
        """Raise, so that the caller can go on without a display."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class Progress:
    """Shows and times stages; ``silent`` only times them. Use from one thread.

    A stage inside another is shown but not recorded: its seconds are the outer one's already.
    """

    def __init__(
        self, console: Console | None = None, *, silent: bool = False, heartbeat: float = _HEARTBEAT_S
    ) -> None:
        self.stages: dict[str, float] = {}
        """Wall seconds by stage, in order; a name used twice adds up."""
        self.console = console or StderrConsole()
        self._silent = silent
        self._heartbeat = heartbeat
        self._open: list[Stage] = []
        self._sampled_mb = 0.0

    @property
    def peak_rss_mb(self) -> float:
        """Highest resident memory of this process so far, MiB."""
        self._sampled_mb = max(self._sampled_mb, resident_mb(), peak_resident_mb())
        return self._sampled_mb

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """Show ``name`` as under way until the block ends, however it ends."""
        stage = Stage(name, total)
        outermost = not self._open
        self._open.append(stage)
        display = _Display(self.console, stage, self._heartbeat, animated=outermost, silent=self._silent)
        outcome = "failed"
        try:
            display.begin()
            with still_an_interrupt():
                yield stage
            outcome = "done"
        except (KeyboardInterrupt, SystemExit):
            outcome = "interrupted"
            raise
        finally:
            self._open.remove(stage)
            if outermost:
                self.stages[name] = self.stages.get(name, 0.0) + stage.elapsed
            display.end(outcome)
            self._sampled_mb = max(self._sampled_mb, stage.peak_mb)

    def say(self, text: str) -> None:
        """Write one line, above whatever is being shown."""
        if not self._silent:
            _Writer(self.console).line(text)


class _Writer:
    """Writes to a console until that fails, and then nevermore."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.broken = False

    def line(self, text: str, style: str = "") -> None:
        if self.broken:
            return
        try:
            self.console.print(Text(printable(text), style=style), soft_wrap=True)
        except (OSError, ValueError):
            # Closed (ValueError) or gone (OSError): what is measured matters, not that it is shown.
            self.broken = True


class _Display:
    """Samples memory and shows a stage from a background thread.

    Native code that holds the interpreter's lock stops this thread as well; the next sign of life then
    comes late, and the system's own high-water mark covers the samples that were missed.
    """

    def __init__(
        self, console: Console, stage: Stage, heartbeat: float, *, animated: bool, silent: bool
    ) -> None:
        self._stage = stage
        self._heartbeat = heartbeat
        self._silent = silent
        self._writer = _Writer(console)
        self._spinner = Spinner("dots")
        animated = animated and not silent and is_terminal(console)
        self._live = _live(console, self._spinner) if animated else None
        self._over = threading.Event()
        # A daemon, so that no crash of ours keeps the process alive.
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def begin(self) -> None:
        memory_mb = self._stage.sample()
        if self._live is not None:
            self._update(memory_mb)
            self._draw(self._live.start)
        elif not self._silent:
            self._writer.line(f"{self._stage.name} ...")
        self._thread.start()

    def end(self, outcome: str) -> None:
        self._over.set()
        try:
            if self._thread.is_alive():
                # Bounded: the thread may hang in a write that nobody reads.
                self._thread.join(_JOIN_S)
        finally:
            if self._live is not None:
                self._draw(self._live.stop)
        stage = self._stage
        stage.sample()
        if not self._silent:
            style = {"done": "", "failed": "red", "interrupted": "yellow"}[outcome]
            text = f"{stage.name}: {outcome}, {seconds(stage.elapsed)}, {stage.peak_mb:,.0f} MiB at the peak"
            self._writer.line(text, style)

    def _watch(self) -> None:
        beat = time.monotonic() + self._heartbeat
        while not self._over.wait(_SAMPLE_S):
            memory_mb = self._stage.sample()
            if self._silent:
                continue
            if self._live is not None:
                self._update(memory_mb)
                self._draw(self._live.refresh)
            elif time.monotonic() >= beat:
                beat = time.monotonic() + self._heartbeat
                self._writer.line(f"  {self._stage.describe(memory_mb)}", "dim")

    def _update(self, memory_mb: float) -> None:
        text = Text(self._stage.describe(memory_mb), overflow="ellipsis", no_wrap=True)
        self._spinner.update(text=text)

    def _draw(self, action: Callable[[], None]) -> None:
        if self._writer.broken:
            return
        try:
            action()
        except (OSError, ValueError):
            self._writer.broken = True


def _live(console: Console, spinner: Spinner) -> Live:
    # stdout stays alone: it belongs to --json. Warnings on stderr are printed above the line.
    return Live(
        spinner,
        console=console,
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=True,
    )


def is_terminal(console: Console) -> bool:
    """A real terminal: not a log for which somebody forced colours, and one that can move its cursor."""
    try:
        return os.isatty(console.file.fileno()) and console.is_terminal and not console.is_dumb_terminal
    except (AttributeError, OSError, ValueError):
        return False
