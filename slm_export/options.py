"""Options that several commands share, and what they ask for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from slm_export.compilation import Request
    from slm_export.quantization_options import QuantizationOptions

_F = TypeVar("_F", bound=Callable[..., Any])
_EMBEDDING_BITS = click.Choice(["4", "6", "8", "16", "32"])

JSON = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document on stdout and nothing else."
)
CALIBRATION = click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Text or JSONL of chats that calibrated passes measure activations on. [default: written by the model]",
)
EVAL_TEXT = click.option(
    "--eval-text", type=click.Path(path_type=Path), help="Held-out text to judge by. [default: a sample]"
)
JUNIT = click.option(
    "--junit",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write the checks for a CI server, a case for each.",
)
LOCKED = click.option(
    "--locked",
    metavar="[FILE]",
    type=click.Path(path_type=Path),
    is_flag=False,
    flag_value="slm-export.lock",
    help="Refuse to make anything but what slm-export.lock, or FILE, says. Every bundle holds such a file.",
)
CONTEXT = click.option("--context", type=click.IntRange(min=1), help="Tokens that the KV cache holds.")
ADAPTERS = click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=FOLDER",
    help="A low-rank adapter (a peft folder) that stays apart, to be turned on at run time; repeatable.",
)
REVISION = click.option("--revision", help="Branch, tag or commit of a hub model.")


def _go_offline(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    # The variable that every tool on that hub reads; what is started from here inherits it.
    if value:
        os.environ["HF_HUB_OFFLINE"] = "1"


OFFLINE = click.option(
    "--offline",
    is_flag=True,
    expose_value=False,
    callback=_go_offline,
    help="Never reach for the network: a hub name means its local copy. As HF_HUB_OFFLINE=1.",
)
FORMATS = click.option(
    "--format", "formats", multiple=True, help="Format to write; may be repeated. [default: the device's]"
)
TARGET = click.option("--target", help="Where it will run: android, ios, linux or host.")

_QUANTIZATION = (
    click.option(
        "--bits",
        type=click.Choice(["4", "8", "16", "32"]),
        help="Bits of the linear layers' weights. [default: the device's recipe]",
    ),
    click.option(
        "--group-size", type=click.Choice(["32", "64", "128", "256"]), help="Weights per scale, at 4 bits."
    ),
    click.option(
        "--palettize",
        type=click.Choice(["4", "6"]),
        help="Core ML: bits of indices into tables, for the Neural Engine, in place of --bits.",
    ),
    click.option(
        "--embedding-bits",
        type=_EMBEDDING_BITS,
        help="Bits of the embedding, and of a head that is tied to it. 6: with --palettize alone.",
    ),
    click.option(
        "--head-bits",
        type=_EMBEDDING_BITS,
        help="Bits of an output head of its own. [default: as the embedding]",
    ),
)
_BUDGET = (
    click.option(
        "--max-size", metavar="SIZE", help="Find the best recipe whose files are no larger: 600MB, 0.6GB."
    ),
    click.option(
        "--max-memory", metavar="SIZE", help="The same, of the memory that the model takes when it runs."
    ),
    click.option(
        "--min-tokens-per-s",
        type=click.FloatRange(min=0, min_open=True),
        help="The same, of the speed of decoding.",
    ),
    click.option(
        "--max-perplexity-ratio",
        type=click.FloatRange(min=1, min_open=True),
        help="Find the smallest recipe that is this good, or with the limits above one that keeps to all: 1.01.",
    ),
    click.option(
        "--min-cosine",
        type=click.FloatRange(min=0, max=1, min_open=True, max_open=True),
        help="The same for encoders of embeddings: mean cosine to the source's, such as 0.99.",
    ),
)


_MATRIX = (
    click.option(
        "--out",
        type=click.Path(path_type=Path),
        help="Folder of results. [default: as FILE says, or `matrix`]",
    ),
    click.option(
        "--jobs", type=click.IntRange(min=1), help="Exports at a time. [default: one for two cores]"
    ),
    click.option(
        "--memory", metavar="SIZE", help="Of all exports together: 16GB. [default: 0.9 of what is available]"
    ),
    click.option(
        "--scheduler", metavar="ADDRESS", help="On the workers of this Dask scheduler: tcp://host:8786."
    ),
    click.option("--force", is_flag=True, help="Export again what is there already."),
)


def quantization(command: _F) -> _F:
    """Add the options that change a device's recipe."""
    return _with(command, _QUANTIZATION)


def budget(command: _F) -> _F:
    """Add the limits that a recipe is searched for."""
    return _with(command, _BUDGET)


def matrix(command: _F) -> _F:
    """Add what a matrix may take, and where it is made."""
    return _with(command, _MATRIX)


def _with(command: _F, options: tuple[Callable[[_F], _F], ...]) -> _F:
    for option in reversed(options):
        command = option(command)
    return command


def token_counts(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Return the counts of ``128,512``."""
    if value is None:
        return None
    parts = value.split(",")
    if not all(part.isdecimal() and part.isascii() for part in parts):
        raise click.BadParameter(f"'{value}' is no list of token counts; write them as 128,512", ctx, param)
    return tuple(dict.fromkeys(map(int, parts)))


def request_of(asked: dict[str, Any]) -> Request:
    """Return the request of a command line, what it leaves open filled from slm-export.toml."""
    from slm_export.budget.budget import Budget, parse_bytes
    from slm_export.compilation import Request
    from slm_export.settings import load_settings
    from slm_export.source.adapters import parse_adapters

    def size(name: str) -> int | None:
        return None if asked[name] is None else parse_bytes(asked[name], f"--{name.replace('_', '-')}")

    request = Request(
        model=asked["model"],
        revision=asked["revision"],
        target=asked["target"],
        device=asked["device"],
        formats=asked["formats"] or None,
        quantization=quantization_of(asked),
        context=asked["context"],
        out=asked["out"],
        eval_text=asked["eval_text"],
        calibration=asked["calibration"],
        budget=Budget(
            size("max_size"),
            size("max_memory"),
            asked["min_tokens_per_s"],
            asked["max_perplexity_ratio"],
            asked["min_cosine"],
        ),
        locked=asked["locked"],
        adapters=parse_adapters(asked["adapters"]),
        force=asked["force"],
        verify=not asked["no_verify"],
        bench=not asked["no_bench"],
    )
    settings = load_settings(Path.cwd())
    return request if settings is None else request.over(settings)


def quantization_of(asked: dict[str, Any]) -> QuantizationOptions:
    """Take the options of a recipe out of a command line, and return them."""
    from slm_export.quantization_options import QuantizationOptions

    taken = {field.name: asked.pop(field.name) for field in fields(QuantizationOptions)}
    return QuantizationOptions(
        **{name: None if value is None else int(value) for name, value in taken.items()}
    )
