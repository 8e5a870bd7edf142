"""Text and embeddings of an open bundle, one step at a time, so that whoever waits can be told or can leave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from slm_export.errors import InputError
from slm_export.generation import Sampling, generate
from slm_export.opened import OpenBundle
from slm_export.runtime import DecoderSession, EncoderSession
from slm_export.tokenization.templates import render_chat
from slm_export.tokenization.tokenizer import Detokenizer

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Limits:
    """Where a text ends, and how its tokens are chosen."""

    most: int | None = None
    """Tokens; None: as many as the context holds."""
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    """Texts that end it, and are not part of it."""


@dataclass(frozen=True)
class Began:
    """The prompt was read into tokens, and fits."""

    prompt_tokens: int


@dataclass(frozen=True)
class Piece:
    """Some text, perhaps none. The last one of a text says why it ends."""

    text: str
    tokens: int
    """Written so far."""
    finish: Finish | None = None


def chat_ids(opened: OpenBundle, messages: Sequence[dict[str, str]]) -> list[int]:
    """Return the tokens of a chat up to the answer; InputError where the model has no chat template."""
    tokenizer = opened.tokenizer
    if not tokenizer.backend.chat_template:
        raise InputError(
            f"{opened.manifest.model.name} has no chat template: it continues texts; ask /v1/completions"
        )
    return tokenizer.encode(
        render_chat(tokenizer.backend, list(messages), "the bundle's tokenizer", answer=True)
    )


def prompt_ids(opened: OpenBundle, prompt: str | Sequence[int]) -> list[int]:
    """Return the tokens of a text as the model wants it begun, or those that are given, looked over."""
    if isinstance(prompt, str):
        return opened.tokenizer.encode_with_template(prompt)
    if odd := [token for token in prompt if token >= opened.tokenizer.vocab_size]:
        raise InputError(f"token {odd[0]} is none of the {opened.tokenizer.vocab_size} of this model")
    return list(prompt)


def write(opened: OpenBundle, ids: Sequence[int], limits: Limits) -> Iterator[Began | Piece]:
    """Yield how it begins, then text as it is written; the last piece has a reason.

    Raises:
        InputError: the prompt is empty or does not fit the context.
    """
    session = opened.session
    assert isinstance(session, DecoderSession)
    if not ids:
        raise InputError("the prompt is empty")
    room = session.context - len(ids)
    if room <= 0:
        raise InputError(
            f"the prompt has {len(ids)} tokens, but the context holds {session.context}; shorten the prompt"
        )
    yield Began(len(ids))
    most = room if limits.most is None else limits.most
    stops = [int(token) for token in opened.manifest.runtime.get("stop_ids", [])]
    detokenizer, watch, count = Detokenizer(opened.tokenizer.decode), _Watch(limits.stop), 0
    for token in generate(session, ids, stops, most, limits.sampling):
        count += 1
        text = watch.add(detokenizer.add(token))
        if watch.met:
            yield Piece(text, count, "stop")
            return
        yield Piece(text, count)
    text = watch.add(detokenizer.flush())
    # A stop token ends it early, and is not counted.
    full = count >= most or len(ids) + count > session.context
    yield Piece(
        text if watch.met else text + watch.rest(), count, "length" if full and not watch.met else "stop"
    )


def embed(opened: OpenBundle, text: str | Sequence[int]) -> tuple[Tensor, int]:
    """Return the embedding (width,) float32 of a text, and its number of tokens."""
    session = opened.session
    assert isinstance(session, EncoderSession)
    ids = prompt_ids(opened, text)
    if len(ids) > session.context:
        raise InputError(f"the text has {len(ids)} tokens, but the model takes at most {session.context}")
    return session.outputs(ids, [1] * len(ids)), len(ids)


class _Watch:
    """Looks for stop sequences in a text that comes in pieces; holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held, self.met = stops, "", False

    def add(self, text: str) -> str:
        """Return what can be shown."""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.met = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((self._begun(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def rest(self) -> str:
        """Return what was held back, once nothing follows."""
        return self._held

    def _begun(self, stop: str) -> int:
        """Return how many characters at the end may be the beginning of a stop sequence."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
