"""Server and clients as processes of their own, over TLS: Flower's SuperLink and SuperNodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from slm_export.child import Child
from slm_export.errors import InputError, MachineError
from slm_export.federated.flower import environment, programs
from slm_export.federated.settings import Client, Federation, Server
from slm_export.machine import machine_errors

_A_YEAR_S = 365 * 24 * 3600.0
"""A server waits for its clients for as long as its rounds let it, and is ended by whoever started it."""
_PAUSE_S = 2.0


def serve(federation: Federation, folder: Path) -> None:
    """Serve the rounds that are left; where they end is in the state of ``folder``.

    Raises:
        InputError: certificate, key or the clients' keys are wrong, or the address is taken.
        MachineError: Flower failed.
    """
    from slm_export.federated.apps import write_station

    assert federation.server is not None
    keys = check_server(federation.server, federation.rounds.clients)
    more = environment(folder / "flower") | programs(folder / "bin") | write_station(federation, folder)
    host, _, port = federation.server.listen.rpartition(":")
    request = {
        "host": host.strip("[]"),
        "port": int(port),
        "certificate": federation.server.certificate,
        "key": federation.server.key,
        "clients": [str(key) for key in keys],
    }
    with Child("slm_export.federated.superlink", "serve the clients", _A_YEAR_S, more) as child:
        ended = child.ask(request)
    if ended["ended"] != "completed":
        raise MachineError(
            f"the server's rounds ended before they were done: {ended['details'] or ended['ended']}"
        )


def take_part(federation: Federation) -> None:
    """Take part until the process is ended.

    Raises:
        InputError: the CA's certificate or the key is not right.
        MachineError: Flower ended by itself.
    """
    from slm_export.federated.apps import write_station

    assert federation.client is not None
    check_client(federation.client)
    folder = Path(federation.client.state)
    with machine_errors("keep what this client has spent", folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        more = environment(folder / "flower") | programs(folder / "bin") | write_station(federation, folder)
    told = {
        "server": federation.client.server,
        "ca": federation.client.ca,
        "key": federation.client.key,
    }
    command = [sys.executable, "-m", "slm_export.federated.supernode", json.dumps(told)]
    while (code := _node(command, {**os.environ, **more})) == 0:
        # So Flower's ends where the server has begun anew, and knows nothing of this client but its key.
        time.sleep(_PAUSE_S)
    raise MachineError(f"the client ended by itself (exit code {code}); the lines above say why")


def _node(command: list[str], variables: Mapping[str, str]) -> int:
    """Run Flower's process to its end, and return its exit code; it ends with this one."""
    child = subprocess.Popen(command, env=variables)
    try:
        return child.wait()
    finally:
        child.terminate()
        child.wait()


def check_server(server: Server, belong: int) -> list[Path]:
    """Return the clients' public keys.

    Raises:
        InputError: a file is not what it should be; there is no key, or more than clients that belong.
    """
    import ssl

    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(server.certificate, server.key)
    except OSError as error:
        raise InputError(
            f"server.certificate, server.key: {server.certificate} and {server.key} are no certificate in PEM form "
            f"with its key ({error})"
        ) from error
    keys = sorted(Path(server.clients).glob("*.pub"))
    if not 0 < len(keys) <= belong:
        raise InputError(
            f"server.clients: {server.clients} holds {len(keys)} public keys (*.pub), of 1 to the {belong} of "
            "rounds.clients"
        )
    for path in keys:
        try:
            known = isinstance(load_ssh_public_key(path.read_bytes()), EllipticCurvePublicKey)
        except (OSError, ValueError, UnsupportedAlgorithm):
            known = False
        if not known:
            raise InputError(
                f"{path}: no public key of an elliptic curve; make one with ssh-keygen -t ecdsa -b 384"
            )
    return keys


def check_client(client: Client) -> None:
    """Raise unless a client's files are what they should be.

    Raises:
        InputError: which one is not.
    """
    import ssl

    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(client.ca)
    except OSError as error:
        raise InputError(f"client.ca: {client.ca} is no certificate in PEM form ({error})") from error
    try:
        known = isinstance(load_ssh_private_key(Path(client.key).read_bytes(), None), EllipticCurvePrivateKey)
    except (OSError, ValueError, UnsupportedAlgorithm):
        known = False
    if not known:
        raise InputError(
            f"client.key: {client.key} is no private key of an elliptic curve without a passphrase; make one with "
            "ssh-keygen -t ecdsa -b 384"
        )
