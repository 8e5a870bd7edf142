"""iPhone and iPad, through Xcode's devicectl (``xcrun devicectl help``).

What is run there is an app: ``--runner`` names its bundle identifier, or the ``.app`` that is installed for the while
and taken off again. It is started with the flags of the vendor's program, finds files in its Documents folder, and
writes what that program writes to stdout. Apple tells no temperature of a device to a computer.
"""

from __future__ import annotations

import json
import plistlib
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from slm_export.bench.figures import Conditions
from slm_export.bench.places import Device, Ran
from slm_export.bench.places.tool import ANSWER_S, Said, call_tool, copy_timeout, find_tool
from slm_export.errors import InputError, MachineError, MissingComponentError

_GET = "it comes with Xcode 15 and later, on a Mac: https://developer.apple.com/xcode/"
_INSTALL_S = 300.0


class Devicectl:
    """One Apple device."""

    name: ClassVar[str] = "devicectl"

    def __init__(
        self, asked: str | None, patience_s: float = ANSWER_S, stop: threading.Event | None = None
    ) -> None:
        self._asked, self._patience_s = asked, patience_s
        self._stop = stop
        self._xcrun = self._identifier = self._app = self.title = ""
        self._installed = False
        self._brought: list[str] = []

    def find(self) -> Device:
        """See `Place`."""
        self._xcrun = find_tool("xcrun", _GET)
        found = self._json(["list", "devices"], "list the devices").get("devices", [])
        known = {_title(device): str(device["identifier"]) for device in found}
        names = ", ".join(known) or "none"
        if self._asked is not None:
            known = {title: one for title, one in known.items() if self._asked in (title, one)}
            if not known:
                raise InputError(
                    f"--device {self._asked}: devicectl knows no such device (it knows: {names})"
                )
        if not known:
            raise MachineError(
                "devicectl finds no device; plug one in, trust this Mac, and turn developer mode on"
            )
        if len(known) > 1:
            raise InputError(f"devicectl finds several devices: {names}; choose one with --device NAME")
        ((self.title, self._identifier),) = known.items()
        return Device(self.title, (), None)

    def prepare(self) -> None:
        """Nothing is made before an app is there."""

    def install(self, runner: str) -> None:
        """Install an ``.app``, or take the one of a bundle identifier."""
        app = Path(runner)
        if app.suffix == ".app":
            if not (app / "Info.plist").is_file():
                raise InputError(
                    f"{app}: no app with an Info.plist; give the .app that Xcode built for a device"
                )
            self._app = str(plistlib.loads((app / "Info.plist").read_bytes())["CFBundleIdentifier"])
            self._installed = True
            self._must(["device", "install", "app", *self._on, str(app)], "install the app", _INSTALL_S)
        elif "." not in runner:
            raise MissingComponentError(
                f"{runner}: on an Apple device an app does what the vendor's program does; "
                "give its .app or its bundle identifier"
            )
        else:
            self._app = runner

    def push(self, local: Path, name: str) -> None:
        """Bring a file into the app's Documents."""
        files = ["--source", str(local), "--destination", f"Documents/{name}"]
        command = ["device", "copy", "to", *self._on, *self._container, *files]
        self._brought.append(name)
        self._must(command, f"take {local.name}", copy_timeout(local, self._patience_s))

    def run(self, arguments: Sequence[str], timeout_s: float) -> Ran:
        """Start the app, and read its stdout until it ends."""
        options = ["--console", "--terminate-existing"]
        command = ["device", "process", "launch", *self._on, *options, self._app, *arguments]
        said = self._call(command, "run the model", timeout_s)
        return Ran(said.code, said.out + said.err, None)

    def conditions(self) -> Conditions:
        """Nothing is told."""
        return Conditions()

    def clean_up(self) -> None:
        """Take off the app that was installed, and its files with it; those of an app that stays are emptied."""
        # What was begun is taken away in any case.
        self._stop = None
        if self._installed:
            self._must(["device", "uninstall", "app", *self._on, self._app], "clean up", _INSTALL_S)
            self._installed = False
            return
        brought, self._brought = self._brought, []
        with tempfile.NamedTemporaryFile(prefix="slm-export-") as empty:
            for name in brought:
                self.push(Path(empty.name), name)
        self._brought = []

    def left_behind(self) -> str:
        """See `Place`."""
        return f"left behind on {self.title}: files of {self._app or 'the app'}; delete that app by hand"

    @property
    def _on(self) -> list[str]:
        return ["--device", self._identifier]

    @property
    def _container(self) -> list[str]:
        return ["--domain-type", "appDataContainer", "--domain-identifier", self._app]

    def _must(self, arguments: Sequence[str], doing: str, timeout_s: float) -> None:
        said = self._call(arguments, doing, timeout_s)
        if said.code:
            raise MachineError(f"{self.title}: the device did not {doing}: {said.reason}")

    def _json(self, arguments: Sequence[str], doing: str) -> Mapping[str, Any]:
        with tempfile.NamedTemporaryFile(prefix="slm-export-", suffix=".json") as file:
            said = self._call([*arguments, "--json-output", file.name], doing, self._patience_s)
            text = file.read()
        if said.code or not text:
            raise MachineError(f"devicectl cannot {doing}: {said.reason}")
        return dict(json.loads(text).get("result", {}))

    def _call(self, arguments: Sequence[str], doing: str, timeout_s: float) -> Said:
        return call_tool(
            [self._xcrun, "devicectl", *arguments],
            f"{self.title or 'devicectl'}: {doing}",
            timeout_s,
            stop=self._stop,
        )


def _title(device: Mapping[str, Any]) -> str:
    return str(device.get("deviceProperties", {}).get("name") or device["identifier"])
