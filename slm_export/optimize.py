"""The passes of a recipe, one after the other: by an export, and again by ``verify --source``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slm_export.bundles.bundle import machine_errors
from slm_export.bundles.finished import IN_MEMORY, Finished, Keeper, cache_folder, finished_weights
from slm_export.checkpoint import Checkpoint
from slm_export.compression.calibration import (
    Calibration,
    own_calibration,
    read_calibration,
    shipped_calibration,
)
from slm_export.compression.workbench import Workbench
from slm_export.errors import InputError
from slm_export.fidelity.steps import StepErrors, worst_of
from slm_export.graph.model import build_reference
from slm_export.progress import Progress
from slm_export.recipe import Recipe, options_of, unaccounted
from slm_export.reports.by_weight import Changes, changes_of, still_true
from slm_export.results import CalibrationFacts, PassRow
from slm_export.source.tasks import GENERATION
from slm_export.tokenization.tokenizer import SourceTokenizer, tokenizer_of


@dataclass(frozen=True)
class Optimized:
    """What the passes made of a checkpoint, and what they did."""

    checkpoint: Checkpoint
    rows: tuple[PassRow, ...]
    notes: tuple[str, ...]
    calibration: CalibrationFacts | None
    errors: dict[str, float]
    """Relative squared error by weight, of the last pass that changed it."""
    steps: StepErrors | None
    """How far passes put codes from what they stand for; None where none did."""


_UNKNOWN = Changes(None, {}, None)


def optimize(
    recipe: Recipe,
    source: Checkpoint,
    source_sha256: str,
    calibration: Calibration | None,
    kept: list[Finished] | None,
    progress: Progress,
) -> Optimized:
    """Run every pass, and see that none forgets a weight.

    Given   kept: filled with what holds the finished weights, to be removed by whoever gave it; None: weights are
            held in memory
    """
    checkpoint, rows, notes = source, [], []
    errors: dict[str, float] = {}
    steps: StepErrors | None = None
    text = None if calibration is None else calibration.sha256
    facts = None if calibration is None else _facts(calibration)
    done: list[object] = [source_sha256, *([text] if text else [])]
    for step in recipe:
        began = time.monotonic()
        done.append({"pass": step.name, **options_of(step)})
        keeper, note = (IN_MEMORY, None) if kept is None else _keeper(done, kept)
        with progress.stage(step.name) as stage, machine_errors(f"run {step.name}", cache_folder()):
            result = step.run(checkpoint, Workbench(keeper, calibration, stage.advance))
        if isinstance(keeper, Finished) and keeper.reused:
            note = f"{step.name}: {len(keeper.reused)} weights were finished by an earlier export"
        notes += [*([note] if note else []), *(f"{step.name}: {note}" for note in result.notes)]
        if forgotten := unaccounted(checkpoint, result.checkpoint, result.skipped):
            raise AssertionError(f"{step.name}: neither changed nor skipped with a reason: {forgotten}")
        changes = _UNKNOWN if step.structural else changes_of(checkpoint, result.checkpoint)
        errors = {**still_true(errors, checkpoint, result.checkpoint), **changes.errors}
        steps = worst_of((steps, changes.steps))
        row = PassRow(
            name=step.name,
            options=options_of(step),
            seconds=time.monotonic() - began,
            bytes_before=checkpoint.bytes,
            bytes_after=result.checkpoint.bytes,
            changed=len(checkpoint.weights) - len(result.skipped),
            skipped=dict(result.skipped),
            error=changes.error,
        )
        rows.append(row)
        if calibration is not None and result.checkpoint.vocabulary is not checkpoint.vocabulary:
            tokenizer = tokenizer_of(result.checkpoint)
            calibration = calibration.read_by(tokenizer, source.task, source.positions)
        checkpoint = replace(result.checkpoint, history=(*checkpoint.history, step.name))
    return Optimized(checkpoint, tuple(rows), tuple(notes), facts, errors, steps)


def calibration_for(
    recipe: Recipe, path: Path | None, source: Checkpoint, tokenizer: SourceTokenizer, progress: Progress
) -> Calibration | None:
    """Return the text that the passes of a recipe are calibrated on; None where none of them wants any.

    Raises:
        InputError: a file was given that no pass wants, or that cannot be used.
    """
    wanting = [step.name for step in recipe if step.calibrated]
    if not wanting:
        if path is not None:
            names = ", ".join(step.name for step in recipe) or "empty"
            raise InputError(
                f"{path}: calibration text was given, but no pass of the recipe uses any ({names})"
            )
        return None
    with progress.stage("read the calibration text" if path else "make calibration text") as stage:
        if path is not None:
            return read_calibration(path, tokenizer, source.task, source.positions)
        if source.task != GENERATION:
            return shipped_calibration(tokenizer, source.task, source.positions)
        return own_calibration(build_reference(source), tokenizer, source.positions, stage.advance)


def refuse_other_text(calibration: Calibration | None, recorded: CalibrationFacts | None, where: str) -> None:
    """Raise InputError unless a recipe is repeated on the text that it was made with."""
    if recorded is not None and (calibration is None or calibration.sha256 != recorded.sha256):
        raise InputError(
            f"{where}: was calibrated on {recorded.origin} ({recorded.tokens:,} tokens), and that text is not the "
            "same now; give the file of then with --calibration"
        )


def _facts(calibration: Calibration) -> CalibrationFacts:
    return CalibrationFacts(calibration.origin, calibration.tokens, calibration.sha256)


def _keeper(done: Sequence[object], kept: list[Finished]) -> tuple[Keeper, str | None]:
    """Return what keeps the weights of a pass, and a note where that cannot be the disk."""
    try:
        keeper = finished_weights(done)
    except OSError as error:
        return IN_MEMORY, f"{cache_folder()} cannot be written ({error.strerror}): weights are held in memory"
    kept.append(keeper)
    return keeper, None
