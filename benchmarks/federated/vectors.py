"""A linear head on vectors that were made beforehand, as a base that `slm_export.federated.local` trains.

What is frozen says the same of a text in every round, so it is asked once; the rest is the code that ships.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from slm_export.federated.base import Base, taken
from slm_export.federated.examples import Examples
from slm_export.source.tasks import CLASSIFICATION


class Head(torch.nn.Module):
    """Classes of vectors; the first token of a text is the number of its vector."""

    def __init__(self, vectors: torch.Tensor, classes: int) -> None:
        super().__init__()
        self.register_buffer("vectors", vectors.float())
        self.classifier = torch.nn.Linear(vectors.shape[1], classes)
        torch.nn.init.zeros_(self.classifier.weight)
        torch.nn.init.zeros_(self.classifier.bias)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.classifier(self.vectors[input_ids[:, 0]]))


def head_on(vectors: torch.Tensor, labels: Sequence[str]) -> Base:
    """Return the base; the head begins at zero."""
    tokenizer: Any = SimpleNamespace(pad_id=0)
    module = Head(vectors, len(labels)).eval()
    base = Base(Path("vectors"), CLASSIFICATION, "head", module, tokenizer, tuple(labels), None, {})
    return Base(**{**vars(base), "begun": taken(base)})


def examples_of(numbers: Sequence[int], classes: Sequence[int]) -> Examples:
    """Return the examples of these vectors with their classes."""
    rows = tuple({"input_ids": [n, 0], "labels": [c]} for n, c in zip(numbers, classes, strict=True))
    return Examples(rows, tuple(classes))
