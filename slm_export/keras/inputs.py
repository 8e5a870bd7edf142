"""The ids that a TensorFlow model and its artifact are compared on.

The user's own (``--eval-text``: a line of ids, or of text where a tokenizer lies beside the model, is one input), else
the shipped sentences where there is a tokenizer, else made up: every length, frequent and rare ids.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slm_export.errors import InputError
from slm_export.evaltext import load_documents, load_sentences
from slm_export.tokenization.tokenizer import SourceTokenizer

COUNT = 256
"""Inputs that are made up; also the most that are read of a file."""

Ids = tuple[int, ...]


@dataclass(frozen=True)
class HeldOut:
    """Inputs, each of 1 to ``tokens`` ids."""

    inputs: tuple[Ids, ...]
    made_up: bool
    notes: tuple[str, ...]


def held_out(path: Path | None, tokenizer: SourceTokenizer | None, rows: int, tokens: int) -> HeldOut:
    """Return what to compare on.

    Given   rows: of the table that ids are looked up in; tokens: of the longest input
    """
    if path is not None:
        return _from_file(path, tokenizer, rows, tokens)
    if tokenizer is not None:
        inputs = [_fit(tokenizer.encode_with_template(text), tokens) for text in load_sentences()]
        return HeldOut(tuple(ids for ids in inputs if ids), False, ())
    note = (
        f"compared on {COUNT} inputs of made-up ids: the model has no tokenizer beside it; "
        "--eval-text FILE gives real ones, a line of ids each"
    )
    return HeldOut(_made_up(rows, tokens), True, (note,))


def parse_ids(text: str, rows: int | None, where: str) -> Ids:
    """Return ids of a text such as ``12 7 99``; InputError where it is anything else."""
    words = text.replace(",", " ").split()
    if not words or not all(word.isascii() and word.isdigit() for word in words):
        raise InputError(f"{where}: not ids; without a tokenizer an input is written as ids, such as 12 7 99")
    ids = tuple(int(word) for word in words)
    if rows is not None and max(ids) >= rows:
        raise InputError(f"{where}: id {max(ids)} has no row in the model's table, whose last is {rows - 1}")
    return ids


def _from_file(path: Path, tokenizer: SourceTokenizer | None, rows: int, tokens: int) -> HeldOut:
    lines = [line for text in load_documents(path) for line in text.splitlines()]
    given: list[Ids] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if tokenizer is None:
            given.append(parse_ids(line, rows, f"{path}, line {number}"))
        else:
            given.append(tuple(tokenizer.encode_with_template(line)))
    notes = []
    if len(given) > COUNT:
        notes.append(f"{path}: the first {COUNT} of its {len(given)} inputs were compared")
    inputs = given[:COUNT]
    if long := sum(len(ids) > tokens for ids in inputs):
        notes.append(f"{path}: {long} inputs are longer than {tokens} tokens, and were cut")
    return HeldOut(tuple(_fit(ids, tokens) for ids in inputs), False, tuple(notes))


def _fit(ids: Sequence[int], tokens: int) -> Ids:
    return tuple(ids[:tokens])


def _made_up(rows: int, tokens: int) -> tuple[Ids, ...]:
    """Return inputs of every length, half of even and half of Zipf-like ids; the same for the same model."""
    source = random.Random(0)

    def draw(index: int) -> int:
        if rows < 3:
            return rows - 1
        if index % 2:
            return source.randrange(1, rows)
        return min(rows - 1, int(math.exp(source.uniform(0, math.log(rows)))))

    lengths = [1 + index * tokens // COUNT for index in range(COUNT)]
    lengths[-1] = tokens
    return tuple(tuple(draw(index) for _ in range(length)) for index, length in enumerate(lengths))
