"""Tokenizers and stop tokens that are not the model's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fault import Fault

from slm_export.runtime import ExportOptions

KIND, STOPS = "tokenizer", "stop tokens"
# Core ML's apps read text with Swift: what runs is not on this machine, and the bundle's files are the source's bytes.
RUNNERS = ("executorch", "litert", "onnx")


def tokenizer(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Return a plant: tokenizer.json, changed."""

    def planted(folder: Path) -> None:
        path = folder / "tokenizer.json"
        document = json.loads(path.read_text("utf-8"))
        change(document)
        path.write_text(json.dumps(document, ensure_ascii=False), "utf-8")

    return planted


def _merges(document: dict[str, Any]) -> None:
    merges = document["model"]["merges"]
    document["model"]["merges"] = merges[: len(merges) * 9 // 10]


def _merge_order(document: dict[str, Any]) -> None:
    document["model"]["merges"].reverse()


def _prefix_space(document: dict[str, Any]) -> None:
    document["pre_tokenizer"]["add_prefix_space"] = True


def _no_pre_tokenizer(document: dict[str, Any]) -> None:
    document["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def _lower_case(document: dict[str, Any]) -> None:
    document["normalizer"] = {"type": "Lowercase"}


def _composed(document: dict[str, Any]) -> None:
    document["normalizer"] = {"type": "NFC"}


def _added(document: dict[str, Any]) -> None:
    document["added_tokens"] = document["added_tokens"][:-1]


def _ids(document: dict[str, Any]) -> None:
    vocabulary = document["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[1000:1002]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def _first_stop(options: ExportOptions) -> ExportOptions:
    return replace(options, stop_ids=options.stop_ids[:1])


def _other_opening(options: ExportOptions) -> ExportOptions:
    return replace(options, bos_id=5, adds_bos=not options.adds_bos)


FAULTS = (
    Fault("a tenth of the merges is missing", KIND, formats=RUNNERS, tokenizer=tokenizer(_merges)),
    Fault("merges in another order", KIND, formats=RUNNERS, tokenizer=tokenizer(_merge_order)),
    Fault("a space before the text", KIND, formats=RUNNERS, tokenizer=tokenizer(_prefix_space)),
    Fault("the pre-tokenizer is dropped", KIND, formats=RUNNERS, tokenizer=tokenizer(_no_pre_tokenizer)),
    Fault("text in lower case", KIND, formats=RUNNERS, tokenizer=tokenizer(_lower_case)),
    Fault("a normalizer too many", KIND, formats=RUNNERS, tokenizer=tokenizer(_composed)),
    Fault("an added token is missing", KIND, formats=RUNNERS, tokenizer=tokenizer(_added)),
    Fault("two tokens have each other's ids", KIND, formats=RUNNERS, tokenizer=tokenizer(_ids)),
    Fault("the newline is a stop token", STOPS, options=lambda o: replace(o, stop_ids=(*o.stop_ids, 200))),
    Fault("no stop token", STOPS, options=lambda o: replace(o, stop_ids=(7,))),
    Fault("the second stop token is missing", STOPS, "two stops", options=_first_stop),
    Fault("a smaller context", "metadata", options=lambda o: replace(o, context=256)),
    Fault("another opening token", STOPS, options=_other_opening),
)
