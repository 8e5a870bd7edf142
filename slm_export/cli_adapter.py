"""The commands for adapters. No logic, as in cli.py, which adds them to its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slm_export import options


@click.group()
def adapter() -> None:
    """Adapters that go on learning in the app (docs/adapters.md)."""


@adapter.command()
@click.argument("model")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--force", is_flag=True, help="Replace an existing one, once the new one is complete.")
@click.option(
    "--train",
    type=click.Choice(["adapter", "head"]),
    default="adapter",
    show_default=True,
    help="What learns: low-rank matrices, or the head of a classifier.",
)
@click.option("--rank", type=click.IntRange(1, 256), default=4, show_default=True, help="Of the adapter.")
@click.option(
    "--targets",
    multiple=True,
    metavar="LAYER",
    help="Linear layers that get one (q_proj); repeatable. [default: what peft takes for the family]",
)
@click.option(
    "--length",
    type=click.IntRange(2, 4096),
    default=64,
    show_default=True,
    help="Tokens of a step; shorter texts are padded.",
)
@click.option(
    "--bits",
    type=click.Choice(["4", "8", "32"]),
    default="4",
    show_default=True,
    help="Of the frozen matrices: those of the bundle that the app ships.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the adapter to begin with.")
@options.JSON
def trainer(as_json: bool, **asked: Any) -> None:
    """Write a program that takes training steps of MODEL in the app: forward, loss and gradients in ExecuTorch.

    Before it is written for good it is trained for three steps in the runtime, and must do as torch's autograd does.
    """
    from slm_export.commands.adapter import trainer_command

    trainer_command(asked, as_json)


ADAPTER = (adapter,)
