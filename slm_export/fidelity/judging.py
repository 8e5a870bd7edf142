"""Figures against thresholds."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from slm_export.delegation import Delegation
from slm_export.gates import Gates
from slm_export.results import Check

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def checks_of(measured: DataclassInstance, gates: Gates, details: dict[str, str]) -> tuple[Check, ...]:
    """Return a check for every figure of ``measured`` that ``gates`` bounds, in the order of the thresholds.

    ``details`` says, for a figure, where the two sides part. A bounded figure that could not be measured fails.
    """
    figures = {field.name: _figure(getattr(measured, field.name)) for field in dataclasses.fields(measured)}
    checks = []
    for threshold, limit in gates.model_dump(exclude_none=True).items():
        side, _, name = threshold.partition("_")
        if name in figures:
            checks.append(_check(name, figures[name], float(limit), side == "max", details.get(name, "")))
    return tuple(checks)


def judge_acceleration(found: Delegation | None, gates: Gates) -> tuple[Check, ...]:
    """Hold the share of multiply-adds that is taken against its bound; what cannot be told fails."""
    limit = gates.min_accelerated
    if limit is None:
        return ()
    if found is None:
        return (_check("accelerated", None, limit, False, ""),)
    left = found.multiplications - found.taken_multiplications
    unit = found.delegate.split(" (")[0]
    reasons = [
        f"{risk.reason} ({100 * risk.multiplications / found.multiplications:.1f}%)"
        for risk in found.risks
        if risk.unit == unit and risk.multiplications
    ]
    rest = f", left: {', '.join(sorted(found.rest))}" if left and not reasons else ""
    detail = "; ".join((f"{found.delegate}, function {found.function}{rest}", *reasons))
    return (_check("accelerated", found.accelerated, limit, False, detail),)


def _check(name: str, value: float | None, limit: float, is_max: bool, detail: str) -> Check:
    if value is None:
        return Check(name, False, "not measured, though a threshold asks for it", None, limit)
    # Written so that NaN fails.
    passed = value <= limit if is_max else value >= limit
    return Check(name, passed, detail, value, limit)


def _figure(value: Any) -> float | None:
    """Of percentiles, the median is what a threshold bounds."""
    if isinstance(value, dict):
        value = value.get("p50")
    return float(value) if isinstance(value, (int, float)) else None
