"""What models are for: how a task is recognised, and what its output is.

text-generation       logits of the next token
sentence-embedding    one vector
text-classification   scores (classes)
token-classification  scores (tokens, classes)
question-answering    scores (2, tokens): where an answer begins, and where it ends
fill-mask             scores (tokens, vocabulary)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

GENERATION = "text-generation"
EMBEDDING = "sentence-embedding"
CLASSIFICATION = "text-classification"
TOKENS = "token-classification"
ANSWERING = "question-answering"
FILLING = "fill-mask"

ENDINGS: Mapping[str, str] = {
    "ForCausalLM": GENERATION,
    "WithLMHeadModel": FILLING,
    "LMHeadModel": GENERATION,
    "ForSequenceClassification": CLASSIFICATION,
    "ForTokenClassification": TOKENS,
    "ForQuestionAnswering": ANSWERING,
    "ForQuestionAnsweringSimple": ANSWERING,
    "ForMaskedLM": FILLING,
    "Model": EMBEDDING,
}
"""Ending of a transformers class -> task; the first that fits."""


def task_of(architecture: str) -> str | None:
    """Return the task of a transformers class, or None."""
    return next((task for ending, task in ENDINGS.items() if architecture.endswith(ending)), None)


def scores(task: str, output: Any) -> Tensor:
    """Return what a transformers model gives for ``task``: (batch, ...) as in the table above."""
    if task == ANSWERING:
        return torch.stack((output.start_logits, output.end_logits), dim=1)
    logits: Tensor = output.logits
    return logits


def rows(task: str, values: Tensor, tokens: int) -> Tensor:
    """Return scores without batch as (rows, choices): one choice is made in each row; padding left out."""
    if task == ANSWERING:
        return values[:, :tokens]
    return values[:tokens] if task in (TOKENS, FILLING) else values.unsqueeze(0)


def output_shape(task: str, config: Any) -> tuple[str, str]:
    """Return the name of an encoder's output and its shape."""
    shapes = {
        EMBEDDING: ("embedding", f"[1, {getattr(config, 'hidden_size', None)}]"),
        CLASSIFICATION: ("scores", f"[1, {config.num_labels}]"),
        TOKENS: ("scores", f"[1, tokens, {config.num_labels}]"),
        ANSWERING: ("scores", "[1, 2, tokens]"),
        FILLING: ("scores", f"[1, tokens, {getattr(config, 'vocab_size', None)}]"),
    }
    name, shape = shapes[task]
    return name, f"float32{shape}"
