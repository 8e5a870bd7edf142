"""The sizes of all values in one call of a saved function, and the multiply-adds of its products, without running it.

Shapes go through the evaluator's own operators on torch's meta device, where nothing is computed. Vectors of integers
are computed: they are what later shapes are made of. One that depends on data, such as where in a cache a call begins,
is taken to be 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slm_export.errors import InputError
from slm_export.exporters.mil.blob import Packed
from slm_export.exporters.mil.operators.registry import find
from slm_export.exporters.mil.package import Feature, Function
from slm_export.exporters.mil.plan import LISTS
from slm_export.exporters.mil.program import Name, Operation, TensorType, Value

Shape = tuple[int, ...]
CONSTEXPR = "constexpr_"
RECURRENT = ("rnn", "gru", "lstm")
_FAULTS = (InputError, RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)


def sizes_of(function: Function) -> dict[str, Shape]:
    """Return the shape of every value by name, in a call with the largest inputs that the function takes.

    Raises:
        InputError: a shape depends on values that are known when the program runs only.
    """
    values: dict[str, Tensor | str] = {
        feature.name: _kept(torch.empty(_largest(feature), dtype=feature.dtype, device="meta"))
        for feature in (*function.inputs, *function.states)
    }
    for operation in function.operations:
        values.update(_made(operation, function.opset, values))
    return {name: tuple(value.shape) for name, value in values.items() if isinstance(value, Tensor)}


def _largest(feature: Feature) -> Shape:
    if feature.enumerated:
        return max(feature.enumerated, key=math.prod)
    if feature.ranges is None:
        return feature.shape
    return tuple(
        own if most is None else most for own, (_, most) in zip(feature.shape, feature.ranges, strict=True)
    )


def _made(operation: Operation, opset: int, values: Mapping[str, Tensor | str]) -> dict[str, Tensor | str]:
    """Return what an operation makes: tensors without values, but for vectors of integers that are known."""
    if operation.kind == "const":
        (value,) = operation.inputs["val"]
        return {operation.outputs[0][0]: _resolved(value, values)}
    static = all(type.shape is not None and None not in type.shape for _, type in operation.outputs)
    if operation.kind.startswith(CONSTEXPR) or (static and not any(map(_is_vector, operation.outputs))):
        return {
            name: torch.empty(type.fixed, dtype=type.element.dtype, device="meta")
            for name, type in operation.outputs
        }
    given = {
        name: [_resolved(part, values) for part in parts] if name in LISTS else _resolved(parts[0], values)
        for name, parts in operation.inputs.items()
    }
    try:
        made = _run(operation, opset, given)
    except _FAULTS as error:
        raise InputError(
            f"{operation.where}: its size cannot be told without running the program ({error})"
        ) from error
    return {name: _kept(value) for (name, _), value in zip(operation.outputs, made, strict=True)}


def _is_vector(output: tuple[str, TensorType]) -> bool:
    _, type = output
    return not type.element.dtype.is_floating_point and type.shape is not None and len(type.shape) < 2


def _kept(value: Tensor) -> Tensor:
    if value.dim() > 1 or value.dtype.is_floating_point:
        return value.to("meta")
    return torch.zeros(value.shape, dtype=value.dtype) if value.is_meta else value


def _resolved(part: Name | Value, values: Mapping[str, Tensor | str]) -> Tensor | str:
    if isinstance(part, Name):
        return values[part.name]
    if isinstance(part, str):
        return part
    if len(part.shape) < 2 and not part.element.dtype.is_floating_point:
        return part.tensor()
    return torch.empty(part.shape, dtype=part.element.dtype, device="meta")


def _run(operation: Operation, opset: int, given: dict[str, Any]) -> tuple[Tensor, ...]:
    if (own := _BY_SHAPE.get(operation.kind)) and any(_is_unknown(value) for value in given.values()):
        return (own(given).to(operation.outputs[0][1].element.dtype),)
    operator = find(operation.kind, opset)
    if operator is None:
        raise InputError(f"the operator {operation.kind} is not known")
    unknown = any(_is_unknown(value) for value in given.values())
    operands = {}
    for name, value in given.items():
        if name in operator.sizes and isinstance(value, Tensor) and not value.is_meta:
            operands[name] = value.tolist()
        else:
            operands[name] = _on_meta(value) if unknown else value
    # What an operator makes for itself has to lie where its operands do; a shape is no data, and known.
    with torch.device("meta") if unknown and operation.kind != "shape" else nullcontext():
        made = operator.run(**operands)
    return made if isinstance(made, tuple) else (made,)


def _is_unknown(value: Any) -> bool:
    parts = value if isinstance(value, list) else [value]
    return any(isinstance(part, Tensor) and part.is_meta for part in parts)


def _on_meta(value: Any) -> Any:
    if isinstance(value, list):
        return [_on_meta(part) for part in value]
    return value.to("meta") if isinstance(value, Tensor) else value


def _gathered(given: Mapping[str, Any]) -> Tensor:
    """Gather looks at its indices, which have no values here."""
    x, indices = given["x"], given["indices"]
    axis, batch = (int(given.get(name, 0)) for name in ("axis", "batch_dims"))
    axis %= x.dim()
    return torch.empty((*x.shape[:axis], *indices.shape[batch:], *x.shape[axis + 1 :]), device="meta")


def _as_indices(given: Mapping[str, Any]) -> Tensor:
    return torch.empty(given["indices"].shape, device="meta")


_BY_SHAPE: Mapping[str, Callable[[Mapping[str, Any]], Tensor]] = {
    "gather": _gathered,
    "gather_along_axis": _as_indices,
}


@dataclass(frozen=True)
class Call:
    """A function, and what is known of one call of it before it runs."""

    function: Function
    sizes: Mapping[str, Shape]
    makers: Mapping[str, Operation]
    """Value -> the operation that makes it."""

    @classmethod
    def of(cls, function: Function) -> Call:
        """Work out the sizes; raise `InputError` where they are not known before the program runs."""
        makers = {name: operation for operation in function.operations for name, _ in operation.outputs}
        return cls(function, sizes_of(function), makers)

    @property
    def operations(self) -> list[Operation]:
        """What computes: all operations but those that make constants."""
        return [
            operation
            for operation in self.function.operations
            if operation.kind != "const" and not operation.kind.startswith(CONSTEXPR)
        ]

    def shape(self, operation: Operation, name: str) -> Shape:
        """Return the shape of an operand."""
        part = operation.inputs[name][0]
        assert not isinstance(part, str), f"{operation.where}: a text has no shape"
        return self.sizes[part.name] if isinstance(part, Name) else part.shape

    def constant(self, operation: Operation, name: str) -> Value | None:
        """Return a constant operand; None where it is not given, or known only when the program runs."""
        part = operation.inputs.get(name, (None,))[0]
        while isinstance(part, Name):
            maker = self.makers.get(part.name)
            if maker is None or maker.kind != "const":
                return None
            part = maker.inputs["val"][0]
        return part

    def multiply_adds(self, operation: Operation) -> int:
        """Return the multiply-adds of a product; everything else has none to speak of."""
        count = _PRODUCTS.get(operation.kind)
        return 0 if count is None else count(self, operation)


def _result(call: Call, operation: Operation) -> int:
    return math.prod(call.sizes[operation.outputs[0][0]])


def _linear(call: Call, operation: Operation) -> int:
    return _result(call, operation) * call.shape(operation, "x")[-1]


def _matmul(call: Call, operation: Operation) -> int:
    transposed = call.constant(operation, "transpose_x")
    turned = isinstance(transposed, Packed) and bool(transposed.tensor())
    return _result(call, operation) * call.shape(operation, "x")[-2 if turned else -1]


def _attention(call: Call, operation: Operation) -> int:
    *rows, width = call.shape(operation, "query")
    *_, keys, _ = call.shape(operation, "key")
    return math.prod(rows) * keys * (width + call.shape(operation, "value")[-1])


def _conv(call: Call, operation: Operation) -> int:
    return _result(call, operation) * math.prod(call.shape(operation, "weight")[1:])


def _einsum(call: Call, operation: Operation) -> int:
    equation = call.constant(operation, "equation")
    assert isinstance(equation, str)
    letters = equation.replace(" ", "").split("->")[0].split(",")
    parts = [call.sizes[part.name] for part in operation.inputs["values"] if isinstance(part, Name)]
    sizes: dict[str, int] = {}
    for axes, shape in zip(letters, parts, strict=True):
        for axis, size in zip(axes, shape, strict=True):
            sizes[axis] = max(size, sizes.get(axis, 1))
    return math.prod(sizes.values())


def _recurrent(call: Call, operation: Operation) -> int:
    weights = [name for name in operation.inputs if name.startswith("weight")]
    rows = math.prod(call.shape(operation, "x")[:-1])
    return rows * sum(math.prod(call.shape(operation, name)) for name in weights)


_PRODUCTS: Mapping[str, Callable[[Call, Operation], int]] = {
    "linear": _linear,
    "matmul": _matmul,
    "scaled_dot_product_attention": _attention,
    "conv": _conv,
    "einsum": _einsum,
    **dict.fromkeys(RECURRENT, _recurrent),
}
