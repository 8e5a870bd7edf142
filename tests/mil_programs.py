"""Core ML operators and programs for tests, made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slm_export.exporters.mil import plan  # registers the operators
from slm_export.exporters.mil.blob import ELEMENT_TYPES, ElementType, Packed, size_of
from slm_export.exporters.mil.operators.registry import find
from slm_export.exporters.mil.package import Feature, Function, Package
from slm_export.exporters.mil.program import Name, Operation, TensorType

BY_DTYPE = {element.dtype: element for element in reversed(ELEMENT_TYPES) if element.bits >= 8}


def run(kind: str, opset: int = 18, /, **given: Any) -> tuple[Tensor, ...]:
    """Run an operator by itself; see that it shares memory with an operand only if it says so."""
    operator = find(kind, opset)
    assert operator, kind
    operator.check(list(given))
    made = operator.run(**given)
    results: tuple[Tensor, ...] = made if isinstance(made, tuple) else (made,)
    if not operator.view:
        owned = {value.untyped_storage().data_ptr() for value in given.values() if isinstance(value, Tensor)}
        assert all(
            not result.numel() or result.untyped_storage().data_ptr() not in owned for result in results
        )
    return results


def only(kind: str, opset: int = 18, /, **given: Any) -> Tensor:
    """Run an operator that makes one tensor."""
    (result,) = run(kind, opset, **given)
    return result


def operands(kind: str, opset: int, given: dict[str, Any]) -> dict[str, Any]:
    """Operands as a program would give them: text as it is, lists of tensors as lists, all else tensors."""
    return {name: _operand(name, value) for name, value in given.items()}


def _operand(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return value
    if name in plan.LISTS:
        return [_operand("", part) for part in value]
    array = np.asarray(value)
    if not isinstance(value, np.ndarray | np.generic):
        array = array.astype({"f": np.float32, "i": np.int32, "b": np.bool_}[array.dtype.kind])
    return (
        torch.from_numpy(array.copy())
        if array.ndim
        else torch.tensor(array[()].item(), dtype=torch.from_numpy(array[None]).dtype)
    )


def packed(values: Tensor, element: ElementType | None = None) -> Packed:
    """Pack a tensor as a file has it."""
    element = element or BY_DTYPE[values.dtype]
    shape = tuple(values.shape)
    if element.bits >= 8:
        return Packed(element, shape, values.contiguous().flatten().view(torch.uint8).clone())
    bits = (values.flatten().to(torch.int64).unsqueeze(1) >> torch.arange(element.bits)) & 1
    stream = torch.cat([bits.flatten(), torch.zeros(-bits.numel() % 8, dtype=torch.int64)]).view(-1, 8)
    data = (stream << torch.arange(8)).sum(1).to(torch.uint8)
    assert len(data) == size_of(element, shape)[0]
    return Packed(element, shape, data)


def typed(dtype: torch.dtype, shape: Sequence[int | None], state: bool = False) -> TensorType:
    return TensorType(BY_DTYPE[dtype], tuple(shape), state)


def operation(kind: str, name: str | None, type: TensorType | None, **inputs: Any) -> Operation:
    """One operation; operands are names, tensors (constants) or lists of them, text is given as ("text",)."""
    bound: dict[str, tuple[Any, ...]] = {}
    for key, value in inputs.items():
        parts = value if isinstance(value, list) else [value]
        bound[key] = tuple(
            Name(part) if isinstance(part, str) else part[0] if isinstance(part, tuple) else packed(part)
            for part in parts
        )
    outputs = () if name is None or type is None else ((name, type),)
    return Operation(kind, f"{kind} '{name}'", bound, outputs)


def package(
    operations: Sequence[Operation],
    results: Sequence[tuple[str, TensorType]],
    inputs: Sequence[tuple[str, TensorType]] = (),
    states: Sequence[tuple[str, TensorType]] = (),
    opset: int = 18,
) -> Package:
    """A package of one function, without files."""

    def features(named: Sequence[tuple[str, TensorType]]) -> tuple[Feature, ...]:
        return tuple(
            Feature(
                name,
                type.element.dtype,
                tuple(size or 1 for size in type.shape or ()),
                None if None not in (type.shape or ()) else tuple((s or 1, s) for s in type.shape or ()),
            )
            for name, type in named
        )

    function = Function(
        "main",
        opset,
        features(inputs),
        features(results),
        features(states),
        dict([*inputs, *states]),
        tuple(operations),
        tuple(name for name, _ in results),
    )
    return Package(Path("made.mlpackage"), {"main": function}, "main", {}, 9)
