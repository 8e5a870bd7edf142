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

import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from slm_export.exporters.executorch_flatbuffer import Record

_HEADER = struct.Struct("<4sIQQQ")
"""Behind root offset and file identifier: magic, length, program size, offset of the segments, their size."""
_HEADER_AT, _SEGMENTS_SIZE_AT = 8, 8 + 24
_MAGIC = b"eh00"

SEGMENTS, CONSTANT_SEGMENT, NAMED_DATA = 4, 5, 7  # fields of Program
OFFSET, SIZE = 0, 1  # of DataSegment
SEGMENT_INDEX, OFFSETS = 0, 1  # of SubsegmentOffsets
KEY, NAMED_SEGMENT = 0, 1  # of NamedData

_SMALLEST = 4096
"""Bytes below which sharing is not worth a look."""
_CHUNK = 1 << 20

Contents = Mapping[str, Callable[[], bytes]]
"""Key of a named constant -> what returns the bytes that stand-ins were emitted for."""


def write_program(emitted: Path, path: Path, contents: Contents, alignment: int) -> None:
    """Write ``path`` from an emitted program, its segments aligned to so many bytes."""
    with open(emitted, "rb") as source, open(path, "wb") as target:
        _Layout(source, target, contents, alignment).write()


def read_head(file: BinaryIO) -> tuple[bytearray, int]:
    """Return the head of a program, and where its segments begin; ValueError where the file is no program."""
    start = file.read(_HEADER_AT + _HEADER.size)
    if len(start) < _HEADER_AT + _HEADER.size or start[_HEADER_AT:][: len(_MAGIC)] != _MAGIC:
        raise ValueError("no ExecuTorch program")
    _, _, size, base, _ = _HEADER.unpack_from(start, _HEADER_AT)
    if size > file.seek(0, os.SEEK_END):
        raise ValueError("the file ends too early")
    file.seek(0)
    return bytearray(file.read(size)), base


class _Layout:
    def __init__(self, source: BinaryIO, target: BinaryIO, contents: Contents, alignment: int) -> None:
        self._source, self._target, self._contents, self._alignment = source, target, contents, alignment
        self._head, self._base = read_head(source)
        program = Record.root(self._head)
        self._segments = program.records(SEGMENTS)
        self._keys = {data.number(NAMED_SEGMENT): data.text(KEY) for data in program.records(NAMED_DATA)}
        self._tensors = self._find_tensors(program)

    def write(self) -> None:
        end = 0
        for index, segment in enumerate(self._segments):
            at, size = segment.number(OFFSET, "Q"), segment.number(SIZE, "Q")
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
            self._put(segment, OFFSET, to)
            self._put(segment, SIZE, size)
        struct.pack_into("<Q", self._head, _SEGMENTS_SIZE_AT, end)
        self._target.seek(0)
        self._target.write(self._head)

    def _find_tensors(self, program: Record) -> Sequence[int]:
        """Return where each constant tensor begins, counted as segments are."""
        if program.place(CONSTANT_SEGMENT) is None:
            return []
        constants = program.record(CONSTANT_SEGMENT)
        # The first segment is the one that stays where it is.
        assert constants.number(SEGMENT_INDEX) == 0
        return constants.numbers(OFFSETS, "Q")

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

    def _put(self, segment: Record, field: int, value: int) -> None:
        place = segment.place(field)  # None where the value is the default, 0
        assert place is not None or not value
        if place is not None:
            struct.pack_into("<Q", self._head, place, value)
