"""The weights of a ``.litertlm`` or ``.tflite`` file, read back from its bytes."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slm_export.errors import InputError
from slm_export.exporters.litert_container import Container
from slm_export.foreign import reading
from slm_export.weights import GROUPS, Quantized


def read_weights(path: Path) -> Mapping[str, Quantized]:
    """Return every quantized matrix by its name; InputError where one is not on the grid."""
    with reading(path, "its weights cannot be read"):
        return _weights(path)


def _weights(path: Path) -> dict[str, Quantized]:
    begin = Container.read(path).model[0] if path.suffix == ".litertlm" else 0
    schema = importlib.import_module("ai_edge_litert.schema_py_generated")
    content = np.memmap(path, dtype=np.uint8, mode="r", offset=begin)
    model = schema.Model.GetRootAs(content, 0)
    found: dict[str, Quantized] = {}
    buffers: dict[str, int] = {}
    for number in range(model.SubgraphsLength()):
        subgraph = model.Subgraphs(number)
        for index in range(subgraph.TensorsLength()):
            tensor = subgraph.Tensors(index)
            kinds = schema.TensorType
            if tensor.Type() not in (kinds.INT4, kinds.INT8) or not tensor.Name():
                continue
            name = tensor.Name().decode()
            if buffers.setdefault(name, tensor.Buffer()) != tensor.Buffer():
                raise InputError(f"{path}: {name} is stored twice; export the model again")
            found[name] = _matrix(path, begin, model, subgraph, tensor, schema, name)
    return found


def _matrix(
    path: Path, begin: int, model: Any, subgraph: Any, tensor: Any, schema: Any, name: str
) -> Quantized:
    bits = 4 if tensor.Type() == schema.TensorType.INT4 else 8
    # A filter of a convolution is a row: the rest of the shape says only how it lies over its input.
    rows, *rest = (int(size) for size in tensor.ShapeAsNumpy())
    columns = math.prod(rest)
    quantization = tensor.Quantization()
    codes = _place(model, tensor)
    if bits == 8:
        group, scales = columns, torch.from_numpy(quantization.ScaleAsNumpy().copy()).view(rows, 1)
        if quantization.ZeroPointAsNumpy().any():
            raise InputError(f"{path}: {name} has zero points, which the grid has not")
        blocks = None
    else:
        details = schema.BlockwiseQuantization()
        details.Init(quantization.Details().Bytes, quantization.Details().Pos)
        group, scales = details.BlockSize(), None
        blocks = _place(model, subgraph.Tensors(details.Scales()))
        if group not in GROUPS:
            raise InputError(f"{path}: {name} has groups of {group}, which the grid has not")

    def load() -> tuple[Tensor, Tensor]:
        with reading(path, "its weights cannot be read"):
            return values()

    def values() -> tuple[Tensor, Tensor]:
        packed = _read(path, begin, codes).reshape(rows, columns * bits // 8)
        if blocks is None:
            assert scales is not None
            return packed.view(torch.int8), scales
        halves = _read(path, begin, blocks).view(torch.float16).view(rows, columns // group)
        return packed, halves.to(torch.float32)

    return Quantized((rows, columns), bits, group, load)


def _place(model: Any, tensor: Any) -> tuple[int, int]:
    """Return where a tensor's bytes begin, counted from the flatbuffer, and how many they are."""
    buffer = model.Buffers(tensor.Buffer())
    return int(buffer.Offset()), int(buffer.Size())


def _read(path: Path, begin: int, place: tuple[int, int]) -> Tensor:
    data = np.fromfile(path, dtype=np.uint8, count=place[1], offset=begin + place[0])
    return torch.from_numpy(data)
