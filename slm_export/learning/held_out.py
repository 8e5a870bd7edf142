"""Training and held-out text that share nothing.

That is: no run of 13 words, the length that Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C,
found by. Text that is given as held-out and does share one is refused.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from slm_export.errors import InputError
from slm_export.learning.texts import Document, Texts, sha256_of

RUN = 13
"""Words in a row that training and held-out text must not share."""
HELD_OUT_SHARE = 0.1
"""Of the characters, where no held-out text is given."""
_WORD = re.compile(r"\w+")
_NAMED = 8
_TRIED = 100


@dataclass(frozen=True)
class Split:
    """What is learned from and what is only measured on."""

    training: tuple[Document, ...]
    held_out: tuple[Document, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def sha256(self) -> str:
        """Of both, apart."""
        return hashlib.sha256(f"{sha256_of(self.training)} {sha256_of(self.held_out)}".encode()).hexdigest()


def split(texts: Texts, held_out: Texts | None, share: float = HELD_OUT_SHARE) -> Split:
    """Return training and held-out documents that share no run of 13 words.

    Given   held_out: given by the user; None: documents of ``texts`` that share no run with any that is learned from

    Raises:
        InputError: the given ones overlap, or none can be held out.
    """
    if held_out is not None:
        _refuse_overlap(texts.documents, held_out.documents)
        return Split(texts.documents, held_out.documents)
    chosen, clashing = _disjoint(texts.documents, share)
    if not chosen or len(chosen) == len(texts.documents):
        raise InputError(
            f"of {len(texts.documents)} documents none can be held out to measure on: each shares a run of {RUN} words "
            "with another, or there is only one; give held-out text of its own with --held-out"
        )
    training = tuple(d for index, d in enumerate(texts.documents) if index not in chosen)
    note = f"{len(chosen)} of {len(texts.documents)} documents were held out to measure on"
    if clashing:
        note += (
            f"; {clashing} others could not be, because they share a run of {RUN} words with training text"
        )
    return Split(training, tuple(texts.documents[i] for i in sorted(chosen)), (note,))


def runs_of(text: str) -> set[int]:
    """Return the hashes of all runs of 13 words; of a shorter text, of the whole."""
    words = _WORD.findall(text.lower())
    if len(words) < RUN:
        return {_hash(tuple(words))} if words else set()
    return {_hash(tuple(words[i : i + RUN])) for i in range(len(words) - RUN + 1)}


def _hash(words: tuple[str, ...]) -> int:
    # Not hash(): that of texts is another in every process, and a split must be the same.
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest(), "big")


def overlap(training: Sequence[Document], held_out: Sequence[Document]) -> list[tuple[str, str]]:
    """Return pairs (held-out document, training document) that share a run of 13 words, one for each held-out one."""
    owners: dict[int, list[int]] = {}
    for index, document in enumerate(held_out):
        for run in runs_of(document.text):
            owners.setdefault(run, []).append(index)
    found: dict[int, str] = {}
    for document in training:
        for run in runs_of(document.text):
            for index in owners.get(run, ()):
                found.setdefault(index, document.where)
    return [(held_out[index].where, where) for index, where in sorted(found.items())]


def _refuse_overlap(training: Sequence[Document], held_out: Sequence[Document]) -> None:
    pairs = overlap(training, held_out)
    if pairs:
        named = "; ".join(f"{ours} with {theirs}" for ours, theirs in pairs[:_NAMED])
        more = f" and {len(pairs) - _NAMED} more" if len(pairs) > _NAMED else ""
        raise InputError(
            f"{len(pairs)} of {len(held_out)} held-out documents share a run of {RUN} words with training text, and a "
            f"figure on them would mean nothing: {named}{more}; take them out of one of the two"
        )


def _disjoint(documents: Sequence[Document], share: float) -> tuple[set[int], int]:
    """Return indices of documents to hold out, and how many candidates could not be.

    Candidates come in the order of a hash of their text, so that a split does not depend on names. One that shares a
    run with a document that stays in training stays there too, until nothing changes.
    """
    ranked = sorted(range(len(documents)), key=lambda i: hashlib.sha256(documents[i].text.encode()).digest())
    wanted = share * sum(len(document.text) for document in documents)
    # Twice as many as needed are tried, and of a small text all, because some will clash.
    candidates: list[int] = []
    room = 2 * wanted
    for index in ranked:
        if room <= 0 and len(candidates) >= _TRIED:
            break
        candidates.append(index)
        room -= len(documents[index].text)
    runs = {index: runs_of(documents[index].text) for index in candidates}
    owners: dict[int, set[int]] = {}
    for index, found in runs.items():
        for run in found:
            owners.setdefault(run, set()).add(index)
    chosen, pending = set(candidates), [i for i in range(len(documents)) if i not in runs]
    while pending:
        index = pending.pop()
        for run in runs.get(index) or runs_of(documents[index].text):
            for other in owners.get(run, ()):
                if other in chosen and other != index:
                    chosen.remove(other)
                    pending.append(other)
    clashing = len(candidates) - len(chosen)
    return _as_many_as_wanted(
        [i for i in candidates if i in chosen], documents, runs, owners, wanted
    ), clashing


def _as_many_as_wanted(
    chosen: Sequence[int],
    documents: Sequence[Document],
    runs: dict[int, set[int]],
    owners: dict[int, set[int]],
    wanted: float,
) -> set[int]:
    """Return the first of these, with all that they share runs with: what is left of them is learned from."""
    allowed, taken, characters = set(chosen), set[int](), 0
    for index in chosen:
        if characters >= wanted:
            break
        pending = [index]
        while pending:
            one = pending.pop()
            if one in taken:
                continue
            taken.add(one)
            characters += len(documents[one].text)
            pending += [o for run in runs[one] for o in owners[run] if o in allowed and o not in taken]
    return taken
