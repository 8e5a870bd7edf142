"""Text from a decoder artifact, one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slm_export.errors import InputError
from slm_export.runtime import DecoderSession


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_p: float = 1.0
    """Smallest set of likeliest tokens with at least this probability (nucleus sampling, Holtzman et al. 2019)."""
    seed: int = 0


def generate(
    session: DecoderSession,
    prompt: Sequence[int],
    stop_ids: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
) -> Iterator[int]:
    """Yield tokens until a stop token (not yielded), ``max_tokens``, or the end of the context.

    Raises:
        InputError: the prompt is empty or does not fit the context.
    """
    if not prompt:
        raise InputError("the prompt is empty; give --prompt some text")
    if len(prompt) >= session.context:
        raise InputError(
            f"the prompt has {len(prompt)} tokens, but the context holds {session.context}; shorten the prompt, "
            "or export with a larger --context"
        )
    generator = torch.Generator().manual_seed(sampling.seed)
    fed, at = prompt, 0
    for _ in range(max_tokens):
        token = choose(session.logits(fed, at), sampling, generator)
        at += len(fed)
        if token in stop_ids:
            return
        yield token
        if at >= session.context:
            return
        fed = [token]


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return the next token of logits (vocabulary,)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    # Less the largest: however small the temperature is, that one stays 0 and the others go to -infinity.
    probabilities = ((logits.to(torch.float64) - logits.max()) / sampling.temperature).softmax(-1)
    ordered, tokens = probabilities.sort(descending=True)
    # A token is kept while those before it have not reached top_p; so the first always is.
    kept = ordered.cumsum(0) - ordered < sampling.top_p
    kept[0] = True
    picked = torch.multinomial(ordered * kept, 1, generator=generator)
    return int(tokens[picked])
