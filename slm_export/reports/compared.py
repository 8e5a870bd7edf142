"""Bundles read to be compared: their manifests, and what their reports add.

The manifest alone is enough; a report.json beside it tells the machine and the text that figures were measured with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from slm_export.bundles.manifest import Manifest, read_manifest
from slm_export.errors import InputError

_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Bundle:
    """One bundle, and how it is called beside the others."""

    label: str
    folder: Path
    manifest: Manifest
    document: Mapping[str, Any]
    """report.json; empty where there is none."""

    @property
    def formats(self) -> tuple[str, ...]:
        """Its formats, in its order."""
        return tuple(entry.format for entry in self.manifest.artifacts)

    @property
    def device_title(self) -> str:
        """The device, as people call it."""
        return str(self.document.get("device_title") or self.manifest.device)


def read_bundles(folders: Sequence[Path]) -> tuple[Bundle, ...]:
    """Read bundles; each is called by the last part of its path, or by all of it where that tells two apart.

    Raises:
        InputError: one of them is not a bundle, or one is given twice.
    """
    resolved = [folder.resolve() for folder in folders]
    for at, place in enumerate(resolved):
        if place in resolved[:at]:
            raise InputError(f"{folders[at]}: is given twice; give different bundles")
    names = [place.name for place in resolved]
    labels = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    return tuple(
        Bundle(label, folder, read_manifest(folder), _read_report(folder / "report.json"))
        for label, folder in zip(labels, folders, strict=True)
    )


def _read_report(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path}: too large for a report; export the model again")
        document = from_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}; export the model again") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: not a report; export the model again")
    return document


def differences_of_ground(bundles: Sequence[Bundle]) -> tuple[str, ...]:
    """Return in words what makes figures of these bundles not alike: another model, text or machine."""
    notes = []
    if len({bundle.manifest.model.source_sha256 for bundle in bundles}) > 1:
        notes.append("they were made from different source models")
    texts = {str(text) for bundle in bundles if (text := bundle.document.get("held_out")) is not None}
    if len(texts) > 1:
        notes.append("fidelity was measured on different texts")
    machines = {_machine(bundle) for bundle in bundles} - {None}
    if len(machines) > 1:
        notes.append(f"speed was measured on different machines: {'; '.join(sorted(map(str, machines)))}")
    return tuple(notes)


def _machine(bundle: Bundle) -> str | None:
    """Return what speed was measured on; None where none was measured or it is not known."""
    if not any(bundle.manifest.latency.values()):
        return None
    environment = bundle.document.get("environment") or {}
    threads = sorted({str(one.get("threads")) for one in bundle.manifest.latency.values() if one})
    if not environment:
        return None
    return f"{environment.get('processor', 'unknown processor')}, {'/'.join(threads)} threads"


def recipe_words(bundle: Bundle) -> str:
    """Return the recipe in one line: ``group-quantize bits=4 group=32``."""
    return steps_words(bundle.manifest.recipe)


def steps_words(recipe: Iterable[Mapping[str, Any]]) -> str:
    """Return passes with their options in one line, those that say nothing left out."""
    steps = []
    for step in recipe:
        options = [
            f"{key}={f'({len(value)} names)' if isinstance(value, Mapping) else value}"
            for key, value in step.items()
            if key != "pass" and value is not None and value != {}
        ]
        steps.append(" ".join([str(step.get("pass")), *options]))
    return "; ".join(steps) or "none"


def toolchain_changes(old: Manifest, new: Manifest) -> dict[str, tuple[str | None, str | None]]:
    """Return package -> (old version, new version) of what differs; None where a side does without it."""
    names = sorted({*old.toolchain, *new.toolchain})
    versions = {name: (old.toolchain.get(name), new.toolchain.get(name)) for name in names}
    return {name: pair for name, pair in versions.items() if pair[0] != pair[1]}
