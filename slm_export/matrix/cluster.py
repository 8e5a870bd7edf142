"""The workers of a Dask scheduler as an engine: a cell is a task, and is tried again where a machine failed.

The folder of results must be on a file system that all workers see under the same path, and every worker has the same
slm-export installed. A worker that declares memory (``dask worker --resources MEMORY=64e9``) is given no more cells at
a time than their predictions fit in.
"""

from __future__ import annotations

import asyncio
import queue
from pathlib import Path
from typing import Any

from slm_export import __version__
from slm_export.errors import InputError, MachineError, MissingComponentError
from slm_export.matrix.work import Ended, Work, lives, run_work, stop

RETRIES = 2
MEMORY = "MEMORY"
_CONNECT_S = 20
_LOOK_S = 0.1


class AttemptError(Exception):
    """A machine failed; another may do better."""

    def __init__(self, ended: Ended) -> None:
        super().__init__(ended)
        self.ended = ended


def attempt(work: Work) -> Ended:
    """Run a cell, on a worker."""
    ended = run_work(work)
    if ended.machine:
        raise AttemptError(ended)
    return ended


class Cluster:
    """Tasks of one client."""

    def __init__(self, run: str, address: str, folder: Path) -> None:
        """Connect, and see that the workers are fit.

        Raises:
            MissingComponentError: Dask is not installed here.
            InputError: no scheduler answers, or a worker sees another folder or has another version.
        """
        try:
            from distributed import Client
        except ImportError as error:
            raise MissingComponentError(
                f"--scheduler needs Dask ({error}); pip install 'slm-export[cluster]'"
            ) from error
        try:
            connect: Any = Client
            self._client: Any = connect(address, timeout=_CONNECT_S, set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            raise InputError(
                f"--scheduler {address}: no scheduler answers ({error}); start one with `dask scheduler`"
            ) from None
        self._run, self._folder = run, folder
        self._over: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._futures: dict[str, Any] = {}
        self._check_workers(address)

    def _check_workers(self, address: str) -> None:
        found = self._client.run(_fitness, str(self._folder))
        if not found:
            raise InputError(
                f"--scheduler {address}: it has no workers; start some with `dask worker {address}`"
            )
        for worker, (version, sees) in found.items():
            if version != __version__:
                raise InputError(f"worker {worker} has slm-export {version}, and this is {__version__}")
            if not sees:
                raise InputError(
                    f"worker {worker} does not see {self._folder}; give an --out on a file system that they share"
                )

    def _declares_memory(self) -> bool:
        workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        return all(MEMORY in worker.get("resources", {}) for worker in workers)

    def start(self, name: str, work: Work, needed: int | None) -> None:
        """Submit a task."""
        resources = {MEMORY: needed} if needed and self._declares_memory() else None
        future = self._client.submit(
            attempt, work, key=f"{name}-{work.run}", retries=RETRIES, resources=resources
        )
        self._futures[name] = future
        future.add_done_callback(lambda done: self._over.put((name, done)))

    def ended(self, timeout_s: float) -> tuple[str, Ended] | None:
        """Return a task that has ended."""
        try:
            name, future = self._over.get(timeout=timeout_s)
        except queue.Empty:
            return None
        del self._futures[name]
        error = future.exception()
        if isinstance(error, AttemptError):
            return name, error.ended
        if error is not None:
            return name, Ended(MachineError.exit_code, 0.0, f"the cluster gave it up: {error}")
        return name, future.result()

    def stop(self) -> None:
        """Cancel what waits, interrupt what runs, and leave."""
        if self._futures:
            self._client.cancel(list(self._futures.values()), force=True)
            self._client.run(_stop, self._run)
        self._client.close()


def _fitness(folder: str) -> tuple[str, bool]:
    return __version__, Path(folder).is_dir()


async def _stop(run: str) -> None:
    """Stop a command's exports on a worker, whose own work goes on meanwhile."""
    stop(run)
    while lives(run):
        await asyncio.sleep(_LOOK_S)
