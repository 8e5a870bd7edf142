"""The quantized and palettized matrices of a package, read back from its files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from slm_export.errors import InputError
from slm_export.exporters.coreml_metadata import WEIGHTS
from slm_export.exporters.mil.blob import Packed
from slm_export.exporters.mil.package import Package
from slm_export.exporters.mil.program import Name, Operation
from slm_export.weights import TABLE_BITS, Coded, Palettized, Quantized, quantized

_TABLES = "constexpr_lut_to_dense"
_SPARSE = "constexpr_sparse_blockwise_shift_scale"
_PARTS = {
    "constexpr_blockwise_shift_scale": ("data", "scale"),
    "constexpr_affine_dequantize": ("quantized_data", "scale"),
    _TABLES: ("indices", "lut"),
    _SPARSE: ("nonzero_data", "scale", "data_mask"),
}
"""Operations that make a matrix, or what of it is not 0 -> their parameters for its codes and for what those mean."""


def read_weights(path: Path) -> Mapping[str, Coded]:
    """Return every quantized or palettized matrix under its name in the checkpoint.

    Raises:
        InputError: the package is not one of ours, two of its functions disagree, or a matrix is neither on the grid
            nor in tables for groups of its rows.
    """
    package = Package.open(path)
    try:
        names = json.loads(package.metadata[WEIGHTS])
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: its metadata lacks '{WEIGHTS}'; export the model again") from error
    found = [
        {names.get(made, made): operation for made, operation in _coded(function.operations)}
        for function in package.functions.values()
    ]
    for other in found[1:]:
        if differing := sorted(name for name in found[0] if not _alike(found[0][name], other.get(name))):
            raise InputError(f"{path}: its functions have different weights for {', '.join(differing[:3])}")
    return {name: _matrix(operation) for name, operation in found[0].items()}


def _coded(operations: Sequence[Operation]) -> Iterator[tuple[str, Operation]]:
    """Yield the value that is a matrix, and the operation that knows its codes."""
    spread = {
        part.name: operation.outputs[0][0]
        for operation in operations
        if operation.kind == "constexpr_sparse_to_dense"
        for part in operation.inputs.get("nonzero_data", ())
        if isinstance(part, Name)
    }
    for operation in operations:
        if operation.kind in _PARTS:
            made = operation.outputs[-1][0]
            yield spread.get(made, made), operation


def _alike(one: Operation, other: Operation | None) -> bool:
    return (
        other is not None
        and other.kind == one.kind
        and all(torch.equal(_constant(one, key).data, _constant(other, key).data) for key in _PARTS[one.kind])
    )


def _matrix(operation: Operation) -> Coded:
    if operation.kind == _TABLES:
        return _palettized(operation)
    return _sparse(operation) if operation.kind == _SPARSE else _quantized(operation)


def _sparse(operation: Operation) -> Quantized:
    left, scale, mask = (_constant(operation, key) for key in _PARTS[_SPARSE])
    _refuse_shift(operation)
    bits, scales, places = left.element.bits, scale.tensor().float(), mask.tensor().bool()
    fits = places.dim() == scales.dim() == 2 and scales.shape[0] == places.shape[0]
    if left.element.name not in ("int4", "int8") or not fits or places.shape[1] % scales.shape[1]:
        raise InputError(
            f"{operation.where}: {left.element.name} with scales {list(scales.shape)} for a mask {list(places.shape)} "
            "is not on the grid of symmetric int4 and int8"
        )
    codes = torch.zeros(places.shape, dtype=torch.int8)
    codes[places] = left.tensor()
    return quantized(codes, scales, bits)


def _palettized(operation: Operation) -> Palettized:
    indices, lut = (_constant(operation, key) for key in _PARTS[_TABLES])
    # Before iOS 18 indices are bytes without a shape, and there is one table.
    shaped = "shape" in operation.inputs
    shape = tuple(_constant(operation, "shape").tensor().tolist()) if shaped else indices.shape
    tables = lut.tensor().reshape(1, -1) if shaped or len(lut.shape) < 2 else lut.tensor().flatten(1)
    bits = next((bits for bits in TABLE_BITS if tables.shape[1] == 1 << bits), None)
    along_rows = shaped or lut.shape[1:] == (1, tables.shape[1], 1)
    fits = len(shape) == 2 and len(tables) and shape[0] % len(tables) == 0 and tables.dtype == torch.float16
    if bits is None or not along_rows or not fits or shape[1] * bits % 8:
        raise InputError(
            f"{operation.where}: a table {list(lut.shape)} of {lut.element.name} for a matrix {list(shape)} is not one "
            "of 16 or 64 float16 values for each group of rows"
        )
    return Palettized.of((shape[0], shape[1]), bits, indices.data.view(shape[0], -1), tables)


def _quantized(operation: Operation) -> Quantized:
    codes, scale = _PARTS[operation.kind]
    data, scales = _constant(operation, codes), _constant(operation, scale).tensor()
    _refuse_shift(operation)
    if data.element.name not in ("int4", "int8") or len(data.shape) != 2:
        raise InputError(f"{operation.where}: not on the grid of symmetric int4 and int8")
    rows, columns = data.shape
    scales = scales.unsqueeze(1) if scales.dim() == 1 else scales
    if scales.dim() != 2 or scales.shape[0] != rows or columns % scales.shape[1]:
        raise InputError(f"{operation.where}: scales {list(scales.shape)} for a matrix {[rows, columns]}")
    packed = data.data.view(rows, -1)
    return Quantized.of(
        (rows, columns),
        data.element.bits,
        packed if data.element.bits == 4 else packed.view(torch.int8),
        scales.to(torch.float32),
    )


def _refuse_shift(operation: Operation) -> None:
    """The grid is symmetric: no offset, no zero point other than 0, scales along the rows."""
    for key in set(operation.inputs) - set(_PARTS[operation.kind]):
        if key not in ("zero_point", "axis") or _constant(operation, key).tensor().any():
            raise InputError(f"{operation.where}: its '{key}' leads off the grid of symmetric int4 and int8")


def _constant(operation: Operation, key: str) -> Packed:
    (value,) = operation.inputs.get(key, (None,))
    if not isinstance(value, Packed):
        raise InputError(f"{operation.where}: its '{key}' is not a constant")
    return value
