"""What stands in the place of personal data: its kind with a number, a keyed hash, or nothing."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from slm_export.privacy.finder import Finder

How = Literal["replace", "hash", "drop"]
_SECRET = secrets.token_bytes(32)


@dataclass
class Anonymiser:
    """Anonymises texts that belong together: the same data gets the same mark in all of them.

    replace     <PERSON_1>: numbered in the order of appearance
    hash        <PERSON_5f2c9a01d3e4>: HMAC-SHA256 with a key; who has the key can tell whether two are the same
    drop        nothing
    """

    finder: Finder
    how: How = "replace"
    key: bytes = b""
    """Of the hash; a secret of at least 16 bytes."""
    found: Counter[str] = field(default_factory=Counter)
    """How many of each kind, so far."""
    _numbers: dict[tuple[str, str], int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        assert self.how != "hash" or len(self.key) >= 16

    def text(self, text: str) -> str:
        """Return a text without what was found in it."""
        made, at = [], 0
        for span in self.finder.find(text):
            self.found[span.kind] += 1
            made += [text[at : span.start], self._mark(span.kind, text[span.start : span.end])]
            at = span.end
        return "".join((*made, text[at:]))

    def _mark(self, kind: str, value: str) -> str:
        if self.how == "drop":
            return ""
        same = " ".join(unicodedata.normalize("NFKC", value).split()).casefold()
        if self.how == "hash":
            digest = hmac.new(self.key, f"{kind}\0{same}".encode(), hashlib.sha256).hexdigest()
            return f"<{kind}_{digest[:12]}>"
        # Numbers are given by appearance; of the value itself a digest is kept, with a key that ends with the process.
        hidden = hashlib.blake2b(same.encode(), key=_SECRET).hexdigest()
        known = self._numbers.setdefault((kind, hidden), self._next(kind))
        return f"<{kind}_{known}>"

    def _next(self, kind: str) -> int:
        return 1 + sum(known == kind for known, _ in self._numbers)


def values(document: object, change: Callable[[str], str]) -> object:
    """Return a JSON value with every text in it changed; keys stay."""
    if isinstance(document, str):
        return change(document)
    if isinstance(document, Mapping):
        return {key: values(value, change) for key, value in document.items()}
    if isinstance(document, list):
        return [values(value, change) for value in document]
    return document
