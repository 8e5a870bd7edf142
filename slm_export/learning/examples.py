"""Labelled examples: JSONL, read strictly, and parted into those that teach and those that judge.

    classify   {"text": "...", "label": "..."}
    tag        {"tokens": ["...", ...], "labels": ["...", ...]}
    embed      {"text": "...", "positive": "..."}, and perhaps "negative": "..."
    generate   {"prompt": "...", "answer": "..."}

Examples of one text are all on one side. Those that say the same twice are left out and counted; those that say two
different things of one text are errors.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_export.errors import InputError
from slm_export.learning.adapt_settings import Task
from slm_export.learning.jsonlines import Line, read_lines
from slm_export.learning.problems import normalised

KEYS: dict[Task, tuple[str, ...]] = {
    "classify": ("text", "label"),
    "tag": ("tokens", "labels"),
    "embed": ("text", "positive", "negative"),
    "generate": ("prompt", "answer"),
}
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Row:
    """One labelled example."""

    given: str
    """What the model reads; the words of ``tag`` with spaces between them."""
    wanted: tuple[str, ...]
    """The label; a label for each word; positive and perhaps negative; the answer."""
    words: tuple[str, ...]
    """Of ``tag``; else none."""
    where: str

    @property
    def key(self) -> str:
        """sha256 of the normalised words that the model reads."""
        return hashlib.sha256(normalised(self.given).encode()).hexdigest()


@dataclass(frozen=True)
class Labelled:
    """Examples on their two sides."""

    training: tuple[Row, ...]
    held_out: tuple[Row, ...]
    duplicates: int

    @property
    def labels(self) -> list[str]:
        """The names of the classes of ``classify`` and ``tag``, sorted."""
        return sorted({label for row in self.training for label in row.wanted})

    @property
    def sha256(self) -> str:
        """Of all examples, apart."""
        rows = [
            [(row.given, row.wanted, row.words) for row in side] for side in (self.training, self.held_out)
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def read_labelled(task: Task, paths: Sequence[Path], held_out: Sequence[Path] = ()) -> Labelled:
    """Return the examples of JSONL files.

    Raises:
        InputError: a line is no such object, two lines contradict each other, a held-out example is among those that
            teach or has a label that none of them has, or there are too few.
    """
    rows, duplicates = read_rows(task, paths)
    if held_out:
        apart, more = read_rows(task, held_out)
        taught = {row.key: row for row in rows}
        for row in apart:
            if row.key in taught:
                raise InputError(
                    f"{row.where}: held out, but {taught[row.key].where} teaches the same text; remove one"
                )
        made = Labelled(tuple(rows), tuple(apart), duplicates + more)
    else:
        made = _parted(rows, duplicates)
    if task in ("classify", "tag"):
        _check_labels(made)
    return made


def _parted(rows: Sequence[Row], duplicates: int) -> Labelled:
    keys = sorted({row.key for row in rows})
    chosen = set(keys[: math.ceil(len(keys) * HELD_OUT_SHARE)])
    if len(keys) - len(chosen) < 1:
        raise InputError(f"{len(keys)} different examples: too few to teach with and to hold out; give more")
    training = tuple(row for row in rows if row.key not in chosen)
    return Labelled(training, tuple(row for row in rows if row.key in chosen), duplicates)


def _check_labels(made: Labelled) -> None:
    known = set(made.labels)
    if len(known) < 2:
        raise InputError(
            f"only one label, '{next(iter(known))}': there is nothing to tell apart; give more examples"
        )
    for row in made.held_out:
        if strange := sorted(set(row.wanted) - known):
            raise InputError(
                f"{row.where}: held out, but no example that teaches has the label '{strange[0]}'; give more of it"
            )


def read_rows(task: Task, paths: Iterable[Path]) -> tuple[list[Row], int]:
    """Return the different examples of JSONL files, and how many say the same as another.

    Raises:
        InputError: a line is no such object, or two lines contradict each other.
    """
    rows: list[Row] = []
    seen: dict[tuple[Any, ...], Row] = {}
    by_text: dict[str, Row] = {}
    duplicates = 0
    for path in paths:
        for line in read_lines(path, KEYS[task]):
            row = _row(task, line)
            if (row.key, row.wanted) in seen:
                duplicates += 1
                continue
            seen[row.key, row.wanted] = row
            earlier = by_text.setdefault(row.key, row)
            if earlier is not row and task in ("classify", "tag"):
                raise InputError(
                    f"{row.where}: another label than {earlier.where} gives the same text; correct one"
                )
            rows.append(row)
    return rows, duplicates


def _row(task: Task, line: Line) -> Row:
    if task == "tag":
        words, labels = (_texts(line, key) for key in KEYS["tag"])
        if len(words) != len(labels):
            raise InputError(
                f"{line.where}: {len(words)} tokens with {len(labels)} labels; every token has one"
            )
        return Row(" ".join(words), labels, words, line.where)
    given, *wanted = KEYS[task]
    names = [name for name in wanted if name != "negative" or name in line.values]
    return Row(line.text(given), tuple(line.text(name) for name in names), (), line.where)


def _texts(line: Line, key: str) -> tuple[str, ...]:
    values = line.values.get(key)
    if (
        not isinstance(values, list)
        or not values
        or not all(isinstance(v, str) and v.strip() for v in values)
    ):
        raise InputError(f"{line.where}: '{key}' must be a list of texts that are not blank")
    return tuple(values)
