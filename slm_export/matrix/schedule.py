"""Which of the waiting jobs may start now: pure arithmetic, no processes.

A job starts when there is room for one more, when its predicted memory fits beside that of the running ones, and when
none of those is just making weights that it would make too: it waits, and finds them finished.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """One export, as far as the order goes."""

    name: str
    bytes: int | None
    """Predicted peak of memory; None where nobody knows: it runs alone."""
    stages: tuple[str, ...] = ()
    """Keys of the passes' results; see `cells.Cell.stages`."""


@dataclass(frozen=True)
class Room:
    """What all jobs together may take."""

    jobs: int
    bytes: int | None = None
    """None: somebody else sees to it."""

    def never(self, job: Job) -> bool:
        """Return whether a job is larger than all there is."""
        return None not in (self.bytes, job.bytes) and (job.bytes or 0) > (self.bytes or 0)

    def beside(self, job: Job, running: Collection[Job]) -> bool:
        """Return whether a job fits beside the running ones."""
        if not running:
            return True
        if len(running) >= self.jobs:
            return False
        if self.bytes is None:
            return True
        needed = [one.bytes for one in (job, *running)]
        return None not in needed and sum(size or 0 for size in needed) <= self.bytes


def startable(
    waiting: Sequence[Job], running: Collection[Job], finished: Collection[str], room: Room
) -> Job | None:
    """Return the first job that may start now; None where none may.

    Given   finished: the keys of stages whose weights are complete
    """
    making = {stage for job in running for stage in job.stages} - set(finished)
    for job in waiting:
        if making.isdisjoint(job.stages) and room.beside(job, running):
            return job
    return None
