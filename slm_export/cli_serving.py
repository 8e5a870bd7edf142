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


@click.group()
def delegate() -> None:
    """Standing jobs of bundled models: on a schedule, on a file's change, on a request (docs/delegates.md)."""


_FILE = click.argument("file", type=click.Path(path_type=Path), default=Path("delegates.toml"))


@delegate.command("run")
@_FILE
@click.option("--once", is_flag=True, help="Do what is due, and what standard input holds, and end.")
def delegate_run(file: Path, once: bool) -> None:
    """Run the delegates of FILE (delegates.toml) until Ctrl-C; what was not done is done by the next run."""
    from slm_export.commands.delegates import run_command

    run_command(file, once)


@delegate.command("list")
@_FILE
@options.JSON
def delegate_list(file: Path, as_json: bool) -> None:
    """List the delegates of FILE, and what came of their triggers."""
    from slm_export.commands.delegates import list_command

    list_command(file, as_json)


@delegate.command("check")
@_FILE
@options.JSON
def delegate_check(file: Path, as_json: bool) -> None:
    """Check FILE and what it names (bundles, keys, folders, programs); nothing is run."""
    from slm_export.commands.delegates import check_command

    check_command(file, as_json)


SERVING = (serve, delegate)
