"""Server and clients as processes of their own, over TLS on the loopback address.

What is asserted is what happened, never how long it took: the tests wait for states.
"""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import json
import os
import signal
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import command, environment
from forked import Forked

pytest.importorskip("flwr")

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from federating import free_port
from test_federated_simulation import changed

from slm_export.federated.flower import programs
from slm_export.federated.state import FILE, load_state
from slm_export.federated.superlink import for_clients_only

DEADLINE_S = 900.0
SETTINGS = """
out = "adapter"

[model]
base = "{base}"
rank = 2

[data]
texts = ["{texts}"]

[rounds]
number     = {number}
clients    = 3
available  = {available}
minimum    = 1
deadline_s = {deadline_s}
failures   = 0

[local]
steps  = 2
batch  = 2
length = 32
"""

# In the client's process alone, and before it has learned anything: it waits there until the test lets it go on.
GATED = """
import os, sys, time
if "flwr-clientapp" in sys.orig_argv:
    from pathlib import Path
    import slm_export.federated.client as client
    gate, learn = Path(os.environ["GATE"]), client._learn
    def waits(*asked):
        gate.with_suffix(".reached").touch()
        while not gate.exists():
            time.sleep(0.1)
        gate.unlink(missing_ok=True)
        return learn(*asked)
    client._learn = waits
"""


def key_pair(path: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    path.chmod(0o600)
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    path.with_suffix(".pub").write_bytes(public)
    return key


def certificates(folder: Path) -> None:
    """A CA, and a certificate of it for 127.0.0.1."""
    folder.mkdir(parents=True)
    now = datetime.datetime.now(datetime.timezone.utc)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a CA of the tests")])

    def certificate(name: x509.Name, public: Any, extensions: list[tuple[Any, bool]]) -> x509.Certificate:
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(ca_name).public_key(public)
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(days=1))
        builder = builder.not_valid_after(now + datetime.timedelta(days=2))
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(ca_key, hashes.SHA256())

    authority = certificate(
        ca_name,
        ca_key.public_key(),
        [
            (x509.BasicConstraints(ca=True, path_length=0), True),
            (x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), False),
        ],
    )
    own = certificate(
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")]),
        key.public_key(),
        [
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), False),
        ],
    )
    (folder / "ca.pem").write_bytes(authority.public_bytes(Encoding.PEM))
    (folder / "server.pem").write_bytes(own.public_bytes(Encoding.PEM))
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "server.key").write_bytes(private)


def until(what: str, true: Callable[[], Any], alive: tuple[subprocess.Popen[Any], ...] = ()) -> Any:
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        if found := true():
            return found
        assert all(process.poll() is None for process in alive), f"a process ended while waiting until {what}"
        time.sleep(0.2)
    raise AssertionError(f"never came: {what}")


class Place:
    """A folder for each process, with its own federation.toml, keys and log."""

    def __init__(self, folder: Path, base: Path, available: int, deadline_s: float, number: int = 1) -> None:
        self.folder = folder
        certificates(folder / "tls")
        (folder / "keys").mkdir()
        self.port = free_port()
        self._common = {"base": base, "available": available, "number": number, "deadline_s": deadline_s}
        self._write(
            "server",
            f'[server]\nlisten = "127.0.0.1:{self.port}"\ncertificate = "../tls/server.pem"\n'
            'key = "../tls/server.key"\nclients = "../keys"\n',
        )

    def client(self, name: str, known: bool = True) -> None:
        own = self._write(
            name,
            f'[client]\nserver = "127.0.0.1:{self.port}"\nca = "../tls/ca.pem"\nkey = "id"\nstate = "state"\n',
        )
        key_pair(own / "id")
        if known:
            (own / "id.pub").rename(self.folder / "keys" / f"{name}.pub")

    def _write(self, name: str, section: str) -> Path:
        own = self.folder / name
        own.mkdir()
        lines = "\n\f\n".join(f"def {name}_{i}(a, b):\n    return a * {i} + b\n" * 4 for i in range(8))
        (own / "mine.txt").write_text(lines)
        (own / "federation.toml").write_text(SETTINGS.format(texts="mine.txt", **self._common) + section)
        return own

    def gate(self, name: str) -> Path:
        """A file that a client waits for before it learns, and takes away; beside it another says that it waits."""
        return self.folder / name / "gate"

    @contextmanager
    def running(self, name: str, gated: bool = False) -> Iterator[subprocess.Popen[Any]]:
        kind = "server" if name == "server" else "client"
        own = self.folder / name
        made = environment(
            {"OMP_NUM_THREADS": "1", "SLM_EXPORT_CACHE": str(own / "cache"), "HOME": str(own / "home")}
        )
        if gated:
            (own / "sitecustomize.py").write_text(GATED)
            made |= {"PYTHONPATH": str(own), "GATE": str(self.gate(name))}
        with (own / "out").open("w") as out, (own / "log").open("w") as log:
            process = subprocess.Popen(
                command("federate", kind, "federation.toml"),
                cwd=own,
                env=made,
                stdout=out,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            kill(process)
            print(f"--- {name}, exit code {process.returncode}\n{self.log(name)[-3000:]}")

    def log(self, name: str) -> str:
        return (self.folder / name / "log").read_text(errors="replace")

    def learns(self, name: str) -> bool:
        """Whether a client was asked, and is at it."""
        return self.gate(name).with_suffix(".reached").exists() or "learns from" in self.log(name)


def rounds_of(cache: Path) -> int:
    """How many rounds a server has stored."""
    found = list((cache / "learning").glob(f"*/{FILE}"))
    state = load_state(found[0].parent) if found else None
    return 0 if state is None else len(state.rounds)


def kill(process: subprocess.Popen[Any]) -> None:
    """Kill a process and all that it has started, without a word."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_one_client_is_killed_and_one_is_late_and_the_round_is_done(tmp_path: Path, tiny_llama: Path) -> None:
    place = Place(tmp_path, tiny_llama, available=3, deadline_s=300.0)
    for name in ("steady", "killed", "late", "stranger"):
        place.client(name, known=name != "stranger")
    with (
        place.running("server") as server,
        place.running("steady") as steady,
        place.running("killed", gated=True) as killed,
        place.running("late", gated=True) as late,
        place.running("stranger"),
    ):
        until("one is at it who will be killed", lambda: place.learns("killed"), (server, steady))
        kill(killed)
        until("one is at it who will be late", lambda: place.learns("late"), (server, steady))
        until("the server is done", lambda: server.poll() is not None, (steady,))
        assert server.returncode == 0, place.log("server")
        place.gate("late").touch()
        until("the late one learns after all", lambda: "learns from" in place.log("late"), (late,))
        assert late.poll() is None, "who was late can go on"
    told = json.loads((tmp_path / "server" / "adapter" / "federation.json").read_text())["federation"]
    assert told["updates"] == {"drawn": 3, "good": 1}
    assert told["refused"] == {"silent": 2}
    assert told["rounds"]["that_changed"] == 1
    assert changed(tmp_path / "server" / "adapter")
    assert not place.learns("stranger"), "a key that the server does not know takes no part"
    for name in ("server", "steady"):
        assert not (tmp_path / name / "home").exists(), "nothing lies in the user's own folder"


@pytest.mark.slow
def test_a_killed_server_is_gone_on_with_and_its_clients_stay(tmp_path: Path, tiny_llama: Path) -> None:
    place = Place(tmp_path, tiny_llama, available=1, deadline_s=600.0, number=3)
    place.client("steady")
    cache = tmp_path / "server" / "cache"
    with place.running("steady", gated=True) as steady:
        with place.running("server") as server:
            place.gate("steady").touch()
            until("the first round is stored", lambda: rounds_of(cache) == 1, (server, steady))
            kill(server)  # in the midst of the second, for which its client waits
        assert rounds_of(cache) == 1
        with place.running("server") as server:

            def done() -> bool:
                place.gate("steady").touch()
                return server.poll() is not None

            until("the server is done", done, (steady,))
            assert server.returncode == 0, place.log("server")
    told = json.loads((tmp_path / "server" / "adapter" / "federation.json").read_text())["federation"]
    assert told["rounds"]["that_changed"] == 3
    assert [each["good"] for each in told["each_round"]] == [1, 1, 1]


@pytest.mark.slow
def test_what_is_open_to_the_network_is_for_known_clients_over_tls_alone(
    tmp_path: Path, tiny_llama: Path
) -> None:
    place = Place(tmp_path, tiny_llama, available=1, deadline_s=600.0)
    place.client("steady")
    with place.running("server") as server:
        trusted = ssl.create_default_context(cafile=str(tmp_path / "tls" / "ca.pem"))
        base = f"https://127.0.0.1:{place.port}"

        def answers() -> bool:
            with suppress(httpx.HTTPError):
                return httpx.get(f"{base}/health", verify=trusted, trust_env=False).status_code > 0
            return False

        until("the server answers", answers, (server,))
        with httpx.Client(base_url=base, verify=trusted, trust_env=False) as client:
            for path in ("/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task"):
                assert client.post(path).status_code == 404
            assert client.get("/health").status_code == 404
            assert client.get("/docs").status_code == 404
            assert client.post("/v1/fleet/pull-messages").status_code in (400, 401, 403, 415, 422, 500)
        with pytest.raises(httpx.HTTPError):
            httpx.get(base.replace("https", "http"), trust_env=False)
        with pytest.raises(httpx.HTTPError, match="certificate"):
            httpx.get(base, trust_env=False)


def test_the_filter_lets_clients_questions_through_and_nothing_else() -> None:
    seen: list[str] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["path"])

    async def ask(path: str, kind: str = "http") -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await for_clients_only(inner)({"type": kind, "path": path}, None, send)
        return sent

    refused = (
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/",
        "/v1/fleet",
        "//v1/fleet/x",
        "/V1/fleet/x",
    )
    for path in refused:
        assert asyncio.run(ask(path))[0]["status"] == 404
    assert asyncio.run(ask("/v1/fleet/x", "websocket")) == []
    assert seen == []
    asyncio.run(ask("/v1/fleet/pull-messages"))
    assert seen == ["/v1/fleet/pull-messages"]


def test_flower_finds_our_programs_and_no_others(tmp_path: Path) -> None:
    path = programs(tmp_path / "bin")["PATH"]
    assert path.startswith(str(tmp_path / "bin"))
    assert {file.name for file in (tmp_path / "bin").iterdir()} == {
        "flower-superexec",
        "flwr-clientapp",
        "flwr-serverapp",
    }


def test_a_client_runs_its_own_program_whatever_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supernode.runtime import run_clientapp

    import slm_export.federated.processes as processes
    from slm_export.federated.apps import client

    called: list[str] = []
    monkeypatch.setattr("flwr.supernode.cli.flwr_clientapp", lambda: called.append("run"))
    monkeypatch.setattr(run_clientapp, "install_from_fab", run_clientapp.install_from_fab)
    monkeypatch.setattr(run_clientapp, "get_load_client_app_fn", run_clientapp.get_load_client_app_fn)
    processes.clientapp()
    assert called == ["run"]
    assert run_clientapp.install_from_fab(b"code of a server", skip_prompt=True) is None
    load = run_clientapp.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
    assert load("somebody/else", "1.0", "hash") is client


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("tls/server.pem", r"server.certificate, server.key: .* are no certificate in PEM form with its key"),
        ("keys/one.pub", r"one.pub: no public key of an elliptic curve; make one with ssh-keygen"),
        ("one/id", r"client.key: .* is no private key of an elliptic curve"),
        ("tls/ca.pem", r"client.ca: .* is no certificate in PEM form"),
    ],
)
def test_files_that_are_not_what_they_should_be_are_named(
    tmp_path: Path, tiny_llama: Path, spoil: str, message: str
) -> None:
    from slm_export.errors import InputError
    from slm_export.federated.deployment import check_client, check_server
    from slm_export.federated.settings import read_federation

    place = Place(tmp_path, tiny_llama, available=1, deadline_s=5.0)
    place.client("one")
    server = read_federation(tmp_path / "server" / "federation.toml").server
    client = read_federation(tmp_path / "one" / "federation.toml").client
    assert server is not None
    assert client is not None
    assert [key.name for key in check_server(server, 3)] == ["one.pub"]
    check_client(client)
    (tmp_path / spoil).write_text("nothing of that kind\n")

    def check() -> None:
        check_server(server, 3)
        check_client(client)

    with pytest.raises(InputError, match=message):
        check()


def test_more_keys_than_clients_belong_are_refused(
    tmp_path: Path, tiny_llama: Path, quick_cli: Forked
) -> None:
    from slm_export.errors import InputError
    from slm_export.federated.deployment import check_server
    from slm_export.federated.settings import read_federation

    place = Place(tmp_path, tiny_llama, available=1, deadline_s=5.0)
    server = read_federation(tmp_path / "server" / "federation.toml").server
    assert server is not None
    with pytest.raises(InputError, match="holds 0 public keys"):
        check_server(server, 3)
    for name in ("one", "two"):
        place.client(name)
    with pytest.raises(InputError, match=r"holds 2 public keys \(\*.pub\), of 1 to the 1"):
        check_server(server, 1)
