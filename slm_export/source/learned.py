"""How a model was taught, where slm-export taught it: ``learning.json`` in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from slm_export.errors import InputError
from slm_export.jsonfile import read_object

LEARNING = "learning.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Measured(_Frozen):
    """A figure with its interval of 95% confidence."""

    value: float
    low: float
    high: float


class Taught(_Frozen):
    """One model of the table: teacher, child before, child after."""

    name: str
    parameters: int | None = None
    figures: dict[str, Measured]


class Learned(_Frozen):
    """What manifest and report say of a model that was taught."""

    by: str
    rows: tuple[Taught, ...]
    """On the same held-out text."""
    lineage: dict[str, Any] = {}
    data: dict[str, Any] = {}
    held_out: dict[str, Any] = {}
    data_licence: str | None = None
    settings: dict[str, Any] = {}


def learned_of(folder: Path) -> Learned | None:
    """Return how the model of a folder was taught; None where slm-export did not.

    Raises:
        InputError: the file is there and is not one of slm-export.
    """
    path = folder / LEARNING
    if not path.is_file():
        return None
    content = read_object(path)
    try:
        return Learned.model_validate(content["learned"])
    except (KeyError, ValidationError) as error:
        reason = "has no 'learned'" if isinstance(error, KeyError) else str(error.errors()[0]["msg"])
        raise InputError(f"{path}: not written by slm-export ({reason}); remove it") from None
