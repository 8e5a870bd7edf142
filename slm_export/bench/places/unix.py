"""What Android and Linux have in common: a folder, a shell, and files of ``/proc``."""

from __future__ import annotations

import shlex
import tempfile
import uuid
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Protocol

from slm_export.bench.places import Ran
from slm_export.bench.places.programs import check_machine
from slm_export.errors import MachineError, MissingComponentError

_RUNNER, _SCRIPT = "runner", "measure.sh"
_REFUSED = {
    126: "the device refuses to execute it",
    127: "it is not found, or a library that it needs is not",
}


class Connection(Protocol):
    """A shell on a device; every method raises MachineError where the device does not answer."""

    title: str

    def shell(self, command: str, doing: str, timeout_s: float | None = None) -> tuple[int, str]:
        """Return exit code and output of a command."""

    def push(self, local: Path, remote: str) -> None:
        """Bring a file there."""

    def pull(self, remote: str, local: Path) -> None:
        """Bring a file from there."""


class UnixFolder:
    """A folder of our own on a device, and the vendor's program in it."""

    def __init__(self, connection: Connection, base: str) -> None:
        self._connection = connection
        self.path = f"{base}/slm-export-{uuid.uuid4().hex[:12]}"
        self._runner = f"./{_RUNNER}"

    def prepare(self) -> None:
        """Make the folder, and put the script there that measures memory."""
        self._must(f"mkdir -p {self._quoted}", "make a folder")
        with resources.as_file(resources.files("slm_export.bench.places") / _SCRIPT) as script:
            self.push(script, _SCRIPT)

    def install(self, runner: str, machines: tuple[str, ...]) -> None:
        """Bring a program from here, or find one that is there already."""
        local = Path(runner)
        if local.is_file():
            check_machine(local, machines, self._connection.title)
            self.push(local, _RUNNER)
            self._must(f"chmod 755 {self._quoted}/{_RUNNER}", "make the runner executable")
            return
        code, found = self._connection.shell(f"command -v {shlex.quote(runner)}", "look for the runner")
        if code or not found.strip():
            raise MissingComponentError(
                f"{runner}: no such file here, and no such program on {self._connection.title}"
            )
        self._runner = found.split()[-1]

    def push(self, local: Path, name: str) -> None:
        """Bring a file into the folder."""
        self._connection.push(local, f"{self.path}/{name}")

    def run(self, arguments: Sequence[str], timeout_s: float) -> Ran:
        """Run the program in the folder; its output comes back as a file."""
        command = shlex.join(["sh", _SCRIPT, self._runner, *arguments])
        code, said = self._connection.shell(f"cd {self._quoted} && {command}", "run the model", timeout_s)
        with tempfile.TemporaryDirectory(prefix="slm-export-") as here:
            local = Path(here) / "out.txt"
            self._connection.pull(f"{self.path}/out.txt", local)
            output, _, peak = local.read_text(encoding="utf-8", errors="replace").rpartition("VmHWM:")
        if code in _REFUSED:
            raise MachineError(
                f"{self._connection.title}: the runner does not start: {_REFUSED[code]}\n{_last_lines(output or peak)}"
            )
        if not output:  # it ended before its memory was seen
            return Ran(code, peak + said, None)
        return Ran(code, output + said, int(peak.split()[0]) / 1024)

    def clean_up(self) -> None:
        """End the program if it still runs, and remove the folder."""
        end = f"[ -f {self._quoted}/pid.txt ] && kill -9 $(cat {self._quoted}/pid.txt) 2>/dev/null"
        self._must(f"{end}; rm -rf {self._quoted}", "clean up")

    def free_bytes(self, base: str) -> int | None:
        """Return the free space of the disk that a folder is on (``df -kP``, POSIX)."""
        code, said = self._connection.shell(f"df -kP {shlex.quote(base)}", "ask for free space")
        words = said.splitlines()[-1].split() if said.strip() else []
        return int(words[3]) * 1024 if code == 0 and len(words) >= 6 and words[3].isdigit() else None

    def _must(self, command: str, doing: str) -> None:
        code, said = self._connection.shell(command, doing)
        if code:
            raise MachineError(
                f"{self._connection.title}: cannot {doing}: {_last_lines(said) or f'exit code {code}'}"
            )

    @property
    def _quoted(self) -> str:
        return shlex.quote(self.path)


def available_mb(meminfo: str) -> float | None:
    """Return the memory that ``/proc/meminfo`` says is available, MiB."""
    for line in meminfo.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 1024
    return None


def _last_lines(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.strip().splitlines()[-3:])
