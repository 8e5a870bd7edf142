"""Element types of MIL, and the weight file of an ML Program, mapped into memory and checked before it is believed.

The file ("MIL blob storage", version 2) is a 64-byte header, then pairs of 64-byte metadata and raw data, everything
64-byte aligned and little-endian:

header      uint32 count, uint32 version
metadata    uint32 sentinel, uint32 element type, uint64 bytes, uint64 offset of the data, uint64 unused bits at its end

Elements narrower than a byte lie one after the other, the first in the lowest bits, and may cross bytes.
Source: mlmodel/src/MILBlob/Blob/StorageFormat.hpp, BlobDataType.hpp and Util/Span.hpp of apple/coremltools;
mlmodel/format/MIL.proto for the codes of element types.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slm_export.errors import InputError

ALIGNMENT = 64
SENTINEL = 0xDEADBEEF
VERSION = 2
_METADATA = struct.Struct("<IIQQQ")


@dataclass(frozen=True)
class ElementType:
    """One element type of MIL."""

    name: str
    """As MIL's text and its ``dtype`` arguments have it."""
    bits: int
    dtype: torch.dtype
    """What holds an element once it is unpacked."""
    code: int
    """In MIL.proto."""
    stored: int | None
    """In a weight file; None: it does not occur there."""


ELEMENT_TYPES = (
    ElementType("bool", 8, torch.bool, 1, None),
    ElementType("fp16", 16, torch.float16, 10, 1),
    ElementType("fp32", 32, torch.float32, 11, 2),
    ElementType("fp64", 64, torch.float64, 12, None),
    ElementType("bf16", 16, torch.bfloat16, 13, 5),
    ElementType("int8", 8, torch.int8, 21, 4),
    ElementType("int16", 16, torch.int16, 22, 6),
    ElementType("int32", 32, torch.int32, 23, 14),
    ElementType("int64", 64, torch.int64, 24, None),
    ElementType("int4", 4, torch.int8, 25, 8),
    ElementType("uint8", 8, torch.uint8, 31, 3),
    ElementType("uint16", 16, torch.uint16, 32, 7),
    ElementType("uint32", 32, torch.uint32, 33, 15),
    ElementType("uint64", 64, torch.uint64, 34, None),
    ElementType("uint4", 4, torch.uint8, 35, 11),
    ElementType("uint2", 2, torch.uint8, 36, 10),
    ElementType("uint1", 1, torch.uint8, 37, 9),
    ElementType("uint6", 6, torch.uint8, 38, 13),
    ElementType("uint3", 3, torch.uint8, 39, 12),
    ElementType("fp8e4m3fn", 8, torch.float8_e4m3fn, 40, 16),
    ElementType("fp8e5m2", 8, torch.float8_e5m2, 41, 17),
)
BY_CODE = {element.code: element for element in ELEMENT_TYPES}
BY_NAME = {element.name: element for element in ELEMENT_TYPES}


@dataclass(frozen=True)
class Packed:
    """A constant as it lies in the file: bytes, and how to read them."""

    element: ElementType
    shape: tuple[int, ...]
    data: Tensor
    """uint8 (bytes,), a view of the mapped file or of the specification."""

    def rows(self, begin: int, end: int) -> Tensor:
        """Return rows [begin, end) along the first dimension, unpacked; a view where elements are whole bytes."""
        width = math.prod(self.shape[1:])
        return self._elements(begin * width, end * width).reshape(end - begin, *self.shape[1:])

    def take(self, index: Tensor) -> Tensor:
        """Return the rows at int64 index (n,) along the first dimension, unpacked; only these are read."""
        bits = math.prod(self.shape[1:]) * self.element.bits
        if bits % 8 or not bits:
            return self.tensor()[index]
        chosen = self.data.view(-1, bits // 8)[index]
        return Packed(self.element, (len(index), *self.shape[1:]), chosen.flatten()).tensor()

    def tensor(self) -> Tensor:
        """Return all of it, unpacked; a view where elements are whole bytes."""
        return self._elements(0, math.prod(self.shape)).reshape(self.shape)

    def _elements(self, begin: int, end: int) -> Tensor:
        bits = self.element.bits
        first, last = begin * bits // 8, -(-end * bits // 8)
        data = self.data[first:last]
        if bits >= 8:
            # torch wants a view to begin at a multiple of the element's size; what lies in a protobuf may not.
            if data.storage_offset() * 8 % bits or data.data_ptr() * 8 % bits:
                data = data.clone()
            return data.view(self.element.dtype)
        return unpack(data, bits, begin * bits % 8, end - begin, signed=self.element.dtype == torch.int8)


def unpack(data: Tensor, bits: int, skipped: int, count: int, *, signed: bool = False) -> Tensor:
    """Return count elements of some bits each from packed uint8 data, as uint8 or (signed, 4 bits) int8 (count,).

    Given   skipped: bits of the first byte that belong to the element before
    """
    if bits == 4:  # most weights: each byte becomes the two of a little-endian int16, in place from then on
        pairs = data.to(torch.int16)
        pairs |= pairs << 4
        pairs &= 0x0F0F
        elements = pairs.view(torch.int8 if signed else torch.uint8)
        if signed:
            elements ^= 8
            elements -= 8
        return elements[skipped // 4 : skipped // 4 + count]
    if bits in (1, 2):
        parts = (data.unsqueeze(1) >> torch.arange(0, 8, bits, dtype=torch.uint8)) & ((1 << bits) - 1)
        return parts.flatten()[skipped // bits : skipped // bits + count]
    stream = ((data.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()
    wanted = stream[skipped : skipped + count * bits].view(count, bits)
    return (wanted << torch.arange(bits, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)


class WeightFile:
    """A weight file, mapped; nothing of it is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            if size < ALIGNMENT:
                raise InputError(
                    f"{path}: {size} bytes, less than the header of a weight file; export it again"
                )
            # Mapped copy-on-write: torch wants memory that it could write to, and the file must never change.
            self._bytes: Any = np.memmap(path, dtype=np.uint8, mode="c")
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
        version = int.from_bytes(self._bytes[4:8].tobytes(), "little")
        if version != VERSION:
            raise InputError(f"{path}: weight file version {version}; known: {VERSION}")

    def packed(self, offset: int, element: ElementType, shape: tuple[int, ...]) -> Packed:
        """Return the constant whose metadata is at offset; raise `InputError` unless it is what is expected."""
        where = f"{self.path}: blob at {offset}"
        if offset % ALIGNMENT or not ALIGNMENT <= offset <= len(self._bytes) - ALIGNMENT:
            raise InputError(
                f"{where}: outside of the file ({len(self._bytes)} bytes) or not aligned to {ALIGNMENT}"
            )
        raw = self._bytes[offset : offset + _METADATA.size].tobytes()
        sentinel, stored, size, start, unused = _METADATA.unpack(raw)
        if sentinel != SENTINEL:
            raise InputError(f"{where}: no blob begins here (sentinel {sentinel:#x}, not {SENTINEL:#x})")
        if stored != element.stored:
            known = {known.stored: known.name for known in ELEMENT_TYPES if known.stored}
            raise InputError(
                f"{where}: holds {known.get(stored, f'type {stored}')}, declared as {element.name}"
            )
        expected, spare = size_of(element, shape)
        if size != expected:
            raise InputError(f"{where}: {size} bytes, but {element.name} {list(shape)} takes {expected}")
        # Before iOS 18 the field was not initialised; it says something of elements narrower than a byte alone.
        if element.bits < 8 and unused != spare:
            raise InputError(
                f"{where}: {unused} unused bits, but {element.name} {list(shape)} leaves {spare}"
            )
        if start % ALIGNMENT or start < offset + ALIGNMENT or start + size > len(self._bytes):
            raise InputError(
                f"{where}: its data at {start}, {size} bytes, is outside of the file or not aligned"
            )
        return Packed(element, shape, torch.from_numpy(self._bytes[start : start + size]))


def size_of(element: ElementType, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the bytes that a packed tensor takes, and the unused bits in the last of them."""
    bits = math.prod(shape) * element.bits
    return -(-bits // 8), -bits % 8
