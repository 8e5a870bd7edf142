"""The registry of MIL operators that the evaluator knows, and what their implementations share.

An operator is a function of MIL's own parameter names. It takes tensors as they are stored, computes fp16 in float32
and rounds the result to fp16 once. What it means is taken from the published MIL specification
(https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html) alone, never from a
converter, so that a converter's mistake shows.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from slm_export.errors import InputError

LARGEST_RESULT = 1 << 31
"""Elements that an operator may make out of few: a shape that asks for more is taken for a damaged file."""

Size = Tensor | int
"""A parameter that is one number or flag; the evaluator gives a number where it is constant."""
Sizes = Tensor | Sequence[int]
"""A parameter that is a vector of sizes, axes or flags; the evaluator gives a list where it is constant."""
Run = Callable[..., Any]
_Function = TypeVar("_Function", bound=Run)


@dataclass(frozen=True)
class Operator:
    """One operator as one release of the specification defines it."""

    kind: str
    since: int
    """The iOS release that defines it so."""
    run: Run
    view: bool
    """Its result may share memory with its operands."""
    lazy: frozenset[str]
    """Parameters that it takes as `Constant`, not yet dequantized, where they are constant."""
    constant: bool
    """It makes a `Constant`, or several, out of constants, once, before anything runs."""

    @cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The parameters that MIL knows; keyword-only ones are between the evaluator and the operator."""
        found = inspect.signature(self.run).parameters
        return {
            name: parameter
            for name, parameter in found.items()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        }

    @cached_property
    def sizes(self) -> frozenset[str]:
        """Parameters annotated `Size` or `Sizes`."""
        return frozenset(
            name for name, found in self.parameters.items() if str(found.annotation).startswith("Size")
        )

    def check(self, given: Sequence[str]) -> None:
        """Raise `InputError` for a parameter that the operator does not have, or one that it lacks."""
        parameters = self.parameters
        unknown = sorted(set(given) - set(parameters))
        if unknown:
            raise InputError(f"has no parameter {', '.join(unknown)}; known: {', '.join(parameters)}")
        required = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
        missing = sorted(required - set(given))
        if missing:
            raise InputError(f"lacks the parameter {', '.join(missing)}")


_OPERATORS: dict[str, list[Operator]] = {}


def operator(
    *kinds: str, since: int = 15, view: bool = False, lazy: Sequence[str] = (), constant: bool = False
) -> Callable[[_Function], _Function]:
    """Register a function as an operator; the fields are `Operator`'s."""

    def register(function: _Function) -> _Function:
        for kind in kinds:
            add(kind, function, since=since, view=view, lazy=lazy, constant=constant)
        return function

    return register


def add(
    kind: str,
    run: Run,
    *,
    since: int = 15,
    view: bool = False,
    lazy: Sequence[str] = (),
    constant: bool = False,
) -> None:
    """Register a function that was not written as one: a row of a table."""
    versions = _OPERATORS.setdefault(kind, [])
    assert all(known.since != since for known in versions), f"{kind} of iOS {since} is registered twice"
    versions.append(Operator(kind, since, run, view, frozenset(lazy), constant))
    versions.sort(key=lambda version: version.since)


def find(kind: str, opset: int) -> Operator | None:
    """Return the operator as this release has it, or None where it is unknown."""
    return next((known for known in reversed(_OPERATORS.get(kind, ())) if known.since <= opset), None)


def known_operators() -> tuple[Operator, ...]:
    """Return every version of every operator."""
    return tuple(version for versions in _OPERATORS.values() for version in versions)


def wide(x: Tensor) -> Tensor:
    """Return what is computed with: fp16 as float32, all else as it is."""
    return x.float() if x.dtype is torch.float16 else x


def ints(x: Sizes) -> list[int]:
    """Return the elements of a vector of sizes, axes or flags; a scalar counts as a vector of one."""
    values: Any = x.tolist() if isinstance(x, Tensor) else x
    return values if isinstance(values, list) else [values]


def axis_of(axis: Size, rank: int) -> int:
    """Return an axis counted from the front, given one that may be counted from the end."""
    position = int(axis)
    if not -rank <= position < rank:
        raise InputError(f"axis {position} of a tensor of rank {rank}")
    return position % rank


def axes_of(axes: Sizes | None, rank: int) -> list[int]:
    """Return axes counted from the front; all of them for None."""
    return list(range(rank)) if axes is None else [axis_of(axis, rank) for axis in ints(axes)]


def same_type(x: Tensor, y: Tensor) -> None:
    """Raise `InputError` where two operands that must be of one type are not."""
    if x.dtype is not y.dtype:
        raise InputError(f"takes operands of one type, not {x.dtype} and {y.dtype}")


def bounded(shape: Sequence[int]) -> list[int]:
    """Return a shape that a result is to have; raise `InputError` where no program could mean it."""
    if any(size < 0 for size in shape) or math.prod(shape) > LARGEST_RESULT:
        raise InputError(f"a result of shape {list(shape)} is refused")
    return list(shape)
