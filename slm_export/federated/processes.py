"""The programs that Flower starts: its own, but a client runs no code that the server sends.

Flower ships the apps of a run to the clients and runs what it ships. Here server and clients have the same program
installed, and a client runs that one whatever was sent: what its texts are used for is decided by its own machine.

    python -m slm_export.federated.processes flower-superexec|flwr-serverapp|flwr-clientapp ARGUMENTS
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def superexec() -> None:
    """Start an app's process for each task."""
    from flwr.supercore.cli import flower_superexec

    flower_superexec()


def serverapp() -> None:
    """Run the server's app."""
    from flwr.superlink.cli import flwr_serverapp

    flwr_serverapp()


def clientapp() -> None:
    """Run this machine's client for one message."""
    from flwr.supernode.cli import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    from slm_export.federated.apps import client

    def leave_it(*sent: Any, **options: Any) -> None:
        """Neither unpack nor run what the server sent."""

    def own(*where: Any, **options: Any) -> Callable[..., Any]:
        return lambda *run: client

    assert hasattr(run_clientapp, "install_from_fab")
    assert hasattr(run_clientapp, "get_load_client_app_fn")
    run_clientapp.install_from_fab = leave_it
    run_clientapp.get_load_client_app_fn = own
    flwr_clientapp()


PROGRAMS = {"flower-superexec": superexec, "flwr-serverapp": serverapp, "flwr-clientapp": clientapp}


if __name__ == "__main__":
    program = sys.argv.pop(1)
    sys.argv[0] = program
    PROGRAMS[program]()
