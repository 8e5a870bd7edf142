"""Flower's two apps: as a simulation makes them, and as processes of a deployment load them.

A process is told where it lives by the variable `STATION`, a file that the command has written.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from slm_export.federated.client import Station, answer
from slm_export.federated.rounds import run_rounds
from slm_export.federated.settings import Federation

STATION = "SLM_EXPORT_FEDERATION"

server = ServerApp()
client = ClientApp()


def write_station(federation: Federation, folder: Path) -> dict[str, str]:
    """Write where a process lives, and return the variable that leads there."""
    path = folder / "station.json"
    told = {"federation": federation.model_dump(mode="json"), "folder": str(folder)}
    path.write_text(json.dumps(told), encoding="utf-8")
    return {STATION: str(path)}


def simulated_server(federation: Federation, folder: Path) -> ServerApp:
    """Return a server that goes on from the state of ``folder``, and leaves it there."""
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        run_rounds(grid, federation, folder)

    return app


def simulated_client(station: Station) -> ClientApp:
    """Return a client that takes the part of the texts which its context says."""
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        return answer(station, message, context)

    return app


@server.main()  # type: ignore[untyped-decorator]
def _serve(grid: Grid, context: Context) -> None:
    federation, folder = _station()
    run_rounds(grid, federation, folder)


@client.train()  # type: ignore[untyped-decorator]
def _train(message: Message, context: Context) -> Message:
    federation, folder = _station()
    return answer(Station(federation, folder), message, context)


def _station() -> tuple[Federation, Path]:
    told = json.loads(Path(os.environ[STATION]).read_text(encoding="utf-8"))
    # Tuples are lists in JSON.
    return Federation.model_validate_json(json.dumps(told["federation"])), Path(told["folder"])
