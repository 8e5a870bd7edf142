"""Documents -> examples of token ids.

windows    decoders: every document cut into windows, each opened by the opening token where the tokenizer puts one
           before a text; the stop token behind a document that ends
sentences  encoders: paragraphs, with the tokens that the tokenizer puts around a text
"""

from __future__ import annotations

from collections.abc import Sequence

from slm_export.errors import InputError
from slm_export.evaltext import MINIMUM_TAIL, paragraphs
from slm_export.learning.texts import Document
from slm_export.learning.trainer import Example
from slm_export.tokenization.tokenizer import SourceTokenizer


def windows(
    documents: Sequence[Document], tokenizer: SourceTokenizer, length: int, tokens: int | None = None
) -> list[Example]:
    """Return examples {"input_ids", "document"} of at most ``length`` tokens, in the order of the documents.

    Given   tokens: stop after so many; None: all
    Result  ``document`` is the index of the document; a tail shorter than 32 tokens is dropped, unless it is a whole
            document

    Raises:
        InputError: no window of two tokens.
    """
    opening = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    closing = list(tokenizer.stop_ids[:1])
    size = length - len(opening)
    made: list[Example] = []
    total = 0
    for index, document in enumerate(documents):
        ids = [*tokenizer.encode(document.text), *closing]
        for start in range(0, len(ids), size):
            chunk = ids[start : start + size]
            if start and len(chunk) < min(MINIMUM_TAIL, size):
                continue
            if len(opening) + len(chunk) >= 2:
                made.append({"input_ids": [*opening, *chunk], "document": [index]})
                total += len(opening) + len(chunk)
            if tokens is not None and total >= tokens:
                return made
    if not made:
        raise InputError("the text has no two tokens in a row; give a longer text")
    return made


def sentences(documents: Sequence[Document], tokenizer: SourceTokenizer, length: int) -> list[Example]:
    """Return examples {"input_ids", "document"} of the paragraphs of every document, cut at ``length`` tokens."""
    before, after = tokenizer.template
    room = length - len(before) - len(after)
    made: list[Example] = []
    for index, document in enumerate(documents):
        for text in paragraphs([document.text]):
            ids = tokenizer.encode(text)[:room]
            if ids:
                made.append({"input_ids": [*before, *ids, *after], "document": [index]})
    if not made:
        raise InputError("the text has no paragraph with a token; give a longer text")
    return made


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """Return so many examples, evenly from all."""
    step = max(1, len(examples) // count)
    return list(examples[::step][:count])
