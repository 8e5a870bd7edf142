"""Tables of a flatbuffer, read where they lie; of fields only what a reader asks for is looked at."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any


class Record:
    """A table of a flatbuffer. Fields are called by their number in the schema, a union being two: type, value.

    Raises:
        struct.error: the bytes end before what they are said to hold.
        ValueError: a text or a table is not there.
    """

    def __init__(self, data: bytes | bytearray, at: int) -> None:
        self.data, self.at = data, at

    @staticmethod
    def root(data: bytes | bytearray, at: int = 0) -> Record:
        """Return the root of the flatbuffer that begins at this byte."""
        return Record(data, at + _unpack("I", data, at))

    def place(self, field: int) -> int | None:
        """Return where a field lies; None where it is left out, as one with its default is."""
        table = self.at - _unpack("i", self.data, self.at)
        slot = 4 + 2 * field
        offset = _unpack("H", self.data, table + slot) if slot < _unpack("H", self.data, table) else 0
        return self.at + offset if offset else None

    def number(self, field: int, form: str = "I") -> int:
        """Return a number of a form of `struct`: I uint, i int, H ushort, B ubyte, Q ulong."""
        place = self.place(field)
        return 0 if place is None else _unpack(form, self.data, place)

    def numbers(self, field: int, form: str = "I") -> Sequence[int]:
        """Return a vector of numbers."""
        first, count = self._vector(field)
        return struct.unpack_from(f"<{count}{form}", self.data, first)

    def text(self, field: int) -> str:
        """Return a string."""
        first, count = self._vector(field)
        return bytes(self.data[first : first + count]).decode()

    def record(self, field: int) -> Record:
        """Return a table."""
        place = self.place(field)
        if place is None:
            raise ValueError(f"field {field} is left out")
        return Record(self.data, place + _unpack("I", self.data, place))

    def records(self, field: int) -> list[Record]:
        """Return a vector of tables."""
        first, count = self._vector(field)
        places = range(first, first + 4 * count, 4)
        return [Record(self.data, place + _unpack("I", self.data, place)) for place in places]

    def _vector(self, field: int) -> tuple[int, int]:
        """Return where the first element is, and how many there are."""
        if self.place(field) is None:
            return 0, 0
        at = self.record(field).at
        return at + 4, _unpack("I", self.data, at)


def _unpack(form: str, data: Any, at: int) -> int:
    (value,) = struct.unpack_from(f"<{form}", data, at)
    return int(value)
