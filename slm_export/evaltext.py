"""The held-out text that artifacts are judged on: documents, token windows, sentences.

A sample is shipped, so that a verdict needs no network and repeats to the bit; a user's own text is
closer to what the model will meet, and can be given instead.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path

from slm_export.errors import InputError

MINIMUM_TAIL = 32
"""A last window of fewer tokens is dropped: its figures would be mostly those of a cold start."""

MAXIMUM_BYTES = 64 * 2**20
"""A larger evaluation text is refused: it would be read whole, and only its first windows are used."""

_SEPARATOR = re.compile(r"^\f[ \t]*\r?$\n?", re.MULTILINE)


def load_documents(path: Path | None, purpose: str = "evaluation") -> tuple[str, ...]:
    """Return the documents of a text file, or of the shipped sample.

    Given   UTF-8 text; a line that holds only a form feed ends a document
            purpose: what the text is for, as errors name it
    Result  the documents in order, none of them blank; a file without form feeds is one document
    """
    text = _shipped("sample.txt") if path is None else _read_text(path, purpose)
    documents = tuple(part for part in _SEPARATOR.split(text) if part.strip())
    if not documents:
        raise InputError(f"{path}: the {purpose} text is empty; give a UTF-8 file with some pages of text")
    return documents


def text_sha256(documents: Sequence[str]) -> str:
    """Return the sha256 that tells two evaluation texts apart."""
    return hashlib.sha256("\f".join(documents).encode()).hexdigest()


def load_sentences() -> tuple[str, ...]:
    """Return the shipped sentences that embeddings and class scores are compared on."""
    return tuple(line for line in _shipped("sentences.txt").splitlines() if line.strip())


def paragraphs(documents: Sequence[str]) -> Iterator[str]:
    """Yield what an encoder is given: the paragraphs of every document in turn."""
    for document in documents:
        yield from (part.strip() for part in document.split("\n\n") if part.strip())


def token_windows(
    documents: Sequence[str],
    encode: Callable[[str], list[int]],
    length: int,
    bos: int | None,
    limit: int,
) -> tuple[tuple[int, ...], ...]:
    """Cut documents into windows of at most ``length`` tokens, ``limit`` tokens in all.

    Given   ``bos``: the token that opens every window (it counts), or None
    Result  windows in rounds: the first of each document, then the second of each, so that few tokens
            already cover many documents; a tail (a document's, or what ``limit`` leaves) shorter than
            ``MINIMUM_TAIL`` is dropped
    """
    opening = () if bos is None else (bos,)
    if length <= len(opening) or limit < 1:
        raise ValueError(f"no window fits: length {length}, limit {limit}")
    windows: list[tuple[int, ...]] = []
    room, smallest = limit, min(MINIMUM_TAIL, length, limit)
    for chunk in _rounds(documents, encode, length - len(opening)):
        windows.append((opening + chunk)[:room])
        room -= len(windows[-1])
        if room < smallest:
            break
    if not windows:
        raise InputError(
            f"the text is too short: no document has {min(MINIMUM_TAIL, length)} tokens; give a longer text"
        )
    return tuple(windows)


def _rounds(
    documents: Sequence[str], encode: Callable[[str], list[int]], size: int
) -> Iterator[tuple[int, ...]]:
    """Yield the first chunk of every document, then the second of every document, ..."""
    tokens: dict[int, list[int]] = {}
    alive = list(range(len(documents)))
    start = 0
    while alive:
        still = []
        for index in alive:
            if index not in tokens:  # encoded when first reached: a small limit reads few documents
                tokens[index] = encode(documents[index])
            chunk = tuple(tokens[index][start : start + size])
            if len(chunk) >= min(MINIMUM_TAIL, size):
                still.append(index)
                yield chunk
        alive = still
        start += size


def _shipped(name: str) -> str:
    """Return a data file of this package, read as bytes so that no newline is translated."""
    return (resources.files("slm_export") / "data" / name).read_bytes().decode("utf-8")


def _read_text(path: Path, purpose: str) -> str:
    """Return a user's file as text, or say what is wrong with it."""
    try:
        if not path.is_file():
            problem = "is not a file" if path.exists() else "no such file"
            raise InputError(f"{path}: {problem}; the {purpose} text must be a UTF-8 text file")
        if path.stat().st_size > MAXIMUM_BYTES:
            raise InputError(
                f"{path}: larger than {MAXIMUM_BYTES >> 20} MiB; some hundred kilobytes of text are enough"
            )
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    if b"\0" in data:
        hint = "UTF-16; convert it to UTF-8" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "a binary file"
        raise InputError(f"{path}: not UTF-8 text (it looks like {hint})")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text (byte 0x{data[error.start]:02x} at offset {error.start}); "
            "convert it to UTF-8"
        ) from error
