"""What lies beside the weights of a model that was taught: text to judge its exports on, licences, a card, a record."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slm_export.evaltext import load_documents, text_sha256
from slm_export.machine import machine_errors
from slm_export.source.licences import licence_files, licence_of

HELD_OUT = "held_out.txt"
_KEPT_CHARACTERS = 400_000
TOOLS = ("torch", "transformers", "tokenizers", "accelerate", "safetensors")
"""Packages whose versions decide what comes of teaching."""


def write_beside(held_out: Sequence[str], source: Path, out: Path) -> None:
    """Write held-out documents, at least one, and what ``source`` says of its licence."""
    kept: list[str] = []
    characters = 0
    for document in held_out:
        if kept and characters + len(document) > _KEPT_CHARACTERS:
            break
        kept.append(document)
        characters += len(document)
    licence = licence_of(source)
    card = f"---\nlicense: {licence}\n---\n\n" if licence else ""
    with machine_errors("write the model", out):
        (out / HELD_OUT).write_text("\n\f\n".join(kept), encoding="utf-8", newline="\n")
        for file in licence_files(source):
            (out / file.name).write_bytes(file.read_bytes())
        text = f"{card}# {out.name}\n\nTaught by slm-export; learning.html says how.\n"
        (out / "README.md").write_text(text, encoding="utf-8", newline="\n")


def text_for_exports(out: Path) -> dict[str, str]:
    """Return what a report knows again the text by that exports were judged on."""
    return {"export_sha256": text_sha256(load_documents(out / HELD_OUT))}


def write_rows(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write objects as JSONL."""
    with machine_errors("write the model", path), path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(dict(row), ensure_ascii=False) + "\n")
