"""What an earlier run says of a cell: ``cell.json`` in its folder, and whether its bundle is still what it says."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from slm_export.bundles.bundle import verify_files
from slm_export.bundles.lock import Source
from slm_export.errors import SlmExportError
from slm_export.keras import read as keras
from slm_export.keras.source import is_tensorflow_model
from slm_export.locked import inputs_of
from slm_export.matrix.cells import Cell
from slm_export.matrix.work import ANSWER
from slm_export.source.hub import find_model
from slm_export.source.provenance import source_of
from slm_export.toolchain import tools_of, versions

RECORD = "cell.json"


@dataclass(frozen=True)
class Record:
    """How a cell ended, and what it was made from."""

    key: str
    code: int
    reason: str
    seconds: float | None
    peak_rss_mb: float | None
    """Of the export's process; None where it did not tell."""


def source_facts(model: str, revision: str | None) -> Source:
    """Return what a lock says of a model: the hashes of its files and licence; one on the hub is downloaded first."""
    if is_tensorflow_model(model):
        return keras.source_of(Path(model))
    return source_of(find_model(model, revision), revision)


def content_key(cell: Cell, source: Source) -> str:
    """Return a hash of all that a cell's bundle follows from.

    Given   source: what is known of its model
    """
    plan = cell.plan
    inputs = inputs_of(plan, plan.recipe, versions(tools_of(plan)), source)
    follows_from = [inputs.model_dump(mode="json"), asdict(plan.request.budget), plan.request.bench]
    return hashlib.sha256(json.dumps(follows_from, sort_keys=True).encode()).hexdigest()


def read_record(folder: Path) -> Record | None:
    """Return the record of a cell; None where there is none that can be read."""
    document = read_json(folder / RECORD)
    try:
        return None if document is None else Record(**document)
    except TypeError:
        return None


def write_record(folder: Path, record: Record) -> None:
    """Write the record of a cell, whole or not at all."""
    part = folder / f"{RECORD}.part"
    part.write_text(json.dumps(asdict(record), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, folder / RECORD)


def is_complete(record: Record | None, key: str, bundle: Path) -> bool:
    """Return whether a cell was made from the same inputs, and its bundle is still as it was left."""
    if record is None or record.code != 0 or record.key != key:
        return False
    try:
        return not verify_files(bundle)
    except SlmExportError:
        return False


def answer_of(folder: Path) -> dict[str, Any]:
    """Return what an export printed: its report, or ``error`` and perhaps ``report``; empty where it was killed."""
    return read_json(folder / ANSWER) or {}


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object of a file; None where there is none."""
    try:
        document = from_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None
