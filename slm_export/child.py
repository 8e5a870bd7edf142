"""Work that is better done in a process of its own: its memory is measured alone, its crash is only a result,
and what native code prints there disturbs nobody.

A module that serves as a child calls ``serve(function)`` under ``if __name__ == "__main__"``, or ``serve_all`` where
one request follows another.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from typing import Any

from slm_export.errors import MachineError, SlmExportError, known_errors

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


class Child:
    """A process that answers request after request; a context manager that ends it."""

    def __init__(
        self, module: str, doing: str, timeout_s: float = 1800, more: Mapping[str, str] | None = None
    ) -> None:
        """Start ``python -m module``, with ``more`` variables in its environment."""
        self._doing, self._timeout_s = doing, timeout_s
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed on leaving
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=pipe,
            stdout=pipe,
            stderr=self._log,
            text=True,
            errors="replace",
            env={**os.environ, **(more or {})},
        )

    def __enter__(self) -> Child:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the process, whatever it is at."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def ask(self, request: Mapping[str, Any]) -> Any:
        """Return the JSON answer to a JSON request.

        Raises:
            InputError, MissingComponentError, ...: the function in the child raised it.
            MachineError: the child died or did not answer in time.
        """
        late = threading.Timer(self._timeout_s, self._process.kill)
        late.start()
        try:
            answer = self._answer(request)
        finally:
            in_time = late.is_alive()
            late.cancel()
        if answer is not None:
            kind, value = answer
            if kind == "raised":
                raise known_errors()[value["class"]](value["message"])
            return value
        if not in_time:
            raise MachineError(
                f"the process that should {self._doing} took longer than {self._timeout_s:.0f} s"
            )
        raise MachineError(self._died())

    def _answer(self, request: Mapping[str, Any]) -> tuple[str, Any] | None:
        assert self._process.stdin
        assert self._process.stdout
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            return None
        for line in self._process.stdout:
            if line.startswith(_MARK):
                kind, value = json.loads(line.removeprefix(_MARK))
                return str(kind), value
        return None

    def _died(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", errors="replace").splitlines()[-3:]
        last = "\n".join(f"  {line}" for line in lines)
        return f"the process that should {self._doing} died ({_ending(code)})\n{last}".rstrip()


def serve_all(function: Callable[[dict[str, Any]], Any]) -> None:
    """Answer every request on stdin; an error that a user can mend is an answer too. Only to be called as a child."""
    for line in sys.stdin:
        try:
            answer = ("told", function(json.loads(line)))
        except SlmExportError as error:
            known = known_errors()
            name = next(cls.__name__ for cls in type(error).__mro__ if cls.__name__ in known)
            answer = ("raised", {"class": name, "message": str(error)})
        print(f"\n{_MARK}{json.dumps(answer)}", flush=True)


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
