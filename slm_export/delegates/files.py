"""Files that changed: what lies there is compared with the marks of the last look, whatever the watcher said.

watchfiles (Rust's notify) says when to look; a look at the start finds what changed while nothing ran. A change is one
of the content: its mark is the sha256. The text is read when the change is seen, so that a later change cannot lose it.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from slm_export.delegates.triggers import Trigger

LARGEST = 1 << 20
"""Bytes of an input."""
_BEGUN = "begun"
"""The mark that a first look took place."""


@dataclass(frozen=True)
class Change:
    """A file with content that was not seen there before."""

    path: Path
    text: str
    key: str
    marks: Mapping[str, str]
    problem: str = ""
    """Why it is no input; empty where it is one."""


def changes(trigger: Trigger, marks: Mapping[str, str]) -> Iterator[Change]:
    """Yield the files that changed since the marks.

    A first look takes what is there for known, unless ``existing`` says otherwise; it yields those as marks alone, with
    the problem ``"known"``.
    """
    first = _BEGUN not in marks
    for path in _files(trigger):
        try:
            found = path.stat()
            stamp = f"{found.st_mtime_ns} {found.st_size}"
            before = marks.get(str(path), "")
            if before.startswith(f"{stamp} "):
                continue
            digest, text, problem = _read(path, found.st_size)
        except FileNotFoundError:  # gone meanwhile
            continue
        except OSError as error:
            digest, text, problem, stamp, before = "", "", error.strerror or str(error), "", ""
        if before.endswith(f" {digest}") and digest:
            problem = "known"  # touched, and the same
        if first and not trigger.existing:
            problem = "known"
        yield Change(path, text, f"{path} {stamp} {digest}", {str(path): f"{stamp} {digest}"}, problem)


def begun() -> Mapping[str, str]:
    """Return the mark of a first look."""
    return {_BEGUN: "yes"}


def watched(trigger: Trigger) -> Path:
    """Return what a watcher is to look at: a file's folder, because files are replaced by renaming."""
    assert trigger.watch is not None
    path = Path(trigger.watch)
    return path if path.is_dir() else path.parent


def _files(trigger: Trigger) -> list[Path]:
    assert trigger.watch is not None
    path = Path(trigger.watch)
    if not path.is_dir():
        return [path] if path.is_file() else []
    return sorted(
        file for file in path.iterdir() if file.is_file() and fnmatch.fnmatch(file.name, trigger.match)
    )


def _read(path: Path, size: int) -> tuple[str, str, str]:
    if size > LARGEST:
        return f"{size} bytes", "", f"has {size:,} bytes; at most {LARGEST:,} are an input"
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    try:
        return digest, data.decode("utf-8"), ""
    except UnicodeDecodeError:
        return digest, "", "is not UTF-8 text"
