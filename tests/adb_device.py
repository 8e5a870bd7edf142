"""A phone for tests: a server that speaks adb's host protocol, so that the real ``adb`` client can be driven.

Protocol: SERVICES.TXT, SYNC.TXT and shell_protocol.h of Android's adb (version 41). The phone's shell is this
machine's, its ``/data/local/tmp`` is a folder of the test, and getprop, dumpsys and df say what the test wants.
"""

from __future__ import annotations

import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer

TMP = "/data/local/tmp"
_VERSION = 41
_STDOUT, _STDERR, _EXIT = 1, 2, 3
_FEATURES = "shell_v2"

THERMAL = """IsStatusOverride: false
Thermal Status: 2
Cached temperatures:
\tTemperature{mValue=99.0, mType=0, mName=OLD, mStatus=0}
Current temperatures from HAL:
\tTemperature{mValue=48.5, mType=0, mName=CPU0, mStatus=0}
\tTemperature{mValue=51.25, mType=0, mName=CPU1, mStatus=0}
\tTemperature{mValue=36.0, mType=3, mName=SKIN, mStatus=2}
Current cooling devices from HAL:
\tCoolingDevice{mValue=77, mType=2, mName=cpu-cooling}
"""


@dataclass
class Phone:
    """What the phone is like, and what was asked of it. Change it while it runs, to make it fail."""

    folder: Path
    serial: str = "PHONE1"
    state: str = "device"
    others: tuple[str, ...] = ()
    abis: str = "arm64-v8a,armeabi-v7a"
    free_kb: int = 10_000_000
    thermal: str = THERMAL
    full: bool = False
    """Whether it refuses files for want of space."""
    deaf_to: str | None = None
    """It does not answer a shell command with this in it."""
    gone_at: str | None = None
    """It is unplugged when a shell command has this in it, and stays so."""
    gone: bool = False
    commands: list[str] = field(default_factory=list)

    @property
    def tmp(self) -> Path:
        """What it has for /data/local/tmp."""
        return self.folder / "tmp"

    def here(self, text: str) -> str:
        """Return a command or path of the phone as one of this machine."""
        return text.replace(TMP, str(self.tmp))


@contextmanager
def plugged_in(*phones: Phone) -> Iterator[int]:
    """Yield the port of an adb server that has these phones."""
    for phone in phones:
        _give_tools(phone)

    class Handler(BaseRequestHandler):
        def handle(self) -> None:
            with suppress(ConnectionError, EOFError):
                _Conversation(self.request, phones).talk()

    class Server(ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def _give_tools(phone: Phone) -> None:
    phone.tmp.mkdir(parents=True, exist_ok=True)
    tools = phone.folder / "bin"
    tools.mkdir(exist_ok=True)
    says = {"getprop": "$ABIS", "dumpsys": "$THERMAL"}
    for name, said in says.items():
        (tools / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "{said}"\n', encoding="utf-8")
    (tools / "df").write_text(
        '#!/bin/sh\necho "Filesystem 1024-blocks Used Available Capacity Mounted on"\n'
        'echo "/dev/block/dm-9 20000000 1 $FREE_KB 1% /data"\n',
        encoding="utf-8",
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)


class _Conversation:
    def __init__(self, connection: socket.socket, phones: tuple[Phone, ...]) -> None:
        self._connection, self._phones, self._phone = connection, phones, phones[0]

    def talk(self) -> None:
        while True:
            service = self._exactly(int(self._exactly(4), 16)).decode()
            name, _, rest = service.partition(":")
            name, _, _ = name.partition(",")  # shell,v2,TERM=xterm,raw:COMMAND
            if name in ("host", "host-serial") and not self._host(name, rest):
                return
            if name in ("shell", "sync"):
                self._shell(rest) if name == "shell" else self._sync()
                return

    def _host(self, name: str, rest: str) -> bool:
        """Answer the server's own services; return whether more may follow."""
        # Which phone is said by its serial number: `host-serial:PHONE1:features`, `host:tport:serial:PHONE1`.
        named = [phone for phone in self._phones if phone.serial in rest.split(":")]
        self._phone = phone = named[0] if named else self._phones[0]
        if rest == "version":
            self._okay(f"{_VERSION:04x}")
        elif rest.startswith("devices"):
            states = {one.serial: one.state for one in self._phones if not one.gone}
            states |= {other: "device" for one in self._phones if not one.gone for other in one.others}
            lines = [
                f"{serial:<22} {state} usb:1-1 product:p model:Test_Phone device:d transport_id:1"
                for serial, state in states.items()
            ]
            self._okay("".join(f"{line}\n" for line in lines))
        elif phone.gone or phone.state != "device":
            self._fail(f"device '{phone.serial}' not found" if phone.gone else f"device {phone.state}")
        elif rest.endswith("features"):
            self._okay(_FEATURES)
        elif rest.startswith("tport:"):
            self._connection.sendall(b"OKAY" + struct.pack("<Q", 1))
            return True
        elif rest.startswith("transport"):
            self._connection.sendall(b"OKAY")
            return True
        else:
            self._fail(f"unknown host service {rest}")
        return False

    def _shell(self, command: str) -> None:
        """Run a command with the shell protocol: packets of kind, length and bytes."""
        phone = self._phone
        phone.commands.append(command)
        self._connection.sendall(b"OKAY")
        if phone.deaf_to and phone.deaf_to in command:
            time.sleep(30)
        if phone.gone_at and phone.gone_at in command:
            phone.gone = True
            return
        tools = f"{phone.folder / 'bin'}:/usr/bin:/bin"
        state = {"ABIS": phone.abis, "THERMAL": phone.thermal, "FREE_KB": str(phone.free_kb)}
        done = subprocess.run(
            ["/bin/sh", "-c", phone.here(command)],
            env={"PATH": tools, **state},
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        for kind, data in ((_STDOUT, done.stdout), (_STDERR, done.stderr), (_EXIT, bytes([done.returncode]))):
            self._connection.sendall(struct.pack("<BI", kind, len(data)) + data)

    def _sync(self) -> None:
        """Take and give files: requests of a four-letter name and a length."""
        self._connection.sendall(b"OKAY")
        while True:
            name, length = struct.unpack("<4sI", self._exactly(8))
            if name == b"QUIT":
                return
            path = self._exactly(length).decode()
            if name == b"STAT":
                self._stat(Path(self._phone.here(path)))
            elif name == b"SEND":
                self._take(Path(self._phone.here(path.rpartition(",")[0])))
            elif name == b"RECV":
                self._give(Path(self._phone.here(path)))
            else:
                self._sync_fail(f"unknown request {name!r}")
                return

    def _stat(self, path: Path) -> None:
        try:
            found = path.stat()
            self._connection.sendall(
                struct.pack("<4sIII", b"STAT", found.st_mode, found.st_size, int(found.st_mtime))
            )
        except OSError:
            self._connection.sendall(struct.pack("<4sIII", b"STAT", 0, 0, 0))

    def _take(self, path: Path) -> None:
        chunks = []
        while True:
            name, length = struct.unpack("<4sI", self._exactly(8))
            if name == b"DONE":
                break
            chunks.append(self._exactly(length))
        if self._phone.full:
            self._sync_fail("write failed: No space left on device")
            return
        path.write_bytes(b"".join(chunks))
        self._connection.sendall(struct.pack("<4sI", b"OKAY", 0))

    def _give(self, path: Path) -> None:
        try:
            data = path.read_bytes()
        except OSError as error:
            self._sync_fail(str(error.strerror))
            return
        if data:
            self._connection.sendall(struct.pack("<4sI", b"DATA", len(data)) + data)
        self._connection.sendall(struct.pack("<4sI", b"DONE", 0))

    def _sync_fail(self, words: str) -> None:
        self._connection.sendall(struct.pack("<4sI", b"FAIL", len(words)) + words.encode())

    def _okay(self, text: str) -> None:
        self._connection.sendall(b"OKAY" + f"{len(text):04x}{text}".encode())

    def _fail(self, text: str) -> None:
        self._connection.sendall(b"FAIL" + f"{len(text):04x}{text}".encode())

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self._connection.recv(count - len(data))
            if not part:
                raise EOFError
            data += part
        return data


def adb_variables(port: int) -> dict[str, str]:
    """Return the environment in which the real client talks to this server."""
    return {"ANDROID_ADB_SERVER_PORT": str(port), "ADB_SERVER_SOCKET": f"tcp:127.0.0.1:{port}"}
