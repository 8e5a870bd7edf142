"""How an encoder learns from another: its vectors or scores, and what its layers and its attention make of a text.

embedding    1 - cosine of the pooled vectors (Reimers and Gurevych, 2020, take the squared distance)
contrastive  KL divergence of the likeness of every text to all others of the batch, teacher to student, each a softmax
             over cosines (SEED, Fang et al., 2021): needs no vectors of equal width
hidden       1 - cosine of the tokens' vectors behind every layer, a student's layer held against the one of its teacher
             that is as deep, in shares of the depth (DistilBERT, Sanh et al., 2019; TinyBERT, Jiao et al., 2020)
attention    KL divergence of the attention of the last layers (MiniLM, Wang et al., 2020)
output       KL divergence of the scores of a task
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm_export.errors import InputError
from slm_export.learning.distil_settings import DistilSettings, EncoderLosses
from slm_export.learning.evaluation import batches, documents_of, embeddings, likeness
from slm_export.learning.held_out import Split
from slm_export.learning.measures import Interval, mean
from slm_export.learning.models import Model
from slm_export.learning.trainer import Batch, Example, Loss, Measure, Watcher
from slm_export.learning.windows import sentences, spread
from slm_export.source.tasks import ANSWERING, EMBEDDING, FILLING, TOKENS, scores

_HELD_OUT_TEXTS = 1000
_ON_THE_WAY = 64
"""Texts that are measured while it learns."""
_TINY = 1e-9


class EncoderLesson:
    """Paragraphs of text, and a teacher that is asked at every step."""

    def __init__(self, teacher: Model, settings: DistilSettings, parts: Split) -> None:
        if settings.decoder.top_k or settings.decoder.on_policy:
            raise InputError(
                f"{teacher.folder}: is no decoder: --top-k and --on-policy are about probabilities of the next token"
            )
        length = settings.training.length
        self._teacher, self._settings = teacher, settings
        self.training: Sequence[Example] = sentences(parts.training, teacher.tokenizer, length)
        self.held_out: Sequence[Example] = spread(
            sentences(parts.held_out, teacher.tokenizer, length), _HELD_OUT_TEXTS
        )
        self._vectors: dict[int, Tensor] = {}

    def watchers(self, student: Model) -> Sequence[Watcher]:
        """Nothing changes with the steps."""
        return ()

    def loss(self, student: Model) -> Loss:
        """Return the weighted sum of losses; InputError where one cannot be taken of these two."""
        losses = self._settings.encoder
        refuse_unlike_widths(self._teacher, student, losses)
        return EncoderLoss(self._teacher, student, losses)

    def measure(self, student: Model) -> Measure:
        """Return the likeness to the teacher on some held-out texts."""
        some = spread(self.held_out, _ON_THE_WAY)
        return lambda module: {
            name: figure.value for name, figure in self._against_teacher(module, student, some).items()
        }

    def figures(self, model: Model) -> Mapping[str, Interval]:
        """Return how like its teacher a model is; the teacher's own are those of a perfect copy."""
        return self._against_teacher(model.module, model, self.held_out)

    def _against_teacher(
        self, module: nn.Module, model: Model, examples: Sequence[Example]
    ) -> dict[str, Interval]:
        pad, teacher = model.tokenizer.pad_id, self._teacher
        if model.task == EMBEDDING:
            if len(examples) not in self._vectors:
                self._vectors[len(examples)] = embeddings(teacher.module, teacher.pooling, examples, pad)
            made = embeddings(module, model.pooling, examples, pad)
            return likeness(self._vectors[len(examples)], made, documents_of(examples))
        return _likeness_of_scores(teacher, module, examples, pad)


class EncoderLoss:
    """The weighted sum of the losses of this module."""

    def __init__(self, teacher: Model, student: Model, losses: EncoderLosses) -> None:
        self._teacher, self._losses = teacher, losses
        self._pooling, self._task = student.pooling, student.task
        self._asks: dict[str, Any] = {}
        if losses.hidden:
            self._asks["output_hidden_states"] = True
        if losses.attention:
            self._asks["output_attentions"] = True
            for module in (teacher.module, student.module):
                module.set_attn_implementation("eager")
        teacher.module.eval().requires_grad_(False)

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        ids, mask, losses = batch["input_ids"], batch["attention_mask"], self._losses
        teacher: Any = self._teacher.module
        if next(teacher.parameters()).device != ids.device:
            teacher.to(ids.device)
        with torch.no_grad():
            theirs = teacher(input_ids=ids, attention_mask=mask, **self._asks)
        ours = module(input_ids=ids, attention_mask=mask, **self._asks)
        total = torch.zeros((), device=ids.device)
        if losses.hidden:
            total = total + losses.hidden * hidden_loss(theirs.hidden_states, ours.hidden_states, mask)
        if losses.attention:
            total = total + losses.attention * attention_loss(
                theirs.attentions[-1], ours.attentions[-1], mask
            )
        if self._task == EMBEDDING:
            assert self._pooling is not None
            there, here = (self._pooling(out.last_hidden_state, mask) for out in (theirs, ours))
            return total + self._embedding(there, here)
        there, here = (_choices(self._task, scores(self._task, out), mask) for out in (theirs, ours))
        return total + losses.output * _kl(there, here).mean()

    def _embedding(self, there: Tensor, here: Tensor) -> Tensor:
        losses = self._losses
        total = torch.zeros((), device=here.device)
        if losses.embedding:
            total = total + losses.embedding * (1 - F.cosine_similarity(there, here, dim=-1)).mean()
        if losses.contrastive and len(here) > 2:
            total = total + losses.contrastive * contrastive_loss(there, here, losses.contrast_temperature)
        return total


def hidden_loss(theirs: Sequence[Tensor], ours: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Return the mean 1 - cosine of token vectors behind the embedding and every layer of the student.

    Given   of each model the vectors behind the embedding and each layer, (examples, tokens, width)
    """
    depth, whole = len(ours) - 1, len(theirs) - 1
    distances = [
        1 - F.cosine_similarity(theirs[round(i * whole / depth)], ours[i], dim=-1) for i in range(depth + 1)
    ]
    weights = mask.to(ours[0].dtype)
    return torch.stack([(d * weights).sum() / weights.sum() for d in distances]).mean()


def attention_loss(theirs: Tensor, ours: Tensor, mask: Tensor) -> Tensor:
    """Return the mean KL divergence of attention, (examples, heads, tokens, tokens), over the tokens that count."""
    divergence = (theirs * (theirs.clamp_min(_TINY).log() - ours.clamp_min(_TINY).log())).sum(-1).mean(1)
    weights = mask.to(divergence.dtype)
    return (divergence * weights).sum() / weights.sum()


def contrastive_loss(there: Tensor, here: Tensor, temperature: float) -> Tensor:
    """Return the mean KL divergence of each text's likeness to the others; vectors (texts, width), 3 texts or more."""
    own = torch.eye(len(here), dtype=torch.bool, device=here.device)

    def among(vectors: Tensor) -> Tensor:
        unit = F.normalize(vectors, dim=-1)
        return (unit @ unit.t() / temperature)[~own].view(len(vectors), -1).log_softmax(-1)

    p, q = among(there), among(here)
    return (p.exp() * (p - q)).sum(-1).mean()


def _kl(there: Tensor, here: Tensor) -> Tensor:
    p, q = there.float().log_softmax(-1), here.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _choices(task: str, values: Tensor, mask: Tensor) -> Tensor:
    """Return scores as (choices made, alternatives), padding left out."""
    if task in (TOKENS, FILLING):
        return values[mask.bool()]
    if task == ANSWERING:
        return values.masked_fill(mask[:, None] == 0, -1e4).flatten(0, 1)
    return values


@torch.no_grad()
def _likeness_of_scores(
    teacher: Model, module: nn.Module, examples: Sequence[Example], pad_id: int
) -> dict[str, Interval]:
    """Return the share of equal choices, and the mean KL divergence of scores."""
    divergences, same, counts = [], [], []
    device = next(module.parameters()).device
    for batch in batches(examples, pad_id):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        there = scores(teacher.task, teacher.module.to(device)(ids.to(device), mask.to(device)))
        here = scores(teacher.task, module(ids.to(device), mask.to(device)))
        for row in range(len(ids)):
            one = mask[row : row + 1].to(device)
            p, q = (_choices(teacher.task, each[row : row + 1], one) for each in (there, here))
            divergences.append(float(_kl(p, q).sum()))
            same.append(float((p.argmax(-1) == q.argmax(-1)).sum()))
            counts.append(float(len(p)))
    groups = documents_of(examples)
    return {"agreement": mean(same, counts, groups), "kl_to_teacher": mean(divergences, counts, groups)}


def refuse_unlike_widths(teacher: Model, student: Model, losses: EncoderLosses) -> None:
    """Raise InputError for losses that need equal widths or heads of two models that do not have them."""
    ours, theirs = student.module.config, teacher.module.config
    width = ours.hidden_size, theirs.hidden_size
    heads = ours.num_attention_heads, theirs.num_attention_heads
    if width[0] != width[1] and (losses.hidden or (losses.embedding and student.task == EMBEDDING)):
        raise InputError(
            f"{student.folder}: its vectors have {width[0]} values and its teacher's {width[1]}: the losses of hidden "
            "states and of embeddings compare them value by value; cut the student out of the teacher (--shrink), or "
            "leave those out (--hidden 0 --embedding 0) and learn from the contrastive loss"
        )
    if heads[0] != heads[1] and losses.attention:
        raise InputError(
            f"{student.folder}: has {heads[0]} heads and its teacher {heads[1]}: their attention cannot be compared; "
            "leave it out (--attention 0)"
        )
