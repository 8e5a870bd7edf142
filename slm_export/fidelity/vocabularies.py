"""How a source and its artifact read the same text, where the artifact has fewer tokens.

A smaller vocabulary spells some words in several tokens where the source has one, so three questions are asked apart.

    Is a text as likely as before? Each reads it in its own tokens: -log p of the whole text, whatever it was cut into,
    over the number of tokens that the source reads it in.

    Is the artifact still the model that it was made from? The source can read the artifact's tokens too, for it has
    them all. It does, token by token, and its probabilities are taken of the tokens that both have, as shares of what
    it gives to those.

    Is what it writes good text? The source reads it in its own tokens, and says how it would have gone on.

What the lost tokens were worth shows in the first and the third; the second is what it is for one vocabulary: the price
of the bits. With one vocabulary for both, all three are asked of the same tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

from torch import Tensor

from slm_export.errors import GateError
from slm_export.evaltext import MINIMUM_TAIL, token_windows
from slm_export.tokenization.spelling import longest_pieces
from slm_export.tokenization.tokenizer import SourceTokenizer
from slm_export.tokenization.tokenizer_trim import document_of

Window = tuple[int, ...]
Place = tuple[int, int]
"""How many tokens the source has read, and how many the artifact."""

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Passage:
    """A stretch of text, as both read it."""

    source: Window
    artifact: Window
    as_source: Window
    """The artifact's tokens under the source's ids."""
    places: tuple[Place, ...]
    """Where both have read equally much, at least one token each; the last is the end of the stretch."""

    @property
    def alike(self) -> int:
        """How many tokens of the source the artifact reads as the same token."""
        ends = {(0, 0), *self.places}
        return sum(
            (i - 1, j - 1) in ends and self.source[i - 1] == self.as_source[j - 1] for i, j in self.places
        )

    def beginning(self, most: int) -> Passage:
        """Return the beginning of at most so many of the artifact's tokens; up to the first place if that is more."""
        own, artifact = max((p for p in self.places if p[1] <= most), default=self.places[0])
        return Passage(
            self.source[:own],
            self.artifact[:artifact],
            self.as_source[:artifact],
            tuple(p for p in self.places if p[1] <= artifact),
        )


class Vocabularies(Protocol):
    """The tokens of a source and of its artifact."""

    @property
    def source(self) -> SourceTokenizer:
        """The source's tokenizer."""

    @property
    def artifact(self) -> SourceTokenizer:
        """The artifact's tokenizer."""

    def passages(self, documents: Sequence[str], length: int, limit: int) -> tuple[Passage, ...]:
        """Cut documents into stretches of at most ``length`` tokens on either side, ``limit`` tokens in all."""

    def shared(self, logs: Tensor) -> Tensor:
        """Return the source's log probabilities (n, its vocabulary) among the tokens that both have (n, those)."""

    def lacking(self, logs: Tensor) -> Tensor:
        """Return the probability (n,) that the source gives to tokens that the artifact lacks."""

    def spelled(self, token: int) -> Window:
        """Return a token of the source in the artifact's tokens; empty where that is no text."""

    def reread(self, prompt: Passage, written: Sequence[int]) -> tuple[Window, tuple[Place, ...]]:
        """Return prompt and what the artifact wrote behind it in the source's tokens, and the common places."""


@dataclass(frozen=True)
class OneVocabulary:
    """Both read the same tokens."""

    source: SourceTokenizer

    @property
    def artifact(self) -> SourceTokenizer:
        """The source's."""
        return self.source

    def passages(self, documents: Sequence[str], length: int, limit: int) -> tuple[Passage, ...]:
        """Cut documents into windows."""
        windows = token_windows(documents, self.source.encode, length, _opening(self.source), limit)
        return tuple(Passage(window, window, window, _all_places(len(window))) for window in windows)

    def shared(self, logs: Tensor) -> Tensor:
        """Return them as they are."""
        return logs

    def lacking(self, logs: Tensor) -> Tensor:
        """Return zeros: it lacks none."""
        return logs.new_zeros(len(logs))

    def spelled(self, token: int) -> Window:
        """Return the token itself."""
        return (token,)

    def reread(self, prompt: Passage, written: Sequence[int]) -> tuple[Window, tuple[Place, ...]]:
        """Return the tokens themselves."""
        ids = (*prompt.source, *written)
        return ids, _all_places(len(ids))


@dataclass(frozen=True)
class FewerTokens:
    """The artifact has some of the source's tokens, under ids of its own; see `fewer_tokens`."""

    source: SourceTokenizer
    artifact: SourceTokenizer
    kept: Window
    """The artifact's id -> the source's."""
    spellings: tuple[Window, ...]
    """The source's id -> the artifact's tokens that spell it; empty for rows of the table that are no token."""
    surfaces: tuple[bytes, ...]
    """The source's id -> what it stands for in a text, as the tokenizer's own alphabet writes that."""

    def passages(self, documents: Sequence[str], length: int, limit: int) -> tuple[Passage, ...]:
        """Cut documents at common places, in rounds: the first stretch of each document, then the second."""
        found: list[Passage] = []
        room, alive = limit, [self._stretches(document, length) for document in documents]
        while alive and room >= MINIMUM_TAIL:
            still = []
            for stretches in alive:
                passage = next(stretches, None)
                if passage is None or len(passage.artifact) > room:
                    continue
                still.append(stretches)
                if len(passage.artifact) >= min(MINIMUM_TAIL, length):
                    found.append(passage)
                    room -= len(passage.artifact)
            alive = still
        if not found:
            raise GateError(
                f"the text is too short: no document has {MINIMUM_TAIL} tokens; give a longer --eval-text"
            )
        return tuple(found)

    def shared(self, logs: Tensor) -> Tensor:
        """Take the columns of the tokens that are left."""
        return logs[:, list(self.kept)].log_softmax(-1)

    def lacking(self, logs: Tensor) -> Tensor:
        """Return what the source gives to tokens that are gone."""
        return (1 - logs[:, list(self.kept)].exp().sum(-1)).clamp_min(0)

    def spelled(self, token: int) -> Window:
        """Return the artifact's tokens for it."""
        return self.spellings[token]

    def reread(self, prompt: Passage, written: Sequence[int]) -> tuple[Window, tuple[Place, ...]]:
        """Read the text anew; what is no text, such as half a character, is taken token by token."""
        ours = (*prompt.artifact, *written)
        opening = _opening(self.artifact) is not None
        theirs = (*prompt.source[:opening], *self.source.encode(self.artifact.decode(ours[opening:])))
        as_source = tuple(self.kept[token] for token in ours)
        places = self._common(theirs, as_source)
        if self._text(theirs) != self._text(as_source) or places[0][1] > len(prompt.artifact):
            theirs = (*prompt.source, *(self.kept[token] for token in written))
            places = self._common(theirs, as_source)
        return theirs, places

    def _stretches(self, document: str, length: int) -> Iterator[Passage]:
        theirs = tuple(self.source.encode(document))
        ours = tuple(self.artifact.encode(document))
        as_source = tuple(self.kept[token] for token in ours)
        if self._text(theirs) != self._text(as_source):
            raise GateError(
                f"the artifact's tokenizer reads another text than the source's in {document[:60]!r}; this is a "
                "mistake of slm-export: please report it"
            )
        before, after = (
            (() if (i := _opening(side)) is None else (i,)) for side in (self.source, self.artifact)
        )
        places, start = self._places(theirs, as_source), 0
        while start + 1 < len(places):
            (i, j), end = places[start], start
            while end + 1 < len(places) and max(
                places[end + 1][0] - i, places[end + 1][1] - j
            ) <= length - len(before):
                end += 1
            if end == start:  # one word longer than a window
                start += 1
                continue
            shifted = ((a - i + len(before), b - j + len(after)) for a, b in places[start : end + 1])
            yield Passage(
                (*before, *theirs[i : places[end][0]]),
                (*after, *ours[j : places[end][1]]),
                (*(self.kept[token] for token in after), *as_source[j : places[end][1]]),
                tuple(place for place in shifted if place[0]),
            )
            start = end

    def _places(self, theirs: Sequence[int], ours: Sequence[int]) -> tuple[Place, ...]:
        """Return where both have read equally much, the beginning included; both in the source's ids."""
        first, second = (
            {
                end: count
                for count, end in enumerate(accumulate((len(self.surfaces[i]) for i in ids), initial=0))
            }
            for ids in (theirs, ours)
        )
        return tuple((count, second[end]) for end, count in first.items() if end in second)

    def _common(self, theirs: Sequence[int], ours: Sequence[int]) -> tuple[Place, ...]:
        """Return the places behind at least one token."""
        return tuple(place for place in self._places(theirs, ours) if min(place))

    def _text(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.surfaces[token] for token in ids)


def fewer_tokens(
    source: SourceTokenizer, artifact: SourceTokenizer, kept: Sequence[int], rows: int
) -> FewerTokens:
    """Return the two vocabularies.

    Given   kept: the artifact's id -> the source's; rows: of the source's table, which may have more than tokens
    """
    model = document_of(source)["model"]
    ids = source.backend.get_vocab()
    texts = {token: text for text, token in ids.items()}
    new_ids = {old: new for new, old in enumerate(kept)}
    spell = _speller(artifact)
    spellings: list[Window] = []
    for row in range(rows):
        here = new_ids.get(row)
        spellings.append((here,) if here is not None else spell(texts[row]) if row in texts else ())
    surface = _surfaces(model)
    surfaces = tuple(surface(texts.get(row, "")) for row in range(rows))
    return FewerTokens(source, artifact, tuple(kept), tuple(spellings), surfaces)


def _speller(tokenizer: SourceTokenizer) -> Callable[[str], Window]:
    """Return what spells the text of a token, as the tokenizer's model writes it."""
    from tokenizers import Tokenizer

    document = document_of(tokenizer)
    prefix = document["model"].get("continuing_subword_prefix") or ""
    vocabulary: Mapping[str, int] = tokenizer.backend.get_vocab()
    model: Any = Tokenizer.from_str(tokenizer.tokenizer_json_bytes().decode()).model

    def spell(text: str) -> Window:
        if prefix and text.startswith(prefix):
            return longest_pieces(text.removeprefix(prefix), True, text, prefix, vocabulary) or ()
        return tuple(token.id for token in model.tokenize(text))

    return spell


def _surfaces(model: Mapping[str, Any]) -> Callable[[str], bytes]:
    prefix = model.get("continuing_subword_prefix") or ""
    falls_back = bool(model.get("byte_fallback"))

    def surface(text: str) -> bytes:
        byte = _BYTE.fullmatch(text) if falls_back else None
        return bytes.fromhex(byte[1]) if byte else text.removeprefix(prefix).encode()

    return surface


def _opening(tokenizer: SourceTokenizer) -> int | None:
    return tokenizer.bos_id if tokenizer.adds_bos else None


def _all_places(count: int) -> tuple[Place, ...]:
    return tuple((i, i) for i in range(1, count + 1))
