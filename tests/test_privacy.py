"""What leaves this machine: nothing over the network unless a hub name is given, and no secret in what is written.

Every command runs in a process that dies loudly where it reaches for the network.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import environment
from forked import Forked, forked

# A process of its own: an audit hook cannot be taken away again, and children inherit the folder too.
HOOK = """
import os, socket, sys
CALLS = {"socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo",
         "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"}
HERE = ("localhost", "::1", "", "0.0.0.0")

def hear(event, arguments):
    if event not in CALLS:
        return
    place = arguments[0] if event.startswith("socket.get") else arguments[1]
    host = place[0] if isinstance(place, tuple) else place
    if isinstance(arguments[0], socket.socket) and arguments[0].family == getattr(socket, "AF_UNIX", None):
        return
    if isinstance(host, str) and (host in HERE or host.startswith("127.")):
        return
    with open(os.environ["HEARD"], "a") as file:
        file.write(f"{event} {place!r}\\n")
    os.write(2, f"NETWORK: {event} {place!r}\\n".encode())
    os._exit(97)

sys.addaudithook(hear)
# The machine's own name may be as short as two letters, and those are in every file.
kind, _, *rest = os.uname()
os.uname = lambda: os.uname_result((kind, "machine-of-somebody", *rest))
socket.gethostname = lambda: "machine-of-somebody"
"""
QUICK = ("--target", "host", "--format", "executorch", "--bits", "8")


SECRETS = {
    "HF_TOKEN": "hf_tokenOfSomebody",
    "HUGGING_FACE_HUB_TOKEN": "hf_olderTokenOfSomebody",
    "PIP_INDEX_URL": "https://builder:pipPasswordOfSomebody@127.0.0.1:9/simple",
    "HTTPS_PROXY": "http://builder:proxyPasswordOfSomebody@127.0.0.1:9",
    "AWS_SECRET_ACCESS_KEY": "awsKeyOfSomebody",
}
PERSON = "person-of-this-machine"


@dataclass(frozen=True)
class Exported:
    """A bundle, what making it printed, and a way to do more in the same environment."""

    home: Path
    done: subprocess.CompletedProcess[str]
    run: Forked
    """Another command, in the environment that this one was made in."""
    place: Path
    """Where the hook writes what it hears."""

    def heard(self) -> str:
        """Return what was reached for, and forget it."""
        said = self.place.read_text() if self.place.exists() else ""
        self.place.unlink(missing_ok=True)
        return said


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[Exported]:
    """An export from somebody's home, online, with secrets around."""
    home = tmp_path_factory.mktemp("homes") / PERSON
    shutil.copytree(tiny_llama, home / "model")
    (home / "hook").mkdir()
    (home / "hook" / "sitecustomize.py").write_text(HOOK)
    (home / "text.txt").write_text("A page of text, and its second sentence.\n\n" * 200)
    online = {
        **SECRETS,
        "HOME": str(home),
        "USER": PERSON,
        "PYTHONPATH": str(home / "hook"),
        "HEARD": str(home / "heard"),
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": "https://hub.invalid",
        "NO_PROXY": "hub.invalid",
        "HF_HOME": str(home / "hub"),
    }
    asked = (
        "--eval-text",
        home / "text.txt",
        "--out",
        home / "out",
        "--no-bench",
        "--junit",
        home / "junit.xml",
    )
    with forked(environment(online)) as run:
        done = run("export", home / "model", *QUICK, *asked, cwd=home)
        yield Exported(home, done, run, Path(online["HEARD"]))


def test_an_export_of_a_folder_never_reaches_for_the_network(exported: Exported) -> None:
    assert exported.done.returncode == 0, exported.done.stderr
    assert not exported.heard()


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "model", "--target", "host"),
        ("verify", "out"),
        ("run", "out", "--prompt", "def", "--max-tokens", "2"),
        ("report", "out"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_no_command_on_folders_reaches_for_the_network(
    exported: Exported, arguments: tuple[str, ...]
) -> None:
    done = exported.run(*arguments, cwd=exported.home)
    assert done.returncode == 0, done.stderr
    assert not exported.heard()


@pytest.mark.parametrize(
    "arguments",
    [
        ("org/name", "--target", "host"),
        ("plan", "org/name", "--target", "host"),
        ("verify", "out", "--source", "org/name"),
        ("matrix", "matrix.toml"),
    ],
    ids=["export", "plan", "verify", "matrix"],
)
def test_offline_a_hub_name_is_refused_unasked(exported: Exported, arguments: tuple[str, ...]) -> None:
    (exported.home / "matrix.toml").write_text('models = ["org/name"]\ndevices = ["raspberry-pi-5"]\n')
    done = exported.run(*arguments, "--offline", "--json", cwd=exported.home)
    assert done.returncode == 2, done.stderr
    assert not exported.heard()
    message = json.loads(done.stdout)["error"]["message"]
    assert message.startswith(
        "org/name: no such folder, not downloaded before, and offline mode is on (--offline"
    )


def test_without_that_option_the_hub_is_asked_and_the_hook_hears_it(exported: Exported) -> None:
    """What the tests above rely on."""
    done = exported.run("org/name", "--target", "host", cwd=exported.home)
    assert done.returncode == 97
    assert exported.heard() == "socket.getaddrinfo 'hub.invalid'\n"


def test_no_secret_is_printed_or_written(exported: Exported) -> None:
    written = [path for path in exported.home.rglob("*") if path.is_file() and "hook" not in path.parts]
    contents = {str(path): path.read_bytes() for path in written}
    assert {"report.json", "report.html", "manifest.json", "sbom.cdx.json", "junit.xml"} <= {
        p.name for p in written
    }
    contents |= {"stdout": exported.done.stdout.encode(), "stderr": exported.done.stderr.encode()}
    for name, secret in SECRETS.items():
        word = secret.partition("OfSomebody")[0].rpartition(":")[2].encode() + b"OfSomebody"
        found = [place for place, content in contents.items() if word in content]
        assert not found, (name, found)


def test_a_bundle_does_not_tell_whose_machine_made_it(exported: Exported) -> None:
    """Neither the path of the home nor the user's name; of a path that was asked for, the last part alone."""
    for path in (exported.home / "out").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert PERSON.encode() not in content, path
            assert str(Path.home()).encode() + b"/" not in content, path
            assert b"machine-of-somebody" not in content, path
    asked = json.loads((exported.home / "out" / "report.json").read_text())["asked"]
    assert asked["eval_text"] == "text.txt"
