"""The answer of an embedding model: that of the entry whose text is nearest, where any is near enough.

    [[entry]]
    texts  = ["How do I reset my password?", "I forgot my password"]
    answer = "Settings, Account, Reset password."

Near is the cosine of the two embeddings, 1 for the same direction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from slm_export.tomlfile import read_model

Text = Annotated[str, Field(min_length=1)]


class Entry(BaseModel):
    """Texts that have one answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    texts: tuple[Text, ...] = Field(min_length=1)
    answer: str


class Entries(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    entry: tuple[Entry, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Embedded:
    """Entries with the embeddings of their texts, unit length, float32 (texts, width)."""

    answers: tuple[str, ...]
    """One for each text."""
    vectors: Tensor

    def nearest(self, vector: Tensor) -> tuple[str, float]:
        """Return the answer of the nearest text to an embedding (width,), and the cosine."""
        cosines = self.vectors @ _unit(vector)
        best = int(cosines.argmax())
        return self.answers[best], float(cosines[best])


def embedded(path: Path, embed: Callable[[str], Tensor]) -> Embedded:
    """Read a file of entries and embed their texts.

    Raises:
        InputError: the file is missing or wrong, or a text is too long for the model.
    """
    pairs = [(text, entry.answer) for entry in read_model(path, Entries).entry for text in entry.texts]
    vectors = torch.stack([_unit(embed(text)) for text, _ in pairs])
    return Embedded(tuple(answer for _, answer in pairs), vectors)


def _unit(vector: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vector, dim=0)
