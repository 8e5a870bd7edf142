"""Several bundles side by side: across devices, recipes or versions. The first is what the others are held against.

    compare_bundles  bundles -> Comparison
    to_markdown      for a pull request
    to_json          for programs

A figure that was not measured is absent, here as in the manifest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from slm_export.reports.compared import Bundle, differences_of_ground, recipe_words, toolchain_changes
from slm_export.reports.figures import FIGURES, Figure, figures_of

SCHEMA = 1


@dataclass(frozen=True)
class Column:
    """One artifact of one bundle."""

    bundle: str
    format: str
    device: str
    recipe: str
    gate: str
    """pass, fail, or not verified."""
    figures: dict[str, float]
    """By the manifest's names; what was not measured is absent."""

    @property
    def title(self) -> str:
        """How the column is headed."""
        return f"{self.bundle} / {self.format}"


@dataclass(frozen=True)
class Comparison:
    """All columns, the baseline first."""

    model: str
    columns: tuple[Column, ...]
    toolchain: dict[str, dict[str, tuple[str | None, str | None]]]
    """By bundle: what differs from the baseline's."""
    notes: tuple[str, ...]

    @property
    def figures(self) -> tuple[Figure, ...]:
        """The figures that any column has."""
        return tuple(one for one in FIGURES if any(one.name in column.figures for column in self.columns))

    def baseline(self, column: Column) -> Column:
        """Return what a column is held against: the first bundle's artifact of its format, else its first."""
        first = [other for other in self.columns if other.bundle == self.columns[0].bundle]
        return next((other for other in first if other.format == column.format), first[0])


def compare_bundles(bundles: Sequence[Bundle]) -> Comparison:
    """Return the comparison of one or more bundles."""
    columns = tuple(
        Column(
            bundle.label,
            format,
            bundle.device_title,
            recipe_words(bundle),
            str((bundle.manifest.quality.get(format) or {}).get("gate", "not verified")),
            figures_of(bundle.manifest, format),
        )
        for bundle in bundles
        for format in bundle.formats
    )
    changes = {
        bundle.label: toolchain_changes(bundles[0].manifest, bundle.manifest) for bundle in bundles[1:]
    }
    names = list(dict.fromkeys(bundle.manifest.model.name for bundle in bundles))
    return Comparison(
        " / ".join(names),
        columns,
        {label: changed for label, changed in changes.items() if changed},
        differences_of_ground(bundles),
    )


def cell(comparison: Comparison, one: Figure, column: Column) -> tuple[str, str, bool]:
    """Return a value as it reads, its change against the baseline (or empty), and whether that is for the worse."""
    value = column.figures.get(one.name)
    base = comparison.baseline(column)
    if base is column:
        return one.show(value), "", False
    old = base.figures.get(one.name)
    return one.show(value), one.show_change(old, value), one.is_worse(old, value)


def to_markdown(comparison: Comparison) -> str:
    """Return a table with a column per artifact, and what makes figures not alike under it."""
    columns = comparison.columns
    rows = [
        ["", *(column.title for column in columns)],
        ["device", *(column.device for column in columns)],
        ["recipe", *(column.recipe for column in columns)],
        ["gate", *(column.gate for column in columns)],
    ]
    rows = [[escaped(text) for text in row] for row in rows]
    rows.insert(1, ["---", *("---:" for _ in columns)])
    for one in comparison.figures:
        texts = []
        for column in columns:
            value, change, worse = cell(comparison, one, column)
            texts.append(f"{value} ({f'**{change}**' if worse else change})" if change else value)
        rows.append([one.label, *texts])
    lines = [f"### {escaped(comparison.model)}", "", *(f"| {' | '.join(row)} |" for row in rows)]
    if len(columns) > 1:
        against = columns[0].bundle
        lines += ["", f"In brackets: against {escaped(against)}; bold is for the worse."]
    for label, changed in comparison.toolchain.items():
        versions = ", ".join(
            f"{name} {old or 'none'} → {new or 'none'}" for name, (old, new) in changed.items()
        )
        lines += ["", f"Made with other versions: {escaped(label)}: {escaped(versions)}"]
    lines += [line for note in comparison.notes for line in ("", f"Mind that {escaped(note)}.")]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Return text that Markdown shows as it is."""
    for char in "\\`*_{}[]<>#|":
        text = text.replace(char, f"\\{char}")
    return " ".join(text.split())


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as JSON values."""
    return {"schema": SCHEMA, **asdict(comparison)}
