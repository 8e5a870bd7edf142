"""What a user asked for, under the names of slm-export.toml, so that a report can say it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pydantic import BaseModel

from slm_export.compilation import Request

_LEFT_OUT = frozenset(
    {"model", "out", "force", "locked"}
)  # which model it is the report says; the others change nothing


def asked(request: Request) -> dict[str, object]:
    """Return what differs from a request that says nothing. Of a path only the last part: a report travels."""
    found: dict[str, object] = {}
    silent = Request()
    for field in dataclasses.fields(request):
        value = getattr(request, field.name)
        if field.name in _LEFT_OUT or value == getattr(silent, field.name):
            continue
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            found |= {name: item for name, item in dataclasses.asdict(value).items() if item is not None}
        else:
            found[field.name] = _plain(value)
    return {name: value for name, value in found.items() if value not in (None, {})}


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_none=True)
    if isinstance(value, Path):
        return value.name
    if isinstance(value, str) and value.endswith(".toml"):
        return Path(value).name
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
