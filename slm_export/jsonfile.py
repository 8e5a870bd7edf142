"""JSON files of strangers: whatever is in one, it is JSON or an `InputError` that names the file.

Bounded in size and depth, and only ever a regular file: a pipe would block for ever, a device never end.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slm_export.errors import InputError

LARGEST = 256 << 20
"""Bytes. Tokenizers of large vocabularies take some 30 MB."""


def read_object(path: Path) -> dict[str, Any]:
    """Return the object that a file holds; InputError as of `read_json`, and where it holds something else."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_json(path: Path) -> Any:
    """Return what a file holds.

    Raises:
        InputError: there is no such regular file, it is too large, or it is no UTF-8 JSON.
    """
    try:
        found = path.stat()
        if not path.is_file():
            raise InputError(f"{path}: not readable as JSON: not a regular file")
        if found.st_size > LARGEST:
            raise InputError(f"{path}: not readable as JSON: {found.st_size:,} bytes are too many")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from None
