"""On this machine: several artifacts, each in a process of its own, which take turns.

What disturbs the machine then disturbs all of them, and ratios are those of turns that followed each other.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from slm_export.bench.figures import Conditions, Instant, Measurement, Spoken, Spread, speeds
from slm_export.bench.subject import Subject
from slm_export.bench.temperature import host_temperature
from slm_export.bench.workload import Turn, Workload
from slm_export.child import Child
from slm_export.errors import InputError, MissingComponentError
from slm_export.progress import Progress
from slm_export.registry import exporter

_IDLE_LOAD = 0.7
"""Load average from which on other work is worth a word."""
_LOADS = 3
"""Times that an artifact is opened from the disk, and from memory."""


def measure_here(
    subjects: Sequence[Subject], workload: Workload, progress: Progress
) -> tuple[Measurement, ...]:
    """Measure artifacts side by side, each in its own runtime; the first one's context decides the lengths.

    Raises:
        InputError: a runtime cannot load a file, or a length does not fit its context.
        MissingComponentError: a runtime is not installed, or runs on another system alone.
        MachineError: a process died or took too long.
    """
    engines = [engine_of(subject) for subject in subjects]
    with ExitStack() as running:
        tables = []
        for subject, engine in zip(subjects, engines, strict=True):
            child = running.enter_context(Child("slm_export.bench.process", f"measure {subject.name}"))
            with progress.stage(f"open {subject.name}"):
                tables.append(_Table(subject, child, engine, workload))
        return _measured(tables, workload, progress)


def engine_of(subject: Subject) -> str:
    """Return the name of the engine for an artifact."""
    if subject.format == "gguf":
        return "llama_cpp"
    elsewhere = exporter(subject.format).elsewhere
    if elsewhere is not None:
        raise MissingComponentError(f"{subject.name}: {elsewhere}; nothing can be timed on this machine")
    if subject.path.suffix == ".litertlm":
        return "litert_lm"
    if subject.path.suffix == ".tflite":
        return "litert"
    return "genai" if subject.format == "onnx" and subject.generates else "exported"


class _Table:
    """One artifact, its process, and what was found so far."""

    def __init__(self, subject: Subject, child: Child, engine: str, workload: Workload) -> None:
        self.subject, self._child = subject, child
        self.facts: dict[str, Any] = child.ask(
            {
                "do": "open",
                "engine": engine,
                "path": str(subject.path),
                "task": subject.task,
                "threads": workload.threads,
                "room": workload.room,
            }
        )
        self.rounds: list[list[Spoken]] = []
        self.sustained: tuple[Instant, ...] = ()
        self.before = Conditions(host_temperature())
        self._busy = os.getloadavg()[0]
        self.cold: list[float] = []
        self.warm: list[float] = []
        self.memory: dict[str, float] = {}

    def turn(self, turn: Turn) -> Spoken:
        """Take one turn."""
        found = self._child.ask({"do": "turn", "prompt": turn.prompt, "generated": turn.generated})
        return Spoken(turn, found["prefill_s"], found["decode_s"])

    def sustain(self, turn: Turn, seconds: float) -> None:
        """Repeat a turn for so long."""
        asked = {"do": "sustain", "prompt": turn.prompt, "generated": turn.generated, "seconds": seconds}
        self.sustained = tuple(Instant(*values) for values in self._child.ask(asked)["instants"])

    def load(self) -> None:
        """See what memory it took, and open it again from the disk and from memory."""
        self.memory = self._child.ask({"do": "memory"})
        for _ in range(_LOADS):
            for cold, found in ((True, self.cold), (False, self.warm)):
                load_ms = self._child.ask({"do": "load", "cold": cold})["load_ms"]
                found.extend([] if load_ms is None else [load_ms])

    def result(self, workload: Workload) -> Measurement:
        """Return everything."""
        prefill, decode = speeds(self.rounds, workload)
        return Measurement(
            name=self.subject.name,
            format=self.subject.format,
            bytes=self.subject.bytes,
            runtime=self.facts["runtime"],
            where="this machine's CPU",
            threads=workload.threads,
            runs=workload.runs,
            context=self.facts["context"],
            generates=self.facts["generates"],
            cold_load_ms=Spread.of(self.cold),
            warm_load_ms=Spread.of(self.warm),
            prefill=prefill,
            decode=decode,
            **self.memory,
            sustained=self.sustained,
            before=self.before,
            after=Conditions(host_temperature()),
            notes=self._notes(workload),
        )

    def _notes(self, workload: Workload) -> tuple[str, ...]:
        notes = [] if self.cold else ["load from the disk: the system did not let go of the file"]
        if (busy := self._busy) > _IDLE_LOAD:
            notes.append(
                f"the machine was busy before this began (load average {busy:.1f}): "
                "its cores were shared with other work"
            )
        return tuple(notes)


def _measured(tables: Sequence[_Table], workload: Workload, progress: Progress) -> tuple[Measurement, ...]:
    generates = tables[0].facts["generates"]
    if odd := [table.subject.name for table in tables if table.facts["generates"] != generates]:
        raise InputError(
            f"{odd[0]}: a decoder and an encoder have no figure in common; compare what does the same"
        )
    turns = workload.turns(min(table.facts["context"] for table in tables), generates=generates)
    rounds = workload.runs + 1
    with progress.stage("measure", rounds) as stage:
        for number in range(rounds):
            for table in tables:
                spoken = [table.turn(turn) for turn in turns]
                # The first round warms up and is not counted.
                table.rounds.extend([spoken] if number else [])
            stage.advance()
    for table in tables if workload.sustained_s else ():
        with progress.stage(f"measure {table.subject.name} for {workload.sustained_s:.0f} s"):
            # A decoder's shortest prompt: what is sustained is generating.
            table.sustain(turns[0] if generates else turns[-1], workload.sustained_s)
    for table in tables:
        with progress.stage(f"load {table.subject.name}"):
            table.load()
    return tuple(table.result(workload) for table in tables)
