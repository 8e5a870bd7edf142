"""Android, through adb (https://developer.android.com/tools/adb).

Temperature and throttling are those of ``dumpsys thermalservice`` (Android 10 and later): the sensors of type CPU, and
the status of PowerManager from NONE to SHUTDOWN.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from slm_export.bench.figures import Conditions
from slm_export.bench.places import Device, Ran
from slm_export.bench.places.tool import ANSWER_S, Said, call_tool, copy_timeout, find_tool
from slm_export.bench.places.unix import UnixFolder, available_mb
from slm_export.errors import InputError, MachineError

_GET = (
    "`apt-get install adb` on Debian and Ubuntu, or Android's platform tools: "
    "https://developer.android.com/tools/releases/platform-tools"
)
_BASE = "/data/local/tmp"
_MACHINES = {"arm64-v8a": "aarch64", "armeabi-v7a": "arm", "armeabi": "arm", "x86_64": "x86_64", "x86": "x86"}
_THROTTLING = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
_NONE = "adb finds no device; plug one in, with USB debugging turned on in its developer options"
_MARK = "slm-export-exit:"
_MEND = {
    "unauthorized": "unlock it and allow debugging from this computer",
    "offline": "plug it in again, or `adb reconnect`",
    "no permissions": "install udev's rules for it (Debian: android-sdk-platform-tools-common)",
}
_CPU = "0"
"""TemperatureType.CPU of Android's thermal HAL."""


class Adb:
    """One Android device."""

    name: ClassVar[str] = "adb"

    def __init__(
        self, serial: str | None, patience_s: float = ANSWER_S, stop: threading.Event | None = None
    ) -> None:
        self._asked, self._patience_s = serial, patience_s
        self._stop = stop
        self._adb = self._serial = self.title = ""
        self._machines: tuple[str, ...] = ()
        self._folder = UnixFolder(self, _BASE)

    def find(self) -> Device:
        """See `Place`."""
        self._adb = find_tool("adb", _GET)
        self._serial, model = _choose(_listed(self._adb, self._patience_s), self._asked)
        self.title = f"{model} ({self._serial})"
        _, said = self.shell("getprop ro.product.cpu.abilist", "ask for the ABI")
        abis = [abi for abi in said.strip().split(",") if abi]
        self._machines = tuple(dict.fromkeys(_MACHINES.get(abi, abi) for abi in abis))
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
        _, thermal = self.shell("dumpsys thermalservice", "ask for temperatures")
        _, memory = self.shell("cat /proc/meminfo", "ask for free memory")
        return Conditions(*thermal_state(thermal), available_mb(memory))

    def clean_up(self) -> None:
        """See `Place`."""
        # What was begun is taken away in any case.
        self._stop = None
        self._folder.clean_up()

    def left_behind(self) -> str:
        """See `Place`."""
        return f"left behind on {self.title}: remove it with `adb -s {self._serial} shell rm -rf {self._folder.path}`"

    def shell(self, command: str, doing: str, timeout_s: float | None = None) -> tuple[int, str]:
        """See `Connection`."""
        # adb itself exits with 1 too, so the device's own code is said in the output.
        said = self._call(
            ["shell", f"({command}) 2>&1; echo {_MARK}$?"], doing, timeout_s or self._patience_s
        )
        output, mark, code = said.out.rpartition(_MARK)
        if not mark:
            raise MachineError(f"{self.title}: the device went away while it should {doing}: {said.reason}")
        return int(code), output

    def push(self, local: Path, name: str) -> None:
        """See `Place` and `Connection`: a name is one in our folder, a path is where it says."""
        remote = name if name.startswith("/") else f"{self._folder.path}/{name}"
        timeout_s = copy_timeout(local, self._patience_s)
        self._copy(["push", str(local), remote], f"take {local.name}", timeout_s)

    def pull(self, remote: str, local: Path) -> None:
        """See `Connection`."""
        self._copy(["pull", remote, str(local)], "give its results", self._patience_s)

    def _copy(self, arguments: Sequence[str], doing: str, timeout_s: float) -> None:
        said = self._call(arguments, doing, timeout_s)
        if said.code:
            full = "No space left" in said.out + said.err
            mend = "; free some space there" if full else ""
            raise MachineError(f"{self.title}: the device did not {doing}: {said.reason}{mend}")

    def _call(self, arguments: Sequence[str], doing: str, timeout_s: float) -> Said:
        command = [self._adb, "-s", self._serial, *arguments]
        return call_tool(command, f"{self.title}: {doing}", timeout_s, stop=self._stop)


def serials(patience_s: float = ANSWER_S) -> tuple[str, ...]:
    """Return the serial numbers of all devices that adb knows, also of those that refuse it.

    Raises:
        MissingComponentError: adb is not installed.
        MachineError: there is none, or adb does not answer.
    """
    if found := tuple(_states(_listed(find_tool("adb", _GET), patience_s))):
        return found
    raise MachineError(_NONE)


def _listed(adb: str, patience_s: float) -> str:
    said = call_tool([adb, "devices", "-l"], "adb: list the devices", patience_s)
    if said.code:
        raise MachineError(f"adb cannot list devices: {said.reason}")
    return said.out


def _states(listed: str) -> dict[str, tuple[str, str]]:
    """Return serial -> state and model from what ``adb devices -l`` says."""
    found = {}
    for line in listed.splitlines():
        if match := re.match(r"(\S+)\s+(no permissions|\w+)(.*)", line):
            model = re.search(r"model:(\S+)", match[3])
            found[match[1]] = (match[2], model[1].replace("_", " ") if model else "Android device")
    found.pop("List", None)
    return found


def _choose(listed: str, asked: str | None) -> tuple[str, str]:
    """Return serial and model of one device."""
    found = _states(listed)
    known = ", ".join(found) or "none"
    if asked is not None and asked not in found:
        raise InputError(f"--device {asked}: adb knows no such device (it knows: {known})")
    if not found:
        raise MachineError(_NONE)
    if asked is None and len(found) > 1:
        raise InputError(
            f"adb finds several devices: {known}; choose one with --device SERIAL, or measure on --device all"
        )
    serial = asked or next(iter(found))
    state, model_name = found[serial]
    if state != "device":
        raise MachineError(f"{serial}: the device is '{state}'; {_MEND.get(state, 'see `adb devices`')}")
    return serial, model_name


def thermal_state(dump: str) -> tuple[float | None, str | None]:
    """Return the hottest CPU sensor and the throttling status that ``dumpsys thermalservice`` tells."""
    status = re.search(r"^Thermal Status: (\d+)", dump, re.MULTILINE)
    # What stands before that line was cached some time ago.
    _, _, current = dump.partition("Current temperatures from HAL:")
    current, _, _ = current.partition("Current cooling devices")
    sensors = re.findall(r"mValue=(-?[\d.]+), mType=(\d+)", current)
    values = [float(value) for value, kind in sensors if kind == _CPU]
    named = None if status is None else dict(enumerate(_THROTTLING)).get(int(status[1]), status[1])
    return max(values, default=None), named
