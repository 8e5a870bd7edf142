"""What may happen to an export on its way, done to a real one, and what must be true after it.

After every mishap the folder holds the old bundle or the new one, each complete, or none where there was none; nothing
else is left but the cache, and of a killed export one hidden folder and its temporary files; and the next export
removes those, and gives the bytes of an undisturbed one.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from conftest import environment
from forked import STAND_IN, Forked, Running, forked

from slm_export.bundles.bundle import read_manifest, verify_files
from slm_export.bundles.finished import CACHE_VARIABLE
from slm_export.errors import InputError

# Of a tiny model with random weights fidelity says nothing, and speed nothing of mishaps.
COMMON = ("--target", "host", "--format", "onnx", "--no-verify", "--no-bench", "--out", "work/out", "--force")
OLD, NEW = ("--bits", "32"), ("--bits", "4")
BEGUN = "read the model"
"""What an export says first, when its place is claimed."""
WRITTEN = "write onnx: done"
"""What an export says when all that is left is to put the bundle together, and in its place."""
_TIMED = frozenset({"report.json", "report.html", "sbom.cdx.json"})
_PARTIAL = re.compile(r"\.out\.\d+\.[0-9a-f]{8}\.partial")
PLACES = ("work", "cache", "tmp")


@dataclass
class Outcome:
    """What a mishap led to, and all that is not as it must be."""

    found: str = ""
    """The bundle that is there: none, old, new."""
    code: int = 0
    resumed: bool = False
    """Whether the next export found finished weights."""
    problems: list[str] = field(default_factory=list)


class Arena:
    """A folder with three places: ``work``, where the bundle is written, ``cache`` and ``tmp``."""

    def __init__(self, root: Path, model: Path, run: Forked) -> None:
        """Export both bundles undisturbed: the one that is replaced, and the one that replaces it."""
        self.root, self.model, self._run = root, model, run
        self.begin(with_old=False)
        self._contents: dict[str, dict[str, str]] = {}
        self._kept = root / "kept"
        for name, options in (("old", OLD), ("new", NEW)):
            began = time.monotonic()
            with self.started(*options) as export:
                _wait_for(BEGUN, export)
                begun = time.monotonic()
                _wait_for(WRITTEN, export)
                written = time.monotonic()
                done = export.wait()
            ended = time.monotonic()
            self.seconds, self.working_seconds, self.last_seconds = (
                ended - began,
                ended - begun,
                ended - written,
            )
            assert done.returncode == 0, done.stderr
            assert verify_files(self.out) == ()
            self._contents[name] = contents(self.out)
            shutil.copytree(self.out, self._kept / name)
        assert self._contents["old"] != self._contents["new"]

    @property
    def out(self) -> Path:
        return self.root / "work" / "out"

    def begin(self, with_old: bool, elsewhere: Path | None = None, places: tuple[str, ...] = ()) -> None:
        """Empty every place, let some lie ``elsewhere``, and put the old bundle there if it is wanted."""
        for name in PLACES:
            place = self.root / name
            if place.is_symlink():
                shutil.rmtree(place.resolve(), ignore_errors=True)
                place.unlink()
            shutil.rmtree(place, ignore_errors=True)
            if elsewhere is not None and name in places:
                (elsewhere / name).mkdir()
                place.symlink_to(elsewhere / name)
            else:
                place.mkdir()
        if with_old:
            shutil.copytree(self._kept / "old", self.out)

    def started(self, *options: str) -> AbstractContextManager[Running]:
        """Begin an export."""
        return self._run.started(self.model, *COMMON, *options, cwd=self.root)

    def export(self, *options: str) -> subprocess.CompletedProcess[str]:
        return self._run(self.model, *COMMON, *options, cwd=self.root)

    def left(self, place: str) -> list[str]:
        """Return what is in a place besides the bundle."""
        with suppress(FileNotFoundError):
            return [name for name in os.listdir(self.root / place) if name != "out"]
        return []

    def found(self) -> str:
        """Return "none", "old", "new", or what is wrong with the bundle."""
        if not os.path.lexists(self.out):
            return "none"
        try:
            if problems := verify_files(self.out):
                return f"half: {problems[0]}"
            made = contents(self.out)
        except InputError as error:
            return f"half: {error}"
        return next((name for name, known in self._contents.items() if known == made), "another")

    def judge(self, outcome: Outcome, with_old: bool, *, killed: bool = False) -> Outcome:
        """Look at what is there; then export again, and look at that."""
        outcome.found = self.found()
        if outcome.found not in (("old", "new") if with_old else ("none", "new")):
            outcome.problems.append(f"the bundle is: {outcome.found}")
        work = self.left("work")
        if work and not (killed and len(work) == 1 and _PARTIAL.fullmatch(work[0])):
            outcome.problems.append(f"left behind: {work}")
        if not killed and (left := self.left("tmp")):
            outcome.problems.append(f"temporary files left behind: {left}")
        for place in PLACES:
            (self.root / place).mkdir(exist_ok=True)
        done = self.export(*NEW, "--json")
        outcome.resumed = "weights were finished by an" in done.stdout
        if done.returncode or self.found() != "new":
            outcome.problems.append(
                f"the next export: {self.found()}, {done.returncode}: {done.stderr[-300:]}"
            )
        left = [*self.left("work"), *self.left("tmp"), *map(str, (self.root / "cache").glob("finished/*"))]
        if left:
            outcome.problems.append(f"left behind by the next export: {left}")
        return outcome


def contents(bundle: Path) -> dict[str, str]:
    """Return path -> sha256 of every file of a bundle in which no times stand."""
    return {entry.path: entry.sha256 for entry in read_manifest(bundle).files if entry.path not in _TIMED}


@contextmanager
def server(root: Path, model: Path | None = None) -> Iterator[Forked]:
    """Yield a command line whose cache and temporary files lie in an arena.

    Given   model: what it will export; without one the artifacts are a stand-in (forked.STAND_IN)
    """
    for place in PLACES:
        (root / place).mkdir(parents=True, exist_ok=True)
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    places = {CACHE_VARIABLE: str(root / "cache"), "TMPDIR": str(root / "tmp")}
    with TemporaryDirectory() as folder:
        warm = (STAND_IN,) if model is None else (model, "onnx", Path(folder) / "warm")
        with forked(environment({**quiet, **places}), warm) as run:
            yield run


def _wait_for(words: str, export: Running) -> None:
    while words not in export.said:
        time.sleep(0.002)


# --- mishaps -----------------------------------------------------------------------------------------


def killed(arena: Arena, with_old: bool, after_s: float, stage: str = "") -> Outcome:
    """Kill an export and all that it started, so long after it has said something."""
    arena.begin(with_old)
    with arena.started(*NEW) as export:
        _wait_for(stage, export)
        time.sleep(after_s)
        export.send(signal.SIGKILL)
        code = export.wait().returncode
    return arena.judge(Outcome(code=code), with_old, killed=code != 0)


def on_a_full_disk(arena: Arena, volume: Path, places: tuple[str, ...], free: int, with_old: bool) -> Outcome:
    """Export where some places lie on a disk with so many bytes left."""
    arena.begin(with_old, volume, places)
    with filled(volume, free):
        done = arena.export(*NEW)
    outcome = _ended(done, 0, 4)
    if done.returncode and "disk full" not in done.stderr:
        outcome.problems.append(f"a full disk was not called one: {done.stderr[-300:]}")
    return arena.judge(outcome, with_old)


def read_only(arena: Arena, volume: Path, place: str) -> Outcome:
    """Export where the cache, or the place of the bundle, cannot be written: the one does not matter."""
    arena.begin(place == "work", volume, (place,))
    _mount("-o", "remount,ro", str(volume))
    try:
        done = arena.export(*NEW)
    finally:
        _mount("-o", "remount,rw", str(volume))
    outcome = _ended(done, *((2,) if place == "work" else (0,)))
    return arena.judge(outcome, place == "work")


def vanished(arena: Arena, place: str, after_s: float, with_old: bool) -> Outcome:
    """Take a folder away while an export works: its cache, the place of the bundle, or the "partial" one there."""
    arena.begin(with_old)
    with arena.started(*NEW) as export:
        _wait_for(BEGUN, export)
        time.sleep(after_s)
        name = f"work/{next(iter(arena.left('work')), 'none')}" if place == "partial" else place
        with suppress(FileNotFoundError):
            os.rename(arena.root / name, arena.root / "gone")
        done = export.wait()
    shutil.rmtree(arena.root / "gone", ignore_errors=True)
    outcome = _ended(done, *((0,) if place == "cache" else (0, 2, 4)))
    return arena.judge(outcome, with_old and place != "work")


def at_once(arena: Arena, other: Forked, with_old: bool) -> Outcome:
    """Begin a second export into the same folder while a first one writes it: the first is not disturbed."""
    arena.begin(with_old)
    with arena.started(*NEW) as export:
        _wait_for(BEGUN, export)
        export.send(signal.SIGSTOP)
        second = other(arena.model, *COMMON, *OLD, cwd=arena.root)
        export.send(signal.SIGCONT)
        outcome = _ended(export.wait(), 0)
    if second.returncode != 2 or "another export" not in second.stderr:
        outcome.problems.append(f"the second one: {second.returncode}: {second.stderr[-300:]}")
    return arena.judge(outcome, with_old)


def side_by_side(arena: Arena, other: Forked) -> Outcome:
    """Export the same model into two folders at once, which share the cache."""
    arena.begin(with_old=False)
    with arena.started(*NEW) as export:
        second = other(arena.model, *COMMON, *NEW, "--out", "beside", cwd=arena.root)
        outcome = _ended(export.wait(), 0)
    outcome.problems += _ended(second, 0).problems
    if second.returncode == 0 and contents(arena.root / "beside") != contents(arena.out):
        outcome.problems.append("the two bundles differ")
    shutil.rmtree(arena.root / "beside", ignore_errors=True)
    return arena.judge(outcome, with_old=False)


def _ended(done: subprocess.CompletedProcess[str], *codes: int) -> Outcome:
    """Hold an export's ending against those that are right: one of these codes, and a reason that can be read."""
    outcome = Outcome(code=done.returncode)
    if done.returncode not in codes:
        outcome.problems.append(f"exit code {done.returncode}: {done.stderr[-300:]}")
    if "Traceback" in done.stderr or (done.returncode > 0 and "error: " not in done.stderr):
        outcome.problems.append(f"no reason was given: {done.stderr[-300:]}")
    return outcome


# --- disks -------------------------------------------------------------------------------------------


class NoVolumeError(Exception):
    """This system lets this user mount nothing."""


@contextmanager
def small_disk(folder: Path, megabytes: int = 64) -> Iterator[Path]:
    """Yield a small file system of its own.

    Raises:
        NoVolumeError: it cannot be mounted here.
    """
    folder.mkdir()
    try:
        _mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise NoVolumeError(
            f"a small disk needs a mount, which is not permitted here: {said.strip()}"
        ) from None
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def filled(volume: Path, free: int) -> Iterator[None]:
    """Leave so many bytes of a disk, for as long as this lasts."""
    ballast = volume / "ballast"
    size = _free(volume) - free
    with open(ballast, "wb") as file:
        if size > 0:
            os.posix_fallocate(file.fileno(), 0, size)
    try:
        yield
    finally:
        ballast.unlink()


def peak_use(arena: Arena, volume: Path, places: tuple[str, ...]) -> int:
    """Return the most bytes that an undisturbed export has at once on a disk where some places lie."""
    arena.begin(False, volume, places)
    seen, over = [_free(volume)], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            seen.append(_free(volume))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert arena.export(*NEW).returncode == 0
    finally:
        over.set()
        watcher.join()
    return seen[0] - min(seen)


def _free(volume: Path) -> int:
    found = os.statvfs(volume)
    return found.f_bavail * found.f_frsize
