"""A matrix from its cells to their bundles: what is there already is kept, the rest is exported side by side.

OUT/bundles/MODEL.RECIPE.DEVICE/   what an export leaves, whole or not at all
OUT/cells/MODEL.RECIPE.DEVICE/     how it was asked for, its log, its outcome
OUT/cache/MODEL/                   finished weights, while cells of the model are to come
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from slm_export.bundles.finished import CACHE_VARIABLE, KEEP_VARIABLE
from slm_export.bundles.integrity import strangers
from slm_export.bundles.lock import Source
from slm_export.errors import GateError, InputError, MachineError
from slm_export.matrix.cells import Cell
from slm_export.matrix.engine import Engine
from slm_export.matrix.export_file import export_file
from slm_export.matrix.needs import peak_of
from slm_export.matrix.record import (
    Record,
    answer_of,
    content_key,
    is_complete,
    read_record,
    source_facts,
    write_record,
)
from slm_export.matrix.results import Result
from slm_export.matrix.schedule import Job, Room, startable
from slm_export.matrix.work import LOG, SETTINGS, Ended, Work, ending
from slm_export.progress import Progress

BUNDLES, CELLS, CACHE = "bundles", "cells", "cache"
_BEAT_S = 0.5


class Watch(Protocol):
    """Is told what happens."""

    def started(self, cell: Cell, log: Path, predicted: int | None) -> None:
        """A cell's export has begun."""

    def ended(self, result: Result) -> None:
        """A cell was made, was found made, or failed."""

    def beat(self, waiting: int) -> None:
        """Some time has passed."""


@dataclass(frozen=True)
class Task:
    """A cell that is to be made, or was made before."""

    cell: Cell
    key: str
    predicted: int | None
    record: Record | None
    """Of a bundle that is to be kept."""

    @property
    def job(self) -> Job:
        """What the order goes by."""
        return Job(self.cell.name, self.predicted, self.cell.stages())


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Make the folder of results, and hold it for one command."""
    try:
        for part in (BUNDLES, CELLS, CACHE):
            (out / part).mkdir(parents=True, exist_ok=True)
        lock = os.open(out / CELLS / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{out}: another command is at work there; wait for it, or choose another --out"
            ) from None
        except OSError:
            pass  # this file system has no locks
        yield
    finally:
        os.close(lock)


def tasks_of(cells: Sequence[Cell], out: Path, force: bool, progress: Progress) -> tuple[Task, ...]:
    """Return what is to be done: every model is found and hashed once, and bundles of before are looked at."""
    found: dict[str, Source] = {}
    tasks = []
    with progress.stage("see what is there", total=len(cells)) as stage:
        for cell in cells:
            if cell.model not in found:
                found[cell.model] = source_facts(str(cell.settings.model), cell.settings.revision)
            key = content_key(cell, found[cell.model])
            record = None if force else read_record(out / CELLS / cell.name)
            kept = record if is_complete(record, key, out / BUNDLES / cell.name) else None
            tasks.append(Task(cell, key, peak_of(cell), kept))
            stage.advance(1, cell.name)
    return tuple(tasks)


def run(
    tasks: Sequence[Task],
    out: Path,
    engine: Engine,
    room: Room,
    watch: Watch,
    *,
    name: str,
    environment: Mapping[str, str],
) -> tuple[Result, ...]:
    """Make every cell that is not there, and return what came of each, in the order of the tasks.

    Given   name: of this command, for the engine
            environment: what exports are given beside their folders
    """
    results: dict[str, Result] = {}

    def settle(task: Task, result: Result) -> None:
        results[task.cell.name] = result
        watch.ended(result)

    for task in tasks:
        if task.record is not None:
            settle(task, _result(task, task.record, out, "kept"))
        elif room.never(task.job):
            settle(task, _too_large(task, room, out))
    waiting = {task.cell.name: task for task in tasks if task.cell.name not in results}
    running: dict[str, Task] = {}
    finished: set[str] = set()
    try:
        while waiting or running:
            while job := startable(
                [task.job for task in waiting.values()],
                [task.job for task in running.values()],
                finished,
                room,
            ):
                task = running[job.name] = waiting.pop(job.name)
                engine.start(job.name, _work(task, out, name, environment), job.bytes)
                watch.started(task.cell, out / CELLS / job.name / LOG, job.bytes)
            watch.beat(len(waiting))
            if (over := engine.ended(_BEAT_S)) is None:
                continue
            task, ended = running.pop(over[0]), over[1]
            if ended.code in (0, GateError.exit_code):
                finished.update(task.job.stages)
            settle(task, _settled(task, ended, out))
            if not any(
                other.cell.model == task.cell.model for other in (*waiting.values(), *running.values())
            ):
                shutil.rmtree(out / CACHE / task.cell.model, ignore_errors=True)
    finally:
        engine.stop()
    shutil.rmtree(out / CACHE, ignore_errors=True)
    return tuple(results[task.cell.name] for task in tasks)


def _work(task: Task, out: Path, name: str, environment: Mapping[str, str]) -> Work:
    """Return a cell's export, its folder filled."""
    cell, request = task.cell, task.cell.plan.request
    folder = out / CELLS / cell.name
    folder.mkdir(exist_ok=True)
    (folder / SETTINGS).write_text(export_file(cell.settings), encoding="utf-8")
    switches = [
        *([] if request.verify else ["--no-verify"]),
        *([] if request.bench else ["--no-bench"]),
    ]
    return Work(
        name,
        folder,
        ("export", "--json", "--force", "--out", str(out / BUNDLES / cell.name), *switches),
        {**environment, CACHE_VARIABLE: str(out / CACHE / cell.model), KEEP_VARIABLE: "1"},
    )


def _settled(task: Task, ended: Ended, out: Path) -> Result:
    """Write down how a cell ended. Of one that failed no older bundle stays: it is of other inputs."""
    folder, bundle = out / CELLS / task.cell.name, out / BUNDLES / task.cell.name
    answer = answer_of(folder)
    report = answer if ended.code == 0 else answer.get("report") or {}
    record = Record(task.key, ended.code, _reason(ended, answer), ended.seconds, report.get("peak_rss_mb"))
    if ended.code != 0:
        with suppress(OSError):
            if strangers(bundle) is None:
                shutil.rmtree(bundle)
    write_record(folder, record)
    return _result(task, record, out, "made" if ended.code == 0 else "failed")


def _result(task: Task, record: Record, out: Path, outcome: str) -> Result:
    name = task.cell.name
    return Result(
        task.cell,
        outcome,  # type: ignore[arg-type]
        record.code,
        record.reason,
        record.seconds,
        record.peak_rss_mb,
        task.predicted,
        out / CELLS / name,
        None if outcome == "failed" else out / BUNDLES / name,
    )


def _too_large(task: Task, room: Room, out: Path) -> Result:
    assert task.predicted is not None
    assert room.bytes is not None
    reason = (
        f"predicted to take {task.predicted / 1e9:.1f} GB of memory, and exports may take {room.bytes / 1e9:.1f} GB: "
        "give more with --memory, or use a larger machine"
    )
    return _result(task, Record(task.key, MachineError.exit_code, reason, None, None), out, "failed")


def _reason(ended: Ended, answer: Mapping[str, object]) -> str:
    """Return in one line why an export failed."""
    if ended.code == 0:
        return ""
    error = answer.get("error")
    if ended.code < 0 or not isinstance(error, dict):
        return ended.reason or ending(ended.code)
    lines = [line.strip() for line in str(error.get("message")).splitlines() if line.strip()]
    # The first line of a failed gate says that one failed; the others say which.
    return "; ".join(lines[1:] if ended.code == GateError.exit_code and len(lines) > 1 else lines)
