"""The ``slm-export.toml`` of a cell: whoever types `slm-export` in its folder repeats the cell."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from slm_export.settings import Settings


def export_file(settings: Settings) -> str:
    """Return settings as TOML, one key per line."""
    said = settings.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    return "".join(f"{key} = {_toml(value)}\n" for key, value in said.items())


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_text(key)} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        return _text(value)
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _text(text: str) -> str:
    # A JSON string is a TOML string, but for one control character that JSON leaves as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
