"""The adapters of an export: what is refused before any work, the places they need, their files and the judgement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slm_export.adapters.gate import judge_adapter, judge_places, judge_switching
from slm_export.adapters.low_rank import LowRank, read_low_rank
from slm_export.bundles.checksums import sha256_file, size_of
from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError
from slm_export.fidelity import References
from slm_export.judge import Subject
from slm_export.machine import machine_errors
from slm_export.progress import Progress
from slm_export.results import AdapterResult, Artifact, Check
from slm_export.runtime import AdapterExporter
from slm_export.source.tasks import GENERATION

FOLDER = "adapters"
"""Of a bundle."""


def read_adapters(
    asked: Sequence[tuple[str, Path]], base: Checkpoint, sha256: str, progress: Progress
) -> tuple[LowRank, ...]:
    """Read the adapters of an export, by name and folder.

    Given   base: the model as it came; sha256: the hash of its files

    Raises:
        InputError: one of them cannot be kept apart from this model.
    """
    if not asked:
        return ()
    if base.task != GENERATION:
        raise InputError(
            f"{base.name}: a model for {base.task}, and adapters are kept apart of models for {GENERATION} alone; "
            "merge the adapter: give it as MODEL"
        )
    with progress.stage("read the adapters"):
        return tuple(read_low_rank(name, folder, base, sha256) for name, folder in asked)


def places_of(adapters: Sequence[LowRank], base: Checkpoint) -> tuple[str, ...]:
    """Return the weights that any of the adapters adds to, in the order of the model."""
    wanted = {name for adapter in adapters for name in adapter.factors}
    return tuple(name for name in base.weights if name in wanted)


def places_for(adapters: Sequence[LowRank], base: Checkpoint) -> dict[str, Any]:
    """Return what `ExportOptions` says of adapters: places and the largest rank."""
    return {
        "places": places_of(adapters, base),
        "rank": max((adapter.rank for adapter in adapters), default=0),
    }


def build_adapters(
    adapters: Sequence[LowRank],
    subject: Subject,
    artifact: Artifact,
    references: References | None,
    progress: Progress,
    others: Mapping[str, Path] | None = None,
) -> tuple[tuple[AdapterResult, ...], tuple[Check, ...]]:
    """Write the adapters beside an artifact, and judge it with each of them on.

    Given   references: what the artifact is compared with, None where that is turned off
            others: adapters that are there already, by name; switching is tried with them too

    Returns what was made and the checks, each behind the name of its adapter.
    """
    exporter = subject.exporter
    assert isinstance(exporter, AdapterExporter), exporter.name
    results: list[AdapterResult] = []
    checks: list[Check] = []
    files = dict(others or {})
    for adapter in adapters:
        made = _written(adapter, exporter, subject, artifact)
        files[adapter.name] = made.path
        if references is not None:
            quality, found = judge_adapter(subject, references, adapter, made.path, progress)
            made = replace(made, quality=quality)
            checks += [replace(check, name=f"{adapter.name}: {check.name}") for check in found]
        results.append(made)
    if references is not None:
        with progress.stage(f"switch adapters of {exporter.name}"):
            checks += judge_switching(subject, files)
            checks.append(
                judge_places(
                    exporter,
                    references.quantized,
                    places_of(adapters, references.quantized),
                    subject.bundle / "tokenizer",
                )
            )
    return tuple(results), tuple(checks)


def _written(
    adapter: LowRank, exporter: AdapterExporter, subject: Subject, artifact: Artifact
) -> AdapterResult:
    path = subject.bundle / FOLDER / f"{adapter.name}{exporter.adapter_suffix}"
    with machine_errors(f"write the adapter {adapter.name}", path):
        path.parent.mkdir(exist_ok=True)
        exporter.write_adapter(adapter.factors, subject.path, path)
    return AdapterResult(
        name=adapter.name,
        path=path,
        bytes=size_of(path),
        sha256=sha256_file(path),
        base_sha256=artifact.sha256,
        source_sha256=adapter.sha256,
        rank=adapter.rank,
        parameters=adapter.parameters,
        targets=adapter.targets,
        quality=None,
    )
