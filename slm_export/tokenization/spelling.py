"""What a token is spelled with once it is gone, and so which tokens of a vocabulary may go.

    BPE        a token is made by merging two others: those two, which have to stay as long as it does
    WordPiece  the longest pieces that begin where it begins
    Unigram    the likeliest pieces
    bytes      where the tokenizer falls back to them: a single character

What nothing spells stays: bytes, characters without bytes, special tokens. So any text that could be read can be read
without the others, and text whose tokens all stay is read in the very same tokens: what BPE merges, what is longest
and what is likeliest among all tokens is so among fewer.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from slm_export.errors import InputError

Parts = Mapping[int, "tuple[int, ...]"]


@dataclass(frozen=True)
class Spelling:
    """How the tokens of one tokenizer are spelled."""

    ids: Mapping[str, int]
    """Every token of the tokenizer's model, as it is written there."""
    parts: Parts
    """Token -> what spells it when it is gone; a token that nothing spells is not here."""
    derived: bool
    """Whether a token can only be read while its parts are there."""


def spelling_of(document: Mapping[str, Any]) -> Spelling:
    """Return the spelling of a tokenizer.json, as `tokenizers` writes it today.

    Raises:
        InputError: a kind of tokenizer whose tokens are spelled by no others.
    """
    model = document["model"]
    kinds: Mapping[str, Callable[[Mapping[str, Any]], Spelling]] = {
        "BPE": _bpe,
        "WordPiece": _word_piece,
        "Unigram": _unigram,
    }
    if model["type"] not in kinds:
        raise InputError(
            f"a tokenizer of kind {model['type']} cannot lose tokens: no token of it is spelled by others "
            f"(those of {', '.join(kinds)} are)"
        )
    return kinds[model["type"]](model)


def chosen(spelling: Spelling, stay: Collection[int], uses: Mapping[int, int], size: int) -> set[int]:
    """Return the ``size`` tokens that a text is read in with few tokens.

    Given   stay: tokens that are kept in any case; uses: token -> how often it stands in the text
    Result  one token after the other goes, always the one whose loss lengthens the text least, and of those that the
            text does not need the last of the vocabulary; BPE's only when nothing is merged from it any more

    Raises:
        InputError: more tokens than that have to stay.
    """
    parts, left, count = spelling.parts, set(spelling.ids.values()) | set(stay), Counter(uses)
    above = (
        Counter(part for spelled in parts.values() for part in set(spelled))
        if spelling.derived
        else Counter()
    )

    def spelled(token: int) -> list[int]:
        return [p for part in parts[token] for p in ([part] if part in left else spelled(part))]

    def cost(token: int) -> int:
        return count[token] * (len(spelled(token)) - 1) if count[token] else 0

    may_go = {token for token in parts if token not in stay}
    heap = [(cost(token), -token) for token in may_go if not above[token]]
    heapq.heapify(heap)
    while len(left) > size:
        if not heap:
            raise InputError(
                f"{len(left):,} tokens have to stay: special ones, and the bytes or characters that any text can be "
                f"spelled in; {size:,} are too few"
            )
        expected, token = heapq.heappop(heap)
        token = -token
        if expected < (now := cost(token)):  # what it is a part of went since
            heapq.heappush(heap, (now, -token))
            continue
        for part in spelled(token):
            count[part] += count[token]
        left.remove(token)
        for part in set(parts[token]) if spelling.derived else ():
            above[part] -= 1
            if not above[part] and part in may_go:
                heapq.heappush(heap, (cost(part), -part))
    return left


def _byte_ids(ids: Mapping[str, int], model: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the ids of the 256 bytes; none where the tokenizer does not fall back to them."""
    found = tuple(ids.get(f"<0x{byte:02X}>", -1) for byte in range(256))
    return found if model.get("byte_fallback") and min(found) >= 0 else ()


def _bpe(model: Mapping[str, Any]) -> Spelling:
    ids: Mapping[str, int] = model["vocab"]
    prefix = model.get("continuing_subword_prefix") or ""
    whole = not prefix and not model.get("end_of_word_suffix")
    ranks: dict[tuple[str, str], int] = {}
    makers: dict[str, list[tuple[str, str]]] = {}
    for rank, (left, right) in enumerate(model["merges"]):
        ranks[left, right] = rank
        makers.setdefault(left + right.removeprefix(prefix), []).append((left, right))
    fallback = _byte_ids(ids, model)
    parts: dict[int, tuple[int, ...]] = {}
    for text, token in ids.items():
        pairs: list[tuple[str, ...]] = list(makers.get(text, ()))
        if whole and len(pairs) != 1 and len(text) > 1:
            pairs = [_last_merge(text, ranks)]
        if token in fallback:
            continue
        if pairs and all(part in ids for part in pairs[0]):
            parts[token] = tuple(ids[part] for part in pairs[0])
        elif fallback and len(text) == 1:
            parts[token] = tuple(fallback[byte] for byte in text.encode())
    return Spelling(ids, parts, derived=True)


def _last_merge(text: str, ranks: Mapping[tuple[str, str], int]) -> tuple[str, ...]:
    """Return what is left of a text by the rules of BPE before it becomes one token, or in the end.

    Wherever a token stands, the same merges make it: none of them crosses its ends.
    """
    symbols = list(text)
    while len(symbols) > 2:
        found = [(ranks.get(pair, math.inf), at) for at, pair in enumerate(itertools.pairwise(symbols))]
        rank, at = min(found)
        if rank == math.inf:
            break
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return tuple(symbols)


def _word_piece(model: Mapping[str, Any]) -> Spelling:
    ids: Mapping[str, int] = model["vocab"]
    prefix = model["continuing_subword_prefix"]
    parts = {}
    for text, token in ids.items():
        inside = text.startswith(prefix) and text != prefix
        if found := longest_pieces(text.removeprefix(prefix) if inside else text, inside, text, prefix, ids):
            parts[token] = found
    return Spelling(ids, parts, derived=False)


def longest_pieces(
    text: str, inside: bool, without: str, prefix: str, ids: Mapping[str, int]
) -> tuple[int, ...] | None:
    """Return the longest pieces of a text, one after the other; None where they do not cover it."""
    pieces: list[int] = []
    start = 0
    while start < len(text):
        mark = prefix if inside or start else ""
        ends = range(len(text), start, -1)
        end = next((e for e in ends if (p := mark + text[start:e]) in ids and p != without), None)
        if end is None:
            return None
        pieces.append(ids[mark + text[start:end]])
        start = end
    return tuple(pieces)


def _unigram(model: Mapping[str, Any]) -> Spelling:
    ids = {text: token for token, (text, _) in enumerate(model["vocab"])}
    scores = {text: float(score) for text, score in model["vocab"]}
    longest = max(map(len, ids))
    fallback = _byte_ids(ids, model)
    parts = {}
    for text, token in ids.items():
        if token in fallback:
            continue
        if fallback and len(text) == 1:
            parts[token] = tuple(fallback[byte] for byte in text.encode())
        elif found := _likeliest(text, ids, scores, longest):
            parts[token] = found
    return Spelling(ids, parts, derived=False)


def _likeliest(
    text: str, ids: Mapping[str, int], scores: Mapping[str, float], longest: int
) -> tuple[int, ...] | None:
    """Return the likeliest pieces of a token's text, itself left out; None where none cover it."""
    best: list[tuple[float, int]] = [
        (0.0, 0)
    ]  # of each beginning of the text: its score, where its last piece begins
    for end in range(1, len(text) + 1):
        starts = range(max(0, end - longest), end)
        found = [
            (best[start][0] + scores[text[start:end]], start)
            for start in starts
            if text[start:end] in ids and end - start < len(text)
        ]
        best.append(max(found, default=(-math.inf, 0)))
    if best[-1][0] == -math.inf:
        return None
    pieces, end = [], len(text)
    while end:
        start = best[end][1]
        pieces.append(ids[text[start:end]])
        end = start
    return tuple(reversed(pieces))
