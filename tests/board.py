"""A Linux board for tests: a real sshd on the loopback interface, and the real ``ssh`` with a key for it."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
HOST = "board"
_SETTINGS = """
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
AllowUsers {user}
SetEnv PATH={folder}/bin:/usr/bin:/bin
"""
_CLIENT = """
Host {host}
    HostName 127.0.0.1
    Port {port}
    User {user}
    IdentityFile {folder}/user_key
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known_hosts
    StrictHostKeyChecking yes
"""


@dataclass(frozen=True)
class Board:
    """``bin`` comes first on its PATH, and ``client`` on ours: there ``ssh`` knows the board by its name."""

    folder: Path
    port: int

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    @property
    def client(self) -> Path:
        return self.folder / "client"

    def says(self, tool: str, script: str) -> None:
        """Give the board a tool of this name."""
        path = self.bin / tool
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(0o755)


@contextmanager
def switched_on(folder: Path) -> Iterator[Board]:
    """Yield a board that listens."""
    assert SSHD
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    board = Board(folder, port)
    board.bin.mkdir(parents=True)
    board.client.mkdir()
    for name in ("host_key", "user_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True, capture_output=True)
    public = (folder / "host_key.pub").read_text(encoding="utf-8")
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {public}", encoding="utf-8")
    words = {"folder": folder, "port": port, "user": getpass.getuser(), "host": HOST}
    (folder / "sshd_config").write_text(_SETTINGS.format(**words), encoding="utf-8")
    (folder / "ssh_config").write_text(_CLIENT.format(**words), encoding="utf-8")
    real = shutil.which("ssh")
    wrapper = board.client / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {real} -F {folder}/ssh_config "$@"\n', encoding="utf-8")
    wrapper.chmod(0o755)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(
            exist_ok=True
        )  # where sshd gives up its rights; made at boot on a machine that has one
    with subprocess.Popen(
        [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=subprocess.DEVNULL
    ) as running:
        _wait_for(port, running)
        try:
            yield board
        finally:
            running.terminate()


def _wait_for(port: int, running: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert running.poll() is None, "sshd did not start"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("sshd does not listen")
