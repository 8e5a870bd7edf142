"""Places where an artifact and its source part, with the text around them: what a person reads to judge."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from slm_export.reports.details import Divergence
from slm_export.tokenization.tokenizer import SourceTokenizer

SHOWN = 5
"""Places of the held-out text that a report shows, each from a window of its own."""
BEFORE, AFTER = 32, 12
"""Tokens of context."""


def furthest_in(
    window: Sequence[int], kl: Tensor, source: Tensor, artifact: Tensor, tokenizer: SourceTokenizer
) -> Divergence:
    """Return the place of a window where the two distributions are furthest apart.

    Given   kl (tokens,) in nats, and both sides' logits (tokens, vocabulary); row t is what follows token t
    """
    at = int(kl.argmax())
    theirs, ours = _preferred(source[at]), _preferred(artifact[at])
    return Divergence(
        where="held-out text",
        before=_text(tokenizer, window[max(0, at + 1 - BEFORE) : at + 1]),
        source=_text(tokenizer, [theirs[0]]),
        source_probability=theirs[1],
        artifact=_text(tokenizer, [ours[0]]),
        artifact_probability=ours[1],
        kl=float(kl[at]),
        after=_text(tokenizer, window[at + 1 : at + 1 + AFTER]),
    )


def worst(examples: Iterable[Divergence]) -> tuple[Divergence, ...]:
    """Return the examples that a report shows, the worst first; an artifact that gives NaN is the worst."""
    return tuple(
        sorted(examples, key=lambda one: -(one.kl or 0.0) if one.kl == one.kl else -float("inf"))[:SHOWN]
    )


def own_text(
    prompt: Sequence[int],
    written: Sequence[int],
    agree: Tensor,
    source: Tensor,
    sure: Sequence[float],
    tokenizer: SourceTokenizer,
) -> Divergence | None:
    """Return the first place of the artifact's own text where the source would have gone on otherwise.

    Given   agree (tokens,), whether the source would have written each token; its logits before each of them; and
            the probability that the artifact gave each
    """
    differs = (~agree).nonzero().flatten().tolist()
    if not differs:
        return None
    at = differs[0]
    token, probability = _preferred(source[at])
    return Divergence(
        where="the artifact's own text",
        before=_text(tokenizer, [*prompt, *written[:at]][-BEFORE:]),
        source=_text(tokenizer, [token]),
        source_probability=probability,
        artifact=_text(tokenizer, [written[at]]),
        artifact_probability=sure[at],
        after=_text(tokenizer, written[at + 1 : at + 1 + AFTER]),
    )


def _preferred(logits: Tensor) -> tuple[int, float]:
    token = int(logits.argmax())
    return token, float(logits.softmax(-1)[token])


def _text(tokenizer: SourceTokenizer, tokens: Sequence[int]) -> str:
    text = tokenizer.decode(list(tokens))
    # A stretch of tokens may begin or end within a character; a token that is part of one is shown as that.
    return text.strip("\ufffd") or text
