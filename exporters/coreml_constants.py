"""Weights of a checkpoint -> the operations of an ML Program that make them of what the weight file holds.

    Dense        const
    Quantized    constexpr_blockwise_shift_scale: codes and a scale per group; before iOS 18 constexpr_affine_dequantize
    Palettized   constexpr_lut_to_dense: indices and a table per group of rows

Matrices that are half zeros or more have a mask of one bit per value and what is not 0 (iOS 18): codes go through
constexpr_sparse_blockwise_shift_scale first, then all through constexpr_sparse_to_dense. Pages: iOS16.constexpr_ops and
iOS18.compression.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slm_export.exporters.coreml_blobs import BlobWriter
from slm_export.exporters.mil.blob import BY_NAME
from slm_export.weights import Dense, Palettized, Quantized, Weight, pack_int4

FILE = "@model_path/weights/weight.bin"
_TORCH = {"fp16": torch.float16, "fp32": torch.float32}
_SPARSE = 0.5
"""Zeros among the values from which on a mask is stored. A matrix that nobody made sparse has a few per cent of them,
in 4 bits some 15."""


def identifier(name: str) -> str:
    """Return the name of a weight as the program may spell it."""
    return re.sub(r"\W", "_", name)


def constant(name: str, weight: Weight, dtype: str, blobs: BlobWriter, grouped: bool) -> list[Any]:
    """Return the operations that make a matrix, the last of them the matrix itself.

    Given   dtype: "fp16" or "fp32", of the matrix; grouped: whether the program is of iOS 18 or later
    """
    if isinstance(weight, Palettized):
        return [(_tables if grouped else _table)(name, weight, dtype, blobs)]
    if isinstance(weight, Dense):
        values = weight.float32().to(_TORCH[dtype])
        mask = _mask(values) if grouped else None
        return [_dense(name, weight, dtype, blobs)] if mask is None else _sparse(name, values, mask, blobs)
    mask = _mask(weight.codes()) if grouped else None
    if mask is not None:
        return _sparse_blockwise(name, weight, mask, dtype, blobs)
    return [(_blockwise if grouped else _affine)(name, weight, dtype, blobs)]


def _dense(name: str, weight: Weight, dtype: str, blobs: BlobWriter) -> Any:
    """Return the operation that makes a matrix of floats, its data stored."""
    operation = _operation("const", name, dtype, weight.shape)
    offset = blobs.tensor(dtype, weight.float32().to(_TORCH[dtype]))
    _set_file(operation.attributes["val"], offset, dtype, weight.shape)
    return operation


def _blockwise(name: str, weight: Quantized, dtype: str, blobs: BlobWriter) -> Any:
    """Return the operation that makes a matrix of codes and scales per group (iOS 18)."""
    operation = _operation("constexpr_blockwise_shift_scale", name, dtype, weight.shape)
    packed, scales = weight.load()
    element = f"int{weight.bits}"
    offset = blobs.tensor(element, packed)
    _set_input(operation, "data", offset, element, weight.shape)
    # Exact: a scale is a bfloat16 value that float16 can hold.
    offset = blobs.tensor(dtype, scales.to(_TORCH[dtype]))
    _set_input(operation, "scale", offset, dtype, tuple(scales.shape))
    return operation


def _affine(name: str, weight: Quantized, dtype: str, blobs: BlobWriter) -> Any:
    """Return the operation that makes a matrix of int8 codes and a scale per row (iOS 16)."""
    operation = _operation("constexpr_affine_dequantize", name, dtype, weight.shape)
    packed, scales = weight.load()
    assert scales.shape[1] == 1, "refused before"
    offset = blobs.tensor("int8", packed)
    _set_file(operation.attributes["quantized_data"], offset, "int8", weight.shape)
    offset = blobs.tensor(dtype, scales[:, 0].to(_TORCH[dtype]))
    _set_file(operation.attributes["scale"], offset, dtype, weight.shape[:1])
    zero, axis = operation.attributes["zero_point"], operation.attributes["axis"]
    _set_type(zero.type, "int8", ())
    zero.immediateValue.tensor.bytes.values = bytes(1)
    _set_type(axis.type, "int32", ())
    axis.immediateValue.tensor.ints.values.append(0)
    return operation


def _sparse(name: str, values: Tensor, mask: Tensor, blobs: BlobWriter) -> list[Any]:
    """Return the operation that makes a matrix of floats out of a mask and those that are not 0 (iOS 18).

    Given   values (out, in) in the type of the matrix, mask bool (out, in)
    """
    dtype = next(name for name, known in _TORCH.items() if known == values.dtype)
    operation = _operation("constexpr_sparse_to_dense", name, dtype, tuple(values.shape))
    nonzero = values[mask]
    _set_input(operation, "nonzero_data", blobs.tensor(dtype, nonzero), dtype, (len(nonzero),))
    _set_mask(operation, "mask", mask, blobs)
    return [operation]


def _sparse_blockwise(name: str, weight: Quantized, mask: Tensor, dtype: str, blobs: BlobWriter) -> list[Any]:
    """Return the operations that make a matrix out of a mask, the codes that are not 0, and scales (iOS 18)."""
    scaled = _operation(
        "constexpr_sparse_blockwise_shift_scale", f"{name}_nonzero", dtype, (int(mask.sum()),)
    )
    (values,) = scaled.outputs
    made = scaled.outputs.add(name=values.name)
    made.CopyFrom(values)
    values.name = f"{identifier(name)}_mask"
    values.ClearField("type")
    _set_type(values.type, "uint1", weight.shape)
    codes, element = weight.codes()[mask], f"int{weight.bits}"
    _set_mask(scaled, "data_mask", mask, blobs)
    packed, unused = (codes, 0) if weight.bits == 8 else _packed_nibbles(codes)
    _set_input(scaled, "nonzero_data", blobs.tensor(element, packed, unused), element, (len(codes),))
    scales = weight.scales
    _set_input(scaled, "scale", blobs.tensor(dtype, scales.to(_TORCH[dtype])), dtype, tuple(scales.shape))
    dense = _operation("constexpr_sparse_to_dense", name, dtype, weight.shape)
    dense.inputs["nonzero_data"].arguments.add(name=made.name)
    dense.inputs["mask"].arguments.add(name=values.name)
    return [scaled, dense]


def _mask(values: Tensor) -> Tensor | None:
    """Return where a matrix is not 0, bool (out, in); None where that is not worth a mask."""
    mask = values != 0
    left = int(mask.sum())
    return mask if 0 < left <= (1 - _SPARSE) * values.numel() else None


def _set_mask(operation: Any, key: str, mask: Tensor, blobs: BlobWriter) -> None:
    """Store a mask as one bit for each value, the first in the lowest."""
    bits = torch.from_numpy(np.packbits(mask.flatten().numpy(), bitorder="little"))
    offset = blobs.tensor("uint1", bits, -mask.numel() % 8)
    _set_input(operation, key, offset, "uint1", tuple(mask.shape))


def _packed_nibbles(codes: Tensor) -> tuple[Tensor, int]:
    """Return int4 codes (n,) two per byte, and the bits at the end that belong to none."""
    whole = torch.nn.functional.pad(codes, (0, len(codes) % 2))
    return pack_int4(whole.view(1, -1)), 4 * (len(codes) % 2)


def _tables(name: str, weight: Palettized, dtype: str, blobs: BlobWriter) -> Any:
    """Return the operation that makes a matrix of indices and a table per group of rows (iOS 18)."""
    operation = _operation("constexpr_lut_to_dense", name, dtype, weight.shape)
    packed, tables = weight.load()
    element = f"uint{weight.bits}"
    offset = blobs.tensor(element, packed)
    _set_input(operation, "indices", offset, element, weight.shape)
    offset = blobs.tensor(dtype, tables.to(_TORCH[dtype]))
    # One table for all columns; its entries are values, vectors of one element.
    shape = (tables.shape[0], 1, tables.shape[1], 1)
    _set_input(operation, "lut", offset, dtype, shape)
    return operation


def _table(name: str, weight: Palettized, dtype: str, blobs: BlobWriter) -> Any:
    """Return the operation that makes a matrix of indices into one table (iOS 16)."""
    operation = _operation("constexpr_lut_to_dense", name, dtype, weight.shape)
    packed, tables = weight.load()
    assert tables.shape[0] == 1, "refused before"
    offset = blobs.tensor("uint8", packed)
    _set_file(operation.attributes["indices"], offset, "uint8", (packed.numel(),))
    offset = blobs.tensor(dtype, tables.to(_TORCH[dtype]))
    _set_file(operation.attributes["lut"], offset, dtype, (tables.shape[1],))
    shape = operation.attributes["shape"]
    _set_type(shape.type, "uint32", (2,))
    shape.immediateValue.tensor.bytes.values = struct.pack("<2I", *weight.shape)
    return operation


def _operation(kind: str, name: str, dtype: str, shape: Sequence[int]) -> Any:
    from coremltools.proto import MIL_pb2

    operation = MIL_pb2.Operation(type=kind)
    operation.attributes["name"].CopyFrom(_text(f"{identifier(name)}_op"))
    _set_type(operation.outputs.add(name=identifier(name)).type, dtype, shape)
    return operation


def _set_input(operation: Any, key: str, offset: int, element: str, shape: Sequence[int]) -> None:
    _set_file(operation.inputs[key].arguments.add().value, offset, element, shape)


def _set_file(value: Any, offset: int, element: str, shape: Sequence[int]) -> None:
    _set_type(value.type, element, shape)
    value.blobFileValue.fileName = FILE
    value.blobFileValue.offset = offset


def _set_type(type: Any, element: str, shape: Sequence[int]) -> None:
    type.tensorType.dataType = BY_NAME[element].code
    type.tensorType.rank = len(shape)
    for size in shape:
        type.tensorType.dimensions.add().constant.size = size


def _text(text: str) -> Any:
    from coremltools.proto import MIL_pb2

    value = MIL_pb2.Value()
    value.type.tensorType.dataType = MIL_pb2.STRING
    value.immediateValue.tensor.strings.values.append(text)
    return value
