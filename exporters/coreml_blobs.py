"""Writes the weight file of an ML Program, constant after constant, none of them held in memory.

The format is described in `mil.blob`, which reads it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from torch import Tensor

from slm_export.exporters.mil.blob import ALIGNMENT, BY_NAME, SENTINEL, VERSION

_METADATA = struct.Struct("<IIQQQ")


class BlobWriter:
    """A weight file being written; equal constants are stored once."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._file.write(bytes(ALIGNMENT))
        self._count = 0
        self._offsets: dict[tuple[str, bytes], int] = {}

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._file.seek(0)
            self._file.write(struct.pack("<II", self._count, VERSION))
        self._file.close()

    def small(self, element: str, data: bytes) -> int:
        """Store a constant that may be there already; return its offset."""
        key = (element, hashlib.sha256(data).digest())
        if key not in self._offsets:
            self._offsets[key] = self.write(element, len(data), [data])
        return self._offsets[key]

    def tensor(self, element: str, values: Tensor, unused: int = 0) -> int:
        """Store a tensor, or bytes of packed elements, some bits of the last unused; return its offset."""
        data = values.contiguous().view(-1).numpy()
        return self.write(element, data.nbytes, [data.data], unused)

    def write(self, element: str, size: int, parts: Iterable[bytes | memoryview], unused: int = 0) -> int:
        """Store ``size`` bytes that arrive in parts; return the offset of their metadata."""
        offset = self._file.tell()
        stored = BY_NAME[element].stored
        assert stored is not None, element
        metadata = _METADATA.pack(SENTINEL, stored, size, offset + ALIGNMENT, unused)
        self._file.write(metadata.ljust(ALIGNMENT, b"\0"))
        written = sum(self._file.write(part) for part in parts)
        assert written == size, (written, size)
        self._file.write(bytes(-written % ALIGNMENT))
        self._count += 1
        return offset
