"""What an encoder's output says to a person: an embedding, a label, labels of tokens, words for a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from slm_export.errors import InputError
from slm_export.source.tasks import CLASSIFICATION, EMBEDDING, FILLING, TOKENS
from slm_export.tokenization.tokenizer import SourceTokenizer

_BEST = 5


def answer(
    task: str, output: Tensor, ids: Sequence[int], labels: Sequence[str], tokenizer: SourceTokenizer
) -> dict[str, Any]:
    """Return the answer as JSON values; ``output`` is without batch, ``ids`` are the tokens that were read."""
    if task == EMBEDDING:
        return {"embedding": output.tolist()}
    if task == CLASSIFICATION:
        scores = dict(zip(labels, output.softmax(-1).tolist(), strict=True))
        return {"label": max(scores, key=scores.__getitem__), "scores": scores}
    if task == TOKENS:
        best = output.argmax(-1).tolist()
        pairs = zip(ids, best, strict=True)
        return {
            "tokens": [{"text": tokenizer.decode([token]), "label": labels[index]} for token, index in pairs]
        }
    if task == FILLING:
        return {"masks": [_fill(output[at], tokenizer) for at in _masks(ids, tokenizer)]}
    # An answer is a stretch of a passage, and a prompt alone has none.
    raise InputError(f"a model for {task} needs a question and a passage; call it from code")


def lines(answered: dict[str, Any]) -> list[str]:
    """Return an answer as lines for a terminal."""
    if "embedding" in answered:
        return [" ".join(f"{value:.6g}" for value in answered["embedding"])]
    if "label" in answered:
        return [str(answered["label"])]
    if "tokens" in answered:
        return [f"{token['text']}\t{token['label']}" for token in answered["tokens"]]
    return [
        ", ".join(f"{word['text']} ({word['probability']:.2f})" for word in mask)
        for mask in answered["masks"]
    ]


def _masks(ids: Sequence[int], tokenizer: SourceTokenizer) -> list[int]:
    mask = tokenizer.backend.mask_token_id
    places = [at for at, token in enumerate(ids) if token == mask]
    if not places:
        raise InputError(f"the prompt has no {tokenizer.backend.mask_token}; put one where a word is missing")
    return places


def _fill(scores: Tensor, tokenizer: SourceTokenizer) -> list[dict[str, Any]]:
    best = scores.softmax(-1).topk(_BEST)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [{"text": tokenizer.decode([token]), "probability": value} for token, value in pairs]
