"""A package in float32 throughout: what its program computes where nothing is rounded.

A float16 program differs from its source by rounding, and a small mistake of the conversion hides in that
(`coreml_exact`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from slm_export.exporters.mil.blob import BY_NAME, ElementType, Packed
from slm_export.exporters.mil.package import Feature, Function, Package
from slm_export.exporters.mil.program import Operation, TensorType

_HALF, _FULL = BY_NAME["fp16"], BY_NAME["fp32"]


def widened(package: Package) -> Package:
    """Return the package with float32 in place of float16: types, constants, inputs, outputs and states."""
    constants: dict[int, Packed] = {}
    functions = {name: _function(function, constants) for name, function in package.functions.items()}
    return replace(package, functions=functions)


def _function(function: Function, constants: dict[int, Packed]) -> Function:
    return replace(
        function,
        inputs=tuple(map(_feature, function.inputs)),
        outputs=tuple(map(_feature, function.outputs)),
        states=tuple(map(_feature, function.states)),
        arguments={name: _type(type) for name, type in function.arguments.items()},
        operations=tuple(_operation(operation, constants) for operation in function.operations),
    )


def _operation(operation: Operation, constants: dict[int, Packed]) -> Operation:
    inputs: Mapping[str, Any] = {
        name: tuple(_value(part, constants) for part in parts) for name, parts in operation.inputs.items()
    }
    outputs = tuple((name, _type(type)) for name, type in operation.outputs)
    return replace(operation, inputs=inputs, outputs=outputs)


def _value(part: Any, constants: dict[int, Packed]) -> Any:
    if part == _HALF.name:
        return _FULL.name  # what a cast makes
    if not isinstance(part, Packed) or part.element != _HALF:
        return part
    if id(part) not in constants:
        data = part.tensor().float().contiguous().view(-1).view(torch.uint8)
        constants[id(part)] = Packed(_FULL, part.shape, data)
    return constants[id(part)]


def _type(type: TensorType) -> TensorType:
    return replace(type, element=_element(type.element))


def _element(element: ElementType) -> ElementType:
    return _FULL if element == _HALF else element


def _feature(feature: Feature) -> Feature:
    return replace(feature, dtype=torch.float32) if feature.dtype == torch.float16 else feature
