"""Runs a function of a saved ML Program with torch, so that a package can be verified where Core ML is not.

It knows the package on disk and the published meaning of MIL's operators (`operators`), nothing of a
conversion. Every result is held against the type that the program declares for it: where they disagree, the package is
wrong, and would fail or mislead on a device: Core ML infers the types itself as it loads a program, and
refuses one that declares others ("Output '0' has unexpected type").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import psutil
import torch
from torch import Tensor

from slm_export.errors import InputError, suggestion
from slm_export.exporters.mil.package import Feature, Function, Package
from slm_export.exporters.mil.plan import Plan, make_plan

State = dict[str, Tensor]
_FAULTS = (InputError, RuntimeError, ValueError, TypeError, IndexError, OverflowError, ZeroDivisionError)
"""What torch and our operators say of operands that do not go together."""


class Evaluator:
    """Runs one function of a package.

    Raises
    ------
    InputError  the function does not exist, or its program cannot be: all operators that are not known are
                named, with where they stand
    """

    READY_BYTES: ClassVar[int] = 1 << 30
    """Bytes of matrices that all evaluators of a package keep as float32; others are dequantized at each use."""

    def __init__(self, package: Package, function: str | None = None) -> None:
        name = package.default if function is None else function
        if name not in package.functions:
            raise InputError(f"{package.path}: has no function '{name}'{suggestion(name, package.functions)}")
        self.package = package
        self.function: Function = package.functions[name]
        self._where = f"{package.path}: function '{name}'"
        self._plan: Plan = make_plan(package, self.function, self.READY_BYTES)

    def make_state(self) -> State:
        """Return the function's states, all 0; functions of a package that have the same states can share it."""
        size = sum(_bytes(feature) for feature in self.function.states)
        if size > psutil.virtual_memory().total:
            raise InputError(f"{self._where}: its states take {size >> 20} MiB, more than this machine has")
        return {
            feature.name: torch.zeros(feature.shape, dtype=feature.dtype) for feature in self.function.states
        }

    def predict(self, inputs: Mapping[str, Tensor], state: State | None = None) -> dict[str, Tensor]:
        """Return the outputs by name; the state is changed in place.

        After an error the content of the state is not specified.

        Raises
        ------
        InputError  an input or state is not as the function declares it, or a result is not as the program does
        """
        values: list[Tensor | None] = [None] * self._plan.slots
        for slot, tensor in self._plan.fixed:
            values[slot] = tensor
        self._bind(values, self.function.inputs, self._filled(inputs), "input")
        self._bind(values, self.function.states, state or {}, "state")
        with torch.no_grad():
            self._run(values)
        results: dict[str, Tensor] = {}
        for name, slot, guarded in self._plan.results:
            value = values[slot]
            assert value is not None
            results[name] = value.clone() if guarded else value
        return results

    def _run(self, values: list[Tensor | None]) -> None:
        # One loop without calls of our own: a small model's operators take no longer than those would.
        for where, run, arguments, lists, outputs, release in self._plan.steps:
            given: dict[str, Any] = {name: values[slot] for name, slot in arguments}
            for name, parts in lists:
                given[name] = [values[part] if isinstance(part, int) else part for part in parts]
            try:
                made = run(**given)
            except _FAULTS as error:
                shapes = {
                    name: list(value.shape) for name, value in given.items() if isinstance(value, Tensor)
                }
                raise InputError(f"{where}: {error} (given {shapes})") from error
            results = made if isinstance(made, tuple) else (made,)
            if len(results) != len(outputs):
                raise InputError(f"{where}: makes {len(results)} values, declared are {len(outputs)}")
            for value, (name, slot, type, dtype, shape) in zip(results, outputs, strict=False):
                if value.dtype is not dtype or (value.shape != shape and not type.accepts(value.shape)):
                    raise InputError(
                        f"{where}: '{name}' is declared {type}, but is {value.dtype} {list(value.shape)}; "
                        "the conversion is at fault"
                    )
                values[slot] = value
            for slot in release:
                values[slot] = None

    def _filled(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        absent = [
            f for f in self.function.inputs if f.name not in inputs and f.optional and f.default is not None
        ]
        made = {f.name: torch.full(f.shape, f.default or 0, dtype=f.dtype) for f in absent}
        return {**inputs, **made} if made else inputs

    def _bind(
        self, values: list[Tensor | None], features: Sequence[Feature], given: Mapping[str, Tensor], kind: str
    ) -> None:
        for feature in features:
            tensor = given.get(feature.name)
            what = f"{self._where}: {kind} '{feature.name}'"
            if tensor is None:
                raise InputError(f"{what} is missing")
            if tensor.dtype != feature.dtype:
                raise InputError(f"{what} is {tensor.dtype}; it has to be {feature.dtype}")
            if not feature.accepts(tensor.shape):
                raise InputError(
                    f"{what} has the shape {list(tensor.shape)}; it has to be {feature.expected}"
                )
            typed = self.function.arguments[feature.name]
            if not typed.accepts(tensor.shape):
                raise InputError(f"{what} has the shape {list(tensor.shape)}; the program types it {typed}")
            values[self._plan.arguments[feature.name]] = tensor
        for name in given:
            if name not in self.function.arguments:
                raise InputError(
                    f"{self._where}: has no {kind} '{name}'{suggestion(name, (f.name for f in features))}"
                )


def _bytes(feature: Feature) -> int:
    size = feature.dtype.itemsize
    for length in feature.shape:
        size *= length
    return size
