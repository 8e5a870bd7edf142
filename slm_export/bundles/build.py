"""The manifest of a finished export: Report -> Manifest, with nothing in it that cannot be vouched for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from slm_export.bundles.checksums import FileEntry
from slm_export.bundles.manifest import (
    AdapterEntry,
    ArtifactEntry,
    CalibrationEntry,
    Figure,
    Manifest,
    ModelEntry,
    SignatureEntry,
    entries_of,
    total_of,
)
from slm_export.errors import GateError, MachineError
from slm_export.gates import Gates
from slm_export.results import AdapterResult, FormatResult, Report

# Free text belongs to report.json; the manifest holds figures.
_NOT_FIGURES = frozenset({"greedy_text", "worst_sentence", "examples"})


def build_manifest(
    report: Report,
    *,
    files: Sequence[FileEntry],
    recipe: Sequence[Mapping[str, Any]] | None = None,
    gates: Gates | None = None,
    runtime: Mapping[str, Any] | None = None,
) -> Manifest:
    """Return the manifest of a finished export; artifact paths must be relative already.

    Without ``recipe`` the passes of the report are it. A figure that is not a finite number is a
    GateError, and an artifact that is not the one in the report a MachineError: neither can be vouched for.
    """
    formats = [result.artifact.format for result in report.formats]
    assert len(set(formats)) == len(formats), "two artifacts of one format"
    if recipe is None:
        recipe = [{"pass": row.name, **row.options} for row in report.passes]
    facts = {field: getattr(report.model, field) for field in ModelEntry.model_fields}
    manifest = Manifest(
        model=ModelEntry(**facts),
        target=report.target,
        device=report.device,
        recipe=tuple(dict(step) for step in recipe),
        calibration=CalibrationEntry(**dataclasses.asdict(report.calibration))
        if report.calibration
        else None,
        artifacts=tuple(_artifact_entry(result) for result in report.formats),
        adapters=tuple(
            adapter_entry(each, result.artifact.format)
            for result in report.formats
            for each in result.adapters
        ),
        files=tuple(files),
        quality={result.artifact.format: _quality(result) for result in report.formats},
        latency={result.artifact.format: _latency(result) for result in report.formats},
        parity=tuple(dataclasses.asdict(pair) for pair in report.parity),
        gates=gates or Gates.model_validate({}),
        runtime=dict(runtime or {}),
        toolchain=dict(sorted(report.toolchain.items())),
    )
    for entry in manifest.artifacts:
        if (entry.bytes, entry.sha256) != total_of(entry, entries_of(entry, manifest.files)):
            raise MachineError(
                f"{entry.path}: changed on the disk after it was verified; export the model again"
            )
    return manifest


def _artifact_entry(result: FormatResult) -> ArtifactEntry:
    artifact = result.artifact
    return ArtifactEntry(
        format=artifact.format,
        path=artifact.path.as_posix(),
        bytes=artifact.bytes,
        sha256=artifact.sha256,
        bits_per_weight=artifact.bits_per_weight,
        signatures=tuple(SignatureEntry(**dataclasses.asdict(item)) for item in artifact.signatures),
        data=tuple(path.as_posix() for path in artifact.data),
    )


def adapter_entry(made: AdapterResult, format: str) -> AdapterEntry:
    """Return what the manifest says of an adapter; its path is relative already."""
    quality = None if made.quality is None else _figures(format, dataclasses.asdict(made.quality))
    facts = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
    return AdapterEntry(**{**facts, "path": made.path.as_posix(), "format": format, "quality": quality})


def _quality(result: FormatResult) -> dict[str, Figure] | None:
    if result.quality is None:
        return None
    figures = _figures(result.artifact.format, dataclasses.asdict(result.quality))
    return {**figures, "gate": "pass" if result.passed else "fail"}


def _latency(result: FormatResult) -> dict[str, Figure] | None:
    if result.latency is None:
        return None
    return _figures(result.artifact.format, dataclasses.asdict(result.latency))


def _figures(format: str, values: Mapping[str, Figure]) -> dict[str, Figure]:
    figures = {name: value for name, value in values.items() if name not in _NOT_FIGURES}
    for name, value in figures.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise GateError(
                f"{format}: {name} is {value}, not a finite number; the artifact cannot be vouched for"
            )
    return figures
