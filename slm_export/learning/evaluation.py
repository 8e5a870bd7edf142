"""How good a model is on held-out text, and how far it is from its teacher."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm_export.learning.measures import Interval, mean
from slm_export.learning.trainer import Batch, Example, collate

_TOGETHER = 16
_RETRIEVED = 10


def batches(examples: Sequence[Example], pad_id: int, together: int = _TOGETHER) -> Iterator[Batch]:
    """Yield batches in order."""
    for start in range(0, len(examples), together):
        yield collate(examples[start : start + together], pad_id)


@torch.no_grad()
def log_perplexities(module: nn.Module, examples: Sequence[Example], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return of every window the sum of -ln p of its tokens, and their number; float64 (windows,)."""
    sums, counts = [], []
    for batch in batches(examples, pad_id):
        ids, mask = _to(module, batch["input_ids"]), _to(module, batch["attention_mask"])
        logits: Tensor = module(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        nats = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        seen = mask[:, 1:].double()
        sums.append((nats.view_as(seen) * seen).sum(1).cpu())
        counts.append(seen.sum(1).cpu())
    return torch.cat(sums), torch.cat(counts)


def perplexity(module: nn.Module, examples: Sequence[Example], pad_id: int) -> Interval:
    """Return the perplexity of the examples' tokens, each but the first of its window."""
    sums, counts = log_perplexities(module, examples, pad_id)
    return mean(sums.tolist(), counts.tolist(), documents_of(examples)).through(math.exp)


@torch.no_grad()
def divergence(
    teacher: nn.Module, module: nn.Module, examples: Sequence[Example], pad_id: int
) -> dict[str, Interval]:
    """Return how far a decoder is from its teacher: mean KL divergence in nats, share of the same first choices."""
    sums, same, counts = [], [], []
    for batch in batches(examples, pad_id):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        p = teacher(input_ids=_to(teacher, ids), attention_mask=_to(teacher, mask)).logits.float().cpu()
        q = module(input_ids=_to(module, ids), attention_mask=_to(module, mask)).logits.float().cpu()
        p, q, seen = p.log_softmax(-1), q.log_softmax(-1), mask.double()
        sums += ((p.exp() * (p - q)).sum(-1) * seen).sum(1).tolist()
        same += ((p.argmax(-1) == q.argmax(-1)) * seen).sum(1).tolist()
        counts += seen.sum(1).tolist()
    groups = documents_of(examples)
    return {"kl_to_teacher": mean(sums, counts, groups), "top1_agreement": mean(same, counts, groups)}


@torch.no_grad()
def embeddings(module: nn.Module, pooling: Any, examples: Sequence[Example], pad_id: int) -> Tensor:
    """Return the pooled vectors of texts, float32 (texts, width)."""
    made = []
    for batch in batches(examples, pad_id, 32):
        mask = _to(module, batch["attention_mask"])
        hidden = module(input_ids=_to(module, batch["input_ids"]), attention_mask=mask).last_hidden_state
        made.append(pooling(hidden.float(), mask).cpu())
    return torch.cat(made)


def likeness(teacher: Tensor, student: Tensor, groups: Sequence[int]) -> dict[str, Interval]:
    """Return mean cosine, and the share of each text's ten nearest others that both find.

    Given   vectors of the same texts, float32 (texts, width); no cosine where widths differ
    """
    ones = [1.0] * len(teacher)
    found = {}
    if teacher.shape == student.shape:
        cosine = F.cosine_similarity(teacher, student, dim=-1).tolist()
        found["cosine"] = mean(cosine, ones, groups)
    if len(teacher) > _RETRIEVED:
        ours, theirs = (_nearest(vectors) for vectors in (teacher, student))
        shared = (ours[:, :, None] == theirs[:, None, :]).any(-1).float().mean(1).tolist()
        found["top10_overlap"] = mean(shared, ones, groups)
    return found


def documents_of(examples: Sequence[Example]) -> list[int]:
    """Return the document of every example; its own number where none is told."""
    return [int(example["document"][0]) if "document" in example else i for i, example in enumerate(examples)]


def _nearest(vectors: Tensor) -> Tensor:
    """Return the indices of the nearest others, int64 (texts, 10)."""
    unit = F.normalize(vectors, dim=-1)
    likeness = unit @ unit.t()
    likeness.fill_diagonal_(-2)
    return likeness.topk(_RETRIEVED, dim=-1).indices


def _to(module: nn.Module, values: Tensor) -> Tensor:
    return values.to(next(module.parameters()).device)
