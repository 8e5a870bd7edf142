"""All clients of a federation on one machine, by Flower's simulation engine, in a process of its own.

Ray runs the clients in ``simulation.workers`` processes that take one message after another; each reads the base once.
Everything listens on the loopback address alone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from slm_export.child import Child, serve_all
from slm_export.federated.flower import end_with_parent, environment
from slm_export.federated.settings import Federation

_START_S = 300.0
_STORE_BYTES = 100_000_000
"""Of Ray's shared memory; it accepts no less than 75 MB. Messages are a few MB."""


def simulate(federation: Federation, folder: Path) -> None:
    """Run the rounds that are left; where they end is in the state of ``folder``.

    Raises:
        SlmExportError: what the server's part raised.
        MachineError: Ray died.
    """
    # Ray's sockets lie in its folder, and the names of sockets are short: not where other temporary files are.
    # What Ray's processes still write while they end must not make an error of a result.
    with tempfile.TemporaryDirectory(prefix="slm-", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        request = {
            "federation": federation.model_dump(mode="json"),
            "folder": str(folder),
            "temporary": temporary,
        }
        with Child(
            __name__, "simulate the clients", _patience_s(federation), environment(folder / "flower")
        ) as child:
            child.ask(request)


def _patience_s(federation: Federation) -> float:
    rounds = federation.rounds
    return 600 + 3 * rounds.number * rounds.deadline_s


def _run(request: dict[str, Any]) -> None:
    _end_unless_ray_starts()
    from flwr.simulation import run_simulation

    from slm_export.federated.apps import simulated_client, simulated_server
    from slm_export.federated.client import Station

    # Tuples are lists in JSON.
    federation = Federation.model_validate_json(json.dumps(request["federation"]))
    folder = Path(request["folder"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_simulation(
            server_app=simulated_server(federation, folder),
            client_app=simulated_client(Station(federation, folder / "clients", federation.rounds.clients)),
            num_supernodes=federation.rounds.clients,
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                "init_args": {
                    "num_cpus": federation.simulation.workers,
                    "num_gpus": 0,
                    "object_store_memory": _STORE_BYTES,
                    "include_dashboard": False,
                    "log_to_driver": False,
                    "configure_logging": False,
                    "_node_ip_address": "127.0.0.1",
                    "_temp_dir": request["temporary"],
                },
            },
        )


def _end_unless_ray_starts() -> None:
    """End this process where Ray never comes up: on an overloaded machine a part of it gives up, and it would wait on.

    Ray's raylet waits for 15 s for its agent, and no setting was found that changes it.
    """

    def watch() -> None:
        import ray

        time.sleep(_START_S)
        if not ray.is_initialized():
            print(
                f"Ray did not start within {_START_S:.0f} s; try again on a machine with less to do",
                file=sys.stderr,
            )
            os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    end_with_parent()
    serve_all(_run)
