"""What a tokenizer's files have to be before transformers is asked to read them, and where generation ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slm_export.errors import InputError
from slm_export.jsonfile import read_object

_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json",
    "tekken.json",
)
_SAMPLER = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_length", "max_new_tokens")
_MOST = 1 << 31


def check_files(folder: Path) -> None:
    """Refuse a folder that has no tokenizer, a broken one, or one that only its own code can read."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise InputError(
            f"{folder}: no tokenizer; expected tokenizer.json or one of {', '.join(_VOCABULARIES[1:])}"
        )
    _read_json(folder / "tokenizer.json")
    _check_sampler(folder / "generation_config.json")
    auto_map = _read_json(folder / "tokenizer_config.json").get("auto_map")
    if auto_map and (not isinstance(auto_map, dict) or "AutoTokenizer" in auto_map):
        raise InputError(
            f"{folder / 'tokenizer_config.json'}: the tokenizer needs code of its own (auto_map), which is "
            "never executed here; save it as a standard tokenizer.json first"
        )


def check_template(folder: Path, template: Any) -> None:
    """Refuse a chat template that is no text: one, or several by name."""
    texts = template.values() if isinstance(template, dict) else [template]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise InputError(f"{folder}: the chat template is no text; correct tokenizer_config.json")


def _check_sampler(file: Path) -> None:
    """Refuse settings of a sampler that are none: formats carry them to the runner."""
    content = _read_json(file)
    for key in _SAMPLER:
        value = content.get(key)
        if value is not None and (type(value) not in (int, float) or not abs(value) < _MOST):
            raise InputError(f"{file}: {key} is {json.dumps(value)}; it must be a number of a sane size")


def stop_ids_of(folder: Path, tokenizer_eos: int | None) -> tuple[int, ...]:
    """Return the stop tokens by the rule that ``SourceTokenizer.stop_ids`` states."""
    generation = _eos_of(folder / "generation_config.json")
    if generation:
        return generation
    own = () if tokenizer_eos is None else (tokenizer_eos,)
    return tuple(dict.fromkeys(_eos_of(folder / "config.json") + own))


def _eos_of(file: Path) -> tuple[int, ...]:
    """Return ``eos_token_id`` of a file as a tuple; empty when the file or the key is missing."""
    content = _read_json(file)
    nested = content.get("text_config")
    value = content.get("eos_token_id")
    if value is None and isinstance(nested, dict):  # the language model inside a multimodal one
        value = nested.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if type(token) is not int or not 0 <= token < _MOST:
            raise InputError(f"{file}: eos_token_id must be a token id or a list of them, not {value!r}")
    return tuple(dict.fromkeys(ids))


def _read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object; empty when there is no such file."""
    return read_object(file) if file.is_file() else {}
