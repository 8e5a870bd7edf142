"""A client's own texts as what it learns from.

A model that writes text learns from plain text, in windows; a classifier from labelled lines. An example is a window or
a line: that is what example-level privacy speaks of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slm_export.errors import InputError
from slm_export.federated.base import Base
from slm_export.learning.chats import text_of_messages
from slm_export.learning.examples import read_rows
from slm_export.learning.texts import read_texts
from slm_export.learning.trainer import Example
from slm_export.learning.windows import windows
from slm_export.source.tasks import CLASSIFICATION

Rewrite = Callable[[str], str]
_PART_OF_A_FILE = re.compile(r", (?:document|line) \d+$")


@dataclass(frozen=True)
class Examples:
    """What is learned from, in the order of the files."""

    rows: tuple[Example, ...]
    topics: tuple[int, ...]
    """Of every example: the number of its class, or of the file that it is from."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int]) -> Examples:
        """Return some of them."""
        return Examples(tuple(self.rows[i] for i in indices), tuple(self.topics[i] for i in indices))


def read_examples(base: Base, paths: Sequence[Path], length: int, rewrite: Rewrite | None = None) -> Examples:
    """Read files and folders of text, or of a classifier ``.jsonl`` with {"text": ..., "label": ...}.

    Given   length: tokens of an example at most
            rewrite: changes each text before anything is learned, such as an anonymiser; None: nothing does

    Raises:
        InputError: the files are not right, or the base cannot take texts so long.
    """
    if base.positions is not None and length > base.positions:
        raise InputError(
            f"length = {length} is more than the {base.positions} positions of {base.folder.name}"
        )
    if base.task == CLASSIFICATION:
        return _labelled(base, paths, length, rewrite)
    documents = read_texts(paths, text_of_messages(base.tokenizer)).documents
    if rewrite is not None:
        documents = tuple(replace(document, text=rewrite(document.text)) for document in documents)
    files = [_PART_OF_A_FILE.sub("", document.where) for document in documents]
    numbers = {file: number for number, file in enumerate(dict.fromkeys(files))}
    rows = windows(documents, base.tokenizer, length)
    return Examples(tuple(rows), tuple(numbers[files[row["document"][0]]] for row in rows))


def _labelled(base: Base, paths: Sequence[Path], length: int, rewrite: Rewrite | None) -> Examples:
    found, _ = read_rows("classify", paths)
    numbers = {label: number for number, label in enumerate(base.labels)}
    before, after = base.tokenizer.template
    rows: list[Example] = []
    for row in found:
        label = row.wanted[0]
        if label not in numbers:
            raise InputError(
                f"{row.where}: {base.folder.name} has no class '{label}'; it has {', '.join(base.labels)}"
            )
        text = row.given if rewrite is None else rewrite(row.given)
        ids = base.tokenizer.encode(text)[: length - len(before) - len(after)]
        rows.append({"input_ids": [*before, *ids, *after], "labels": [numbers[label]]})
    return Examples(tuple(rows), tuple(row["labels"][0] for row in rows))
