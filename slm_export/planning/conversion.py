"""What converting costs on the machine that converts: a line through what benchmarks/conversion.py measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

from slm_export.planning.model import ModelShape


@dataclass(frozen=True)
class Conversion:
    """Of one export without verification and measurement of speed."""

    seconds: float
    peak_bytes: int


def conversion_of(model: ModelShape, format: str) -> Conversion | None:
    """Return time and peak memory of an export; None for a format that was not measured.

    Time is linear in the bytes of the source. Memory is that of the largest matrix over the vocabulary, which is
    lowered as a whole, and a share of the mapped source.
    """
    of = _fitted().get(format)
    return None if of is None else line(of, model)


def line(of: Mapping[str, float], model: ModelShape) -> Conversion:
    """Return what the coefficients of a format say of a model."""
    peak = of["bytes"] + of["bytes_per_table_value"] * model.largest_table + of["share"] * model.source_bytes
    return Conversion(of["seconds"] + of["seconds_per_byte"] * model.source_bytes, round(peak))


@lru_cache(maxsize=1)
def _fitted() -> dict[str, Any]:
    text = resources.files("slm_export").joinpath("data/roofline.json").read_text("utf-8")
    found: dict[str, Any] = json.loads(text)["conversion"]
    return found
