"""What ``federate simulate``, ``federate server`` and ``federate client`` do and print."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from slm_export.commands.terminal import stdout, working
from slm_export.errors import InputError
from slm_export.federated.flower import require_flower
from slm_export.federated.settings import read_federation
from slm_export.reports.words import figure

if TYPE_CHECKING:
    from slm_export.federated.state import State


# Read by flwr as it is imported, in this process too.
_SILENT = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


def simulate_command(settings: Path, force: bool, as_json: bool) -> None:
    """Simulate, and say what came of each round."""
    federation = read_federation(settings)
    if federation.data is None:
        raise InputError(f"{settings}: [data] is missing; give the texts that are dealt out to the clients")
    require_flower("flwr", "ray")
    os.environ.update(_SILENT)
    with working() as progress:
        from slm_export.federated.federate import federate
        from slm_export.federated.simulation import simulate

        state, out = federate(federation, simulate, "simulate", progress, force)
    _show(state, out, as_json)


def server_command(settings: Path, force: bool, as_json: bool) -> None:
    """Serve, and say what came of each round."""
    federation = read_federation(settings)
    if federation.server is None:
        raise InputError(f"{settings}: [server] is missing; give certificate, key, ca and clients")
    require_flower()
    os.environ.update(_SILENT)
    with working() as progress:
        from slm_export.federated.deployment import serve
        from slm_export.federated.federate import federate

        state, out = federate(federation, serve, "server", progress, force)
    _show(state, out, as_json)


def client_command(settings: Path) -> None:
    """Take part until it is ended."""
    federation = read_federation(settings)
    if federation.client is None or federation.data is None:
        missing = "[client]" if federation.client is None else "[data]"
        raise InputError(f"{settings}: {missing} is missing; a client needs [client] and [data]")
    require_flower()
    os.environ.update(_SILENT)
    from slm_export.federated.deployment import take_part

    take_part(federation)


def _show(state: State, out: Path, as_json: bool) -> None:
    from slm_export.federated.result import MANIFEST

    if as_json:
        print((out / MANIFEST).read_text(encoding="utf-8"), end="")
        return
    console = stdout()
    table = Table("round", "drawn", "good", "refused", "loss before", "after", "epsilon")
    for done in state.rounds:
        refused = ", ".join(f"{count} {reason}" for reason, count in done.refused.items())
        figures = (done.loss_before, done.loss_after, done.epsilon)
        cells = ["" if value is None else figure(value) for value in figures]
        number = f"{done.number}" if done.changed else f"{done.number} (changed nothing)"
        table.add_row(number, f"{done.drawn}", f"{done.good}", refused, *cells)
    console.print(table)
    if state.stopped is not None:
        console.print(f"stopped after {len(state.rounds)} rounds: {state.stopped}", markup=False)
    console.print(f"{out}: slm-export {out} --target android", markup=False)
