"""How the commands that teach show what came of it, and export it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from slm_export.commands.terminal import print_json, stdout
from slm_export.reports.words import printable, seconds

if TYPE_CHECKING:
    from slm_export.compilation import Plan, Request
    from slm_export.learning.distil_settings import Grid
    from slm_export.learning.outcome import Outcome
    from slm_export.learning.scoring import Score
    from slm_export.progress import Progress
    from slm_export.quantization_options import QuantizationOptions


def exported(
    out: Path, targets: Sequence[str], force: bool, quantization: QuantizationOptions | None = None
) -> list[Request]:
    """Return the requests for bundles OUT-TARGET of a model, judged on its own held-out text.

    Given   quantization: the grid that it was trained on; None: the device's recipe
    """
    from slm_export.compilation import Request
    from slm_export.learning.distil import HELD_OUT
    from slm_export.quantization_options import QuantizationOptions

    return [
        Request(
            model=str(out),
            target=target,
            out=out.with_name(f"{out.name}-{target}"),
            eval_text=out / HELD_OUT,
            quantization=quantization or QuantizationOptions(),
            force=force,
        )
        for target in dict.fromkeys(targets)
    ]


def grid_of(bits: str | None, group: str) -> Grid | None:
    """Return the grid that ``--for-bits`` and ``--group-size`` ask for."""
    from slm_export.learning.distil_settings import Grid

    return None if bits is None else Grid.model_validate({"bits": int(bits), "group": int(group)})


def stored(grid: Grid | None) -> QuantizationOptions | None:
    """Return the options of an export that stores what was trained on a grid."""
    from slm_export.quantization_options import QuantizationOptions

    if grid is None:
        return None
    return QuantizationOptions(grid.bits, grid.group if grid.bits == 4 else None, grid.embedding_bits)


def show_outcome(
    outcome: Outcome,
    out: Path,
    plans: Sequence[Plan],
    progress: Progress,
    as_json: bool,
    scores: Callable[[Path], Mapping[str, Score | None]] | None = None,
) -> None:
    """Export what was planned, then print the outcome and every report.

    Given   scores: of the artifacts of a bundle, by format, where there are problems to solve
    """
    from slm_export import driver
    from slm_export.learning.outcome import to_json
    from slm_export.reports import report as reports

    if not as_json:
        print_outcome(stdout(), outcome, out, done=not plans)
    made = [driver.export(plan, progress) for plan in plans]
    solved = [None if scores is None else scores(bundle) for _, bundle in made]
    if as_json:
        exports: list[dict[str, Any]] = [
            {**reports.to_json(report), "out": str(bundle), **_scored(found)}
            for (report, bundle), found in zip(made, solved, strict=True)
        ]
        print_json({**to_json(outcome), "out": str(out), "exports": exports})
        return
    for (report, bundle), found in zip(made, solved, strict=True):
        stdout().print()
        reports.print_report(stdout(), report, bundle)
        _print_scores(stdout(), found)


def _scored(found: Mapping[str, Score | None] | None) -> dict[str, Any]:
    if found is None:
        return {}
    return {
        "held_out_problems": {name: None if one is None else one.as_json() for name, one in found.items()}
    }


def _print_scores(console: Console, found: Mapping[str, Score | None] | None) -> None:
    """Print how many held-out problems each artifact solves."""
    if found is None:
        return
    console.print()
    console.print(Text("Held-out problems, solved by the artifact", "bold"))
    for name, one in found.items():
        told = "not run: its runtime is not on this machine"
        if one is not None:
            told = f"{one.right} of {one.problems}: {one.accuracy}"
        console.print(Text(f"  {name}: {told}"))


def print_outcome(console: Console, outcome: Outcome, out: Path, *, done: bool) -> None:
    """Print the table of models on the held-out text."""
    from slm_export.learning.outcome import table

    console.print(Text(f"{printable(outcome.model)}: {outcome.by}, in {seconds(outcome.seconds)}", "bold"))
    console.print()
    grid = Table.grid(padding=(0, 2, 0, 0))
    rows = table(outcome.rows)
    for _ in rows[0]:
        grid.add_column(overflow="fold")
    for row in rows:
        grid.add_row(*(Text(("  " if not index else "") + printable(cell)) for index, cell in enumerate(row)))
    console.print(grid)
    for note in outcome.notes:
        console.print(Text(f"  {printable(note)}", "dim"))
    if done:
        place = shlex.quote(str(out))
        console.print()
        console.print(Text("Next", "bold"))
        console.print(
            Text(f"  slm-export {place} --target android --eval-text {place}/held_out.txt", "cyan"),
            soft_wrap=True,
        )
