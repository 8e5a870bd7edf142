"""tokenizer.json -> an equal one in the parts that ExecuTorch's C++ tokenizer knows.

It reads byte-level BPE, and SentencePiece's BPE as Gemma's file states it. Two parts of SentencePiece-like files
need other words for the same thing:

    Metaspace      a pre-tokenizer it does not know: a word boundary before the text, spaces as U+2581.
                   As normalizers: a mark before the text, which becomes a boundary unless one follows anyway
    Strip          the decoder that takes the boundary before the text off. The runner decodes token by token, so
                   it would take the space off every word. Left out, the first word keeps a leading space

Where the boundary belongs before the first piece of text only, and not behind special tokens, it comes behind
those too; the conformance check says how often that matters.
"""

from __future__ import annotations

import copy
from typing import Any

_BOUNDARY = "\u2581"
_MARK = "\U0010fffd"
"""Of private use: no text has it."""


def for_executorch(document: dict[str, Any]) -> dict[str, Any] | None:
    """Return the content of a tokenizer.json rewritten, or None where it can be read as it is."""
    made = copy.deepcopy(document)
    _metaspace_to_normalizers(made)
    _decode_by_piece(made)
    return None if made == document else made


def _metaspace_to_normalizers(document: dict[str, Any]) -> None:
    part = document.get("pre_tokenizer") or {}
    # Split into words it cannot be said by normalizers; then it is left, and the runtime says what it cannot read.
    if part.get("type") != "Metaspace" or part.get("split", True):
        return
    steps = [document["normalizer"]] if document.get("normalizer") else []
    prepends = part.get("prepend_scheme", "always") != "never"
    boundary = part.get("replacement", _BOUNDARY)
    if prepends:
        steps.append({"type": "Prepend", "prepend": _MARK})
    replaced = {" ": boundary, **({_MARK + boundary: boundary, _MARK: boundary} if prepends else {})}
    steps += [{"type": "Replace", "pattern": {"String": k}, "content": v} for k, v in replaced.items()]
    document["normalizer"] = {"type": "Sequence", "normalizers": steps}
    document["pre_tokenizer"] = None


def _decode_by_piece(document: dict[str, Any]) -> None:
    part = document.get("decoder") or {}
    if part.get("type") == "Metaspace":
        boundary = part.get("replacement", _BOUNDARY)
        document["decoder"] = {"type": "Replace", "pattern": {"String": boundary}, "content": " "}
    elif part.get("type") == "Sequence":
        part["decoders"] = [step for step in part["decoders"] if step.get("type") != "Strip"]
