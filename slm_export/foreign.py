"""Files of strangers, read by code that believes what they say: every way in which that breaks is one `InputError`.

Generated readers of flatbuffers have no verifier in Python. An offset out of a damaged file leads them anywhere:
beyond the bytes (struct.error), to a table that is not there (AttributeError), to a negative size (TypeError). So the
errors of a mistake of ours are among those that are caught here; tests of good files are what finds those.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slm_export.errors import InputError, SlmExportError

_BROKEN = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    RuntimeError,  # torch: a shape that its bytes do not fill
    struct.error,
)


@contextmanager
def reading(
    path: Path, what: str = "cannot be read", remedy: str = "export the model again"
) -> Iterator[None]:
    """Read a file whose content may be anything.

    Raises:
        InputError: ``PATH: WHAT: reason; REMEDY``; also where there is no regular file or folder: a pipe would block.
    """
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise InputError(f"{path}: {what}: neither a file nor a folder; {remedy}")
        yield
    except SlmExportError:
        raise
    except Exception as error:
        # protobuf's error, which is of no use to import for its name, derives from Exception alone
        if not isinstance(error, _BROKEN) and type(error).__name__ != "DecodeError":
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: {what}: {reason}; {remedy}") from error
