"""The commands for adapters. No logic, as in cli.py, which adds them to its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slm_export import options


@click.group()
def adapter() -> None:
    """Adapters of a bundle, and those that go on learning in the app (docs/adapters.md)."""


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


@adapter.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("adapters", nargs=-1, required=True, metavar="NAME=FOLDER...")
@click.option("--source", required=True, metavar="MODEL", help="The model that the bundle was made from.")
@options.EVAL_TEXT
@options.CALIBRATION
@options.OFFLINE
@options.JSON
def add(bundle: Path, **asked: Any) -> None:
    """Add adapters to a BUNDLE that has places for them; the base is not exported again.

    NAME=FOLDER is a name for the adapter and the folder that peft saved. The bundle must have been exported with an
    adapter (`slm-export MODEL --adapter NAME=FOLDER`) of the same layers; ranks may differ. With each adapter on the
    gate is passed as the base passed it, or nothing changes.
    """
    from slm_export.commands.adapter import add_command

    add_command(bundle, **asked)


@adapter.command("list")
@click.argument("bundle", type=click.Path(path_type=Path))
@options.JSON
def list_(bundle: Path, as_json: bool) -> None:
    """List the adapters of a BUNDLE, and whether their files are what was written."""
    from slm_export.commands.adapter import list_command

    list_command(bundle, as_json)


@adapter.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("name")
@options.JSON
def remove(bundle: Path, name: str, as_json: bool) -> None:
    """Remove the adapter NAME of a BUNDLE."""
    from slm_export.commands.adapter import remove_command

    remove_command(bundle, name, as_json)


ADAPTER = (adapter,)
