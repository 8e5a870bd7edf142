"""How far a changed model is from the one that it was made from, on the same text: what passes choose by.

    decoders     KL divergence from the source's distribution, nats per token
    embeddings   1 - cosine, per text
    scores       KL divergence of the softmax of the scores, nats per score

A text is read in one window at a time, so windows may differ in length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from slm_export.checkpoint import Checkpoint
from slm_export.compression.calibration import Window
from slm_export.graph.model import build_reference
from slm_export.source.tasks import EMBEDDING, GENERATION

_LOGITS_BYTES = 512 << 20
"""Of the source's log probabilities, which stand in memory."""


def spread(windows: Sequence[Window], tokens: int) -> tuple[Window, ...]:
    """Return windows of about so many tokens in all, from everywhere in a text: its files differ; at least one."""
    step = max(1, round(sum(map(len, windows)) / tokens))
    return tuple(windows[::step])


class Distance:
    """What a source says of some text, to hold others against."""

    def __init__(self, source: Checkpoint, windows: Sequence[Window], tokens: int) -> None:
        """Let the source read about ``tokens`` tokens of the windows."""
        vocabulary = int(source.config.get_text_config().vocab_size) if source.task == GENERATION else 1
        self._task = source.task
        self._windows = spread(windows, min(tokens, _LOGITS_BYTES // (4 * vocabulary)))
        self._said = self._read(source)

    @property
    def words(self) -> str:
        """What is measured, and in which unit."""
        if self._task == EMBEDDING:
            return "1 - cosine"
        return "KL divergence in nats per " + ("token" if self._task == GENERATION else "score")

    def to(self, other: Checkpoint) -> float:
        """Return the mean distance of another model of the same task and vocabulary."""
        apart = [self._apart(p, q) for p, q in zip(self._said, self._read(other), strict=True)]
        return torch.cat(apart).mean().item()

    @torch.no_grad()
    def _read(self, checkpoint: Checkpoint) -> list[Tensor]:
        model = build_reference(checkpoint)
        said = []
        for window in self._windows:
            ids = torch.tensor([window])
            if self._task == GENERATION:
                output = model(input_ids=ids, use_cache=False).logits
            else:
                output = model(ids, torch.ones_like(ids))
            output = output[0].to(torch.float32)
            said.append(output if self._task == EMBEDDING else output.log_softmax(-1))
        return said

    def _apart(self, p: Tensor, q: Tensor) -> Tensor:
        if self._task == EMBEDDING:
            return 1 - F.cosine_similarity(p, q, dim=-1).reshape(1)
        return (p.exp() * (p - q)).sum(-1).reshape(-1)
