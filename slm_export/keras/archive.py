"""A ``.keras`` file before TensorFlow sees it: a zip archive of a configuration and weights, and nothing else.

TensorFlow and HDF5 are native code, and unpack what they are told to. So what an archive says of itself is looked at
first, with the standard library alone: which names it has, how large they will be, and that the configuration is one.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

from slm_export.errors import InputError
from slm_export.foreign import reading

CONFIG, METADATA = "config.json", "metadata.json"
WEIGHTS = ("model.weights.h5", "model.weights.npz", "model.weights.json")
MOST_ENTRIES = 10_000
LARGEST_TEXT = 64 << 20
"""Bytes of the configuration; those of large models have some 10 MB."""
GROWTH = 20
"""How many times its size an archive may become. Keras stores weights as they are; floats compress by a few times."""
SMALL = 64 << 20
"""Bytes that any archive may become."""


def check_archive(path: Path) -> None:
    """Refuse what is no archive of Keras, or would fill memory or other folders.

    Raises:
        InputError: it is no zip file, has entries that no Keras writes, or grows beyond what a model needs.
    """
    with reading(path, "Keras cannot read it", "save the model again"):
        try:
            with zipfile.ZipFile(path) as archive:
                _check_entries(path, archive.infolist())
                config = _object(archive, CONFIG)
                _object(archive, METADATA)
        except (zipfile.BadZipFile, zlib.error, EOFError, RecursionError) as error:
            raise ValueError(str(error) or type(error).__name__) from error
        if not isinstance(config.get("class_name"), str):
            raise ValueError(f"{CONFIG} names no class")


def _check_entries(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    names = [entry.filename for entry in entries]
    if len(names) > MOST_ENTRIES:
        raise ValueError(f"{len(names):,} entries are too many")
    if len(set(names)) < len(names):
        raise ValueError("two entries have one name")
    for name in names:
        parts = name.rstrip("/").split("/")
        if not name.isprintable() or "\\" in name or ":" in name or {"", ".", ".."} & set(parts):
            raise InputError(
                f"{path}: an entry leads out of the archive: {name[:200]!r}; save the model again"
            )
    if missing := [name for name in (CONFIG, METADATA) if name not in names]:
        raise ValueError(f"it has no {missing[0]}")
    if not set(WEIGHTS) & set(names):
        raise ValueError("it has no weights")
    becomes, is_now = sum(entry.file_size for entry in entries), path.stat().st_size
    if becomes > max(SMALL, GROWTH * is_now):
        raise InputError(
            f"{path}: {is_now:,} bytes say that they become {becomes:,}, which no model's do; save the model again"
        )


def _object(archive: zipfile.ZipFile, name: str) -> dict[str, Any]:
    entry = archive.getinfo(name)
    if entry.file_size > LARGEST_TEXT:
        raise ValueError(f"{name} has {entry.file_size:,} bytes")
    found = json.loads(archive.read(entry))
    if not isinstance(found, dict):
        raise ValueError(f"{name} holds no object")
    return found
