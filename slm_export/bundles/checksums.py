"""The files of a folder: sizes and SHA-256, in an order that depends on names only."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from slm_export.errors import InputError

_BLOCK = 1 << 20


def portable_path(path: str) -> str:
    """Return ``path`` if it names something below a folder on every system, else raise ValueError."""
    if not path.isprintable() or "\\" in path or ":" in path:
        raise ValueError(f"path {path!r} holds a character that a bundle may not use")
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"path {path!r} does not stay inside the bundle")
    return path


PortablePath = Annotated[str, AfterValidator(portable_path)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class FileEntry(BaseModel):
    """One file of a bundle; ``path`` is relative, with ``/`` between the parts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: PortablePath
    bytes: int = Field(ge=0)
    sha256: Sha256


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file in hex, or of a folder (such as a Core ML package) as a tree."""
    if path.is_dir():
        return sha256_entries(tree_files(path))
    digest = hashlib.sha256()
    block = memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def sha256_entries(entries: Iterable[FileEntry]) -> str:
    """Return the hash of a tree: the SHA-256 of its ``sha256sum`` listing, sorted by path."""
    lines = (f"{entry.sha256}  {entry.path}\n" for entry in sorted(entries, key=lambda entry: entry.path))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder."""
    if path.is_dir():
        return sum((path / name).lstat().st_size for name in scan(path)[0])
    return path.stat().st_size


def scan(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the plain files below ``folder``, and what is neither file nor folder (links, pipes, ...).

    Links are never followed: what lies outside the folder is not part of it.
    """
    plain: list[str] = []
    odd: list[str] = []
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                path = prefix + entry.name
                mode = entry.stat(follow_symlinks=False).st_mode
                if stat.S_ISDIR(mode):
                    pending.append(path + "/")
                else:
                    (plain if stat.S_ISREG(mode) else odd).append(path)
    return tuple(sorted(plain)), tuple(sorted(odd))


def tree_files(folder: Path) -> tuple[FileEntry, ...]:
    """Return every file below ``folder`` with size and hash, sorted by path.

    Refuses links and special files (they mean something else on the phone) and names that other systems
    cannot hold.
    """
    plain, odd = scan(folder)
    if odd:
        raise InputError(
            f"{folder / odd[0]}: not a plain file; a bundle holds plain files only, copy its content"
        )
    for path in plain:
        try:
            portable_path(path)
        except ValueError as error:
            raise InputError(f"{folder}: {error}; rename the file") from None
    return tuple(
        FileEntry(path=path, bytes=(folder / path).lstat().st_size, sha256=sha256_file(folder / path))
        for path in plain
    )
