"""The vendors' own programs that run an artifact on a device: how each is called, and what it prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol

from slm_export.bench.figures import Spoken
from slm_export.bench.runners.executorch import ExecutorRunner, LlamaMain
from slm_export.bench.runners.litert import BenchmarkModel, LiteRTLMMain
from slm_export.bench.subject import Subject
from slm_export.bench.workload import Turn, Workload
from slm_export.errors import InputError


class VendorRunner(Protocol):
    """One program of a vendor's, for one kind of artifact."""

    program: ClassVar[str]
    get: ClassVar[str]
    """Where it comes from."""

    def turns(self, subject: Subject, workload: Workload) -> tuple[Turn, ...]:
        """Return the turns of a round, as far as the program can take them."""

    def files(self, subject: Subject, turns: Sequence[Turn], scratch: Path) -> dict[str, Path]:
        """Return what it needs beside the artifact: name on the device -> file here, made in ``scratch``."""

    def arguments(self, subject: Subject, artifact: str, turn: Turn, threads: int) -> list[str]:
        """Return its command line for one turn."""

    def parse(self, output: str, turn: Turn) -> Spoken | None:
        """Return what it printed of one turn; None where it printed no figures."""


def runner_for(subject: Subject) -> VendorRunner:
    """Return the program that runs an artifact on a device; InputError where none is known."""
    runners: dict[tuple[str, bool], type[VendorRunner]] = {
        (".pte", True): LlamaMain,
        (".pte", False): ExecutorRunner,
        (".litertlm", True): LiteRTLMMain,
        (".tflite", False): BenchmarkModel,
    }
    found = runners.get((subject.path.suffix, subject.generates))
    if found is None:
        raise InputError(
            f"{subject.name}: no vendor's program for {subject.path.suffix} is driven on a device; "
            "measure it on the device itself with --on host, or choose another --format"
        )
    return found()
