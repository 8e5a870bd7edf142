"""Flower's SuperLink with two doors, in a process of its own.

Flower answers everything at one port: clients that fetch and bring messages, and whoever registers clients and starts
runs, which means code, without asking who they are. Here what is open to the network answers clients alone, over TLS,
and knows them by their keys; the rest is at a port of the loopback address.
"""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from pathlib import Path
from typing import Any

from slm_export.child import serve_all
from slm_export.errors import InputError, MachineError
from slm_export.federated.flower import end_with_parent

_FLEET = "/v1/fleet/"
_PROJECT = """\
[project]
name = "slm-export-federation"
version = "1.0.0"
[tool.flwr.app]
publisher = "slm-export"
[tool.flwr.app.components]
serverapp = "slm_export.federated.apps:server"
clientapp = "slm_export.federated.apps:client"
[tool.flwr.app.config]
"""
_LOOK_S = 0.5


def for_clients_only(app: Any) -> Any:
    """Return an app that answers nothing but what clients ask."""

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].startswith(_FLEET):
            await app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    return outer


def serve_run(request: dict[str, Any]) -> dict[str, str]:
    """Serve one run from its begin to its end; return how it ended, in Flower's words.

    Given   request: host, port, certificate, key: of the door for clients; clients: paths of their public keys
    """
    import uvicorn
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.main import create_app

    inner, outer = socket.create_server(("127.0.0.1", 0)), _listening(request["host"], request["port"])
    port = inner.getsockname()[1]
    app = create_app(_lifespan(port), SuperLinkLifespan)
    quiet: dict[str, Any] = {"access_log": False, "log_config": None, "workers": 1}
    ours = _Door(uvicorn.Config(app, host="127.0.0.1", port=port, **quiet), inner)
    theirs = _Door(
        uvicorn.Config(
            for_clients_only(app),
            lifespan="off",
            ssl_certfile=request["certificate"],
            ssl_keyfile=request["key"],
            **quiet,
        ),
        outer,
    )
    ours.open()
    control = _control(f"127.0.0.1:{port}")
    try:
        # Before anybody can ask: a client whose key is not known yet would be sent away for good.
        _register(control, [Path(path) for path in request["clients"]])
        theirs.open()
        return _run(control)
    finally:
        control.close()
        theirs.close()
        ours.close()


class _Door:
    """A server in a thread."""

    def __init__(self, config: Any, listening: socket.socket) -> None:
        import uvicorn

        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listening],), daemon=True)

    def open(self) -> None:
        """Answer from now on."""
        self._thread.start()
        while self._thread.is_alive() and not self._server.started:
            time.sleep(_LOOK_S / 10)
        if not self._server.started:
            raise MachineError("Flower's server did not start")

    def close(self) -> None:
        """Answer no more."""
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join(timeout=10)


def _lifespan(port: int) -> Any:
    from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
    from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin

    return SuperLinkLifespanConfig(
        control_address="127.0.0.1:0",
        health_server_address=None,
        host="127.0.0.1",
        port=port,
        insecure=True,
        certificates=None,
        superexec_auth_secret=None,
        authn_plugin=load_control_authn_plugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type="grpc-rere",
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=FLWR_IN_MEMORY_DB_NAME,
        isolation="subprocess",
        runtime_dependency_install=False,
    )


def _control(address: str) -> Any:
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    return ControlHttpClient.from_server_address(
        address, True, None, [RuntimeVersionHttpInterceptor(component_name="flwr CLI")]
    )


def _register(control: Any, keys: list[Path]) -> None:
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.proto.control_pb2 import RegisterNodeRequest

    for key in keys:
        control.RegisterNode(RegisterNodeRequest(public_key=try_load_public_key(key), name=key.stem))


def _run(control: Any) -> dict[str, str]:
    """Start the run, and wait for its end."""
    from flwr.cli.build import build_fab_from_files
    from flwr.common.serde import fab_to_proto
    from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest
    from flwr.supercore.fab import Fab

    content, _ = build_fab_from_files({"pyproject.toml": _PROJECT.encode()})
    fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
    run_id = control.StartRun(StartRunRequest(fab=fab_to_proto(fab))).run_id
    while True:
        status = control.ListRuns(ListRunsRequest(run_id=run_id)).run_dict[run_id].status
        if status.status == "finished":
            return {"ended": status.sub_status, "details": status.details}
        time.sleep(_LOOK_S)


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(
            f"server.listen: nobody can listen at {host}, port {port}: {error.strerror}"
        ) from error


if __name__ == "__main__":
    end_with_parent()
    serve_all(serve_run)
