"""``config.json`` and the headers of safetensors files, read as they are: without torch, and without a value."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slm_export.errors import InputError
from slm_export.jsonfile import read_object
from slm_export.source.shard_files import INDEX, read_index, shard_files

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Type of a tensor of floats -> bytes of a value."""
_LARGEST = 100 << 20  # bytes of a header, as the safetensors library has it
_MOST = 1 << 40  # rows or columns


def read_config(path: Path) -> Mapping[str, Any]:
    """Return a configuration; InputError where there is none, or a broken one."""
    if not path.is_file():
        raise InputError(f"{path.parent}: no config.json; give a Hugging Face model folder")
    return read_object(path)


def read_tensors(folder: Path) -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
    """Yield name -> (shape, type) of every tensor of floats."""
    for file in shard_files(folder, read_index(folder / INDEX)):
        for name, entry in _header(file).items():
            if name != "__metadata__" and entry["dtype"] in FLOATS:
                yield name, (tuple(entry["shape"]), entry["dtype"])


def _header(path: Path) -> Mapping[str, Any]:
    """Return the header of a safetensors file: its length in 8 bytes, little end first, then JSON.

    Source: the format's description, https://huggingface.co/docs/safetensors.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= _LARGEST:
                raise ValueError(f"a header of {length:,} bytes")
            header: dict[str, Any] = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                _refuse_no_tensor(name, entry)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: truncated or corrupt ({error}); download the model again") from None
    return header


def _refuse_no_tensor(name: str, entry: Any) -> None:
    """Raise unless an entry has a type and a shape."""
    if not isinstance(entry["dtype"], str):
        raise TypeError(f"tensor {name} has no type")
    if any(type(size) is not int or not 0 <= size < _MOST for size in entry["shape"]):
        raise ValueError(f"tensor {name} has no shape")
