"""Options of the commands that teach a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

_F = TypeVar("_F", bound=Callable[..., Any])
_PATH = click.Path(path_type=Path)

_DISTIL = (
    click.option("--student", type=_PATH, metavar="FOLDER", help="A model with the teacher's tokenizer."),
    click.option(
        "--shrink",
        metavar="SHARES",
        help="The teacher with so much of it: layers=0.5,neurons=0.75,kv_groups=0.5.",
    ),
    click.option(
        "--max-size", metavar="SIZE", help="The teacher cut to what makes an artifact of this size: 3MB."
    ),
    click.option(
        "--temperature",
        type=click.FloatRange(min=0, min_open=True),
        default=1.0,
        show_default=True,
        help="Of the teacher's and the student's probabilities.",
    ),
    click.option(
        "--hard",
        type=click.FloatRange(min=0, max=1),
        default=0.1,
        show_default=True,
        help="Share of the text itself in the loss of a decoder.",
    ),
    click.option(
        "--divergence",
        type=click.Choice(["forward", "reverse", "jsd"]),
        default="forward",
        show_default=True,
        help="Of a decoder from its teacher.",
    ),
    click.option(
        "--top-k",
        type=click.IntRange(min=1),
        help="Write the teacher's K largest probabilities to disk once, and learn from those.",
    ),
    click.option(
        "--on-policy",
        type=click.FloatRange(min=0, max=1),
        default=0.0,
        show_default=True,
        help="Share of steps on text that the student writes.",
    ),
    *(
        click.option(
            f"--{name}",
            type=click.FloatRange(min=0),
            default=default,
            show_default=True,
            help=f"Weight of an encoder's loss on {what}; 0 leaves it out.",
        )
        for name, default, what in (
            ("embedding", 1.0, "the vector of a text"),
            ("contrastive", 0.1, "the likeness of texts to each other"),
            ("hidden", 1.0, "the vectors of tokens, layer by layer"),
            ("attention", 0.1, "the attention of the last layer"),
        )
    ),
)
_GRID = (
    click.option(
        "--for-bits", type=click.Choice(["4", "8"]), help="Train on the integer grid that an export will use."
    ),
    click.option(
        "--group-size",
        type=click.Choice(["32", "64", "128", "256"]),
        default="32",
        show_default=True,
        help="Weights per scale, with --for-bits 4.",
    ),
)
_TEXT = (
    click.option(
        "--data",
        type=_PATH,
        multiple=True,
        required=True,
        help="Text or JSONL to learn from, or a folder of it; may be repeated.",
    ),
    click.option(
        "--held-out",
        type=_PATH,
        multiple=True,
        help="Text to measure on. [default: documents that share nothing with the rest of --data]",
    ),
)
_LOOP = (
    click.option("--data-licence", metavar="NAME", help="Of the text; goes into the manifest."),
    click.option(
        "--steps", type=click.IntRange(min=1), default=200, show_default=True, help="Updates of the weights."
    ),
    click.option(
        "--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Windows in each step."
    ),
    click.option(
        "--together",
        type=click.IntRange(min=1),
        default=16,
        show_default=True,
        help="Windows in memory at a time.",
    ),
    click.option(
        "--length", type=click.IntRange(min=8), default=256, show_default=True, help="Tokens of a window."
    ),
    click.option("--rate", type=click.FloatRange(min=0, min_open=True), default=5e-4, show_default=True),
    click.option(
        "--schedule",
        type=click.Choice(["cosine", "linear", "constant"]),
        default="cosine",
        show_default=True,
        help="How the rate falls.",
    ),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True),
)
_RESULT = (
    click.option("--out", type=_PATH, required=True, help="Folder of the model to write."),
    click.option("--force", is_flag=True, help="Replace a model that was taught before."),
    click.option(
        "--export",
        "exports",
        multiple=True,
        metavar="TARGET",
        help="Then export it for android, ios, linux or host, to OUT-TARGET; may be repeated.",
    ),
)


def distil(command: _F) -> _F:
    """Add what says who learns from whom, and how."""
    return _with(command, (*_DISTIL, *_GRID))


def grid(command: _F) -> _F:
    """Add the grid that is trained for."""
    return _with(command, _GRID)


def training(command: _F) -> _F:
    """Add text and loop."""
    return _with(command, (*_TEXT, *_LOOP))


def loop(command: _F) -> _F:
    """Add the loop alone, for what is taught by something else than text."""
    return _with(command, _LOOP)


def result(command: _F) -> _F:
    """Add where the model goes."""
    return _with(command, _RESULT)


def _with(command: _F, added: tuple[Callable[[_F], _F], ...]) -> _F:
    for option in reversed(added):
        command = option(command)
    return command
