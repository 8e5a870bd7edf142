"""Several devices at once: a job for each, in a thread of its own; one that fails is a row with its reason.

The figures are the devices' own: what they share is this machine, which brings files and waits. A job that is told to
stop ends the tool that it waits for, and cleans up on its device as after Ctrl-C.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

from slm_export.bench.figures import Measurement
from slm_export.bench.places import Place
from slm_export.errors import MachineError, SlmExportError
from slm_export.progress import Progress, Stage

_LOOK_S = 0.2

Measure: TypeAlias = Callable[[Place, Progress], tuple[Measurement, ...]]


@dataclass(frozen=True)
class DeviceResult:
    """What came of one device: measurements, or why there are none."""

    device: str
    """As it was asked for: a serial number, a host, a name."""
    measurements: tuple[Measurement, ...] = ()
    error: str | None = None
    exit_code: int = 0
    """That which measuring this device alone would have had."""


def measure_fleet(
    places: Mapping[str, Callable[[threading.Event], Place]], measure: Measure, progress: Progress
) -> tuple[DeviceResult, ...]:
    """Measure on several devices side by side; ``places``: name -> a place that heeds an event to stop.

    The results are in the order of ``places``. An error that a user can cause is a result; any other passes, once
    every job has ended and cleaned up.
    """
    stops = {name: threading.Event() for name in places}
    doing = dict.fromkeys(places, "waiting")
    with (
        progress.stage(f"measure on {len(places)} devices", len(places)) as stage,
        ThreadPoolExecutor(len(places), "device") as pool,
    ):
        jobs = {
            pool.submit(_job, name, make(stops[name]), measure, _Told(name, doing)): name
            for name, make in places.items()
        }
        try:
            _watch(jobs, doing, stage, progress)
        except BaseException:
            for stop in stops.values():
                stop.set()
            raise
    found = {name: job.result() for job, name in jobs.items()}
    return tuple(found[name] for name in places)


def _job(name: str, place: Place, measure: Measure, progress: Progress) -> DeviceResult:
    try:
        return DeviceResult(name, measure(place, progress))
    except SlmExportError as error:
        return DeviceResult(name, error=str(error), exit_code=error.exit_code)
    except (OSError, MemoryError) as error:
        return DeviceResult(name, error=str(error) or "out of memory", exit_code=MachineError.exit_code)


def _watch(
    jobs: Mapping[Future[DeviceResult], str], doing: dict[str, str], stage: Stage, progress: Progress
) -> None:
    """Show what every device is at until all have ended."""
    running = set(jobs)
    while running:
        done, running = wait(running, _LOOK_S, FIRST_COMPLETED)
        for job in done:
            name = jobs[job]
            del doing[name]
            failed = job.exception() is not None or job.result().error is not None
            progress.say(f"{name}: {'failed' if failed else 'done'}")
            stage.advance()
        stage.note = "; ".join(f"{name}: {at}" for name, at in doing.items())


class _Told(Progress):
    """Shows nothing itself: what a job is at stands beside the other jobs', in one line."""

    def __init__(self, name: str, doing: dict[str, str]) -> None:
        super().__init__(silent=True)
        self._name, self._doing = name, doing

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """See `Progress`."""
        self._doing[self._name] = name
        with super().stage(name, total) as stage:
            yield stage
