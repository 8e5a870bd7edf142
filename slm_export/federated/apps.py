"""Flower's two apps, as its processes load them."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from slm_export.federated.rounds import run_rounds
from slm_export.federated.settings import Federation


def server_app(federation: Federation, folder: Path) -> ServerApp:
    """Return the server's: it goes on from the state of ``folder``, and leaves it there."""
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        run_rounds(grid, federation, folder)

    return app
