"""A bundle's answer, and how sure it is of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slm_export.answers import lines
from slm_export.delegates.config import Nearest, Sampling
from slm_export.delegates.nearest import Embedded, embedded
from slm_export.errors import InputError
from slm_export.generation import Sampling as TokenSampling
from slm_export.opened import OpenBundle, open_bundle
from slm_export.runtime import DecoderSession
from slm_export.source.tasks import EMBEDDING, GENERATION


@dataclass(frozen=True)
class Answer:
    """What came of a prompt."""

    text: str
    place: str
    """``local``, or the endpoint's host."""
    confidence: float | None = None


Show = Callable[[str], None]
"""Takes an answer's pieces, as they are written."""


class Bundles:
    """The open bundles of all delegates; each is opened once, when it is needed, and asked by one at a time."""

    def __init__(self, open_one: Callable[[Path, str | None], OpenBundle] = open_bundle) -> None:
        self._open = open_one
        self._lock = threading.Lock()
        self._entries: dict[tuple[object, ...], Embedded] = {}
        self._opened: dict[tuple[str, str | None], tuple[OpenBundle, threading.Lock]] = {}

    def tokens(self, bundle: str, format: str | None, prompt: str) -> int:
        """Return how many tokens a prompt has."""
        opened, lock = self._get(bundle, format)
        with lock:
            return len(opened.tokenizer.encode_with_template(prompt))

    def answer(
        self,
        bundle: str,
        format: str | None,
        prompt: str,
        sampling: Sampling,
        nearest: Nearest | None = None,
        show: Show = lambda _: None,
        adapter: str | None = None,
    ) -> Answer:
        """Return the answer of a bundle; that of a decoder is shown piece by piece.

        Given   adapter: of the bundle, which is switched to for this answer; None: the base answers

        Raises:
            InputError: the prompt does not fit, the entries are not for this model, or it has no such adapter.
            GateError: the bundle is not what was written.
        """
        opened, lock = self._get(bundle, format)
        with lock:
            opened.adapt(adapter)
            if nearest is not None:
                return self._nearest(opened, (bundle, format), prompt, nearest)
            if opened.manifest.model.task != GENERATION:
                found = opened.answer(prompt)
                text = "\n".join(lines(found))
                show(text)
                return Answer(text, "local", _score(found))
            assert isinstance(opened.session, DecoderSession)
            watched = _Watched(opened.session)
            chosen = TokenSampling(sampling.temperature, sampling.top_p, sampling.seed)
            pieces = []
            for piece in replace(opened, session=watched).text(prompt, sampling.max_tokens, chosen):
                show(piece)
                pieces.append(piece)
            return Answer("".join(pieces), "local", watched.confidence)

    def close(self) -> None:
        """Let go of all of them."""
        with self._lock:
            for opened, lock in self._opened.values():
                with lock:
                    opened.close()
            self._opened.clear()

    def _nearest(
        self, opened: OpenBundle, key: tuple[str, str | None], prompt: str, nearest: Nearest
    ) -> Answer:
        if opened.manifest.model.task != EMBEDDING:
            raise InputError(
                f"nearest is for models of embeddings, and {key[0]} is one for {opened.manifest.model.task}"
            )
        path = Path(nearest.file)
        # Read again once it is another.
        entries = (key, nearest.file, path.stat().st_mtime_ns if path.is_file() else 0)
        if entries not in self._entries:
            self._entries[entries] = embedded(path, lambda text: _vector(opened, text))
        answer, cosine = self._entries[entries].nearest(_vector(opened, prompt))
        return Answer(answer if cosine >= nearest.least else nearest.otherwise, "local", cosine)

    def _get(self, bundle: str, format: str | None) -> tuple[OpenBundle, threading.Lock]:
        with self._lock:
            key = (bundle, format)
            if key not in self._opened:
                self._opened[key] = (self._open(Path(bundle), format), threading.Lock())
            return self._opened[key]


def _vector(opened: OpenBundle, text: str) -> Tensor:
    return torch.tensor(opened.answer(text)["embedding"])


def _score(answered: Mapping[str, Any]) -> float | None:
    """Return the best label's score; None for an embedding, which is sure of nothing."""
    return max(answered["scores"].values()) if "scores" in answered else None


class _Watched:
    """A decoder's session that remembers how likely its likeliest tokens were."""

    def __init__(self, session: DecoderSession) -> None:
        self._session = session
        self.context, self.prefill_chunk = session.context, session.prefill_chunk
        self.stop_ids, self.bos_id, self.vocabulary = session.stop_ids, session.bos_id, session.vocabulary
        self._best: list[float] = []

    @property
    def confidence(self) -> float | None:
        """The mean; None where nothing was written."""
        return sum(self._best) / len(self._best) if self._best else None

    def logits(self, tokens: Sequence[int], start: int) -> Tensor:
        """See `DecoderSession`."""
        found = self._session.logits(tokens, start)
        self._best.append(float(found.softmax(-1).max()))
        return found

    def metadata(self) -> Mapping[str, Any]:
        """See `DecoderSession`."""
        return self._session.metadata()

    def close(self) -> None:
        """See `DecoderSession`."""
        self._session.close()
