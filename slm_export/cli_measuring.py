"""The commands that predict, measure and compare. No logic, as in cli.py, which adds them to its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slm_export import options


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--html", metavar="FILE", type=click.Path(path_type=Path), help="Write a page, too.")
@options.JSON
def report(bundles: tuple[Path, ...], html: Path | None, as_json: bool) -> None:
    """Compare BUNDLES side by side, as Markdown for a pull request; the first is what the others are held against."""
    from slm_export.commands.comparing import report_command

    report_command(bundles, html, as_json)


@click.command()
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option(
    "--limit",
    "limits",
    multiple=True,
    metavar="NAME=VALUE",
    help="How far NEW may be from OLD, such as max_bytes_increase=0.02; may be repeated. [default: slm-export.toml]",
)
@click.option(
    "--no-codes", is_flag=True, help="Leave out the comparison of codes: manifests are enough then."
)
@options.JUNIT
@options.JSON
def diff(**asked: Any) -> None:
    """Tell how the bundle NEW differs from OLD: size, codes by layer, fidelity, speed, versions."""
    from slm_export.commands.comparing import diff_command
    from slm_export.reports.junit import recorded

    with recorded(asked.pop("junit"), "diff") as cases:
        diff_command(cases=cases, **asked)


@click.command()
@click.argument("artifact", metavar="BUNDLE|FILE", type=click.Path(path_type=Path))
@click.option(
    "--on",
    type=click.Choice(["host", "adb", "ssh", "devicectl"]),
    default="host",
    show_default=True,
    help="This machine, an Android device, a board, or an Apple device.",
)
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="SERIAL|HOST|all",
    help="Which one, where there are several; may be repeated, to measure on all of them at once. "
    "`all`: every phone that adb knows.",
)
@click.option("--format", "format", help="Which artifact of the bundle. [default: the first]")
@click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="[default: as many as cores; on a device: 4]")
@click.option(
    "--prefill",
    metavar="N,N,...",
    callback=options.token_counts,
    help="Lengths of prompts. [default: 128,512, as far as they fit]",
)
@click.option(
    "--depth",
    metavar="N,N,...",
    callback=options.token_counts,
    help="Tokens in the context before decoding. [default: 0,128,512]",
)
@click.option(
    "--sustained",
    type=click.FloatRange(min=0),
    default=0,
    metavar="SECONDS",
    help="Generate for so long, too.",
)
@click.option(
    "--compare",
    multiple=True,
    metavar="OTHER",
    type=click.Path(path_type=Path),
    help="Beside it, taking turns: another bundle, .pte, .litertlm, .tflite, .onnx or .gguf; may be repeated.",
)
@click.option("--runner", metavar="PATH", help="The vendor's program for the device (docs/bench.md).")
@options.JSON
def bench(as_json: bool, **asked: Any) -> None:
    """Measure how fast an artifact loads, reads and writes, with medians and their spread."""
    from slm_export.bench.command import BenchRequest
    from slm_export.commands.bundles import bench_command

    bench_command(BenchRequest(sustained_s=asked.pop("sustained"), **asked), as_json)


@click.command()
@click.argument("model", required=False)
@options.TARGET
@click.option(
    "--device", help="A device profile by name, your own FILE.toml, or `all`: a line for every device."
)
@options.FORMATS
@options.quantization
@options.CONTEXT
@options.REVISION
@options.OFFLINE
@options.JSON
def plan(as_json: bool, **asked: Any) -> None:
    """Tell what an export of MODEL would take, and how it would run on a device; nothing is exported.

    Sizes, memory and speed are predicted from the configuration and the headers of the files (docs/plan.md). Exit
    code 1 means that it does not fit.
    """
    from slm_export.commands.plan import PlanRequest, plan_command

    plan_command(PlanRequest(quantization=options.quantization_of(asked), **asked), as_json)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@options.matrix
@options.OFFLINE
@options.JSON
def matrix(as_json: bool, **asked: Any) -> None:
    """Export models by devices by formats by recipes, as FILE says, and compare them (docs/matrix.md).

    Typed again it goes on: cells that were made from the same inputs are kept, those that failed are tried again.
    """
    from slm_export.commands.matrix import matrix_command
    from slm_export.matrix.command import MatrixRequest

    matrix_command(MatrixRequest(**asked), as_json)


MEASURING = (report, diff, bench, plan, matrix)
