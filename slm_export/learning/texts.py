"""Text to learn from and to measure on: read and checked.

    FILE.txt, .py, .md, ...   UTF-8; a line that holds only a form feed ends a document
    FILE.jsonl                one document per line: {"text": ...}, or {"messages": [...]} put through the chat template
    FOLDER                    every file in it, sorted by path; what is not UTF-8 text is left out and named

Empty documents and exact duplicates are left out and counted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_export.errors import InputError

_FEED = re.compile(r"^\f[ \t]*\r?$\n?", re.MULTILINE)

Chat = Callable[[Any, str], str]
"""Messages and where they stand -> their text."""


@dataclass(frozen=True)
class Document:
    """One text and where it is from."""

    where: str
    text: str


@dataclass(frozen=True)
class Texts:
    """Documents, and what was left out of the files."""

    documents: tuple[Document, ...]
    files: int
    left_out: tuple[str, ...] = ()
    """Files that were not read, each with the reason."""
    empty: int = 0
    duplicates: int = 0

    @property
    def characters(self) -> int:
        """Characters in all."""
        return sum(len(document.text) for document in self.documents)

    @property
    def sha256(self) -> str:
        """Of the documents in their order, not of where they lie."""
        return sha256_of(self.documents)

    def facts(self) -> dict[str, Any]:
        """Return what a report says of them."""
        return {
            "files": self.files,
            "documents": len(self.documents),
            "characters": self.characters,
            "sha256": self.sha256,
            "left_out": list(self.left_out),
            "empty_documents": self.empty,
            "duplicate_documents": self.duplicates,
        }


def read_texts(paths: Sequence[Path], chat: Chat | None = None) -> Texts:
    """Read files and folders.

    Given   chat: makes text of the messages of a JSONL line; None: such lines are refused

    Raises:
        InputError: nothing there, a file given by name that is not UTF-8 text, a broken line, no text at all.
    """
    documents: list[Document] = []
    left_out: list[str] = []
    files = empty = duplicates = 0
    seen: set[bytes] = set()
    for path in paths:
        for file, given in _files(path):
            found = _read(file, given, chat)
            if isinstance(found, str):
                left_out.append(f"{file}: {found}")
                continue
            files += 1
            for document in found:
                key = hashlib.sha256(document.text.strip().encode()).digest()
                if not document.text.strip():
                    empty += 1
                elif key in seen:
                    duplicates += 1
                else:
                    seen.add(key)
                    documents.append(document)
    if not documents:
        names = ", ".join(map(str, paths))
        why = f" ({len(left_out)} files were no UTF-8 text, {left_out[0]} first)" if left_out else ""
        raise InputError(f"{names}: no text to learn from{why}; give UTF-8 text or JSONL files")
    return Texts(tuple(documents), files, tuple(left_out), empty, duplicates)


def _files(path: Path) -> Iterator[tuple[Path, bool]]:
    """Yield files, and whether each was given by its name."""
    if path.is_dir():
        found = False
        for file in sorted(path.rglob("*")):
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts):
                found = True
                yield file, False
        if not found:
            raise InputError(f"{path}: this folder holds no files")
    elif path.is_file():
        yield path, True
    else:
        problem = "is not a regular file" if path.exists() else "no such file or folder"
        raise InputError(f"{path}: {problem}; give UTF-8 text or JSONL files, or a folder of them")


def _read(file: Path, given: bool, chat: Chat | None) -> list[Document] | str:
    """Return the documents of a file; of one that was not given by name, the reason why it is none."""
    problem = ""
    try:
        data = file.read_bytes()
        if b"\0" in data[: 1 << 16]:
            problem = "not UTF-8 text (it looks like a binary file, or UTF-16)"
        else:
            text = data.decode("utf-8-sig")
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 text (byte 0x{data[error.start]:02x} at offset {error.start})"
    if problem:
        if given:
            raise InputError(f"{file}: {problem}; convert it to UTF-8")
        return problem
    if file.suffix == ".jsonl":
        return list(_lines(file, text, chat))
    return [
        Document(f"{file}" + (f", document {number}" if number else ""), part)
        for number, part in enumerate(_FEED.split(text))
    ]


def _lines(file: Path, text: str, chat: Chat | None) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            example = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not valid JSON ({error})") from None
        if isinstance(example, dict) and isinstance(example.get("text"), str):
            yield Document(where, example["text"])
        elif isinstance(example, dict) and isinstance(example.get("messages"), list) and chat is not None:
            yield Document(where, chat(example["messages"], where))
        else:
            raise InputError(
                f'{where}: expected {{"text": ...}}' + (' or {"messages": [...]}' if chat else "")
            )


def sha256_of(documents: Sequence[Document]) -> str:
    """Return the hash of the texts, in their order."""
    digest = hashlib.sha256()
    for document in documents:
        data = document.text.encode()
        digest.update(f"{len(data)}\n".encode() + data)
    return digest.hexdigest()
