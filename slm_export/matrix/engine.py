"""Where jobs run: `Local`, processes of this machine; `cluster.Cluster`, the workers of a Dask scheduler."""

from __future__ import annotations

import queue
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from slm_export.errors import MachineError
from slm_export.matrix.work import Ended, Work, run_work, stop


class Engine(Protocol):
    """Starts jobs, and tells when they have ended."""

    def start(self, name: str, work: Work, needed: int | None) -> None:
        """Start a job that is predicted to take so many bytes of memory."""

    def ended(self, timeout_s: float) -> tuple[str, Ended] | None:
        """Return a job that has ended, and how; None where none did in so many seconds."""

    def stop(self) -> None:
        """End all jobs, and come back when nothing of them runs."""


class Local:
    """A pool of processes; each is watched by a thread."""

    def __init__(self, run: str, jobs: int) -> None:
        self._run = run
        self._pool = ThreadPoolExecutor(jobs, thread_name_prefix="export")
        self._over: queue.SimpleQueue[tuple[str, Future[Ended]]] = queue.SimpleQueue()

    def start(self, name: str, work: Work, needed: int | None) -> None:
        """Start a job."""
        future = self._pool.submit(run_work, work)
        future.add_done_callback(lambda done: self._over.put((name, done)))

    def ended(self, timeout_s: float) -> tuple[str, Ended] | None:
        """Return a job that has ended."""
        try:
            name, future = self._over.get(timeout=timeout_s)
        except queue.Empty:
            return None
        error = future.exception()
        if error is not None:
            return name, Ended(MachineError.exit_code, 0.0, f"could not be started: {error}")
        return name, future.result()

    def stop(self) -> None:
        """Interrupt all jobs, and wait for their cleaning up."""
        stop(self._run)
        self._pool.shutdown(cancel_futures=True)
