"""Runtimes that keep keys and values in another place, or too long."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fault import Fault
from torch import Tensor

from slm_export.runtime import DecoderSession

KIND = "KV cache"

Feed = Callable[[DecoderSession, Sequence[int], int], Tensor]


class Forgetful:
    """An open decoder that feeds its runtime something else than it was asked to."""

    def __init__(self, session: DecoderSession, feed: Feed) -> None:
        self._session, self._feed = session, feed
        self.context, self.prefill_chunk = session.context, session.prefill_chunk
        self.stop_ids, self.bos_id = session.stop_ids, session.bos_id
        self.vocabulary = session.vocabulary

    def logits(self, tokens: Sequence[int], start: int) -> Tensor:
        """Return the logits after tokens that are not quite these."""
        return self._feed(self._session, tokens, start)

    def metadata(self) -> Mapping[str, Any]:
        """Return what the file says."""
        return self._session.metadata()

    def close(self) -> None:
        """Close the session."""
        self._session.close()


class _NotReset:
    """The cache goes on where the last prompt ended, as long as there is room."""

    def __init__(self) -> None:
        self.end = 0

    def __call__(self, session: DecoderSession, tokens: Sequence[int], start: int) -> Tensor:
        at = self.end if start == 0 else max(start, self.end)
        if at + len(tokens) > session.context:
            at = 0
        while at and start == 0 and session.context - at < len(tokens):
            at = 0
        self.end = at + len(tokens)
        return session.logits(tokens, at)


def _late(session: DecoderSession, tokens: Sequence[int], start: int) -> Tensor:
    return session.logits(tokens, min(start + (start > 0), session.context - len(tokens)))


def _early(session: DecoderSession, tokens: Sequence[int], start: int) -> Tensor:
    return session.logits(tokens, max(0, start - (start > 1)))


def _overwritten(session: DecoderSession, tokens: Sequence[int], start: int) -> Tensor:
    """At half of its capacity the cache begins to keep the newest token in the last place alone."""
    return session.logits(tokens, min(start, session.context // 2))


def _prompt_shortened(session: DecoderSession, tokens: Sequence[int], start: int) -> Tensor:
    """Of a prompt, the last token is fed without those before it."""
    return session.logits(tokens[-1:], start + len(tokens) - 1)


def _prompt_cut(session: DecoderSession, tokens: Sequence[int], start: int) -> Tensor:
    """A prompt loses its first token where it is longer than 8."""
    return session.logits(tokens[1:] if len(tokens) > 8 else tokens, start)


FAULTS = (
    Fault("not reset between prompts", KIND, session=lambda s: Forgetful(s, _NotReset())),
    Fault("one position late", KIND, session=lambda s: Forgetful(s, _late)),
    Fault("one position early", KIND, session=lambda s: Forgetful(s, _early)),
    Fault("overwritten at capacity", KIND, session=lambda s: Forgetful(s, _overwritten)),
    Fault(
        "a prompt is not read before its last token", KIND, session=lambda s: Forgetful(s, _prompt_shortened)
    ),
    Fault("a prompt loses its first token", KIND, session=lambda s: Forgetful(s, _prompt_cut)),
)
