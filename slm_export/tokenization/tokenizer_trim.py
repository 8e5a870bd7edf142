"""A tokenizer's files without some of its tokens: every id in them rewritten, every file saying the same.

The tokens that stay keep their order. Files that other words for the same tokenizer are in (SentencePiece's
``tokenizer.model``) are left out: every runner here reads tokenizer.json.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from slm_export.errors import InputError
from slm_export.tokenization.tokenizer import SourceTokenizer

MAIN, CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
LEFT_OUT = ("tokenizer.model",)
_NAMING = ("_token_id", "_token_ids", "_token_index")
"""Endings of the keys whose values are token ids."""
_LISTING = ("suppress_tokens", "begin_suppress_tokens")

Document = dict[str, Any]


def document_of(tokenizer: SourceTokenizer) -> Document:
    """Return tokenizer.json as `tokenizers` writes it today, with all tokens that transformers knows."""
    from tokenizers import Tokenizer

    if tokenizer.published is None and (fast := getattr(tokenizer.backend, "backend_tokenizer", None)):
        return dict(json.loads(fast.to_str()))
    return dict(json.loads(Tokenizer.from_str(tokenizer.tokenizer_json_bytes().decode()).to_str()))


def indispensable(document: Mapping[str, Any], tokenizer: SourceTokenizer, config: Any) -> set[int]:
    """Return the ids that stay whatever the text: added tokens, and what files and configuration name by its id."""
    model = document["model"]
    stay = {int(token["id"]) for token in document["added_tokens"]} | set(tokenizer.stop_ids)
    if model["type"] == "Unigram":
        scores = [float(score) for _, score in model["vocab"]]
        # What an unknown character costs follows from the least likely piece.
        stay |= {scores.index(min(scores))} | ({model["unk_id"]} - {None})
    elif (unknown := model.get("unk_token")) in model["vocab"]:
        stay.add(model["vocab"][unknown])
    generation = _json(tokenizer.files().get(GENERATION))
    for content in (config.to_dict(), config.get_text_config().to_dict(), generation):
        stay |= {token for key in content if key.endswith(_NAMING) for token in _listed(content[key])}
    return stay & {token for _, token in _all_tokens(document)}


def trimmed_files(
    document: Mapping[str, Any], tokenizer: SourceTokenizer, new_ids: Mapping[int, int]
) -> dict[str, bytes]:
    """Return the files of ``tokenizer`` with only the tokens of ``new_ids`` (old id -> new id).

    Raises:
        InputError: `tokenizers` gives the tokens of the new file other ids.
    """
    made = _document(document, new_ids)
    _refuse_other_ids(made, document, new_ids)
    before = tokenizer.files()
    config = {"tokenizer_class": type(tokenizer.backend).__name__, **_json(before.get(CONFIG))}
    files = {
        name: _rewritten(name, content, made["model"], new_ids)
        for name, content in before.items()
        if name not in LEFT_OUT
    }
    files |= {MAIN: _text(made, indent=None), CONFIG: _text(_tokenizer_config(config, new_ids))}
    if tokenizer.stop_ids:
        # Said here in any case: a bundle has no config.json that would say it.
        stops = [new_ids[token] for token in tokenizer.stop_ids]
        generation = renumbered(_json(before.get(GENERATION)), new_ids)
        files[GENERATION] = _text({**generation, "eos_token_id": stops[0] if len(stops) == 1 else stops})
    return files


def _rewritten(name: str, content: bytes, model: Mapping[str, Any], new_ids: Mapping[int, int]) -> bytes:
    """Return what a file beside tokenizer.json says, of the tokens that are left."""
    if name == "vocab.txt":
        return _lines(model["vocab"])
    if name == "vocab.json":
        return _text(model["vocab"], indent=None)
    if name == "merges.txt":
        return _lines(("#version: 0.2", *(" ".join(pair) for pair in model["merges"])))
    if name == "added_tokens.json":
        return _text({text: new_ids[token] for text, token in _json(content).items()})
    return _text(renumbered(_json(content), new_ids)) if name == GENERATION else content


def renumbered(content: Mapping[str, Any], new_ids: Mapping[int, int]) -> Document:
    """Return a configuration with its token ids rewritten; an id of no token becomes None."""
    made = dict(content)
    for key, value in content.items():
        if key.endswith(_NAMING):
            made[key] = (
                [new_ids[i] for i in value if i in new_ids] if isinstance(value, list) else new_ids.get(value)
            )
        elif key in _LISTING and value:
            made[key] = [new_ids[token] for token in value if token in new_ids]
        elif key == "bad_words_ids" and value:
            made[key] = [[new_ids[i] for i in word] for word in value if all(i in new_ids for i in word)]
    return made


def _listed(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [token for token in values if type(token) is int and token >= 0]


def _document(document: Mapping[str, Any], new_ids: Mapping[int, int]) -> Document:
    made = copy.deepcopy(dict(document))
    model = made["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for token, entry in enumerate(model["vocab"]) if token in new_ids]
        model["unk_id"] = None if model["unk_id"] is None else new_ids[model["unk_id"]]
    else:
        left = ((text, new_ids[token]) for text, token in model["vocab"].items() if token in new_ids)
        model["vocab"] = dict(sorted(left, key=lambda entry: entry[1]))
    if model["type"] == "BPE":
        model["merges"] = [pair for pair in model["merges"] if _is_left(pair, model)]
    for token in made["added_tokens"]:
        token["id"] = new_ids[token["id"]]
    if made.get("padding"):
        made["padding"]["pad_id"] = new_ids.get(made["padding"]["pad_id"], 0)
    _renumber_processor(made.get("post_processor") or {}, new_ids)
    return made


def _is_left(pair: Sequence[str], model: Mapping[str, Any]) -> bool:
    first, second = pair
    merged = first + second.removeprefix(model.get("continuing_subword_prefix") or "")
    return all(text in model["vocab"] for text in (first, second, merged))


def _renumber_processor(processor: Document, new_ids: Mapping[int, int]) -> None:
    """Rewrite the ids of the tokens that are put around a text, in place."""
    for part in processor.get("processors", ()):
        _renumber_processor(part, new_ids)
    if processor.get("type") == "TemplateProcessing":
        for token in processor["special_tokens"].values():
            token["ids"] = [new_ids[i] for i in token["ids"]]
    for end in ("sep", "cls"):  # of BertProcessing and RobertaProcessing: [text, id]
        if end in processor:
            processor[end] = [processor[end][0], new_ids[processor[end][1]]]


def _tokenizer_config(content: Mapping[str, Any], new_ids: Mapping[int, int]) -> Document:
    made = renumbered(content, new_ids)
    if "added_tokens_decoder" in made:
        decoder = made["added_tokens_decoder"].items()
        made["added_tokens_decoder"] = {str(new_ids[int(i)]): token for i, token in decoder}
    return made


def _refuse_other_ids(made: Document, before: Mapping[str, Any], new_ids: Mapping[int, int]) -> None:
    """`tokenizers` numbers added tokens as it reads them: what it makes of the file is what counts."""
    from tokenizers import Tokenizer

    expected = {text: new_ids[token] for text, token in _all_tokens(before) if token in new_ids}
    found = Tokenizer.from_str(json.dumps(made)).get_vocab(with_added_tokens=True)
    if found != expected:
        wrong = sorted(text for text in {*expected, *found} if found.get(text) != expected.get(text))
        raise InputError(
            f"{MAIN}: its tokens cannot be numbered anew ({len(wrong)} would have other ids, {wrong[0]!r} first)"
        )


def _all_tokens(document: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    vocabulary = document["model"]["vocab"]
    if document["model"]["type"] == "Unigram":
        yield from ((text, token) for token, (text, _) in enumerate(vocabulary))
    else:
        yield from vocabulary.items()
    yield from ((token["content"], token["id"]) for token in document["added_tokens"])


def _json(content: bytes | None) -> Document:
    return dict(json.loads(content)) if content else {}


def _lines(texts: Iterable[str]) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode()


def _text(content: object, indent: int | None = 2) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=indent) + "\n").encode()
