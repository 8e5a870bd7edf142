"""The licence of a model: its name, as the card says it, and its texts, which go where the weights go.

A text is a file of the model's own folder that is called what such files are called: ``LICENSE``, ``NOTICE.txt``,
``USE_POLICY.md``, .... Most licences want to be passed on with what they license.
"""

from __future__ import annotations

import hashlib
import re
from fnmatch import fnmatchcase
from pathlib import Path

from slm_export.bundles.checksums import FileEntry, sha256_entries, sha256_file
from slm_export.errors import InputError
from slm_export.source.card import front_matter, listed

FOLDER = "licences"
"""Of a bundle."""
LARGEST = 4 << 20
"""Bytes of one text; the longest that are known have some 40 kB, as PDF some 400 kB."""
_NAMES = (
    "license*",
    "licence*",
    "model[_-]license*",
    "copying*",
    "copyright*",
    "notice*",
    "patents*",
    "use[_-]policy*",
    "acceptable[_-]use*",
    "prohibited[_-]use*",
    "terms[_-]of[_-]use*",
    "third[_-]party*",
    "thirdparty*",
)
PATTERNS = tuple(made for name in _NAMES for made in (name, name.upper(), name.title()))
"""The same for a hub, whose patterns tell large letters from small ones."""
_NO_TEXTS = (".py", ".json", ".jsonl", ".safetensors", ".bin", ".pt", ".gguf", ".onnx")


def licence_files(folder: Path) -> tuple[Path, ...]:
    """Return the licence texts of a model's folder, sorted by name; of a model that is one file, none.

    Raises:
        InputError: one is no regular file, is longer than any licence, or is a link to something else, which would
            otherwise be given away with the bundle.
    """
    if not folder.is_dir():
        return ()
    found = [file for file in sorted(folder.iterdir()) if _is_named_so(file.name) and not file.is_dir()]
    for file in found:
        _check(file)
    return tuple(found)


def licence_texts(folder: Path) -> tuple[str, ...]:
    """Return where the texts are in a bundle."""
    return tuple(f"{FOLDER}/{file.name}" for file in licence_files(folder))


def copy_licences(folder: Path, bundle: Path) -> None:
    """Write the licence texts of a model's folder into ``licences/`` of a bundle; no folder where there are none."""
    for file in licence_files(folder):
        (bundle / FOLDER).mkdir(exist_ok=True)
        (bundle / FOLDER / file.name).write_bytes(file.read_bytes())


def licence_of(folder: Path) -> str | None:
    """Return the licence that a model card's front matter names, or several; "other" has its name beside it."""
    card = front_matter(folder)
    names = listed("license", card)
    if names == ["other"]:
        names = listed("license_name", card) or names
    return ", ".join(names) or None


def licences_sha256(folder: Path) -> str | None:
    """Return a hash of the licence's name and texts; None of a model that has neither."""
    name = licence_of(folder)
    entries = [
        FileEntry(path=file.name, bytes=file.stat().st_size, sha256=sha256_file(file))
        for file in licence_files(folder)
    ]
    if name is None and not entries:
        return None
    return hashlib.sha256(f"{name}\n{sha256_entries(entries)}".encode()).hexdigest()


def _is_named_so(name: str) -> bool:
    lower = name.lower()
    return any(fnmatchcase(lower, pattern) for pattern in _NAMES) and not lower.endswith(_NO_TEXTS)


def _check(file: Path) -> None:
    try:
        target = file.resolve(strict=True)
        size = target.stat().st_size
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "a link that leads nowhere"
        raise InputError(
            f"{file}: a licence text that cannot be read: {reason}; download the model again"
        ) from None
    # The hub's cache holds links to files that are called by their hash.
    cached = target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{40,64}", target.name)
    if not target.is_file():
        raise InputError(f"{file}: named as a licence text, but not a regular file; remove it")
    if file.is_symlink() and not (cached or _is_named_so(target.name)):
        raise InputError(
            f"{file}: a link to {target}, which is not called a licence; put the text itself there"
        )
    if size > LARGEST:
        raise InputError(f"{file}: {size:,} bytes, which is no licence's text; rename or remove it")
