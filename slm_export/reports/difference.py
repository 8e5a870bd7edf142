"""A new bundle against an old one: size, fidelity, speed, codes, recipe and versions, and whether that is too far.

    difference  two bundles -> Difference
    judge       Difference and limits -> checks
    to_json     for programs

Codes are read back out of the artifacts themselves, of a format that both bundles have; where they have none in common,
of the first of each: every format of a bundle carries the same integers.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from slm_export.bundles.integrity import verify_files
from slm_export.errors import GateError, InputError
from slm_export.progress import Progress
from slm_export.registry import exporter
from slm_export.reports.codes import MatrixChange, by_block, changes, share_changed
from slm_export.reports.compared import Bundle, differences_of_ground, recipe_words, toolchain_changes
from slm_export.reports.diff_limits import DiffLimits
from slm_export.reports.figures import FIGURES, Figure, figures_of
from slm_export.results import Check

SCHEMA = 1


@dataclass(frozen=True)
class Difference:
    """What is different. ``figures``: format -> name -> (old, new), None where a side has none."""

    old: str
    new: str
    figures: dict[str, dict[str, tuple[float | None, float | None]]]
    codes: tuple[MatrixChange, ...] | None
    """None where they were not compared."""
    codes_from: str
    """Which files codes were read from, or why they were not compared."""
    recipe: tuple[str, str]
    toolchain: dict[str, tuple[str | None, str | None]]
    notes: tuple[str, ...]


def difference(old: Bundle, new: Bundle, progress: Progress, *, codes: bool = True) -> Difference:
    """Compare two bundles.

    Raises:
        InputError: an artifact does not tell its codes, as those of older versions do not.
        GateError: an artifact that codes are to be read from is not the one that was written.
        MissingComponentError: what reads it is not installed.
    """
    formats = tuple(dict.fromkeys((*old.formats, *new.formats)))
    notes = list(differences_of_ground((old, new)))
    for side, other in ((old, new), (new, old)):
        notes += [
            f"{side.label} has no {format} artifact" for format in other.formats if format not in side.formats
        ]
    rows: tuple[MatrixChange, ...] | None = None
    where = "not compared, as was asked"
    if codes:
        rows, where = _codes(old, new, progress)
    return Difference(
        old.label,
        new.label,
        {format: _figures(old, new, format) for format in formats},
        rows,
        where,
        (recipe_words(old), recipe_words(new)),
        toolchain_changes(old.manifest, new.manifest),
        tuple(notes),
    )


def _figures(old: Bundle, new: Bundle, format: str) -> dict[str, tuple[float | None, float | None]]:
    sides = [figures_of(side.manifest, format) if format in side.formats else {} for side in (old, new)]
    before, after = sides
    return {
        one.name: (before.get(one.name), after.get(one.name))
        for one in FIGURES
        if one.name in before or one.name in after
    }


def _codes(old: Bundle, new: Bundle, progress: Progress) -> tuple[tuple[MatrixChange, ...], str]:
    common = [format for format in old.formats if format in new.formats]
    formats = (common[0], common[0]) if common else (old.formats[0], new.formats[0])
    stored = []
    for side, format in zip((old, new), formats, strict=True):
        entry = side.manifest.artifact(format)
        with progress.stage(f"read the {format} codes of {side.label}"):
            _refuse_changed(side, entry.path)
            try:
                stored.append(exporter(format).stored(side.folder / entry.path))
            except InputError as error:
                raise InputError(f"{error}; or leave the codes out with --no-codes") from None
    with progress.stage("compare codes"):
        rows = changes(*stored)
    return rows, formats[0] if common else f"{formats[0]} against {formats[1]}"


def _refuse_changed(side: Bundle, path: str) -> None:
    problems = [problem for problem in verify_files(side.folder) if problem.path.startswith(path)]
    if problems:
        raise GateError(
            f"{side.folder}: {problems[0]}; codes are compared in whole bundles: fetch it again, "
            "or leave them out with --no-codes"
        )


def judge(found: Difference, limits: DiffLimits) -> dict[str, tuple[Check, ...]]:
    """Return checks by format, and those of codes and versions; what cannot be told fails its limit."""
    bounds = limits.model_dump(exclude_none=True)
    checks: dict[str, tuple[Check, ...]] = {}
    for format, figures in found.figures.items():
        made = [
            _check(one, figures.get(one.name, (None, None)), limit)
            for one in FIGURES
            if (limit := bounds.get(_limit_of(one))) is not None
        ]
        checks[format] = tuple(check for check in made if check is not None)
    bundle = []
    if limits.max_codes_changed is not None:
        share = None if found.codes is None else share_changed(found.codes)
        detail = f"codes of {found.codes_from}"
        bundle.append(_bounded("codes_changed", share, limits.max_codes_changed, detail))
    if limits.max_toolchain_changes is not None:
        count = float(len(found.toolchain))
        detail = ", ".join(
            f"{name} {a or 'none'} -> {b or 'none'}" for name, (a, b) in found.toolchain.items()
        )
        bundle.append(_bounded("toolchain_changes", count, limits.max_toolchain_changes, detail))
    return {**checks, "bundle": tuple(bundle)}


def _limit_of(one: Figure) -> str:
    return f"max_{one.name}_{'increase' if one.better == 'lower' else 'decrease'}"


def _check(one: Figure, pair: tuple[float | None, float | None], limit: float) -> Check | None:
    """Return the check of a figure; None for one that neither side has, which is of another task."""
    old, new = pair
    if old is None and new is None:
        return None
    moved = one.change(old, new)
    worse = None if moved is None else moved if one.better == "lower" else -moved
    detail = f"{one.show(old)} -> {one.show(new)}"
    return _bounded(_limit_of(one).removeprefix("max_"), worse, limit, detail)


def _bounded(name: str, value: float | None, limit: float, detail: str) -> Check:
    if value is None or not math.isfinite(value):
        return Check(name, False, f"cannot be told, though a limit asks for it: {detail}", None, limit)
    return Check(name, value <= limit, detail, value, limit)


def to_json(found: Difference, checks: dict[str, tuple[Check, ...]]) -> dict[str, Any]:
    """Return the difference and its verdict as JSON values."""
    document = asdict(found)
    document["figures"] = {
        format: {
            one.name: {"old": pair[0], "new": pair[1], "change": one.change(*pair)}
            for one in FIGURES
            if (pair := figures.get(one.name)) is not None
        }
        for format, figures in found.figures.items()
    }
    if found.codes is not None:
        document["blocks"] = [{**asdict(block), "share": block.share} for block in by_block(found.codes)]
        document["codes_changed"] = share_changed(found.codes)
    return {
        "schema": SCHEMA,
        "passed": all(check.passed for group in checks.values() for check in group),
        "checks": {name: [asdict(check) for check in group] for name, group in checks.items()},
        **document,
    }
