"""The command line as in `forked`, from a process that has TensorFlow imported already, and perhaps with a fault.

``--fault=NAME`` before the arguments changes the artifact as soon as it is written, as a mistake of ours would.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked

from slm_export.bundles.checksums import sha256_file
from slm_export.keras import export as keras_export

# Scales of the matrix, codes of another, a bias in float: name -> what its bytes become.
FAULTS: dict[str, tuple[str, Callable[[Any], tuple[Any, Any]]]] = {
    "rows": ("dense_1/kernel", lambda w: (w.packed, w.packed[[1, 0, *range(2, w.shape[0])]])),
    "scale": ("lstm/lstm_cell/recurrent_kernel", lambda w: (w.scales, w.scales * 2)),
    "bias": ("dense_1/bias", lambda w: (w.float32(), w.float32() + 1)),
}


def plant(fault: str) -> None:
    """Let every artifact that is written have a fault."""
    name, change = FAULTS[fault]
    plain = keras_export.write

    def write(converted: Any, checkpoint: Any, ports: list[str], output: tuple[str, int], path: Path) -> Any:
        made = plain(converted, checkpoint, ports, output, path)
        right, wrong = (part.contiguous().numpy().tobytes() for part in change(checkpoint.weights[name]))
        data = path.read_bytes()
        assert data.count(right) == 1
        path.write_bytes(data.replace(right, wrong))
        return dataclasses.replace(made, sha256=sha256_file(path))

    keras_export.write = write


def serve() -> dict[str, Any]:
    """Import what is slow, and return a request in each child."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    for module in (
        "keras",
        "tensorflow",
        "ai_edge_litert.compiled_model",
        "transformers.models.auto.tokenization_auto",
    ):
        importlib.import_module(module)
    return forked.request_of_child()


if __name__ == "__main__":
    request = serve()
    if request["args"][0].startswith("--fault="):
        plant(request["args"].pop(0).removeprefix("--fault="))
    forked._become(request)
    runpy.run_module("slm_export", run_name="__main__")
