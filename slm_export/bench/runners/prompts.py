"""Texts of a given number of tokens, for programs that take text."""

from __future__ import annotations

from slm_export.evaltext import load_documents
from slm_export.tokenizer import SourceTokenizer


def text_of(tokenizer: SourceTokenizer, tokens: int) -> str:
    """Return a text of ``tokens`` tokens, or as near as its tokenizer allows; speed does not depend on what it says."""
    ids: list[int] = []
    documents = load_documents(None)
    while len(ids) < tokens + 1:
        ids += [token for document in documents for token in tokenizer.encode(document)]
    # What is cut out of the middle of a text may be read as a token more or less.
    tried = [tokenizer.decode(ids[:count]) for count in range(tokens, max(0, tokens - 4), -1)]
    longer = tokenizer.decode(ids[: tokens + 1])
    return min((*tried, longer), key=lambda text: abs(len(tokenizer.encode(text)) - tokens))
