"""The program in a Core ML specification as plain values: types, constants and operations in order.

Names are in single assignment and an operation uses what stands before it (MIL.proto: "topologically sorted"), so a
cycle is a name that is used before it is made, and is refused as such.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch

from slm_export.errors import InputError
from slm_export.exporters.mil.blob import BY_CODE, ElementType, Packed, size_of

Value = Packed | str
"""A constant tensor, or text."""
_STRING = 2
_OPSETS = {"CoreML5": 15, "CoreML6": 16, "CoreML7": 17, "CoreML8": 18, "CoreML9": 26}
_LARGEST_RANK = (
    16  # Core ML's arrays have at most five dimensions, a vector look-up table two more than its matrix
)


@dataclass(frozen=True)
class TensorType:
    """Element type and shape of a tensor, or of the tensor in a state."""

    element: ElementType
    shape: tuple[int | None, ...] | None
    """None for a dimension that is known when it runs only; None in all for any rank."""
    state: bool = False

    @property
    def fixed(self) -> tuple[int, ...]:
        """The shape of a constant."""
        if self.shape is None or None in self.shape:
            raise InputError(f"a constant is typed {self}, without a fixed shape")
        return tuple(size for size in self.shape if size is not None)

    def accepts(self, shape: Sequence[int]) -> bool:
        """Return whether a tensor of this shape is of this type."""
        return self.shape is None or (
            len(shape) == len(self.shape)
            and not any(known not in (None, size) for known, size in zip(self.shape, shape, strict=True))
        )

    def __str__(self) -> str:
        sizes = (
            "*"
            if self.shape is None
            else ", ".join("?" if size is None else str(size) for size in self.shape)
        )
        return f"{self.element.name} [{sizes}]"


@dataclass(frozen=True)
class Name:
    """A reference to a value that was made before."""

    name: str


@dataclass(frozen=True)
class Operation:
    """One operation: what it takes by parameter name, and what it makes."""

    kind: str
    where: str
    """For messages: the operator, its name and the function it is in."""
    inputs: Mapping[str, tuple[Name | Value, ...]]
    outputs: tuple[tuple[str, TensorType], ...]
    """Empty for `write_state` alone; a `const` of text is typed uint8."""


class ProgramReader:
    """Turns functions of a specification into operations.

    Given   constant: reads (file name, offset, type) from a weight file
    """

    def __init__(self, constant: Callable[[str, int, TensorType], Packed]) -> None:
        self._constant = constant

    def function(
        self, where: str, function: Any
    ) -> tuple[int, dict[str, TensorType], tuple[Operation, ...], tuple[str, ...]]:
        """Return opset, arguments, operations and names of the results; raise `InputError` for what cannot be."""
        if function.opset not in _OPSETS or function.opset not in function.block_specializations:
            raise InputError(f"{where}: written in the opset '{function.opset}'; known: {', '.join(_OPSETS)}")
        block = function.block_specializations[function.opset]
        arguments: dict[str, TensorType] = {}
        for argument in function.inputs:
            if argument.name in arguments:
                raise InputError(f"{where}: two inputs are named '{argument.name}'")
            arguments[argument.name] = _type(f"{where}: input '{argument.name}'", argument.type)
        known = set(arguments)
        operations = []
        for position, operation in enumerate(block.operations):
            made = self._operation(f"{where}, operation {position}", operation, known)
            operations.append(made)
            known.update(name for name, _ in made.outputs)
        missing = sorted(set(block.outputs) - known)
        if missing:
            raise InputError(f"{where}: returns what nothing makes: {', '.join(missing)}")
        return _OPSETS[function.opset], arguments, tuple(operations), tuple(block.outputs)

    def _operation(self, place: str, operation: Any, known: set[str]) -> Operation:
        names = [output.name for output in operation.outputs]
        where = f"{place}: {operation.type}" + (f" '{', '.join(names)}'" if names else "")
        inputs: dict[str, tuple[Name | Value, ...]] = {
            # `const`, and the constexpr operators of iOS 16, hold their operands as attributes.
            key: (self._value(f"{where}, '{key}'", value),)
            for key, value in operation.attributes.items()
            if key != "name"
        }
        for key, argument in operation.inputs.items():
            inputs[key] = tuple(
                self._binding(f"{where}, '{key}'", bound, known) for bound in argument.arguments
            )
        outputs = tuple(
            (output.name, _type(f"{where}, output '{output.name}'", output.type))
            for output in operation.outputs
        )
        for name in names:
            if name in known or names.count(name) > 1:
                raise InputError(f"{where}: '{name}' is made twice")
        return Operation(operation.type, where, inputs, outputs)

    def _binding(self, where: str, binding: Any, known: set[str]) -> Name | Value:
        if binding.WhichOneof("binding") == "value":
            return self._value(where, binding.value)
        if binding.name not in known:
            raise InputError(f"{where}: uses '{binding.name}', which nothing before it makes")
        return Name(binding.name)

    def _value(self, where: str, value: Any) -> Value:
        if value.type.WhichOneof("type") != "tensorType":
            raise InputError(f"{where}: a constant that is no tensor ({value.type.WhichOneof('type')})")
        if value.type.tensorType.dataType == _STRING:
            texts = value.immediateValue.tensor.strings.values
            if len(texts) != 1:
                raise InputError(f"{where}: {len(texts)} texts where one belongs")
            return str(texts[0])
        type = _type(where, value.type)
        try:
            if value.WhichOneof("value") == "blobFileValue":
                return self._constant(value.blobFileValue.fileName, value.blobFileValue.offset, type)
            return _immediate(type, value.immediateValue.tensor)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error


def _type(where: str, type: Any) -> TensorType:
    kind = type.WhichOneof("type")
    tensor = type.stateType.wrappedType.tensorType if kind == "stateType" else type.tensorType
    if kind not in ("tensorType", "stateType"):
        raise InputError(f"{where}: typed {kind}; only tensors and states can be evaluated")
    if tensor.dataType == _STRING:
        return TensorType(BY_CODE[31], ())
    if tensor.dataType not in BY_CODE:
        raise InputError(f"{where}: elements of unknown type {tensor.dataType}")
    if tensor.rank < 0:
        return TensorType(BY_CODE[tensor.dataType], None, kind == "stateType")
    if tensor.rank != len(tensor.dimensions) or tensor.rank > _LARGEST_RANK:
        raise InputError(f"{where}: rank {tensor.rank} with {len(tensor.dimensions)} dimensions")
    shape = tuple(
        size.constant.size if size.WhichOneof("dimension") == "constant" else None
        for size in tensor.dimensions
    )
    return TensorType(BY_CODE[tensor.dataType], shape, kind == "stateType")


def _immediate(type: TensorType, tensor: Any) -> Packed:
    """Return a constant that stands in the specification itself, as bytes: all that is said of blobs holds for it."""
    field = tensor.WhichOneof("value")
    element, shape = type.element, type.fixed

    def wrong(what: str) -> NoReturn:
        raise InputError(f"an immediate {type} is given as {what}")

    if field == "bytes":
        raw = tensor.bytes.values
    elif field in ("floats", "doubles", "ints", "longInts", "bools"):
        values = getattr(tensor, field).values
        if element.bits < 8 or (field in ("floats", "doubles")) != element.dtype.is_floating_point:
            wrong(field)
        if len(values) != math.prod(shape):
            wrong(f"{len(values)} values")
        if not element.dtype.is_floating_point and element.dtype != torch.bool:
            limits = torch.iinfo(element.dtype)
            if any(not limits.min <= value <= limits.max for value in values):
                wrong("values out of its range")
        raw = (
            torch.tensor(list(values), dtype=element.dtype).view(torch.uint8).numpy().tobytes()
            if values
            else b""
        )
    elif math.prod(shape):
        wrong(f"{field or 'nothing'}")
    else:
        raw = b""
    if len(raw) != size_of(element, shape)[0]:
        wrong(f"{len(raw)} bytes")
    return Packed(element, shape, torch.from_numpy(np.frombuffer(raw, np.uint8).copy()))
