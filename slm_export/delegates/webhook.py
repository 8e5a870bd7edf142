"""Requests that set delegates off, on the loopback interface and with a token.

    POST /delegates/NAME   {"text": "...", "private": false}   ->  202 {"id": 7}

The answer is sent once the event is recorded. ``Idempotency-Key`` names an event: one that comes again is not recorded
again, and has the answer 200.
"""

from __future__ import annotations

import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import uvicorn
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from slm_export.delegates.config import Delegate
from slm_export.delegates.files import LARGEST
from slm_export.delegates.sources import Clock
from slm_export.delegates.state import Event, State
from slm_export.serving.errors import ApiError, failed, invalid
from slm_export.serving.guard import LOOPBACK_NAMES, Guard

_JOIN_S = 10.0


class _Given(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    text: str
    private: bool = False


def make_app(
    delegates: Mapping[str, Delegate], state: State, token: str, now: Clock, heard: Callable[[str], None]
) -> ASGIApp:
    """Return the application; ``heard`` is called with a delegate's name once something is recorded for it."""

    async def take(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in delegates:
            raise ApiError(404, f"no delegate '{name}' takes requests")
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > LARGEST:
                raise ApiError(413, f"the body has more than {LARGEST:,} bytes")
        try:
            given = _Given.model_validate_json(body)
        except ValidationError as error:
            raise invalid(error, set(_Given.model_fields)) from None
        key = request.headers.get("idempotency-key") or uuid.uuid4().hex
        event = Event(name, key, given.text, now().isoformat(), private=given.private)
        recorded = state.record(event)
        heard(name)
        return JSONResponse({"id": recorded}, 200 if recorded is None else 202)

    async def told(request: Request, error: Exception) -> Response:
        said = failed(error)
        return JSONResponse(said.document(), said.status)

    app = Starlette(
        routes=[Route("/delegates/{name}", take, methods=["POST"])],
        exception_handlers={ApiError: told, Exception: told},
    )
    return Guard(app, token, LOOPBACK_NAMES)


@contextmanager
def answering(app: ASGIApp, listening: socket.socket) -> Iterator[None]:
    """Answer from a thread until the block ends."""
    config = uvicorn.Config(app, log_level="error", access_log=False, lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="webhook", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(_JOIN_S)
