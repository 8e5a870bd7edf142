"""A program -> its quantized matrices, from the bytes that the runtime computes with.

    XNNPACK's matrices    from the payload of each partition: shape, width and group are what it says there, codes
                          and scales the named data that it points to
    tables of look-ups    from the calls of the kernels: their first two arguments, constant tensors

`executorch_names` tells what each is called. One matrix may be in several places, a tied vocabulary in both
forms: they are all read, and must agree.

Source: ExecuTorch's schema/program.fbs, backends/xnnpack/serialization/runtime_schema.fbs and XNNHeader.h.
"""

from __future__ import annotations

import json
import os
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from slm_export.exporters.executorch_file import (
    CONSTANT_SEGMENT,
    KEY,
    NAMED_DATA,
    NAMED_SEGMENT,
    OFFSET,
    OFFSETS,
    SEGMENT_INDEX,
    SEGMENTS,
    SIZE,
    read_head,
)
from slm_export.exporters.executorch_flatbuffer import Record
from slm_export.exporters.executorch_names import ENTRY, LOOK_UPS, grid_matrix
from slm_export.foreign import reading
from slm_export.weights import CODE_RANGE, GROUPS, Quantized, grid_scale

_PLANS = 1  # of Program
_VALUES, _CHAINS, _OPERATORS, _DELEGATES = 2, 5, 6, 7  # of ExecutionPlan
_INSTRUCTIONS = 2  # of Chain
_TYPE, _VALUE = 0, 1  # of Instruction, EValue and XValue: each is one union
_KERNEL_CALL = 1  # of InstructionArguments
_OPERATOR, _ARGUMENTS = 0, 1  # of KernelCall
_NO_VALUE, _TENSOR = 1, 5  # of KernelTypes
_SCALAR_TYPE, _SIZES, _BUFFER = 0, 2, 5  # of Tensor
_NAME, _OVERLOAD = 0, 1  # of Operator
_BACKEND, _PROCESSED = 0, 1  # of BackendDelegate
_LOCATION, _INDEX, _IN_SEGMENT = 0, 1, 1  # of BackendDelegateDataReference, and of DataLocation
_SCALAR_TYPES = {0: torch.uint8, 1: torch.int8, 5: torch.float16, 6: torch.float32}

_GRAPH_AT = 10  # of XNNHeader: where the graph is in a payload
_XVALUES, _CONSTANTS = 2, 8  # of XNNGraph
_QUANTIZED = 2  # of XValueUnion
_TENSOR_VALUE, _PARAMETERS_TYPE, _PARAMETERS = 0, 1, 2  # of XNNQuantizedTensorValue
_DATATYPE, _DIMS, _CONSTANT = 0, 2, 3  # of XNNTensorValue
_CHANNEL_DIM, _GROUP = 1, 2  # of PerChannelQuant and PerChannelGroupQuant
_CONSTANT_KEY = 2  # of ConstantDataOffset
_KINDS = {(6, 1): (8, torch.float32, 2), (10, 4): (4, torch.bfloat16, 4)}
"""XNNDatatype and XNNQuantParams -> bits, form of the scales, field with their place among the constants."""

_Keys = tuple[str, str]
_DAMAGED = "its weights cannot be read"


@dataclass(frozen=True)
class _Stored:
    """A tensor in the file."""

    at: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read(self, file: BufferedReader) -> Tensor:
        data = torch.empty(self.bytes, dtype=torch.uint8)
        file.seek(self.at)
        if file.readinto(data.numpy().data) != self.bytes:
            raise ValueError("the file ends too early")
        return data.view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class _Matrix:
    """A matrix in one of its places: codes (rows, bytes of a row), scales (rows, groups)."""

    codes: _Stored
    scales: _Stored

    def __post_init__(self) -> None:
        rows, columns = self.shape
        groups = torch.Size(self.scales.shape).numel() // max(1, rows)
        fits = self.scales.shape[:1] == (rows,) and groups and columns % groups == 0
        if not fits or (groups != 1 if self.bits == 8 else columns // groups not in GROUPS):
            raise ValueError(
                f"{self.bits} bits {self.shape} with scales {self.scales.shape} are not on the grid"
            )

    @property
    def bits(self) -> int:
        return {torch.int8: 8, torch.uint8: 4}[self.codes.dtype]

    @property
    def shape(self) -> tuple[int, int]:
        rows, width = self.codes.shape
        return rows, width * 8 // self.bits

    @property
    def group(self) -> int:
        return self.shape[1] * self.shape[0] // torch.Size(self.scales.shape).numel()


def stored(path: Path) -> Mapping[str, Quantized]:
    """Return every quantized matrix under its name in the checkpoint; values are read when they are asked for.

    Raises:
        InputError: the file is none of ours; or, when values are read, they are not on the grid, or a matrix that
            is stored twice is not the same in both places.
    """
    with reading(path, _DAMAGED), open(path, "rb") as file:
        program = _Program(file)
        names: dict[str, _Keys] = {name: (c, s) for name, (c, s) in program.names["matrices"].items()}
        places = program.matrices()
        if differing := places.keys() ^ set(names.values()):
            raise ValueError(f"{len(differing)} of its matrices and their names do not belong together")
        return {name: _quantized(path, name, places[keys]) for name, keys in names.items()}


def _quantized(path: Path, name: str, places: list[_Matrix]) -> Quantized:
    first = places[0]
    for other in places[1:]:
        if (other.shape, other.bits, other.group) != (first.shape, first.bits, first.group):
            raise ValueError(f"{name} has two forms")

    def load() -> tuple[Tensor, Tensor]:
        with reading(path, _DAMAGED), open(path, "rb") as file:
            packed, scales = _values(file, name, first)
            for place in places[1:]:
                # What lies in the same bytes is the same.
                if place != first and not _equal((packed, scales), _values(file, name, place)):
                    raise ValueError(f"{name} is stored twice, with different values")
        return packed, scales

    return Quantized(first.shape, first.bits, first.group, load)


def _values(file: BufferedReader, name: str, place: _Matrix) -> tuple[Tensor, Tensor]:
    matrix = grid_matrix(place.codes.read(file), place.scales.read(file))
    packed, scales = matrix.load()
    if place.bits == 8 and int(packed.min()) < CODE_RANGE[8][0]:
        raise ValueError(f"{name} is not on the grid: it has a code {int(packed.min())}")
    if not torch.equal(grid_scale(scales), scales) or not scales.isfinite().all():
        raise ValueError(f"{name} is not on the grid: it has a scale that is no bfloat16, or too small")
    return packed, scales


def _equal(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def named_entry(path: Path, key: str) -> bytes | None:
    """Return an entry of a program's named data, None where it is not there; ValueError where it is no program."""
    with open(path, "rb") as file:
        return _Program(file).entry(key)


class _Program:
    """The head of a program, and the payloads of its partitions; weights stay in the file."""

    def __init__(self, file: BufferedReader) -> None:
        self._file = file
        head, base = read_head(file)
        self._size = file.seek(0, os.SEEK_END)
        self._program = Record.root(head)
        self._segments = [
            (base + segment.number(OFFSET, "Q"), segment.number(SIZE, "Q"))
            for segment in self._program.records(SEGMENTS)
        ]
        if any(at + size > self._size for at, size in self._segments):
            raise ValueError("the file ends too early")
        self._named = {
            data.text(KEY): self._segments[data.number(NAMED_SEGMENT)]
            for data in self._program.records(NAMED_DATA)
        }
        if ENTRY not in self._named:
            raise ValueError("it does not tell the names of its weights")
        self.names = json.loads(self._read(self._named[ENTRY]))

    def entry(self, key: str) -> bytes | None:
        """Return an entry of the named data, if it is there."""
        return self._read(self._named[key]) if key in self._named else None

    def matrices(self) -> Mapping[_Keys, list[_Matrix]]:
        """Return the matrices by the keys that they are named with, each with the places where it is."""
        found: dict[_Keys, list[_Matrix]] = defaultdict(list)
        tables: list[_Matrix] = []
        for plan in self._program.records(_PLANS):
            for delegate in plan.records(_DELEGATES):
                for keys, matrix in self._partition(delegate):
                    found[keys].append(matrix)
            tables += self._tables(plan)
        look_ups = self.names["look_ups"]
        if len(look_ups) != len(tables):
            raise ValueError(f"it has {len(tables)} look-ups, and names for {len(look_ups)}")
        for (codes, scales), table in zip(look_ups, tables, strict=True):
            found[codes, scales].append(table)
        return dict(found)

    def _partition(self, delegate: Record) -> Iterator[tuple[_Keys, _Matrix]]:
        """Yield the quantized matrices of a partition."""
        processed = delegate.record(_PROCESSED)
        if delegate.text(_BACKEND) != "XnnpackBackend" or processed.number(_LOCATION, "B") != _IN_SEGMENT:
            raise ValueError(f"a partition for {delegate.text(_BACKEND)} is not as it is written here")
        payload = self._read(self._segments[processed.number(_INDEX)])
        (at,) = struct.unpack_from("<I", payload, _GRAPH_AT)
        graph = Record.root(payload, at)
        constants = graph.records(_CONSTANTS)
        for value in graph.records(_XVALUES):
            if value.number(_TYPE, "B") != _QUANTIZED:
                continue
            value = value.record(_VALUE)
            tensor, parameters = value.record(_TENSOR_VALUE), value.record(_PARAMETERS)
            if not (constant := tensor.number(_CONSTANT)):
                continue  # activations
            kind = tensor.number(_DATATYPE, "h"), value.number(_PARAMETERS_TYPE, "B")
            if kind not in _KINDS or parameters.number(_CHANNEL_DIM, "i"):
                raise ValueError(f"a constant of XNNPACK's is quantized in another way: {kind}")
            bits, form, field = _KINDS[kind]
            rows, columns = tensor.numbers(_DIMS)
            groups = columns // (parameters.number(_GROUP, "i") if bits == 4 else columns)
            codes = constants[constant].text(_CONSTANT_KEY)
            scales = constants[parameters.number(field)].text(_CONSTANT_KEY)
            yield (
                (codes, scales),
                _Matrix(
                    self._constant(
                        codes, torch.int8 if bits == 8 else torch.uint8, (rows, columns * bits // 8)
                    ),
                    self._constant(scales, form, (rows, groups)),
                ),
            )

    def _constant(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> _Stored:
        at, size = self._named[key]
        stored = _Stored(at, dtype, shape)
        if stored.bytes != size:
            raise ValueError(f"a constant of {size} bytes is said to be {dtype} {shape}")
        return stored

    def _tables(self, plan: Record) -> Iterator[_Matrix]:
        """Yield the table of every look-up, in the order of the calls."""
        operators = [(o.text(_NAME), o.text(_OVERLOAD)) for o in plan.records(_OPERATORS)]
        values = plan.records(_VALUES)
        known = {(f"quantized_decomposed::{name}", "dtype_out"): bits for name, bits in LOOK_UPS.items()}
        for chain in plan.records(_CHAINS):
            for instruction in chain.records(_INSTRUCTIONS):
                if instruction.number(_TYPE, "B") != _KERNEL_CALL:
                    continue
                call = instruction.record(_VALUE)
                bits = known.get(operators[call.number(_OPERATOR, "i")])
                if bits is None:
                    continue
                codes, scales, zeros = (values[index] for index in call.numbers(_ARGUMENTS, "i")[:3])
                table = _Matrix(self._tensor(codes), self._tensor(scales))
                if table.bits != bits or zeros.number(_TYPE, "B") != _NO_VALUE:
                    raise ValueError("a look-up is quantized in another way")
                yield table

    def _tensor(self, value: Record) -> _Stored:
        """Return where a constant tensor is."""
        if value.number(_TYPE, "B") != _TENSOR:
            raise ValueError("a table is no tensor")
        tensor, constants = value.record(_VALUE), self._program.record(CONSTANT_SEGMENT)
        segment, _ = self._segments[constants.number(SEGMENT_INDEX)]
        at = segment + constants.numbers(OFFSETS, "Q")[tensor.number(_BUFFER)]
        dtype = _SCALAR_TYPES[tensor.number(_SCALAR_TYPE, "B")]
        stored = _Stored(at, dtype, tuple(tensor.numbers(_SIZES, "i")))
        if min(stored.shape) < 1 or at + stored.bytes > self._size:
            raise ValueError("a table is larger than the file")
        return stored

    def _read(self, place: tuple[int, int]) -> bytes:
        at, size = place
        self._file.seek(at)
        return self._file.read(size)
