"""Devices: what is asked of one, and a file for each way to reach one (adb, ssh, devicectl)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from slm_export.bench.figures import Conditions


@dataclass(frozen=True)
class Device:
    """What a device says of itself; None where it does not."""

    title: str
    """As a person knows it."""
    machines: tuple[str, ...]
    """Kinds of programs that it runs, in the words of `programs.machine_of`; empty where apps are run."""
    free_bytes: int | None
    """Of the disk that artifacts are put on."""


@dataclass(frozen=True)
class Ran:
    """A program that ran on a device."""

    code: int
    output: str
    """What it wrote to stdout and stderr."""
    peak_rss_mb: float | None


class Place(Protocol):
    """A device, reached by a vendor's tool. Every method raises MachineError where the device fails us."""

    name: ClassVar[str]

    def find(self) -> Device:
        """Find the device, the only one unless one was named; this comes first.

        Raises:
            InputError: none of that name, or several and none was named.
            MissingComponentError: the vendor's tool is not installed.
        """

    def prepare(self) -> None:
        """Make a folder of our own there."""

    def install(self, runner: str) -> None:
        """Bring the vendor's program, or find it there."""

    def push(self, local: Path, name: str) -> None:
        """Bring a file."""

    def run(self, arguments: Sequence[str], timeout_s: float) -> Ran:
        """Run the vendor's program in our folder, and bring back what it wrote."""

    def conditions(self) -> Conditions:
        """Return temperature, throttling and free memory, as the device tells them."""

    def clean_up(self) -> None:
        """End what still runs, and take away what was brought; also after a failure, and after one of `prepare`."""

    def left_behind(self) -> str:
        """Say what is to be removed by hand where cleaning up failed."""
