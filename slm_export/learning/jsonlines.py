"""JSONL files of a user: an object on each line, read strictly, with line numbers in every error."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_export.errors import InputError, suggestion

LARGEST = 1 << 30
"""Bytes of a file that is read whole."""


@dataclass(frozen=True)
class Line:
    """An object, and where it stands."""

    values: Mapping[str, Any]
    where: str

    def text(self, key: str) -> str:
        """Return a text that must be there and not be blank; else InputError."""
        value = self.values.get(key)
        if not isinstance(value, str) or not value.strip():
            found = "is missing" if value is None else "must be a text that is not blank"
            raise InputError(f"{self.where}: '{key}' {found}")
        return value


def read_lines(path: Path, keys: Sequence[str]) -> Iterator[Line]:
    """Yield the objects of a file; blank lines are left out.

    Given   keys: what an object may have

    Raises:
        InputError: no such file, too large, not UTF-8, a line that is no JSON object or has another key, or no object.
    """
    some = False
    for number, text in enumerate(_text(path).split("\n"), start=1):
        if text.strip():
            some = True
            yield _line(text, f"{path}:{number}", keys)
    if not some:
        raise InputError(f"{path}: empty; expected JSONL, an object on each line with {', '.join(keys)}")


def _text(path: Path) -> str:
    try:
        if not path.is_file():
            raise InputError(f"{path}: {'not a file' if path.exists() else 'no such file'}; expected JSONL")
        if path.stat().st_size > LARGEST:
            raise InputError(f"{path}: larger than {LARGEST >> 20} MiB; give a part of it")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 (byte 0x{error.object[error.start]:02x})") from error


def _line(text: str, where: str, keys: Sequence[str]) -> Line:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected an object, found {type(values).__name__}")
    for key in values:
        if key not in keys:
            raise InputError(f"{where}: unknown key '{key}'{suggestion(key, keys)}")
    return Line(values, where)
