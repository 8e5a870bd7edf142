"""On a device: find it, check it, bring the artifact and the vendor's program, run, bring results back, clean up."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from slm_export.bench.figures import Conditions, Instant, Measurement, Spoken, Spread, speeds
from slm_export.bench.places import Device, Place
from slm_export.bench.runners import VendorRunner, runner_for
from slm_export.bench.subject import Subject
from slm_export.bench.workload import Turn, Workload
from slm_export.bundles.checksums import size_of
from slm_export.errors import InputError, MachineError, MissingComponentError, SlmExportError
from slm_export.progress import Progress
from slm_export.reports.words import megabytes

_RUN_S = 1800.0
"""Seconds that one turn may take."""
_SUSTAINED_TOKENS = 512
_SPARE_BYTES = 64_000_000
"""Free space that is left to the device."""
_NOTES = (
    "load from the disk: not measured, because a device keeps what was just brought to it in memory",
    "memory of the model alone: not measured, because the vendor's program loads it at once",
)


@dataclass
class _Job:
    """One artifact: its names on the device, and what was found so far."""

    subject: Subject
    runner: VendorRunner
    artifact: str
    """Its name on the device."""
    files: dict[str, Path]
    rounds: list[list[Spoken]] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    sustained: list[Instant] = field(default_factory=list)
    before: Conditions = field(default_factory=Conditions)
    after: Conditions = field(default_factory=Conditions)


def measure_there(
    place: Place, subjects: Sequence[Subject], program: str | None, workload: Workload, progress: Progress
) -> tuple[Measurement, ...]:
    """Measure artifacts side by side on a device; ``program``: the vendor's, a file here or a name there.

    Raises:
        InputError: no vendor's program is known for a format, or the device does not run the one that was given.
        MissingComponentError: the tool that reaches the device, or the vendor's program, is not there.
        MachineError: the device is full, refuses, does not answer, or went away.
    """
    first, *others = subjects
    # A file of another tool is given the first one's tokenizer: what is said does not matter to the clock.
    known = {"tokenizer": first.tokenizer, "context": first.context}
    others = [
        other if other.context else dataclasses.replace(other, **known)  # type: ignore[arg-type]
        for other in others
    ]
    turns = runner_for(first).turns(first, workload)
    with progress.stage(f"find the device ({place.name})"):
        device = place.find()
    with tempfile.TemporaryDirectory(prefix="slm-export-") as scratch:
        jobs = [
            _job(subject, turns, number, Path(scratch)) for number, subject in enumerate((first, *others))
        ]
        if odd := [job for job in jobs if job.runner.program != jobs[0].runner.program]:
            raise InputError(
                f"{odd[0].subject.name}: needs {odd[0].runner.program} on a device, and {first.name} needs "
                f"{jobs[0].runner.program}; compare what one program runs, or use --on host"
            )
        _check_space(device, jobs)
        with _prepared(place):
            _bring(place, jobs, program, progress)
            _run_all(place, jobs, turns, workload, progress)
    return tuple(_result(job, device, workload) for job in jobs)


def _job(subject: Subject, turns: Sequence[Turn], number: int, scratch: Path) -> _Job:
    runner = runner_for(subject)
    return _Job(
        subject, runner, f"model-{number}{subject.path.suffix}", runner.files(subject, turns, scratch)
    )


def _check_space(device: Device, jobs: Sequence[_Job]) -> None:
    files = [file for job in jobs for file in (job.subject.path, *job.files.values())]
    needed = sum(map(size_of, files)) + _SPARE_BYTES
    if device.free_bytes is not None and device.free_bytes < needed:
        raise MachineError(
            f"{device.title}: has {megabytes(device.free_bytes)} free where {megabytes(needed)} are needed; "
            "free some space there"
        )


@contextmanager
def _prepared(place: Place) -> Iterator[None]:
    """Have a folder on the device for as long as the block lasts, however it ends."""
    try:
        place.prepare()
        yield
    except BaseException as error:
        left = _left(place)
        if left and isinstance(error, SlmExportError):
            raise type(error)(f"{error}\n  {left}") from error
        raise
    if left := _left(place):
        raise MachineError(left)


def _left(place: Place) -> str | None:
    """Clean up; return what to do by hand where that failed."""
    try:
        place.clean_up()
    except SlmExportError:
        return place.left_behind()
    return None


def _bring(place: Place, jobs: Sequence[_Job], program: str | None, progress: Progress) -> None:
    runner = jobs[0].runner
    with progress.stage("bring the runner"):
        try:
            place.install(program or runner.program)
        except MissingComponentError as error:
            raise MissingComponentError(
                f"{error}\n  {runner.program} is {runner.get}; give it with --runner"
            ) from None
    for job in jobs:
        with progress.stage(f"bring {job.subject.name}"):
            place.push(job.subject.path, job.artifact)
            for name, file in job.files.items():
                place.push(file, name)


def _run_all(
    place: Place, jobs: Sequence[_Job], turns: Sequence[Turn], workload: Workload, progress: Progress
) -> None:
    state = place.conditions()
    for job in jobs:
        job.before = state
    with progress.stage("measure", workload.runs + 1) as stage:
        # The first round warms up and is not counted.
        for number in range(workload.runs + 1):
            for job in jobs:
                spoken = [_speak(place, job, turn, workload.threads) for turn in turns]
                job.rounds.extend([spoken] if number else [])
            stage.advance()
    for job in jobs if workload.sustained_s else ():
        with progress.stage(f"measure {job.subject.name} for {workload.sustained_s:.0f} s"):
            _sustain(place, job, turns, workload)
    state = place.conditions()
    for job in jobs:
        job.after = state


def _speak(place: Place, job: _Job, turn: Turn, threads: int) -> Spoken:
    ran = place.run(job.runner.arguments(job.subject, job.artifact, turn, threads), _RUN_S)
    spoken = job.runner.parse(ran.output, turn)
    if ran.code or spoken is None:
        what = f"ended with exit code {ran.code}" if ran.code else "printed no figures that are known here"
        last = "\n".join(f"  {line}" for line in ran.output.strip().splitlines()[-5:])
        raise MachineError(f"{job.subject.name}: {job.runner.program} {what}\n{last}".rstrip())
    if ran.peak_rss_mb is not None:
        job.peaks.append(ran.peak_rss_mb)
    return spoken


def _sustain(place: Place, job: _Job, turns: Sequence[Turn], workload: Workload) -> None:
    """Generate as much as fits, again and again, and look at the device's state after each turn."""
    turn = turns[-1]
    if turn.generated:
        room = (job.subject.context or 0) - turns[0].prompt - 1
        turn = Turn(turns[0].prompt, max(turns[0].generated, min(_SUSTAINED_TOKENS, room)))
    began = time.monotonic()
    while not job.sustained or job.sustained[-1].at_s < workload.sustained_s:
        spoken = _speak(place, job, turn, workload.threads)
        tokens = (spoken.wrote or turn.generated) if turn.generated else turn.prompt
        took = spoken.decode_s if turn.generated else spoken.prefill_s
        if not took:
            raise MachineError(f"{job.subject.name}: {job.runner.program} told no time for {tokens} tokens")
        state = place.conditions()
        job.sustained.append(
            Instant(time.monotonic() - began, tokens / took, state.temperature_c, state.throttling)
        )


def _result(job: _Job, device: Device, workload: Workload) -> Measurement:
    prefill, decode = speeds(job.rounds, workload)
    every = [spoken for spoken_round in job.rounds for spoken in spoken_round]
    notes = list(_NOTES)
    if other := {s.turn.prompt: s.read for s in every if s.read not in (None, s.turn.prompt)}:
        counts = ", ".join(f"{read} for {asked}" for asked, read in other.items())
        notes.append(f"prompts as the runner counted them: {counts} tokens; rates are of what it counted")
    if job.sustained:
        notes.append("sustained: every turn loads the artifact anew, and the processor rests meanwhile")
    return Measurement(
        name=job.subject.name,
        format=job.subject.format,
        bytes=job.subject.bytes,
        runtime=job.runner.program,
        where=device.title,
        threads=workload.threads,
        runs=workload.runs,
        context=job.subject.context or 0,
        generates=job.subject.generates,
        warm_load_ms=Spread.of(spoken.load_ms for spoken in every if spoken.load_ms is not None),
        prefill=prefill,
        decode=decode,
        peak_rss_mb=max(job.peaks, default=None),
        sustained=tuple(job.sustained),
        before=job.before,
        after=job.after,
        notes=tuple(notes),
    )
