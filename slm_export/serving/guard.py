"""Who may ask: a token where one is set, no web pages, and no names that lead here by a trick.

A server on the loopback interface is reached by every web page that a browser on this machine shows. Two things keep
them out: a request must name the server as it calls itself (a page of `evil.example` that lets its name lead here,
"DNS rebinding", does not), and a body must be declared as JSON, which a browser sends to another origin only if that
allows it (Fetch standard, "CORS-preflight request"); this server allows nobody.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from slm_export.serving.errors import ApiError

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True)
class Guard:
    """Stands before an ASGI application."""

    app: ASGIApp
    token: str | None
    hosts: frozenset[str] | None
    """Names by which a request may call this server; None: any, where a token is asked for."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer why not."""
        refused = self._refused(scope) if scope["type"] == "http" else None
        if refused is None:
            await self.app(scope, receive, send)
            return
        await JSONResponse(refused.document(), refused.status)(scope, receive, send)

    def _refused(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if self.hosts is not None and _name(headers.get("host", "")) not in self.hosts:
            return ApiError(403, "this server is asked as localhost or 127.0.0.1 alone")
        if self.token is not None and not _same(headers.get("authorization", ""), f"Bearer {self.token}"):
            return ApiError(401, "no token, or not the right one", code="invalid_api_key")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            return ApiError(415, "the body must be JSON, and Content-Type say application/json")
        return None


def _name(host: str) -> str:
    """Return a Host header without its port, and without the brackets of IPv6."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] or host if ":" in host else host


def _same(given: str, wanted: str) -> bool:
    """Compare in a time that does not tell where they part."""
    return secrets.compare_digest(given.encode(), wanted.encode())
