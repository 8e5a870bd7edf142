"""``slm-export MODEL --target T --pareto``: the frontier on the terminal, and on a page."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from slm_export.commands.terminal import print_json, stdout, working
from slm_export.compilation import Request, make_plan
from slm_export.errors import InputError
from slm_export.reports.words import printable


def pareto_command(request: Request, as_json: bool) -> None:
    """Print size against quality, and plot it on a page beside where the bundle would be."""
    if request.locked is not None:
        raise InputError("--pareto exports nothing that a lock could hold: leave out --locked")
    if request.adapters:
        raise InputError("--pareto exports nothing that an adapter could be added to: leave out --adapter")
    plan = make_plan(request)
    out = request.out or Path(f"{Path(plan.model).resolve().name}-{plan.profile.target}")
    page = Path(f"{out}.pareto.html")
    if page.exists() and not request.force:
        raise InputError(f"{page}: exists already; give --force to replace it, or another --out")
    with working() as progress:
        from slm_export.budget.pareto import explore
        from slm_export.bundles.bundle import machine_errors
        from slm_export.reports.page.frontier_page import HEAD, frontier_page, rows

        found = explore(plan, progress)
        where = f"{found.format} for {found.device}"
        with machine_errors("write the page", page):
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(
                frontier_page(found.name, where, found.quality, found.points, found.notes), encoding="utf-8"
            )
    if as_json:
        points = [point.as_json for point in found.points]
        print_json(
            {
                "model": found.name,
                "format": found.format,
                "quality": found.quality,
                "points": points,
                "page": str(page),
            }
        )
        return
    console = stdout()
    console.print(Text(printable(f"{found.name}: size against {found.quality}, {where}"), "bold"))
    table = Table(*HEAD, box=None)
    for row in rows(found.points):
        table.add_row(*row)
    console.print(table)
    for note in found.notes:
        console.print(Text(note, "dim"))
    console.print(Text(printable(f"plotted in {page}")))
