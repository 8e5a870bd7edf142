"""Flower's and Ray's environment: nobody is told anything, and nothing lies in the user's own folders."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from slm_export.errors import MissingComponentError


def environment(home: Path) -> dict[str, str]:
    """Return the variables of every process that imports flwr or ray; both read them as they are imported.

    Given   home: Flower's folder
    """
    return {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Ray ends workers of its own choice where memory is short; here that would look like a client that died.
        "RAY_memory_monitor_refresh_ms": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def require_flower(*packages: str) -> None:
    """Raise unless Flower is there.

    Raises:
        MissingComponentError: what to install.
    """
    for package in packages or ("flwr",):
        if find_spec(package) is None:
            raise MissingComponentError(
                f"federated tuning needs {package}, which is not installed; pip install 'slm-export[federated]'"
            )
