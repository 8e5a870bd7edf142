"""An emitted program -> the file: large constants are put in one by one, and what is there twice is stored once.

A program is a head (a flatbuffer) and behind it segments: ranges of the file, which the head lists by offset and
size. ExecuTorch's emitter wants every byte in memory, several times over. Here it is given a few bytes in place of
each weight, and the real ones are written between the segments that it made.

A tied vocabulary is there twice: as the embedding's table, a tensor, and as the head's matrix, a segment of its
own. Nothing forbids that ranges overlap, so the segment is laid over the table. That needs the same bytes in
both roles, which the dialect sees to (`executorch_dialect`). The alternative, an external tensor under XNNPACK's
key, does not work: ``Method::parse_external_constants`` looks only in the data that the caller brings, never in
the program's own.

Source: ExecuTorch's pte-file-format.md (the extended header) and schema/program.fbs, which is only ever extended.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from flatbuffers.table import Table

_HEADER = struct.Struct("<4sIQQQ")
"""Behind root offset and file identifier: magic, length, program size, offset of the segments, their size."""
_HEADER_AT, _SEGMENTS_SIZE_AT = 8, 8 + 24

_SEGMENTS, _CONSTANT_SEGMENT, _NAMED_DATA = 12, 14, 18  # fields of Program
_OFFSET, _SIZE = 4, 6  # of DataSegment
_SEGMENT_INDEX, _OFFSETS = 4, 6  # of SubsegmentOffsets
_KEY, _NAMED_SEGMENT = 4, 6  # of NamedData

_SMALLEST = 4096
"""Bytes below which sharing is not worth a look."""
_CHUNK = 1 << 20

Contents = Mapping[str, Callable[[], bytes]]
"""Key of a named constant -> what returns the bytes that stand-ins were emitted for."""


def write_program(emitted: Path, path: Path, contents: Contents, alignment: int) -> None:
    """Write ``path`` from an emitted program, its segments aligned to so many bytes."""
    with open(emitted, "rb") as source, open(path, "wb") as target:
        _Layout(source, target, contents, alignment).write()


class _Layout:
    def __init__(self, source: BinaryIO, target: BinaryIO, contents: Contents, alignment: int) -> None:
        from flatbuffers.table import Table

        self._source, self._target, self._contents, self._alignment = source, target, contents, alignment
        magic, _, size, self._base, _ = _HEADER.unpack(self._read(_HEADER_AT, _HEADER.size))
        assert magic == b"eh00", magic
        self._head = bytearray(self._read(0, size))
        program = Table(self._head, *struct.unpack_from("<I", self._head))
        self._segments = _tables(program, _SEGMENTS)
        self._keys = {_int(data, _NAMED_SEGMENT): _text(data, _KEY) for data in _tables(program, _NAMED_DATA)}
        self._tensors = self._find_tensors(program)

    def write(self) -> None:
        end = 0
        for index, segment in enumerate(self._segments):
            at, size = _long(segment, _OFFSET), _long(segment, _SIZE)
            key = self._keys.get(index)
            if key is not None and key in self._contents:
                data = self._contents[key]()
                to, size = self._aligned(end), len(data)
                self._target.seek(self._base + to)
                self._target.write(data)
                end = to + size
            elif key is not None and (twin := self._twin(at, size)) is not None:
                to = twin
            else:
                to = self._aligned(end)
                self._copy(at, to, size)
                end = to + size
            self._put(segment, _OFFSET, to)
            self._put(segment, _SIZE, size)
        struct.pack_into("<Q", self._head, _SEGMENTS_SIZE_AT, end)
        self._target.seek(0)
        self._target.write(self._head)

    def _find_tensors(self, program: Table) -> list[int]:
        """Return where each constant tensor begins, counted as segments are."""
        from flatbuffers.table import Table

        constants = Table(program.Bytes, program.Indirect(program.Pos + program.Offset(_CONSTANT_SEGMENT)))
        field = constants.Offset(_OFFSETS)
        count = constants.VectorLen(field) if field else 0
        # The first segment is the one that stays where it is.
        assert not count or _int(constants, _SEGMENT_INDEX) == 0
        return list(struct.unpack_from(f"<{count}Q", program.Bytes, constants.Vector(field))) if count else []

    def _twin(self, at: int, size: int) -> int | None:
        """Return where a tensor holds the same bytes as this segment."""
        if size >= _SMALLEST:
            for start in self._tensors:
                if self._same(self._base + start, self._base + at, size):
                    return start
        return None

    def _same(self, one: int, other: int, size: int) -> bool:
        for done in range(0, size, _CHUNK):
            count = min(_CHUNK, size - done)
            if self._read(one + done, count) != self._read(other + done, count):
                return False
        return True

    def _copy(self, at: int, to: int, size: int) -> None:
        self._source.seek(self._base + at)
        self._target.seek(self._base + to)
        for done in range(0, size, _CHUNK):
            self._target.write(self._source.read(min(_CHUNK, size - done)))

    def _read(self, at: int, count: int) -> bytes:
        self._source.seek(at)
        return self._source.read(count)

    def _aligned(self, at: int) -> int:
        return -(-at // self._alignment) * self._alignment

    def _put(self, segment: Table, slot: int, value: int) -> None:
        field = segment.Offset(slot)  # 0 where the value is the default, 0
        assert field or not value
        if field:
            struct.pack_into("<Q", self._head, segment.Pos + field, value)


def _tables(table: Table, slot: int) -> list[Table]:
    from flatbuffers.table import Table

    field = table.Offset(slot)
    if not field:
        return []
    first = table.Vector(field)
    return [Table(table.Bytes, table.Indirect(first + 4 * i)) for i in range(table.VectorLen(field))]


def _long(table: Table, slot: int) -> int:
    from flatbuffers.number_types import Uint64Flags

    return _number(table, slot, Uint64Flags)


def _int(table: Table, slot: int) -> int:
    from flatbuffers.number_types import Uint32Flags

    return _number(table, slot, Uint32Flags)


def _number(table: Table, slot: int, flags: Any) -> int:
    field = table.Offset(slot)
    return int(table.Get(flags, table.Pos + field)) if field else 0


def _text(table: Table, slot: int) -> str:
    return bytes(table.String(table.Pos + table.Offset(slot))).decode()
