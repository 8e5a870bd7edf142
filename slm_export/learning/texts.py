"""Text to learn from and to measure on: read, checked, and split so that the two share nothing.

    FILE.txt, .py, .md, ...   UTF-8; a line that holds only a form feed ends a document
    FILE.jsonl                one document per line: {"text": ...}, or {"messages": [...]} put through the chat template
    FOLDER                    every file in it, sorted by path; what is not UTF-8 text is left out and named

Empty documents and exact duplicates are left out and counted. Training and held-out text share no run of 13 words
(the length that Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C, found by); text that is given
as held-out and does is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slm_export.errors import InputError

RUN = 13
"""Words in a row that training and held-out text must not share."""
HELD_OUT_SHARE = 0.1
"""Of the characters, where no held-out text is given."""
_FEED = re.compile(r"^\f[ \t]*\r?$\n?", re.MULTILINE)
_WORD = re.compile(r"\w+")
_NAMED = 8
_TRIED = 100

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
        return _sha256(self.documents)

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


@dataclass(frozen=True)
class Split:
    """What is learned from and what is only measured on."""

    training: tuple[Document, ...]
    held_out: tuple[Document, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def sha256(self) -> str:
        """Of both, apart."""
        return hashlib.sha256(f"{_sha256(self.training)} {_sha256(self.held_out)}".encode()).hexdigest()


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


def split(texts: Texts, held_out: Texts | None, share: float = HELD_OUT_SHARE) -> Split:
    """Return training and held-out documents that share no run of 13 words.

    Given   held_out: given by the user; None: documents of ``texts`` that share no run with any that is learned from

    Raises:
        InputError: the given ones overlap, or none can be held out.
    """
    if held_out is not None:
        _refuse_overlap(texts.documents, held_out.documents)
        return Split(texts.documents, held_out.documents)
    chosen, clashing = _disjoint(texts.documents, share)
    if not chosen or len(chosen) == len(texts.documents):
        raise InputError(
            f"of {len(texts.documents)} documents none can be held out to measure on: each shares a run of {RUN} words "
            "with another, or there is only one; give held-out text of its own with --held-out"
        )
    training = tuple(d for index, d in enumerate(texts.documents) if index not in chosen)
    note = f"{len(chosen)} of {len(texts.documents)} documents were held out to measure on"
    if clashing:
        note += (
            f"; {clashing} others could not be, because they share a run of {RUN} words with training text"
        )
    return Split(training, tuple(texts.documents[i] for i in sorted(chosen)), (note,))


def runs_of(text: str) -> set[int]:
    """Return the hashes of all runs of 13 words; of a shorter text, of the whole."""
    words = _WORD.findall(text.lower())
    if len(words) < RUN:
        return {_hash(tuple(words))} if words else set()
    return {_hash(tuple(words[i : i + RUN])) for i in range(len(words) - RUN + 1)}


def _hash(words: tuple[str, ...]) -> int:
    # Not hash(): that of texts is another in every process, and a split must be the same.
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest(), "big")


def overlap(training: Sequence[Document], held_out: Sequence[Document]) -> list[tuple[str, str]]:
    """Return pairs (held-out document, training document) that share a run of 13 words, one for each held-out one."""
    owners: dict[int, list[int]] = {}
    for index, document in enumerate(held_out):
        for run in runs_of(document.text):
            owners.setdefault(run, []).append(index)
    found: dict[int, str] = {}
    for document in training:
        for run in runs_of(document.text):
            for index in owners.get(run, ()):
                found.setdefault(index, document.where)
    return [(held_out[index].where, where) for index, where in sorted(found.items())]


def _refuse_overlap(training: Sequence[Document], held_out: Sequence[Document]) -> None:
    pairs = overlap(training, held_out)
    if pairs:
        named = "; ".join(f"{ours} with {theirs}" for ours, theirs in pairs[:_NAMED])
        more = f" and {len(pairs) - _NAMED} more" if len(pairs) > _NAMED else ""
        raise InputError(
            f"{len(pairs)} of {len(held_out)} held-out documents share a run of {RUN} words with training text, and a "
            f"figure on them would mean nothing: {named}{more}; take them out of one of the two"
        )


def _disjoint(documents: Sequence[Document], share: float) -> tuple[set[int], int]:
    """Return indices of documents to hold out, and how many candidates could not be.

    Candidates come in the order of a hash of their text, so that a split does not depend on names. One that shares a
    run with a document that stays in training stays there too, until nothing changes.
    """
    ranked = sorted(range(len(documents)), key=lambda i: hashlib.sha256(documents[i].text.encode()).digest())
    wanted = share * sum(len(document.text) for document in documents)
    # Twice as many as needed are tried, and of a small text all, because some will clash.
    candidates: list[int] = []
    room = 2 * wanted
    for index in ranked:
        if room <= 0 and len(candidates) >= _TRIED:
            break
        candidates.append(index)
        room -= len(documents[index].text)
    runs = {index: runs_of(documents[index].text) for index in candidates}
    owners: dict[int, set[int]] = {}
    for index, found in runs.items():
        for run in found:
            owners.setdefault(run, set()).add(index)
    chosen, pending = set(candidates), [i for i in range(len(documents)) if i not in runs]
    while pending:
        index = pending.pop()
        for run in runs.get(index) or runs_of(documents[index].text):
            for other in owners.get(run, ()):
                if other in chosen and other != index:
                    chosen.remove(other)
                    pending.append(other)
    clashing = len(candidates) - len(chosen)
    return _as_many_as_wanted(
        [i for i in candidates if i in chosen], documents, runs, owners, wanted
    ), clashing


def _as_many_as_wanted(
    chosen: Sequence[int],
    documents: Sequence[Document],
    runs: dict[int, set[int]],
    owners: dict[int, set[int]],
    wanted: float,
) -> set[int]:
    """Return the first of these, with all that they share runs with: what is left of them is learned from."""
    allowed, taken, characters = set(chosen), set[int](), 0
    for index in chosen:
        if characters >= wanted:
            break
        pending = [index]
        while pending:
            one = pending.pop()
            if one in taken:
                continue
            taken.add(one)
            characters += len(documents[one].text)
            pending += [o for run in runs[one] for o in owners[run] if o in allowed and o not in taken]
    return taken


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


def _sha256(documents: Sequence[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        data = document.text.encode()
        digest.update(f"{len(data)}\n".encode() + data)
    return digest.hexdigest()
