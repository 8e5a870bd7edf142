"""Does a vendor's runtime open an artifact, and run it once? Asked in a process of its own.

Runtimes are native code, and some end the process that gives them a damaged file. Who verifies a bundle wants to be
told so, and of the other artifacts too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slm_export.child import Child, serve_all
from slm_export.errors import MachineError
from slm_export.registry import exporter
from slm_export.results import Check
from slm_export.runtime import DecoderSession

_TIMEOUT_S = 600.0


def judge_opening(format: str, path: Path, task: str) -> Check:
    """Return whether the runtime survives the artifact.

    Raises:
        InputError, MissingComponentError: what opening it in this process would have raised.
    """
    with Child("slm_export.probe", f"open {path.name} in its runtime", _TIMEOUT_S) as child:
        try:
            child.ask({"format": format, "path": str(path), "task": task})
        except MachineError as error:
            return Check("opens", False, f"{str(error).splitlines()[0]}; export the model again")
    return Check("opens", True, "its runtime opens the file and computes with it")


def _opened(request: dict[str, Any]) -> bool:
    session = exporter(request["format"]).open(Path(request["path"]), request["task"])
    try:
        length = min(3, session.context)
        if isinstance(session, DecoderSession):
            session.logits([0] * length, 0)
            session.logits([0], length - 1)
        else:
            session.outputs([0] * length, [1] * length)
    finally:
        session.close()
    return True


if __name__ == "__main__":
    serve_all(_opened)
