"""Prompts as apps have them read: each in one call, turn after turn up to the end of the cache, and then a new one.

Held-out text (`tokens`) is read one token at a time, and what is said of it is a mean: a mistake that is made once in a
prompt is lost among hundreds of tokens that are right. An opening token that is dropped, a prompt of which only the end
is read, keys that stay from the prompt before, a cache that fails at its last places: each spoils few places badly. So
here every turn of a few conversations is read at once, and the worst place counts.

The reference reads the same tokens with the artifact's own weights and rounding, so that what parts the two is no price
of the bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, cycle, takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm_export.fidelity.vocabularies import Passage
from slm_export.runtime import DecoderSession
from slm_export.tokenization.tokenizer import SourceTokenizer

_TURNS = (9, 23, 1, 5, 64, 2, 37, 1, 130, 14)
"""Tokens of the turns that fill the cache, again and again: no round numbers, so that they end within chunks too."""
_AFTERWARDS = ((7, 1, 12), (33, 1, 1), (4, 2, 16), (10, 1), (15, 3), (2, 1, 1))
"""Turns of conversations that begin anew, where the cache is full of the ones before."""


@dataclass(frozen=True)
class Prompts:
    """The worst place. ``kl_max``: KL(reference || artifact) of the next token, in nats."""

    kl_max: float
    detail: str


@torch.no_grad()
def judge_prompts(
    lowered: nn.Module,
    session: DecoderSession,
    passages: Sequence[Passage],
    tokenizer: SourceTokenizer,
    most: int,
) -> Prompts:
    """Let the artifact read conversations turn by turn, and compare its next tokens with the reference's.

    Given   lowered: the artifact's weights and rounding, in torch; passages: what conversations are made of;
            tokenizer: the artifact's; most: tokens of the longest conversation, if the cache holds more
    """
    room = min(session.context, most, _one_reading(lowered))
    worst = Prompts(-1.0, "")
    for number, lengths in enumerate((_filling(room), *_AFTERWARDS)):
        ends = list(takewhile(lambda end: end <= room, accumulate(lengths)))
        if not ends:
            continue
        ids = _text(passages, number, ends[-1])
        kept: Any = torch.tensor([end - 1 for end in ends])
        said = lowered(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=kept)
        expected = said.logits[0].to(torch.float32)
        got = [session.logits(ids[start:end], start) for start, end in zip((0, *ends), ends, strict=False)]
        kl = _kl(expected, torch.stack(got))
        at = int(kl.argmax())
        if not (far := float(kl[at])) <= worst.kl_max and not math.isnan(worst.kl_max):
            worst = Prompts(far, _where(number, ids[: ends[at]], lengths[at], tokenizer))
    return worst


def _filling(room: int) -> tuple[int, ...]:
    """Return the lengths of turns that together are ``room`` tokens, the last place included."""
    lengths: list[int] = []
    for length in cycle(_TURNS):
        if (left := room - sum(lengths)) <= 0:
            break
        lengths.append(min(length, left))
    return tuple(lengths)


def _text(passages: Sequence[Passage], first: int, count: int) -> tuple[int, ...]:
    """Return so many tokens, of passages from one on; they are begun again where they do not suffice."""
    first %= len(passages)
    order = cycle((*passages[first:], *passages[:first]))
    found: list[int] = []
    for token in chain.from_iterable(passage.artifact for passage in order):
        if len(found) == count:
            break
        found.append(token)
    return tuple(found)


def _one_reading(model: nn.Module) -> int:
    """Return up to how many tokens it is one whether a text is read at once or in parts.

    LongRoPE turns a text by other angles once it is longer than what the model was trained on; keys that are in a cache
    by then stay as they were.
    """
    config: Any = model.config
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return 1 << 31
    return int(rope["original_max_position_embeddings"])


def _kl(expected: Tensor, got: Tensor) -> Tensor:
    """Return KL(expected || got) in nats per row, of logits."""
    p, q = F.log_softmax(expected, -1), F.log_softmax(got, -1)
    return (p.exp() * (p - q)).sum(-1)


def _where(number: int, read: Sequence[int], turn: int, tokenizer: SourceTokenizer) -> str:
    begun = "the first conversation" if number == 0 else "a new one, on the cache of the one before"
    return (
        f"prompts are read at once, turn by turn; they part most in {begun}, after {len(read)} tokens, the last "
        f"{turn} of them in one call: {tokenizer.decode(read[-12:])!r}"
    )
