"""Text that the student writes itself, for its teacher to judge: on-policy distillation.

In a share of the steps a window's beginning is kept and the student goes on from there, sampled at temperature 1; the
loss is then the divergence from the teacher on what the student wrote (generalised knowledge distillation, Agarwal et
al., "On-Policy Distillation of Language Models", 2024). What was written is no truth: the text's own share of the loss
is left out of such a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slm_export.errors import InputError
from slm_export.learning.processes import world
from slm_export.learning.trainer import IGNORED, Batch, Loss
from slm_export.tokenization.tokenizer import SourceTokenizer

_PROMPT = 0.25
"""Share of a window that is kept."""


class OnPolicy:
    """A loss around a loss; a watcher, because every step draws anew, and the same when it is repeated."""

    def __init__(self, loss: Loss, share: float, seed: int, tokenizer: SourceTokenizer) -> None:
        if world() > 1:
            raise InputError("--on-policy: the student writes in one process; start it without torchrun")
        self._loss, self._share, self._seed = loss, share, seed
        self._tokens = tokenizer.vocab_size
        self._generator = torch.Generator()
        self._own = False

    def before_step(self, step: int) -> None:
        """Draw whether this step is on the student's own text."""
        self._generator.manual_seed(self._seed * 1_000_003 + step)
        self._own = float(torch.rand((), generator=self._generator)) < self._share

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor:
        """Return the loss on the batch, or on what the student makes of it."""
        if not self._own or not module.training:
            return self._loss(module, batch)
        return self._loss(module, self.written(module, batch))

    @torch.no_grad()
    def written(self, module: nn.Module, batch: Batch) -> Batch:
        """Return the batch with everything behind the prompts written by the student, and labels there alone."""
        from transformers import DynamicCache

        model: Any = module
        shortest = int(batch["attention_mask"].sum(1).min())
        kept = max(1, round(_PROMPT * shortest))
        length = batch["input_ids"].shape[1]
        was_training = module.training
        module.eval()
        written = [batch["input_ids"][:, :kept]]
        cache = DynamicCache(config=model.config)
        for _ in range(length - kept):
            logits = model(input_ids=written[-1], past_key_values=cache, use_cache=True).logits[:, -1].float()
            chances = logits[:, : self._tokens].softmax(-1).cpu()
            written.append(torch.multinomial(chances, 1, generator=self._generator).to(logits.device))
        module.train(was_training)
        ids = torch.cat(written, 1)
        labels = ids.clone()
        labels[:, :kept] = IGNORED
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
