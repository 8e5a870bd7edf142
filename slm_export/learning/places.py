"""Where unfinished work lies: found again after a kill, removed when it is done.

The folder is ``<cache>/learning/<hash>``, the hash over everything that decides the result: settings, models, text,
this program's and its tools' versions. A killed or failed command leaves it to the same command typed again; what
nobody came back for is removed after a week. One process at a time works on a result.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from slm_export import __version__
from slm_export.bundles.finished import cache_folder
from slm_export.bundles.held import Held, reclaim, try_lock
from slm_export.errors import InputError
from slm_export.learning.processes import rank, wait_for_all
from slm_export.machine import machine_errors

_FORGOTTEN_S = 7 * 24 * 3600.0
_PARTIAL = ".partial"


class Place:
    """A folder of unfinished work. Made by `place` only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_done = False

    def once(self, name: str, make: Callable[[Path], None]) -> Path:
        """Return the folder ``name`` in here, filled by ``make`` unless an earlier run has finished that.

        It appears whole or not at all. Of several processes the first makes it, and the others wait.
        """
        path = self.folder / name
        if rank() == 0 and not path.is_dir():
            partial = self.folder / f"{name}{_PARTIAL}"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            make(partial)
            os.rename(partial, path)
        wait_for_all()
        return path

    def done(self) -> None:
        """Say that the result is in its place: the folder goes when `place` ends."""
        self.is_done = True


@contextmanager
def place(key: Mapping[str, Any], *, alone: bool = True) -> Iterator[Place]:
    """Yield the folder of the work that ``key`` decides, JSON values.

    Given   alone: False where several processes may be at the same work, because every file of it appears whole

    Raises:
        InputError: another process is at the same work.
        MachineError: the cache folder cannot be written, or its disk is full.
    """
    decides = {"slm-export": __version__, "tools": _tools(), **key}
    name = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]
    root = cache_folder() / "learning"
    with machine_errors("keep unfinished work", root):
        if rank() == 0:
            _remove_forgotten(root, name)
        held = Held(root / name)
        lock = _alone(held.folder) if alone and rank() == 0 else None
        made = Place(held.folder)
        try:
            os.utime(held.folder)
            yield made
        finally:
            if lock is not None:
                os.close(lock)
            held.leave(remove=made.is_done and rank() == 0)


def _alone(folder: Path) -> int:
    """Lock out whoever wants to do the same work; the lock goes with the process."""
    file = os.open(folder / "owner", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if try_lock(file) is False:
        os.close(file)
        raise InputError(
            f"{folder}: another process is teaching the same model with the same settings; wait for it, or give "
            "another --seed"
        )
    return file


def _tools() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "tokenizers")}


def _remove_forgotten(root: Path, wanted: str) -> None:
    for folder in root.glob("*"):
        with suppress(OSError):
            if folder.name != wanted and time.time() - folder.stat().st_mtime > _FORGOTTEN_S:
                reclaim(folder)
