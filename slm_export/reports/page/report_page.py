"""The page of one report."""

from __future__ import annotations

from slm_export.reports import words
from slm_export.reports.details import Prediction
from slm_export.reports.page import plots, sections, wording
from slm_export.reports.page.templates import render
from slm_export.reports.page.treemap import treemap
from slm_export.reports.taught import taught_notes, taught_rows
from slm_export.results import Report


class _Shown:
    """What the template calls with parts of the report."""

    asked_rows = staticmethod(wording.asked_rows)
    check_limit = staticmethod(wording.check_limit)
    check_value = staticmethod(wording.check_value)
    check_title = staticmethod(wording.check_title)
    examples = staticmethod(wording.examples)
    furthest = staticmethod(wording.furthest)
    frontier_rows = staticmethod(wording.frontier_rows)
    headroom = staticmethod(sections.headroom)
    count = staticmethod(wording.count)
    visible = staticmethod(wording.visible)


def report_page(report: Report) -> str:
    """Return the page; a section that there is nothing to say in is left out."""
    speed_head, speed_rows = sections.speed_table(report)
    return render(
        "report.html.j2",
        report=report,
        words=words,
        shown=_Shown,
        verdict=sections.verdict(report),
        cards=[sections.card(report, result) for result in report.formats],
        contents=_contents(report),
        size_bars=sections.size_bars(report),
        beside=[sections.beside_weights(report, result) for result in report.formats],
        map=treemap(report.weights),
        heat=sections.heat(report.weights),
        speed_head=speed_head,
        speed_rows=speed_rows,
        predicted_rows=sections.predicted_rows(report),
        rooflines=_rooflines(report),
        frontier=plots.frontier(report.frontier),
        delegated=[result for result in report.formats if result.delegation is not None],
        stage_bars=sections.stage_bars(report),
        taught=taught_rows(report),
        taught_notes=taught_notes(report),
    )


def _contents(report: Report) -> list[tuple[str, str]]:
    """Return (id, title) of every section that is there."""
    speed = any(result.latency or result.predictions for result in report.formats)
    there = (
        ("asked", "Asked", True),
        ("taught", "Taught", report.model.learned is not None),
        ("size", "Size", True),
        ("passes", "Passes", bool(report.passes)),
        ("fidelity", "Fidelity", True),
        ("parity", "Formats", bool(report.parity)),
        ("speed", "Speed", speed),
        ("frontier", "Frontier", plots.frontier(report.frontier) is not None),
        ("delegation", "Acceleration", any(result.delegation for result in report.formats)),
        ("notes", "Notes", bool(report.notes)),
        ("environment", "Environment", True),
    )
    return [(name, title) for name, title, shown in there if shown]


def _rooflines(report: Report) -> list[tuple[plots.Plot, Prediction]]:
    """Return a roofline, and its machine, for every machine that something was predicted for."""
    machines: dict[str, list[tuple[str, Prediction]]] = {}
    for result in report.formats:
        for prediction in result.predictions:
            machines.setdefault(prediction.where, []).append((result.artifact.format, prediction))
    drawn = [(plots.roofline(group), group[0][1]) for group in machines.values()]
    return [(plot, machine) for plot, machine in drawn if plot is not None]
