"""From a bundle to the end of the command: a socket, the model, and uvicorn between them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from slm_export.bundles.bundle import read_manifest
from slm_export.errors import InputError, MachineError
from slm_export.keras import bundle as keras_bundle
from slm_export.network import is_loopback
from slm_export.opened import OpenBundle, open_bundle
from slm_export.registry import exporter
from slm_export.serving.endpoints import Endpoints
from slm_export.serving.engine import Engine
from slm_export.serving.errors import ApiError, failed
from slm_export.serving.guard import LOOPBACK_NAMES, Guard
from slm_export.source.tasks import EMBEDDING, GENERATION

_GRACE_S = 5
"""Answers under way may take so long to end when the server is to stop."""
_CONNECTIONS = 64
"""Beyond those that wait for the model."""


@dataclass(frozen=True)
class ServeRequest:
    """What was asked on the command line."""

    bundle: Path
    format: str | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    queue: int = 8
    threads: int | None = None
    token_env: str | None = None

    @property
    def token(self) -> str | None:
        """The secret that requests must bring.

        Raises:
            InputError: the variable is not set, or the server could be reached from elsewhere without a token.
        """
        if self.token_env is None:
            if not is_loopback(self.host):
                raise InputError(
                    f"--host {self.host}: other machines could reach it, so requests must bring a token; "
                    "put one into a variable and give its name with --token-env"
                )
            return None
        token = os.environ.get(self.token_env, "").strip()
        if not token:
            raise InputError(f"--token-env {self.token_env}: no such variable is set, or it is empty")
        return token


def open_engine(request: ServeRequest) -> Engine:
    """Open the model of a bundle that is whole, once.

    Raises:
        InputError: not a bundle, or a model that the API has no address for.
        GateError: a file of it is not what was written.
    """
    if keras_bundle.is_one(request.bundle):
        raise InputError(
            f"{request.bundle}: holds a model of TensorFlow, and the API has no address for such"
        )
    manifest = read_manifest(request.bundle)
    if manifest.model.task not in (GENERATION, EMBEDDING):
        raise InputError(
            f"{request.bundle}: a model for {manifest.model.task}, and the API has addresses for {GENERATION} and "
            f"{EMBEDDING} alone; `slm-export run` answers a single text"
        )

    def opened() -> OpenBundle:
        if request.threads is not None:
            format = request.format or manifest.artifacts[0].format
            exporter(format).set_threads(request.threads)
        return open_bundle(request.bundle, request.format)

    return Engine(opened, request.queue)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0: any that is free.

    Raises:
        InputError: no such address on this machine.
        MachineError: the port is taken, or is not ours to take.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise InputError(f"--host {host}: {error.strerror}") from None
    # With its protocol named: asyncio turns Nagle's waiting off for such alone, and small answers come 40 ms sooner.
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise MachineError(
            f"cannot listen on {host}, port {port}: {error.strerror}; choose another with --port"
        ) from None
    return listening


def make_app(engine: Engine, token: str | None, loopback: bool) -> ASGIApp:
    """Return the application: endpoints, errors in the API's form, the guard before them."""
    served = Endpoints(engine, engine.model.manifest.model.name, int(time.time()))
    routes = [
        Route("/health", served.health, methods=["GET"]),
        Route("/v1/models", served.models, methods=["GET"]),
        Route("/v1/models/{name:path}", served.model, methods=["GET"]),
        Route("/v1/chat/completions", served.chat, methods=["POST"]),
        Route("/v1/completions", served.completions, methods=["POST"]),
        Route("/v1/embeddings", served.embeddings, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {ApiError: _api_error, HTTPException: _http_error, Exception: _mistake}
    app = Starlette(routes=routes, exception_handlers=handlers)
    return Guard(app, token, LOOPBACK_NAMES if loopback else None)


def serve(
    request: ServeRequest,
    engine: Engine,
    listening: socket.socket,
    token: str | None,
    ready: Callable[[], None],
) -> None:
    """Answer until a signal ends it; ``ready`` is called once requests are taken."""
    config = uvicorn.Config(
        make_app(engine, token, is_loopback(request.host)),
        log_level="error",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        limit_concurrency=request.queue + _CONNECTIONS,
        timeout_graceful_shutdown=_GRACE_S,
    )
    with closing(engine):
        server = _Server(config, ready)
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt:
            # How a server ends; uvicorn passes the signal on once it has let go of everything.
            if not server.began:
                raise


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready, self.began = ready, False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.began = True
        self._ready()


async def _api_error(request: Request, error: ApiError) -> Response:
    headers = None if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
    return JSONResponse(error.document(), error.status, headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    said = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(said.document(), error.status_code)


async def _mistake(request: Request, error: Exception) -> Response:
    said = failed(error)
    return JSONResponse(said.document(), said.status)
