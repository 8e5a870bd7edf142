"""Where an answer goes. Each delivery carries the trigger's id, so that a receiver can tell one that comes twice.

The only deliveries that can come twice are those that a kill, or a power cut, parted from their record.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from slm_export.delegates.config import Output
from slm_export.delegates.state import Trigger
from slm_export.delegates.triggers import duration_s
from slm_export.errors import MachineError
from slm_export.network import is_loopback

_TAIL = 1 << 20
_STDOUT = threading.Lock()
"""Delegates answer side by side."""


def deliver(output: Output, trigger: Trigger, place: str) -> None:
    """Bring an answer where it belongs; MachineError where that fails, and nothing was delivered as far as is known."""
    document = {
        "id": trigger.id,
        "delegate": trigger.delegate,
        "time": trigger.time,
        "path": trigger.path or None,
        "place": place,
        "answer": trigger.answer,
    }
    timeout_s = duration_s(output.timeout)
    if output.file is not None:
        _append(Path(output.file), document)
    elif output.stdout:
        with _STDOUT:
            print(trigger.answer, flush=True)
    elif output.webhook is not None:
        _post(output.webhook, document, timeout_s)
    else:
        assert output.command is not None
        _run(output.command, document, timeout_s)


@contextmanager
def shown(wanted: bool) -> Iterator[Callable[[str], None]]:
    """Yield what writes pieces of an answer to standard output, which is its own until its end; or nothing."""
    if not wanted:
        yield lambda _: None
        return
    with _STDOUT:
        try:
            yield lambda piece: print(piece, end="", flush=True)
        finally:
            print(flush=True)


def _append(path: Path, document: Mapping[str, Any]) -> None:
    """Append a line, unless it is there already; a half line, of a kill, is ended first."""
    line = json.dumps(document, ensure_ascii=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            tail = file.read()
            if any(_is(one, document) for one in tail.splitlines()):
                return
            broken = b"\n" if tail and not tail.endswith(b"\n") else b""
            file.write(broken + line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise MachineError(f"{path}: {error.strerror}") from error


def _is(line: bytes, document: Mapping[str, Any]) -> bool:
    try:
        found = json.loads(line)
    except ValueError:
        return False
    return isinstance(found, dict) and all(
        found.get(key) == document[key] for key in ("id", "delegate", "time")
    )


def _post(url: str, document: Mapping[str, Any], timeout_s: float) -> None:
    headers = {
        "Content-Type": "application/json",
        "Idempotency-Key": f"{document['delegate']}-{document['id']}",
    }
    request = urllib.request.Request(url, json.dumps(document).encode(), headers, method="POST")
    try:
        with _opener(url).open(request, timeout=timeout_s) as answer:
            answer.read(1 << 16)
    except urllib.error.HTTPError as error:
        with error:
            raise MachineError(f"{url} answers {error.code}") from None
    except (OSError, ValueError) as error:
        raise MachineError(f"{url} cannot be reached: {getattr(error, 'reason', error)}") from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """An answer goes where the file says, and not where somebody there sends it."""

    def redirect_request(self, *arguments: Any, **more: Any) -> None:
        """Follow none."""


def _opener(url: str) -> urllib.request.OpenerDirector:
    """Return what opens an address; what is on this machine is never asked for through a proxy elsewhere."""
    own = is_loopback(urlsplit(url).hostname or "")
    direct = [urllib.request.ProxyHandler({})] if own else []
    return urllib.request.build_opener(_NoRedirect, *direct)


def _run(command: tuple[str, ...], document: Mapping[str, Any], timeout_s: float) -> None:
    environment = {
        **os.environ,
        "SLM_EXPORT_DELEGATE": str(document["delegate"]),
        "SLM_EXPORT_TRIGGER": str(document["id"]),
    }
    given = str(document["answer"]).encode()
    try:
        done = subprocess.run(
            command,
            input=given,
            env=environment,
            stdout=sys.stderr.fileno() if _has_stderr() else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=timeout_s,
            check=False,
            # Ctrl-C is ours; a delivery that has begun ends.
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise MachineError(f"{command[0]} took longer than {timeout_s:g} s") from None
    except OSError as error:
        raise MachineError(f"{command[0]} cannot be started: {error.strerror}") from None
    if done.returncode:
        last = done.stderr.decode("utf-8", errors="replace").strip().splitlines()[-1:]
        raise MachineError(
            f"{command[0]} ended with exit code {done.returncode}{''.join(f': {x}' for x in last)}"
        )


def _has_stderr() -> bool:
    try:
        sys.stderr.fileno()
    except (OSError, ValueError):
        return False
    return True
