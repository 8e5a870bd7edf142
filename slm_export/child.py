"""Work that is better done in a process of its own: its memory is measured alone, its crash is only a result,
and what native code prints there disturbs nobody.

A module that serves as a child calls ``serve(function)`` under ``if __name__ == "__main__"``.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from slm_export.errors import MachineError

_MARK = "slm-export-result:"


def call(module: str, request: Mapping[str, Any], doing: str, timeout_s: float = 1800) -> Any:
    """Run ``python -m module`` on a JSON request and return its JSON answer.

    Raises:
        MachineError: the child died or did not answer in time; ``doing`` says what it was at.
    """
    command = [sys.executable, "-m", module, json.dumps(request)]
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise MachineError(f"the process that should {doing} took longer than {timeout_s:.0f} s") from None
    answers = [line for line in child.stdout.splitlines() if line.startswith(_MARK)]
    if child.returncode or not answers:
        last = "\n".join(f"  {line}" for line in child.stderr.splitlines()[-3:])
        raise MachineError(
            f"the process that should {doing} died ({_ending(child.returncode)})\n{last}".rstrip()
        )
    return json.loads(answers[-1].removeprefix(_MARK))


def serve(function: Callable[[dict[str, Any]], Any]) -> None:
    """Answer the request on the command line; only to be called as a child."""
    answer = json.dumps(function(json.loads(sys.argv[1])))
    # On a line of its own, whatever native code has printed before.
    print(f"\n{_MARK}{answer}", flush=True)


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
