"""The quantized matrices of a package, read back from its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from slm_export.errors import InputError
from slm_export.exporters.coreml_metadata import WEIGHTS
from slm_export.exporters.mil.blob import Packed
from slm_export.exporters.mil.package import Package
from slm_export.exporters.mil.program import Operation
from slm_export.weights import Quantized

_CODES = {"constexpr_blockwise_shift_scale": "data", "constexpr_affine_dequantize": "quantized_data"}
"""Operations that make a matrix of codes and scales -> their parameter for the codes."""


def read_weights(path: Path) -> Mapping[str, Quantized]:
    """Return every quantized matrix under its name in the checkpoint.

    Raises:
        InputError: the package is not one of ours, two of its functions disagree, or a matrix is not on the grid.
    """
    package = Package.open(path)
    try:
        names = json.loads(package.metadata[WEIGHTS])
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: its metadata lacks '{WEIGHTS}'; export the model again") from error
    found = [
        {
            names.get(operation.outputs[0][0], operation.outputs[0][0]): operation
            for operation in function.operations
            if operation.kind in _CODES
        }
        for function in package.functions.values()
    ]
    for other in found[1:]:
        if differing := sorted(name for name in found[0] if not _alike(found[0][name], other.get(name))):
            raise InputError(f"{path}: its functions have different weights for {', '.join(differing[:3])}")
    return {name: _matrix(operation) for name, operation in found[0].items()}


def _alike(one: Operation, other: Operation | None) -> bool:
    return other is not None and all(
        torch.equal(_constant(one, key).data, _constant(other, key).data)
        for key in (_CODES[one.kind], "scale")
    )


def _matrix(operation: Operation) -> Quantized:
    data, scales = _constant(operation, _CODES[operation.kind]), _constant(operation, "scale").tensor()
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
    for key in set(operation.inputs) - {_CODES[operation.kind], "scale"}:
        if key not in ("zero_point", "axis") or _constant(operation, key).tensor().any():
            raise InputError(f"{operation.where}: its '{key}' leads off the grid of symmetric int4 and int8")


def _constant(operation: Operation, key: str) -> Packed:
    (value,) = operation.inputs.get(key, (None,))
    if not isinstance(value, Packed):
        raise InputError(f"{operation.where}: its '{key}' is not a constant")
    return value
