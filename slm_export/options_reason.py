"""Options of `reason`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

_F = TypeVar("_F", bound=Callable[..., Any])
_PATH = click.Path(path_type=Path)

_PROBLEMS = (
    click.option(
        "--problems",
        type=_PATH,
        required=True,
        help='JSONL of {"problem": ..., "answer": ...}; no answers where a --checker judges.',
    ),
    click.option(
        "--held-out",
        type=_PATH,
        metavar="FILE",
        help="Problems to score on. [default: a fifth of --problems]",
    ),
    click.option(
        "--held-out-problems",
        "held_out_count",
        type=click.IntRange(min=1),
        help="How many of --problems that is.",
    ),
    click.option(
        "--checker",
        metavar="COMMAND",
        help="Judges in place of known answers: JSON on stdin, exit code 0 for right and 1 for wrong.",
    ),
    click.option(
        "--checker-seconds",
        type=click.FloatRange(min=0, min_open=True),
        default=10.0,
        show_default=True,
        help="Time of one check.",
    ),
    click.option(
        "--checker-memory", metavar="SIZE", default="1GB", show_default=True, help="Memory of one check."
    ),
)
_TEACHER = (
    click.option("--teacher-model", metavar="NAME", help="Behind a URL. [default: the only one there]"),
    click.option(
        "--samples",
        type=click.IntRange(1, 64),
        default=4,
        show_default=True,
        help="Solutions of each problem to ask for.",
    ),
    click.option(
        "--temperature", type=click.FloatRange(min=0), default=0.7, show_default=True, help="Of the teacher."
    ),
    click.option(
        "--max-tokens",
        type=click.IntRange(min=1),
        default=1024,
        show_default=True,
        help="Of a solution of the teacher's.",
    ),
    click.option(
        "--timeout",
        "timeout_s",
        type=click.FloatRange(min=0, min_open=True),
        default=120.0,
        show_default=True,
        help="Seconds to wait for an answer of a URL.",
    ),
    click.option(
        "--at-once",
        type=click.IntRange(1, 64),
        default=4,
        show_default=True,
        help="Questions to a URL at a time.",
    ),
    click.option(
        "--shortest", is_flag=True, help="Learn from the shortest right solution of a problem alone."
    ),
    click.option(
        "--answer-tokens",
        type=click.IntRange(min=1),
        default=512,
        show_default=True,
        help="That the child may write when it is scored.",
    ),
)
LOW_RANK = click.option(
    "--low-rank",
    type=click.IntRange(min=1),
    metavar="RANK",
    help="Train thin matrices that are merged in the end (LoRA). [default: the whole model]",
)


def reason(command: _F) -> _F:
    """Add problems, judges and teacher."""
    for option in reversed((*_PROBLEMS, *_TEACHER, LOW_RANK)):
        command = option(command)
    return command
