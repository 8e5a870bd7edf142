"""Options of `adapt`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from slm_export.options_reason import LOW_RANK

_F = TypeVar("_F", bound=Callable[..., Any])
_PATH = click.Path(path_type=Path)

_ADAPT = (
    click.option(
        "--data",
        type=_PATH,
        multiple=True,
        help="Plain text or JSONL to learn from, or a folder of it; may be repeated.",
    ),
    click.option(
        "--task",
        type=click.Choice(["classify", "tag", "embed", "generate"]),
        help="Learn a task from --labels instead: a head is put on where the model has none for it.",
    ),
    click.option(
        "--labels",
        type=_PATH,
        multiple=True,
        metavar="FILE",
        help="JSONL of labelled examples (docs/distillation.md); may be repeated.",
    ),
    click.option(
        "--held-out",
        type=_PATH,
        multiple=True,
        help="Text or labelled examples to measure on. [default: a tenth that shares nothing with the rest]",
    ),
    click.option(
        "--masked",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        default=0.15,
        show_default=True,
        help="Share of tokens that are hidden from an encoder.",
    ),
    LOW_RANK,
)


def adapt(command: _F) -> _F:
    """Add what is learned from, and how."""
    for option in reversed(_ADAPT):
        command = option(command)
    return command
