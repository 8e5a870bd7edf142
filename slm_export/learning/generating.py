"""Text that a model writes, in batches: by a teacher in a folder, and by a child whose answers are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slm_export.learning.models import Model


@dataclass(frozen=True)
class Written:
    """What a model wrote behind a prompt, and whether it came to an end by itself."""

    text: str
    finished: bool


@torch.inference_mode()
def write(
    model: Model, prompts: Sequence[Sequence[int]], most: int, *, temperature: float = 0.0, seed: int = 0
) -> list[Written]:
    """Continue prompts of token ids together.

    Given   most: tokens to write at most; fewer where the model has no positions for them
            temperature: 0 is greedy; what is drawn above it follows from ``seed`` and from all prompts
    Result  the texts without special tokens
    """
    if not prompts:
        return []
    model.module.to("cuda" if torch.cuda.is_available() else "cpu")
    ids, mask = _padded(prompts, model.tokenizer.pad_id)
    room = most if model.positions is None else min(most, model.positions - ids.shape[1])
    if room < 1:
        return [Written("", False) for _ in prompts]
    stops = list(model.tokenizer.stop_ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: Tensor = model.module.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=room,
            do_sample=temperature > 0,
            **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
            eos_token_id=stops or None,
            pad_token_id=model.tokenizer.pad_id,
            use_cache=True,
        )
    return [_written(model, row, set(stops)) for row in made[:, ids.shape[1] :].tolist()]


def _written(model: Model, ids: list[int], stops: set[int]) -> Written:
    end = next((at for at, token in enumerate(ids) if token in stops), None)
    text: str = model.tokenizer.backend.decode(ids[:end], skip_special_tokens=True)
    return Written(text, end is not None)


def _padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return prompts that end together, int64 (prompts, tokens), and their mask, 1 for a token."""
    longest = max(map(len, prompts))
    ids = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)
