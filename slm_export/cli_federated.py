"""The commands for federated tuning. No logic, as in cli.py, which adds them to its own."""

from __future__ import annotations

from pathlib import Path

import click

from slm_export import options

_FILE = click.argument("settings", metavar="FEDERATION.toml", type=click.Path(path_type=Path))
_FORCE = click.option(
    "--force", is_flag=True, help="Replace an existing result, once the new one is complete."
)


@click.group()
def federate() -> None:
    """Teach one adapter with many clients, whose texts stay where they are (docs/federated.md)."""


@federate.command()
@_FILE
@_FORCE
@options.JSON
def simulate(settings: Path, force: bool, as_json: bool) -> None:
    """Run server and clients on this machine, the texts of [data] dealt out to them, by Flower's simulation engine."""
    from slm_export.commands.federate import simulate_command

    simulate_command(settings, force, as_json)


@federate.command()
@_FILE
@_FORCE
@options.JSON
def server(settings: Path, force: bool, as_json: bool) -> None:
    """Serve the rounds over TLS to the clients whose keys [server] knows, and write the adapter.

    A server that was killed is gone on with by the same command: after the last round that was complete.
    """
    from slm_export.commands.federate import server_command

    server_command(settings, force, as_json)


@federate.command()
@_FILE
def client(settings: Path) -> None:
    """Take part with the texts of [data], until it is ended (Ctrl-C)."""
    from slm_export.commands.federate import client_command

    client_command(settings)


FEDERATED = (federate,)
