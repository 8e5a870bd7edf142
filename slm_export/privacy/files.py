"""Whole files without their personal data: plain text, and JSONL of which every text is changed and no key.

The result appears whole or not at all, in a folder that was not there; the originals are only read. A file that is
neither, or that is not UTF-8, ends the work: what was left out would pass for clean.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from slm_export.errors import InputError
from slm_export.machine import machine_errors
from slm_export.privacy.anonymise import Anonymiser, values

REPORT = "anonymised.json"
_TEXT, _LINES = (".txt", ".md"), (".jsonl",)
LARGEST = 1 << 30
"""Bytes of one file."""
_PART = 100_000
"""Characters of a text that are searched at a time; cut at blank lines, or at line ends where there is none."""


@dataclass(frozen=True)
class Done:
    """What came of it; nothing in here is from the texts."""

    folder: Path
    files: int
    characters: int
    found: dict[str, int]
    """Kind -> how many."""
    blind_to: tuple[str, ...]


def anonymise_files(
    sources: Sequence[Path], out: Path, anonymiser: Anonymiser, advance: Callable[[int, str], None]
) -> Done:
    """Write the sources, files or folders of them, without personal data into the folder ``out``.

    Raises:
        InputError: no such source, nothing in it that can be read, two of one name, or ``out`` is there.
        MachineError: the disk is full.
    """
    if os.path.lexists(out):
        raise InputError(f"{out}: is there already; name a folder that is not")
    inputs = _inputs(sources)
    partial = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    characters = 0
    try:
        with machine_errors("write the texts", out):
            for name, path in inputs.items():
                text = _read(path)
                made = _changed(path, text, anonymiser)
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).write_text(made, encoding="utf-8", newline="")
                characters += len(text)
                advance(1, name)
            done = Done(
                out,
                len(inputs),
                characters,
                dict(sorted(anonymiser.found.items())),
                anonymiser.finder.blind_to,
            )
            (partial / REPORT).write_text(json.dumps(_report(done, anonymiser), indent=2), encoding="utf-8")
            os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return done


def _report(done: Done, anonymiser: Anonymiser) -> dict[str, object]:
    return {
        "how": anonymiser.how,
        "entities": list(anonymiser.finder.kinds),
        "ner": anonymiser.finder.ner,
        "files": done.files,
        "characters": done.characters,
        "found": done.found,
        "not_found_by_this": list(done.blind_to),
    }


def _inputs(sources: Sequence[Path]) -> dict[str, Path]:
    """Return names below the result -> files, in order."""
    found: dict[str, Path] = {}
    for source in sources:
        if not source.exists():
            raise InputError(f"{source}: no such file or folder")
        files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
        if not files:
            raise InputError(f"{source}: holds no files")
        for file in files:
            if file.suffix not in (*_TEXT, *_LINES):
                raise InputError(
                    f"{file}: not {', '.join((*_TEXT, *_LINES))}; convert it, or take it out of the folder"
                )
            name = file.name if source.is_file() else file.relative_to(source).as_posix()
            if name in found or name == REPORT:
                raise InputError(f"{file}: another file is called {name} too; give it another name")
            found[name] = file
    return found


def _read(path: Path) -> str:
    if path.stat().st_size > LARGEST:
        raise InputError(f"{path}: larger than {LARGEST >> 20} MiB; cut it")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        # The error holds the bytes; they must not be told.
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from None


def _changed(path: Path, text: str, anonymiser: Anonymiser) -> str:
    if path.suffix in _TEXT:
        return _in_parts(text, anonymiser)
    lines = []
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.strip():
            lines.append(line)
            continue
        try:
            document = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(f"{path}, line {number}: not JSON") from None
        changed = values(document, lambda value: _in_parts(value, anonymiser))
        lines.append(json.dumps(changed, ensure_ascii=False) + line[len(line.rstrip("\r\n")) :])
    return "".join(lines)


def _in_parts(text: str, anonymiser: Anonymiser) -> str:
    return "".join(anonymiser.text(part) for part in _parts(text))


def _parts(text: str) -> Iterator[str]:
    """Yield a text in parts that no finding is likely to lie across."""
    start = 0
    while len(text) - start > _PART:
        end = start + _PART
        for mark in ("\n\n", "\n", " "):
            cut = text.rfind(mark, start + _PART // 2, end)
            if cut >= 0:
                end = cut + len(mark)
                break
        yield text[start:end]
        start = end
    yield text[start:]
