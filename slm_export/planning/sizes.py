"""What an artifact's file holds, by part: body, embedding, head, tokenizer."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from slm_export.planning.formats import FORMATS
from slm_export.planning.model import ModelShape
from slm_export.planning.storage import Stored


@dataclass(frozen=True)
class Sizes:
    """Bytes of a file."""

    body: int
    """Linear layers, norms and biases, and the program around them."""
    embedding: int
    """Tables that are looked up; the head too, where the two are one matrix."""
    head: int
    tokenizer: int
    """0 where the format keeps it outside of its file."""

    @property
    def total(self) -> int:
        """Of the whole artifact."""
        return self.body + self.embedding + self.head + self.tokenizer


def sizes_of(model: ModelShape, stored: Sequence[Stored], format: str, context: int) -> Sizes:
    """Return what each part takes in a file of a format, with a cache of so many tokens."""
    known = FORMATS[format]

    def of(*roles: str) -> int:
        return sum(
            one.bytes(format, tied=model.tied and one.matrix.role == "embedding")
            for one in stored
            if one.matrix.role in roles
        )

    rest = known.vector * model.vectors + model.others_bytes + known.program + known.block * model.layers
    rest += known.rotary * context * model.head_width
    return Sizes(of("linear") + rest, of("embedding", "table"), of("head"), _tokenizer(model, format))


def _tokenizer(model: ModelShape, format: str) -> int:
    file = model.folder / "tokenizer.json"
    if not (FORMATS[format].tokenizer and model.decodes and file.is_file()):
        return 0
    return len(zlib.compress(file.read_bytes()))
