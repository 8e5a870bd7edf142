"""The tokenizer as swift-transformers reads it (release 1.3.3, Sources/Tokenizers).

It chooses its implementation by ``tokenizer_class`` of tokenizer_config.json and not by what tokenizer.json holds, so a
class that it does not know, or that stands for several kinds, is one that it gets wrong. And unlike `tokenizers` it
takes spaces off before punctuation unless told not to.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slm_export.errors import InputError
from slm_export.tokenization import conformance_strings
from slm_export.tokenization.tokenizer import SourceTokenizer

VERSION = "1.3.3"
"""The release of swift-transformers that a package depends on."""

_CLASSES: Mapping[str, str] = {
    "BPE": "PreTrainedTokenizer",
    "WordPiece": "BertTokenizer",
    "Unigram": "XLMRobertaTokenizer",
}
"""Kind of model in tokenizer.json -> the class under which swift-transformers implements that kind."""

_PER_KIND = 4


def check_tokenizer(folder: Path) -> None:
    """Raise InputError unless swift-transformers has this kind of tokenizer."""
    _class_of(folder)


def swift_config(folder: Path) -> dict[str, Any]:
    """Return tokenizer_config.json of a bundle's ``tokenizer/``, in words that swift-transformers takes rightly."""
    file = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {
        **config,
        **_bert(folder),
        "tokenizer_class": _class_of(folder),
        "clean_up_tokenization_spaces": False,
    }


def probes(tokenizer: SourceTokenizer) -> list[dict[str, Any]]:
    """Return texts with what the source's tokenizer makes of them, for the package's own test.

    ``tokens`` are with those that the tokenizer adds, ``inner`` without, and ``decoded`` is the text of the latter.
    """
    found = []
    for text in _texts():
        inner = tokenizer.encode(text)
        found.append(
            {
                "text": text,
                "tokens": tokenizer.encode_with_template(text),
                "inner": inner,
                "decoded": tokenizer.decode(inner),
            }
        )
    return found


def _bert(folder: Path) -> dict[str, bool]:
    """Return what the WordPiece implementation in Swift reads here, and `tokenizers` in the normalizer."""
    normalizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("normalizer") or {}
    if normalizer.get("type") != "BertNormalizer":
        return {}
    return {
        "do_lower_case": bool(normalizer.get("lowercase")),
        "handle_chinese_chars": bool(normalizer.get("handle_chinese_chars")),
    }


def _texts() -> Iterator[str]:
    for texts in conformance_strings.BY_KIND.values():
        yield from texts[:_PER_KIND]


def _class_of(folder: Path) -> str:
    file = folder / "tokenizer.json"
    kind = _kind(json.loads(file.read_text(encoding="utf-8")).get("model", {}))
    if kind not in _CLASSES:
        raise InputError(
            f"{file.name}: a tokenizer of kind {kind}, which swift-transformers {VERSION} cannot read "
            f"({', '.join(_CLASSES)} it can); export for another --target, or save the model with another tokenizer"
        )
    return _CLASSES[kind]


def _kind(model: Mapping[str, Any]) -> str:
    """Return the kind of a tokenizer's model; early files do not name it."""
    if "type" in model:
        return str(model["type"])
    if "merges" in model:
        return "BPE"
    if "unk_id" in model:
        return "Unigram"
    return "WordPiece" if "max_input_chars_per_word" in model else "unknown"
