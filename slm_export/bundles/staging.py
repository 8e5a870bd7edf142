"""A folder that appears whole or not at all.

An export writes into a hidden folder beside its destination and is moved into place by one rename:

    .NAME.PID.RANDOM.partial/
      owner      locked for as long as the export lives; holds its process id, for people
      bundle/    what is being written; this is what becomes NAME
      old/       the bundle that is being replaced, where the system cannot exchange two folders

The lock, not the process id, says whether the owner lives: ids are reused, and a lock goes with
its process however that dies. So a later export can remove what a killed one left behind.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slm_export.bundles.atomic import exchange, sync, sync_tree
from slm_export.bundles.held import try_lock
from slm_export.bundles.integrity import strangers
from slm_export.errors import InputError, MachineError
from slm_export.machine import MACHINE_ERRNOS, machine_errors

_OWNER, _BUNDLE, _OLD = "owner", "bundle", "old"
_START_WAIT_S = 20.0


class Staging:
    """A bundle being written: fill ``path``, then ``commit()``. Made by `staged` only."""

    def __init__(self, home: Path, out: Path, force: bool) -> None:
        self.path = home / _BUNDLE
        self.out = out
        self.committed = False
        self._home = home
        self._force = force
        self._file = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def commit(self) -> Path:
        """Put the folder in its place in one step, durably, and return that place."""
        assert not self.committed, "a bundle is committed once"
        with machine_errors("write the bundle", self.out):
            self._refuse_another_folder()
            sync_tree(self.path)
            # Again, because minutes have passed since the first look.
            _refuse_unless_replaceable(self.out, self._force)
            self._put_in_place()
            self.committed = True
            sync(self.out.parent)
        return self.out

    def close(self) -> None:
        """Let go of the folder."""
        os.close(self._file)

    def _refuse_another_folder(self) -> None:
        """Whoever writes a file makes the folder above it: what follows a removal looks whole, and is not."""
        try:
            same = os.path.samestat(os.fstat(self._file), self.path.stat())
        except FileNotFoundError:
            same = False
        if not same:
            raise MachineError(
                f"{self.path.parent}: was removed while the export wrote it; see what cleans up there, and export again"
            )

    def _put_in_place(self) -> None:
        try:
            if not os.path.lexists(self.out):
                # Fails, as it should, when a folder with content comes in just now.
                os.rename(self.path, self.out)
            elif not exchange(self.path, self.out):
                os.rename(self.out, self._home / _OLD)
                os.rename(self.path, self.out)
        except OSError as error:
            if error.errno in MACHINE_ERRNOS:
                raise
            raise InputError(
                f"{self.out}: cannot be put in place ({error.strerror}); remove it or choose another --out"
            ) from error


@contextmanager
def staged(out: Path, force: bool = False) -> Iterator[Staging]:
    """Yield an empty folder that `Staging.commit` moves to ``out``; without a commit nothing stays.

    Refuses at once, before any work: an ``out`` that exists (unless ``force``), that is not a bundle
    and nothing else (even with ``force``), that cannot be written, or that another export is writing now.
    """
    out = _resolved(out)
    created: list[Path] = []
    owner = os.getpid()
    lock: int | None = None
    home = out.parent / f".{out.name}.{owner}.{secrets.token_hex(4)}.partial"
    try:
        with _input_errors(out):
            _make_parents(out.parent, created)
            with _starting(out.parent):
                _reclaim(out)
                _refuse_unless_replaceable(out, force)
                lock = _claim(home)
        staging = Staging(home, out, force)
        try:
            with machine_errors("write the bundle", out):
                yield staging
        finally:
            staging.close()
    finally:
        # A forked child that unwinds through here owns nothing.
        if os.getpid() == owner:
            _discard(home, out)
            _remove_empty(created)
        if lock is not None:
            os.close(lock)


@contextmanager
def _input_errors(out: Path) -> Iterator[None]:
    """Blame a destination that cannot be written on --out, and a failing disk on the machine."""
    try:
        with machine_errors("start", out):
            yield
    except MachineError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EROFS:
            raise InputError(f"{out}: the file system is read-only; choose another --out") from error
        raise
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); choose another --out") from error


def _resolved(out: Path) -> Path:
    """Follow links first, so that two spellings of one place meet in one lock."""
    try:
        found = out.resolve() if os.path.lexists(out) else out.parent.resolve() / out.name
    except (OSError, RuntimeError) as error:
        raise InputError(f"{out}: {error}; choose another --out") from None
    if not found.name or found.name == "..":
        raise InputError(f"{out}: not a folder that can be written; choose another --out")
    return found


def _make_parents(parent: Path, created: list[Path]) -> None:
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for folder in reversed(missing):
        with suppress(FileExistsError):
            folder.mkdir()
            created.append(folder)
    if not parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{parent} is a file")


def _remove_empty(created: list[Path]) -> None:
    for folder in reversed(created):
        with suppress(OSError):
            folder.rmdir()


def _refuse_unless_replaceable(out: Path, force: bool) -> None:
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise InputError(f"{out}: exists and is not a folder; choose another --out")
    if os.path.ismount(out):
        raise InputError(
            f"{out}: a mount point, which cannot be replaced; choose a folder inside, {out}/bundle"
        )
    if not force:
        raise InputError(f"{out}: exists already; use --force to replace it, or choose another --out")
    with suppress(OSError):
        if Path.cwd().is_relative_to(out):
            raise InputError(
                f"{out}: the current folder is inside it; leave it first, or choose another --out"
            )
    try:
        reason = strangers(out)
    except OSError as error:
        reason = f"it cannot be read ({error.strerror})"
    if reason:
        raise InputError(
            f"{out}: not replaced, even with --force: {reason}; move it away or choose another --out"
        )


@contextmanager
def _starting(parent: Path) -> Iterator[None]:
    """Let one export at a time look for others and claim its place."""
    folder = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        deadline = time.monotonic() + _START_WAIT_S
        while try_lock(folder) is False:
            if time.monotonic() > deadline:
                raise InputError(f"{parent}: locked by another program; try again, or choose another --out")
            time.sleep(0.02)
        yield
    finally:
        os.close(folder)


def _claim(home: Path) -> int:
    home.mkdir(mode=0o700)
    lock = os.open(home / _OWNER, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        try_lock(lock)
        os.write(lock, f"{os.getpid()}\n".encode())
        # Default mode, unlike tempfile's: this folder is what other users will read.
        (home / _BUNDLE).mkdir()
    except BaseException:
        os.close(lock)
        raise
    return lock


def _reclaim(out: Path) -> None:
    """Remove what dead exports to this place left; refuse to go on beside a live one."""
    ours = re.compile(rf"\.{re.escape(out.name)}\.(\d+)\.[0-9a-f]{{8}}\.partial")
    for home in sorted(out.parent.iterdir()):
        match = ours.fullmatch(home.name)
        if not match or home.is_symlink() or not home.is_dir():
            continue
        try:
            lock = os.open(home / _OWNER, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            # Killed before it made its lock: nothing of anybody's can be inside.
            with suppress(OSError):
                home.rmdir()
            continue
        try:
            locked = try_lock(lock)
            if locked is False:
                raise InputError(
                    f"{out}: another export (process {match[1]}) is writing it; "
                    "wait for it, or choose another --out"
                )
            if locked:
                _discard(home, out)
        finally:
            os.close(lock)


def _discard(home: Path, out: Path) -> None:
    """Remove a partial folder; put the old bundle back if its replacement stopped half-way."""
    if os.path.lexists(home / _OLD) and not os.path.lexists(out):
        with suppress(OSError):
            os.rename(home / _OLD, out)
    for folder, _, _ in os.walk(home):
        with suppress(OSError):
            os.chmod(folder, 0o700)
    shutil.rmtree(home, ignore_errors=True)
