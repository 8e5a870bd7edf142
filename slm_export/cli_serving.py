"""The commands that keep running: a bundle as an endpoint. No logic, as in cli.py, which adds them to its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slm_export import options


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--format", "format", help="Which artifact of the bundle. [default: the first]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: one that is free."
)
@click.option(
    "--queue",
    type=click.IntRange(min=0),
    default=8,
    show_default=True,
    help="Requests that may wait while one is answered; further ones are refused.",
)
@click.option("--threads", type=click.IntRange(min=1), help="[default: the runtime's own]")
@click.option(
    "--token-env",
    metavar="NAME",
    help="Variable with a token that requests must bring; needed where other machines can reach it.",
)
@options.JSON
def serve(as_json: bool, **asked: Any) -> None:
    """Serve a BUNDLE as an OpenAI-compatible endpoint of this machine, until Ctrl-C (docs/serve.md).

    Chats, completions and embeddings, streamed or whole. The bundle is checked against its hashes before.
    """
    from slm_export.commands.serving import serve_command

    serve_command(asked, as_json)


SERVING = (serve,)
