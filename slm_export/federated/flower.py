"""Flower's and Ray's environment: nobody is told anything, and nothing lies in the user's own folders."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

from slm_export.errors import MissingComponentError

_LOOK_S = 0.2


def environment(home: Path) -> dict[str, str]:
    """Return the variables of every process that imports flwr or ray; both read them as they are imported.

    Given   home: Flower's folder
    """
    return {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Where it may not join machines to a cluster, Ray listens on the loopback address alone.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Ray ends workers of its own choice where memory is short; here that would look like a client that died.
        "RAY_memory_monitor_refresh_ms": "0",
        # A proxy is not asked for what is on this machine.
        "NO_PROXY": ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1", "localhost"))),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def programs(folder: Path) -> dict[str, str]:
    """Write the programs that Flower starts by their names, and return the PATH that leads to them and no others.

    They are those of `slm_export.federated.processes`: Flower would look for its own wherever the user's PATH leads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("flower-superexec", "flwr-serverapp", "flwr-clientapp"):
        script = folder / name
        script.write_text(
            f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m slm_export.federated.processes {name} "$@"\n'
        )
        script.chmod(0o700)
    return {"PATH": f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin"}


def end_with_parent() -> None:
    """End this process at once when the one that started it has ended, however it did."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def require_flower(*packages: str) -> None:
    """Raise unless Flower is there.

    Raises:
        MissingComponentError: what to install.
    """
    for package in packages or ("flwr",):
        if find_spec(package) is None:
            raise MissingComponentError(
                f"federated tuning needs {package}, which is not installed; pip install 'slm-export[federated]' "
                "with Python 3.11 or later"
            )
