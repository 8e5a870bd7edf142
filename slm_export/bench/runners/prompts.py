"""Texts of a given number of tokens, for programs that take text."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from slm_export.errors import InputError
from slm_export.evaltext import load_documents


def open_tokenizer(path: Path) -> Tokenizer:
    """Open a tokenizer.json; InputError where it is none."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no class of its own
        raise InputError(f"{path}: no tokenizer: {error}; export the model again") from error


def text_of(tokenizer: Tokenizer, tokens: int) -> str:
    """Return a text of ``tokens`` tokens, or as near as its tokenizer allows; speed does not depend on what it says."""

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    ids: list[int] = []
    documents = load_documents(None)
    while len(ids) < tokens + 1:
        ids += [token for document in documents for token in encode(document)]
    # What is cut out of the middle of a text may be read as a token more or less.
    tried = [tokenizer.decode(ids[:count]) for count in range(tokens, max(0, tokens - 4), -1)]
    longer = tokenizer.decode(ids[: tokens + 1])
    return min((*tried, longer), key=lambda text: abs(len(encode(text)) - tokens))
