"""Store once what a program holds twice: a tied vocabulary, as the embedding's table and as the head's matrix.

The runtime reads a constant of XNNPACK as a range of the file (a segment: offset and size), and nothing forbids
that ranges overlap. So the head's segment is laid over the table, and its own bytes leave the file. It needs the
same bytes in both roles, which the dialect sees to (`executorch_dialect`).

The alternative, an external tensor under XNNPACK's key, does not work: ``Method::parse_external_constants`` looks
only in the data that the caller brings, never in the program's own.

Source: ExecuTorch's pte-file-format.md (the extended header) and schema/program.fbs, which is only ever extended.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flatbuffers.table import Table

_HEADER = struct.Struct("<4sIQQQ")
"""Behind root offset and file identifier: magic, length, program size, offset of the segments, their size."""
_HEADER_AT, _SEGMENTS_SIZE_AT = 8, 8 + 24

_SEGMENTS, _CONSTANT_SEGMENT, _NAMED_DATA = 12, 14, 18  # fields of Program
_OFFSET, _SIZE = 4, 6  # of DataSegment
_SEGMENT_INDEX, _OFFSETS = 4, 6  # of SubsegmentOffsets
_NAMED_SEGMENT = 6  # of NamedData

_SMALLEST = 4096
"""Bytes below which sharing is not worth a look."""


def share_constants(path: Path, alignment: int) -> int:
    """Rewrite a program in place, with the segments' alignment kept; return the bytes saved."""
    size = path.stat().st_size
    with open(path, "r+b") as file:
        with mmap.mmap(file.fileno(), size) as data:
            end = _share(data, alignment)
        file.truncate(end)
    return size - end


def _share(data: mmap.mmap, alignment: int) -> int:
    """Move every segment to where it goes; return the end of the last."""
    from flatbuffers.number_types import Uint32Flags
    from flatbuffers.table import Table

    magic, _, program_size, base, _ = _HEADER.unpack_from(data, _HEADER_AT)
    assert magic == b"eh00", magic
    head = bytearray(data[:program_size])
    program = Table(head, *struct.unpack_from("<I", head))
    named = {_number(entry, _NAMED_SEGMENT, Uint32Flags) for entry in _tables(program, _NAMED_DATA)}
    segments = _tables(program, _SEGMENTS)
    tensors = _tensors(program, segments)
    end = 0
    for index, segment in enumerate(segments):
        at, size = _number(segment, _OFFSET), _number(segment, _SIZE)
        to = _twin(data, base, tensors, at, size) if index in named and size >= _SMALLEST else None
        if to is None:
            to = -(-end // alignment) * alignment
            data.move(base + to, base + at, size)
            end = to + size
        if to != at:
            struct.pack_into("<Q", head, segment.Pos + segment.Offset(_OFFSET), to)
    struct.pack_into("<Q", head, _SEGMENTS_SIZE_AT, end)
    data[:program_size] = bytes(head)
    return int(base + end)


def _tensors(program: Table, segments: list[Table]) -> list[int]:
    """Return where each constant tensor begins, counted as segments are."""
    from flatbuffers.number_types import Uint32Flags
    from flatbuffers.table import Table

    field = program.Offset(_CONSTANT_SEGMENT)
    constants = Table(program.Bytes, program.Indirect(program.Pos + field))
    offsets = constants.Offset(_OFFSETS)
    if not offsets or not constants.VectorLen(offsets):
        return []
    index = _number(constants, _SEGMENT_INDEX, Uint32Flags)
    # They are looked for where they lie before anything moves: the first segment is the one that stays.
    assert index == 0 and _number(segments[0], _OFFSET) == 0, index  # noqa: PT018
    count = constants.VectorLen(offsets)
    return list(struct.unpack_from(f"<{count}Q", program.Bytes, constants.Vector(offsets)))


def _twin(data: mmap.mmap, base: int, tensors: list[int], at: int, size: int) -> int | None:
    """Return where a tensor holds the same bytes."""
    with memoryview(data) as view, view[base + at :][:size] as own:
        for start in tensors:
            with view[base + start :][:size] as other:
                if own[:64] == other[:64] and own == other:
                    return start
    return None


def _tables(table: Table, slot: int) -> list[Table]:
    from flatbuffers.table import Table

    field = table.Offset(slot)
    first = table.Vector(field)
    return [Table(table.Bytes, table.Indirect(first + 4 * i)) for i in range(table.VectorLen(field))]


def _number(table: Table, slot: int, flags: Any = None) -> int:
    from flatbuffers.number_types import Uint64Flags

    field = table.Offset(slot)  # 0 where the value is the default, 0
    return int(table.Get(flags or Uint64Flags, table.Pos + field)) if field else 0
