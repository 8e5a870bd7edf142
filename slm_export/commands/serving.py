"""What ``serve`` does, and how it says where it is."""

from __future__ import annotations

import json
import sys
from typing import Any

from slm_export.bundles.scratch import scratch
from slm_export.commands.terminal import working
from slm_export.errors import MissingComponentError


def serve_command(asked: dict[str, Any], as_json: bool) -> None:
    """Serve a bundle until a signal ends it."""
    try:
        from slm_export.serving.server import ServeRequest, listen, open_engine, serve
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise MissingComponentError(
            f"serving needs starlette and uvicorn ({error}); pip install 'slm-export[serve]'"
        ) from error

    request = ServeRequest(**asked)
    token = request.token
    with listen(request.host, request.port) as listening, scratch():
        with working() as progress, progress.stage(f"open {request.bundle}"):
            engine = open_engine(request)
        name = engine.model.manifest.model.name
        host, port = listening.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

        def ready() -> None:
            print(json.dumps({"url": url, "model": name}) if as_json else f"{name} at {url}; Ctrl-C ends it")
            sys.stdout.flush()

        serve(request, engine, listening, token, ready)
