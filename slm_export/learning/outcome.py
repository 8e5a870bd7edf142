"""What came of teaching: figures of teacher and child on the same held-out text, in learning.json and learning.html.

    {"schema": 1,
     "learned": {"by": "distil", "rows": [{"name", "parameters", "figures": {NAME: {"value", "low", "high"}}}],
                 "training": {...}, "curves": [...], "data": {...}, "held_out": {...}, "lineage": {...},
                 "licence", "data_licence", "notes"},
     "files": [{"path", "bytes", "sha256"}]}

The file lists all others of its folder, so that ``--force`` can tell a model that was taught from somebody's folder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slm_export.bundles.checksums import tree_files
from slm_export.learning.measures import Interval
from slm_export.learning.trainer import Curve
from slm_export.machine import machine_errors
from slm_export.source.learned import LEARNING, Learned

SCHEMA = 1
PAGE = "learning.html"


@dataclass(frozen=True)
class Row:
    """One model and its figures on the held-out text."""

    name: str
    """teacher, child before, child after."""
    parameters: int | None
    figures: Mapping[str, Interval]


@dataclass(frozen=True)
class Outcome:
    """The outcome of one way of teaching."""

    by: str
    """The command: distil, adapt, reason."""
    model: str
    rows: tuple[Row, ...]
    curves: Mapping[str, Curve]
    """Name of a run -> how it went."""
    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    """What was learned from: `texts.Texts.facts`, windows, tokens."""
    held_out: Mapping[str, Any]
    lineage: Mapping[str, Any]
    """Who taught whom: names and hashes."""
    licence: str | None = None
    """Of the models that it was made of."""
    data_licence: str | None = None
    """Of the text, as the user said it."""
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    toolchain: Mapping[str, str] = field(default_factory=dict)

    def learned(self) -> Learned:
        """Return what an export of the model passes on."""
        return Learned.model_validate(
            {
                "by": self.by,
                "rows": [
                    {
                        "name": row.name,
                        "parameters": row.parameters,
                        "figures": {name: dataclasses.asdict(each) for name, each in row.figures.items()},
                    }
                    for row in self.rows
                ],
                "lineage": dict(self.lineage),
                "data": dict(self.data),
                "held_out": dict(self.held_out),
                "data_licence": self.data_licence,
                "settings": dict(self.settings),
            }
        )


def write_outcome(outcome: Outcome, folder: Path) -> None:
    """Write learning.html and, listing every other file, learning.json; call it last."""
    from slm_export.reports.page.learning_page import learning_page

    with machine_errors("write the outcome", folder):
        page = learning_page(outcome, table(outcome.rows))
        (folder / PAGE).write_text(page, encoding="utf-8", newline="\n")
        document = {**to_json(outcome), "files": [entry.model_dump() for entry in tree_files(folder)]}
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        (folder / LEARNING).write_text(text, encoding="utf-8", newline="\n")


def to_json(outcome: Outcome) -> dict[str, Any]:
    """Return everything as JSON values."""
    learned = outcome.learned().model_dump(mode="json")
    learned |= {
        "licence": outcome.licence,
        "curves": {name: _curve(curve) for name, curve in outcome.curves.items()},
        "notes": list(outcome.notes),
        "seconds": outcome.seconds,
        "toolchain": dict(outcome.toolchain),
    }
    return {"schema": SCHEMA, "learned": learned}


def _curve(curve: Curve) -> dict[str, Any]:
    return {
        "tokens": curve.tokens,
        "seconds": curve.seconds,
        "resumed_at": curve.resumed_at,
        "points": [
            {
                "step": point.step,
                "loss": point.loss,
                "rate": point.rate,
                "measured": None if point.measured is None else dict(point.measured),
            }
            for point in curve.points
        ],
    }


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return the table of models and figures as text, a header first; what was not measured is a dash."""
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    made: list[tuple[str, ...]] = [("", "parameters", *(name.replace("_", " ") for name in names))]
    for row in rows:
        cells = (str(row.figures[name]) if name in row.figures else "-" for name in names)
        made.append((row.name, "-" if row.parameters is None else f"{row.parameters:,}", *cells))
    return made
