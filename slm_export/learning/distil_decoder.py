"""How a decoder learns from another: its next-token probabilities, mixed with the text itself.

The loss is (1 - hard) T^2 KL(teacher at T || student at T) + hard * cross entropy (Hinton et al., "Distilling the
Knowledge in a Neural Network", 2015), mean over the tokens that count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from slm_export.errors import InputError
from slm_export.learning.distil_settings import DistilSettings
from slm_export.learning.evaluation import divergence, perplexity
from slm_export.learning.held_out import Split
from slm_export.learning.measures import Interval
from slm_export.learning.models import Model
from slm_export.learning.places import place
from slm_export.learning.policies import OnPolicy
from slm_export.learning.teachers import LiveTeacher, Teacher, examples_sha256, numbered, write_down
from slm_export.learning.trainer import (
    IGNORED,
    Batch,
    Example,
    Loss,
    Measure,
    Watcher,
    hard_loss,
    labels_of,
)
from slm_export.learning.windows import spread, windows
from slm_export.progress import Progress
from slm_export.source.provenance import source_sha256

_HELD_OUT_TOKENS = 65_536
_ON_THE_WAY = 16
"""Windows that are measured while it learns."""

Divergence = Callable[[Tensor, Tensor], Tensor]
"""log-probabilities (tokens, choices) of teacher and student -> (tokens,), nats"""


def forward_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(teacher || student) of log-probabilities (tokens, choices), float32 (tokens,)."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def reverse_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(student || teacher), as `forward_kl`: it does not ask for what the student has no room for."""
    return forward_kl(student, teacher)


def jensen_shannon(teacher: Tensor, student: Tensor) -> Tensor:
    """Return the generalised Jensen-Shannon divergence with beta 1/2 (Agarwal et al., 2024), as `forward_kl`."""
    middle = torch.logaddexp(teacher, student) - math.log(2)
    return (forward_kl(teacher, middle) + forward_kl(student, middle)) / 2


DIVERGENCES: Mapping[str, Divergence] = {"forward": forward_kl, "reverse": reverse_kl, "jsd": jensen_shannon}


def decoder_loss(
    teacher: Teacher, temperature: float, hard: float, distance: Divergence = forward_kl
) -> Loss:
    """Return the loss of a student with a teacher of the same vocabulary.

    Given   temperature: above 0; more tells more of what the teacher thinks unlikely
            hard: share of the cross entropy of the text itself, 0 to 1
    """

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = module(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits.float()
        total = torch.zeros((), device=logits.device)
        if hard < 1:
            counted = labels_of(batch)[:, 1:] != IGNORED
            taught, learned = teacher.targets(batch, logits)
            taught, learned = (
                (part[:, :-1][counted] / temperature).log_softmax(-1) for part in (taught, learned)
            )
            total = total + (1 - hard) * temperature**2 * distance(taught, learned).mean()
        if hard > 0:
            total = total + hard * hard_loss(logits, batch)
        return total

    return loss


class DecoderLesson:
    """Windows of text, and a teacher that is asked live or was written down."""

    def __init__(self, teacher: Model, settings: DistilSettings, parts: Split, progress: Progress) -> None:
        length = settings.training.length
        self._teacher, self._settings, self._progress = teacher, settings, progress
        self._losses = settings.decoder
        # Numbered, so that a teacher's words can be found again.
        self.training: Sequence[Example] = numbered(windows(parts.training, teacher.tokenizer, length))
        self.held_out: Sequence[Example] = windows(
            parts.held_out, teacher.tokenizer, length, _HELD_OUT_TOKENS
        )
        if len(self.training) < 2:
            raise InputError("the training text is too short: it makes one window; give more text")
        self._policy: OnPolicy | None = None

    def watchers(self, student: Model) -> Sequence[Watcher]:
        """Return the policy, which draws other text at every step."""
        return () if self._policy is None else (self._policy,)

    def loss(self, student: Model) -> Loss:
        """Return the loss; a teacher that is to be written down is asked now."""
        losses, teacher = self._losses, self._source()
        loss = decoder_loss(teacher, losses.temperature, losses.hard, DIVERGENCES[losses.divergence])
        if losses.on_policy:
            self._policy = OnPolicy(loss, losses.on_policy, self._settings.training.seed, student.tokenizer)
            return self._policy
        return loss

    def measure(self, student: Model) -> Measure:
        """Return the perplexity on some held-out windows."""
        some = spread(self.held_out, _ON_THE_WAY)
        pad = student.tokenizer.pad_id
        return lambda module: {"perplexity": perplexity(module, some, pad).value}

    def figures(self, model: Model) -> Mapping[str, Interval]:
        """Return perplexity, and of a student how far it is from its teacher."""
        pad = model.tokenizer.pad_id
        found = {"perplexity": perplexity(model.module, self.held_out, pad)}
        if model is not self._teacher:
            found |= divergence(self._teacher.module, model.module, self.held_out, pad)
        return found

    def _source(self) -> Teacher:
        k = self._losses.top_k
        if not k:
            return LiveTeacher(self._teacher.module)
        key = {
            "what": "teacher",
            "teacher": source_sha256(self._teacher.folder),
            "examples": examples_sha256(self.training),
            "k": k,
        }
        with place(key, alone=False) as written:
            pad = self._teacher.tokenizer.pad_id
            return write_down(self._teacher.module, self.training, k, pad, written.folder, self._progress)
