"""A Linux board, through OpenSSH; without questions, so with a key.

Temperature is that of ``/sys/class/thermal``. Throttling is what a Raspberry Pi's firmware says (``vcgencmd
get_throttled``), or else whether the kernel keeps a processor below its highest frequency (``/sys/.../cpufreq``).
"""

from __future__ import annotations

import re
import shlex
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from slm_export.bench.figures import Conditions
from slm_export.bench.places import Device, Ran
from slm_export.bench.places.tool import ANSWER_S, Said, call_tool, copy_timeout, find_tool
from slm_export.bench.places.unix import UnixFolder, available_mb
from slm_export.errors import InputError, MachineError

_GET = "`apt-get install openssh-client` on Debian and Ubuntu"
_BASE = "/tmp"
_MACHINES = {"armv7l": "arm", "armv8l": "arm", "i686": "x86", "riscv64": "riscv"}
_MARK = "slm-export-exit:"
_OWN_FAILURE = 255
"""ssh's exit code where it is ssh that failed."""
_PI = {0x1: "under-voltage", 0x2: "frequency capped", 0x4: "throttled", 0x8: "soft temperature limit"}
"""Bits of ``vcgencmd get_throttled`` that are about now."""
_CAPPED = (
    "cd /sys/devices/system/cpu/cpufreq 2>/dev/null && for p in policy*; do "
    "echo cpufreq $p $(cat $p/scaling_max_freq) $(cat $p/cpuinfo_max_freq); done"
)


class Ssh:
    """One board."""

    name: ClassVar[str] = "ssh"

    def __init__(
        self, host: str | None, patience_s: float = ANSWER_S, stop: threading.Event | None = None
    ) -> None:
        self._host, self._patience_s = host, patience_s
        self._stop = stop
        self.title = host or ""
        self._ssh = ""
        self._machines: tuple[str, ...] = ()
        self._folder = UnixFolder(self, _BASE)

    def find(self) -> Device:
        """See `Place`."""
        if not self._host:
            raise InputError("--on ssh needs --device HOST: a name or USER@NAME, as ssh takes it")
        if self._host.startswith("-"):
            raise InputError(f"--device {self._host}: no name of a host")
        self._ssh = find_tool("ssh", _GET)
        _, said = self.shell("uname -m; cat /proc/device-tree/model 2>/dev/null", "say what it is")
        machine, _, model = said.partition("\n")
        self.title = f"{model.strip(chr(0)).strip() or 'Linux'} ({self._host})"
        self._machines = (_MACHINES.get(machine.strip(), machine.strip()),)
        return Device(self.title, self._machines, self._folder.free_bytes(_BASE))

    def prepare(self) -> None:
        """See `Place`."""
        self._folder.prepare()

    def install(self, runner: str) -> None:
        """See `Place`."""
        self._folder.install(runner, self._machines)

    def run(self, arguments: Sequence[str], timeout_s: float) -> Ran:
        """See `Place`."""
        return self._folder.run(arguments, timeout_s)

    def conditions(self) -> Conditions:
        """See `Place`."""
        heat = "cat /sys/class/thermal/thermal_zone*/temp 2>/dev/null"
        _, said = self.shell(f"{heat}; vcgencmd get_throttled 2>/dev/null; {_CAPPED}", "ask for temperatures")
        _, memory = self.shell("cat /proc/meminfo", "ask for free memory")
        return Conditions(*board_state(said), available_mb(memory))

    def clean_up(self) -> None:
        """See `Place`."""
        # What was begun is taken away in any case.
        self._stop = None
        self._folder.clean_up()

    def left_behind(self) -> str:
        """See `Place`."""
        return f"left behind on {self.title}: remove it with `ssh {self._host} rm -rf {self._folder.path}`"

    def shell(self, command: str, doing: str, timeout_s: float | None = None) -> tuple[int, str]:
        """See `Connection`."""
        wrapped = f"({command}) 2>&1; echo {_MARK}$?"
        said = self._call(wrapped, doing, timeout_s or self._patience_s)
        output, mark, code = said.out.rpartition(_MARK)
        if not mark:
            raise MachineError(f"{self.title}: the device went away while it should {doing}: {said.reason}")
        return int(code), output

    def push(self, local: Path, name: str) -> None:
        """See `Place` and `Connection`: a name is one in our folder, a path is where it says."""
        remote = name if name.startswith("/") else f"{self._folder.path}/{name}"
        timeout_s = copy_timeout(local, self._patience_s)
        said = self._call(f"cat > {shlex.quote(remote)}", f"take {local.name}", timeout_s, local)
        if said.code:
            mend = "; free some space there" if "No space left" in said.err else ""
            raise MachineError(f"{self.title}: the device did not take {local.name}: {said.reason}{mend}")

    def pull(self, remote: str, local: Path) -> None:
        """See `Connection`."""
        said = self._call(f"cat {shlex.quote(remote)}", "give its results", self._patience_s)
        if said.code:
            raise MachineError(f"{self.title}: the device did not give its results: {said.reason}")
        local.write_text(said.out, encoding="utf-8")

    def _call(self, command: str, doing: str, timeout_s: float, stdin: Path | None = None) -> Said:
        options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={max(1, int(self._patience_s / 2))}"]
        assert self._host
        # The remote user's own shell may be any; ours is sh.
        line = shlex.join(["sh", "-c", command])
        said = call_tool(
            [self._ssh, *options, "--", self._host, line],
            f"{self.title}: {doing}",
            timeout_s,
            stdin,
            self._stop,
        )
        if said.code == _OWN_FAILURE:
            raise MachineError(f"{self.title}: ssh cannot reach it to {doing}: {said.reason}")
        return said


def board_state(said: str) -> tuple[float | None, str | None]:
    """Return the hottest zone in degrees and what the board says of throttling."""
    zones = [int(line) / 1000 for line in said.splitlines() if re.fullmatch(r"-?\d+", line)]
    temperature = max(zones, default=None)
    if firmware := re.search(r"^throttled=0x([0-9a-fA-F]+)", said, re.MULTILINE):
        bits = int(firmware[1], 16)
        return temperature, ", ".join(name for bit, name in _PI.items() if bits & bit) or "none"
    policies = re.findall(r"^cpufreq policy\d+ (\d+) (\d+)$", said, re.MULTILINE)
    if not policies:
        return temperature, None
    capped = [
        f"{int(now) // 1000} of {int(most) // 1000} MHz" for now, most in policies if int(now) < int(most)
    ]
    return temperature, f"frequency capped at {', '.join(capped)}" if capped else "none"
