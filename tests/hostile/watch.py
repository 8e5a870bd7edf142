"""What a reader did with one input: accepted or refused it, or did what no input may make it do.

While an input is read, an audit hook of the interpreter listens: to files opened outside of the folder that was given,
to connections, to processes, to code of the folder that is compiled or run, to pickles. Native libraries open files
without telling the interpreter; for them there are links and pipes among the inputs, and limits of time and memory.
"""

from __future__ import annotations

import os
import resource
import signal
import site
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from mutations import CANARY

CPU_S, WALL_S = 10, 30
"""Limits of one input."""
GROWTH = 400 << 20
"""Bytes that the peak of memory may grow by."""
ADDRESSES = 3 << 30
"""Bytes of address space beyond what imports took: an allocation beyond fails, and does not take the machine along."""
_LONGEST = 4000

_FORBIDDEN = (
    "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "socket.gethostbyname",
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pickle.find_class",
)  # fmt: skip
_ROOT = Path(__file__).resolve().parent.parent.parent
_READABLE = ("slm_export", "exporters", "optimizers", "targets", "device_profiles", "tests")


class Hang(BaseException):
    """The limit of time was reached; no ``except Exception`` may swallow it."""


class Watch:
    """Listens while an input is read. An audit hook cannot be taken away again: one for a process."""

    def __init__(self) -> None:
        self._listening = False
        self._found: list[str] = []
        paths = sysconfig.get_paths()
        system = {sys.prefix, sys.base_prefix, paths["stdlib"], paths["purelib"], *site.getsitepackages()}
        self._system = (
            os.path.join(tempfile.gettempdir(), "slm-export-"),
            "/proc/",
            "/sys/",
            os.devnull,
            "/dev/urandom",
            "/etc/localtime",
            *(os.path.realpath(path) for path in system),
            *(os.path.realpath(_ROOT / name) for name in _READABLE),
        )
        sys.addaudithook(self._hear)

    def look_at(self, folder: Path, sealed: bool, *others: Path) -> None:
        """Take inputs from a folder.

        Given   sealed: whether links in that folder must not be followed out of it
                others: further folders that a reader may open
        """
        self._folder, self._sealed = os.path.realpath(folder), sealed
        self._allowed = (*self._system, self._folder, *map(os.path.realpath, others))

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._listening:
            return
        if event in ("open", "os.listdir", "os.scandir"):
            self._opened(arguments[0])
        elif event == "subprocess.Popen" and list(arguments[1])[:2] == [sys.executable, "-m"]:
            # The product's own children; nothing of the input names what they run.
            if not str(list(arguments[1])[2]).startswith("slm_export."):
                self._found.append(f"{event} {arguments!r:.200}")
        elif event in _FORBIDDEN:
            self._found.append(f"{event} {arguments!r:.200}")
        elif event in ("exec", "compile"):
            code = getattr(arguments[0], "co_filename", None) or arguments[-1]
            if isinstance(code, str) and self._inside(code):
                self._found.append(f"{event} {code}")

    def _opened(self, path: object) -> None:
        if isinstance(path, int) or path is None:
            return
        text = os.fsdecode(path)  # type: ignore[arg-type]
        if text == tempfile.gettempdir():  # for a file without a name
            return
        place = os.path.realpath(text) if self._sealed else os.path.abspath(text)
        if not place.startswith(self._allowed) and not os.path.realpath(text).startswith(self._allowed):
            self._found.append(f"open {text}")

    def _inside(self, path: str) -> bool:
        return os.path.realpath(path).startswith(self._folder + os.sep)

    @contextmanager
    def listening(self) -> Iterator[list[str]]:
        """Yield what is heard."""
        self._found = []
        self._listening = True
        try:
            yield self._found
        finally:
            self._listening = False


def limit_memory() -> None:
    """Bound the address space of this process; only where it can be told, on Linux."""
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESSES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))


def judged(read: Any, folder: Path, watch: Watch, patience: int = 1) -> dict[str, str]:
    """Return what became of one input: ``{"outcome": "accepted" | "refused" | "defect", "what": ...}``.

    Given   patience: how many times the limits of time it may take
    """
    from slm_export.errors import SlmExportError, shown

    before = _start_of_peak()
    outcome, what = "accepted", ""
    with watch.listening() as heard, _limits(patience):
        try:
            read(folder)
        except SlmExportError as error:
            outcome, what = "refused", str(error)
        except Hang:
            outcome, what = "defect", "hang: " + _where()
        except (SystemExit, AssertionError, Exception) as error:  # noqa: BLE001 - that is the question here
            outcome, what = "defect", f"{type(error).__name__}: {str(error)[:200]} {_where()}"
        except BaseException as error:  # noqa: BLE001 - a panic of Rust is no Exception
            outcome, what = "defect", f"{type(error).__name__}: {str(error)[:200]} {_where()}"
    if outcome == "refused" and not what.strip():
        return {"outcome": "defect", "what": "refused without a word"}
    if outcome == "refused" and len(text := shown(what)) > _LONGEST:
        return {"outcome": "defect", "what": f"a message of {len(text)} characters: {text[:100]}"}
    if heard:
        return {"outcome": "defect", "what": heard[0]}
    if Path(CANARY).exists() or (folder / CANARY).exists():
        Path(CANARY).rmdir()
        return {"outcome": "defect", "what": "code of the input was executed"}
    if (grown := _peak() - before) > GROWTH:
        return {"outcome": "defect", "what": f"memory grew by {grown >> 20} MiB"}
    return {"outcome": outcome, "what": what[:300]}


def _where() -> str:
    """Return the innermost line of the product that an exception went through."""
    frames = traceback.extract_tb(sys.exc_info()[2])
    ours = [
        frame for frame in frames if _ROOT.as_posix() in frame.filename and "/tests/" not in frame.filename
    ]
    if not ours:
        return ""
    return f"({Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name})"


@contextmanager
def _limits(patience: int) -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise Hang

    signal.signal(signal.SIGPROF, late)
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_PROF, CPU_S * patience)
    signal.setitimer(signal.ITIMER_REAL, WALL_S * patience)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _start_of_peak() -> int:
    """Forget the peak of memory so far; return what is taken now, in bytes."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))
