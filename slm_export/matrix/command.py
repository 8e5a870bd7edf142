"""What ``slm-export matrix`` asks for, and the whole of it from the file to the summary."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slm_export.budget.budget import parse_bytes
from slm_export.errors import InputError
from slm_export.matrix.cells import cells_of
from slm_export.matrix.cluster import Cluster
from slm_export.matrix.engine import Engine, Local
from slm_export.matrix.matrix_file import Matrix, load_matrix
from slm_export.matrix.needs import available_bytes
from slm_export.matrix.results import Summary
from slm_export.matrix.run import claimed, run, tasks_of
from slm_export.matrix.schedule import Room
from slm_export.matrix.show import Board
from slm_export.progress import Progress

CORES_PER_JOB = 2
_THREADS = "OMP_NUM_THREADS"
_OFFLINE = "HF_HUB_OFFLINE"


@dataclass(frozen=True)
class MatrixRequest:
    """What the command line asks for."""

    file: Path
    out: Path | None = None
    jobs: int | None = None
    memory: str | None = None
    scheduler: str | None = None
    force: bool = False


def make(request: MatrixRequest, progress: Progress) -> Summary:
    """Export every cell of a matrix that is not there.

    Raises:
        InputError: the file or an option is wrong; nothing was begun then.
        MissingComponentError: a scheduler is asked for, and Dask is not installed.
    """
    matrix = load_matrix(request.file)
    room, environment = _room(request, matrix)
    out = Path(os.path.abspath(request.out or matrix.out))
    cells, skipped = cells_of(matrix)
    name = uuid.uuid4().hex
    with claimed(out):
        tasks = tasks_of(cells, out, request.force, progress)
        engine = _engine(request, room, name, out)
        try:
            with Board(progress.console, len(cells)) as board:
                results = run(tasks, out, engine, room, board, name=name, environment=environment)
        except KeyboardInterrupt:
            progress.say("what is finished stays; the same command goes on from there")
            raise
    return Summary(out, results, skipped)


def _room(request: MatrixRequest, matrix: Matrix) -> tuple[Room, Mapping[str, str]]:
    """Return what exports may take of this machine, and the environment in which each keeps to that, and offline."""
    if request.scheduler is not None:
        if request.jobs or request.memory:
            raise InputError(
                "--jobs and --memory are of this machine; with --scheduler the workers see to both"
            )
        return Room(jobs=1 << 20), _offline()
    if matrix.bench and (request.jobs or 1) > 1:
        raise InputError(
            f"--jobs {request.jobs}: with bench = true one cell is made at a time, because others would slow it down"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = 1 if matrix.bench else request.jobs or max(1, cores // CORES_PER_JOB)
    memory = parse_bytes(request.memory, "--memory") if request.memory else available_bytes()
    share = {} if _THREADS in os.environ else {_THREADS: str(max(1, cores // jobs))}
    return Room(jobs, memory), {**share, **_offline()}


def _offline() -> Mapping[str, str]:
    """Return what exports on other machines have to be told too."""
    return {_OFFLINE: "1"} if os.environ.get(_OFFLINE) == "1" else {}


def _engine(request: MatrixRequest, room: Room, name: str, out: Path) -> Engine:
    return Local(name, room.jobs) if request.scheduler is None else Cluster(name, request.scheduler, out)
