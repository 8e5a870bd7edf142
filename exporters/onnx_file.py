"""ONNX files whose weights are written one by one, and read back one by one.

A file is one protobuf message. A message in it that comes twice is merged, by the rules of the format, and lists are
joined. So the graph is written without its weights, and behind it the graph again, a weight at a time: no more than
one stands in memory. A large model has its weights in a second file.

Source: onnx.proto (field numbers), and protobuf's encoding.md ("last one wins" and merging).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from slm_export.errors import InputError
from slm_export.exporters.onnx_stored import CODES, COLUMNS, SCALES, Stored
from slm_export.foreign import reading
from slm_export.weights import GROUPS, Quantized, grid_scale

LARGEST = 64_000_000
"""Bytes of weights that still lie in the file itself. ONNX Runtime maps what lies beside it and packs it matrix by
matrix; what is in the file it holds twice more while it loads."""
_LEAST_OUTSIDE = 1 << 16
"""Bytes of a weight that is worth a page of its own: norms and biases stay in the file."""

_TYPES = {torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.float16: 10}
_DTYPES = {number: dtype for dtype, number in _TYPES.items()}
_GRAPH, _INITIALIZER = 7, 5  # of ModelProto, of GraphProto
_DIMS, _TYPE, _NAME, _RAW, _EXTERNAL = 1, 2, 8, 9, 13  # of TensorProto
_BYTES = 2  # the wire type of what has a length
_PAGE = 4096
_DAMAGED = "not an ONNX file that can be read"


def data_file(path: Path) -> Path:
    """Return where the weights of a large model are."""
    return path.with_name(f"{path.name}.data")


def write_model(graph: bytes, weights: Iterable[Stored], path: Path) -> int:
    """Write a model and its weights; return the bytes of both files.

    Given   graph: a serialized ModelProto, which uses the weights by name and does not hold them
    """
    weights = list(weights)
    size = sum(tensor.nbytes for stored in weights for tensor in stored.stand_ins.values())
    with open(path, "wb") as file:
        file.write(graph)
        if size <= LARGEST:
            for name, tensor in _tensors(weights):
                _put(file, name, tensor)
        else:
            with open(data_file(path), "wb") as data:
                for name, tensor in _tensors(weights):
                    if tensor.nbytes < _LEAST_OUTSIDE:
                        _put(file, name, tensor)
                    else:
                        _put_outside(file, data, name, tensor)
    return path.stat().st_size + (data_file(path).stat().st_size if size > LARGEST else 0)


def read_stored(path: Path) -> dict[str, Quantized]:
    """Return the quantized matrices of a file, each read when asked for.

    Raises:
        InputError: the file is damaged or not one of ours; a matrix is not on the grid, at the latest when it is read.
    """
    with reading(path, _DAMAGED):
        return _stored(path)


def _stored(path: Path) -> dict[str, Quantized]:
    held = {entry.name: entry for entry in _entries(path)}
    found: dict[str, Quantized] = {}
    for name, codes in held.items():
        weight = name.removesuffix(CODES).removesuffix(COLUMNS)
        scales = held.get(weight + SCALES)
        if weight == name or scales is None:
            continue
        found[weight] = _quantized(path, codes, scales)
    if not held:
        raise InputError(f"{path}: holds no weights; export the model again")
    return found


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies."""

    name: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int

    def read(self) -> Tensor:
        if self.dtype is None or self.size != math.prod(self.shape) * self.dtype.itemsize:
            raise ValueError(f"{self.name} of {self.size:,} bytes is said to be {self.dtype} {self.shape}")
        with reading(self.file, _DAMAGED), open(self.file, "rb") as file:
            file.seek(self.start)
            data = bytearray(file.read(min(self.size, self.file.stat().st_size)))
            return torch.frombuffer(data, dtype=self.dtype).reshape(self.shape)


def _quantized(path: Path, codes: _Entry, scales: _Entry) -> Quantized:
    name = codes.name
    by_column, bits = name.endswith(COLUMNS), 4 if codes.dtype == torch.uint8 else 8
    dims = codes.shape[::-1] if by_column else codes.shape
    columns = dims[1] if bits == 8 else dims[1] * dims[2] * 2
    group = columns if bits == 8 else dims[2] * 2
    if bits == 4 and group not in GROUPS:
        raise InputError(f"{path}: {name} has groups of {group} columns, which the grid does not know")

    def load() -> tuple[Tensor, Tensor]:
        with reading(path, _DAMAGED):
            return values()

    def values() -> tuple[Tensor, Tensor]:
        made, steps = codes.read(), scales.read().reshape(dims[0], columns // group)
        if not torch.equal(steps, grid_scale(steps)) or (bits == 8 and bool((made == -128).any())):
            raise InputError(f"{path}: {name} is not on the grid")
        if bits == 4:
            return (made ^ 0x88).reshape(dims[0], columns // 2), steps
        return (made.t().contiguous() if by_column else made), steps

    return Quantized((dims[0], columns), bits, group, load)


def _tensors(weights: Iterable[Stored]) -> Iterator[tuple[str, Tensor]]:
    for stored in weights:
        for name in stored.stand_ins:
            yield name, stored.tensor(name)


def _put(file: BinaryIO, name: str, tensor: Tensor) -> None:
    head = _head(name, tensor) + _length(_RAW, tensor.nbytes)
    whole = len(head) + tensor.nbytes
    inner = _length(_INITIALIZER, whole)
    file.write(_length(_GRAPH, len(inner) + whole) + inner + head)
    file.write(_bytes(tensor))


def _put_outside(file: BinaryIO, data: BinaryIO, name: str, tensor: Tensor) -> None:
    from onnx import TensorProto

    data.write(bytes(-data.tell() % _PAGE))  # ONNX Runtime maps whole pages
    tail = TensorProto(data_location=TensorProto.EXTERNAL)
    place = {"location": f"{Path(file.name).name}.data", "offset": data.tell(), "length": tensor.nbytes}
    for key, value in place.items():
        tail.external_data.add(key=key, value=str(value))
    whole = _head(name, tensor) + tail.SerializeToString()
    inner = _length(_INITIALIZER, len(whole)) + whole
    file.write(_length(_GRAPH, len(inner)) + inner)
    data.write(_bytes(tensor))


def _head(name: str, tensor: Tensor) -> bytes:
    from onnx import TensorProto

    made: bytes = TensorProto(
        name=name, data_type=_TYPES[tensor.dtype], dims=tensor.shape
    ).SerializeToString()
    return made


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data


def _length(field: int, size: int) -> bytes:
    return _varint(field << 3 | _BYTES) + _varint(size)


def _varint(value: int) -> bytes:
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*made, value])


def _entries(path: Path) -> Iterator[_Entry]:
    """Yield the initializers of a file; ValueError or IndexError where it is no protobuf message."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for number, start, end in _fields(data, 0, len(data)):
            if number == _GRAPH:
                for inner, first, last in _fields(data, start, end):
                    if inner == _INITIALIZER:
                        yield _entry(path, data, first, last)


def _entry(path: Path, data: mmap.mmap, start: int, end: int) -> _Entry:
    from onnx import TensorProto

    raw, head = (end, end), b""
    at = start
    for number, first, last in _fields(data, start, end):
        if number == _RAW:
            raw = (first, last)
        else:
            head += data[at:last]
        at = last
    tensor = TensorProto.FromString(head)
    place = {item.key: item.value for item in tensor.external_data}
    dtype, shape = _DTYPES.get(tensor.data_type), tuple(tensor.dims)
    if place:
        outside = path.with_name(Path(place["location"]).name)
        return _Entry(tensor.name, dtype, shape, outside, int(place["offset"]), int(place["length"]))
    return _Entry(tensor.name, dtype, shape, path, raw[0], raw[1] - raw[0])


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, start and end of every field of a message; of a number its bytes."""
    while at < end:
        key, at = _read_varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == _BYTES:
            size, at = _read_varint(data, at)
            last = at + size
        elif kind == 0:
            last = _read_varint(data, at)[1]
        elif kind in (1, 5):
            last = at + (8 if kind == 1 else 4)
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if last > end:
            raise ValueError(f"it ends at byte {end}, within a field")
        yield number, at, last
        at = last


def _read_varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
