"""What is said in a Swift package: constants, entitlements, and the words of its README."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from slm_export.runtime import Proven
from slm_export.source.tasks import ANSWERING, CLASSIFICATION, EMBEDDING, FILLING, GENERATION, TOKENS
from slm_export.tokenization.tokenizer import SourceTokenizer

INCREASED_MEMORY = "com.apple.developer.kernel.increased-memory-limit"
EXTENDED_ADDRESSES = "com.apple.developer.kernel.extended-virtual-addressing"

_MEMORY_FROM = 500_000_000
"""Bytes of an artifact from which on the higher limit of memory is asked for."""
_ADDRESSES_FROM = 2_000_000_000
"""Bytes from which on more addresses are asked for: the file may be mapped more than once."""

USES: Mapping[str, str] = {
    GENERATION: "it writes text",
    EMBEDDING: "it embeds text",
    CLASSIFICATION: "it classifies text",
    TOKENS: "it labels the tokens of a text",
    ANSWERING: "it finds answers in a passage",
    FILLING: "it fills in masked words",
}
_ENCODER = "let encoder = try await TextEncoder.load()\n"
EXAMPLES: Mapping[str, str] = {
    GENERATION: (
        "let model = try await LanguageModel.load()\n"
        'for try await piece in model.generate("Once upon a time") { print(piece, terminator: "") }'
    ),
    EMBEDDING: _ENCODER + 'let vector = try await encoder.embed("A text.")',
    CLASSIFICATION: _ENCODER + 'let classes = try await encoder.classify("A text.")',
    TOKENS: _ENCODER + 'let tags = try await encoder.tag("A text.")',
    ANSWERING: _ENCODER + 'let answer = try await encoder.answer("A question?", in: "A passage.")',
    FILLING: _ENCODER + 'let words = try await encoder.fill("A text with a mask in it.")',
}

_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def swift_string(text: str) -> str:
    """Return a string literal of Swift."""
    quoted = (
        _ESCAPES.get(char) or (char if char.isprintable() else f"\\u{{{ord(char):X}}}") for char in text
    )
    return '"' + "".join(quoted) + '"'


def entitlements(size: int) -> dict[str, bool]:
    """Return the entitlements that an app with an artifact of ``size`` bytes needs, perhaps none."""
    needed = {INCREASED_MEMORY: size >= _MEMORY_FROM, EXTENDED_ADDRESSES: size >= _ADDRESSES_FROM}
    return {key: True for key, is_needed in needed.items() if is_needed}


def memory_note(size: int, file: str) -> str:
    """Return the README's words on entitlements."""
    if not entitlements(size):
        return "No entitlement is needed: the model fits the memory that every app has."
    return (
        f"Copy the keys of `{file}` into the app's entitlements (*Signing & Capabilities > Increased Memory Limit*), "
        "and look at `os_proc_available_memory()` before loading: what an app gets differs from device to device."
    )


def facts(made: Proven) -> dict[str, str]:
    """Return the constants of ``Facts.swift`` beyond name and hash: name -> expression."""
    task, tokenizer = made.model.task, made.tokenizer
    if task == GENERATION:
        return {}
    found = {"padToken": str(tokenizer.pad_id), "output": swift_string(_output(made))}
    if task in (CLASSIFICATION, TOKENS):
        found["labels"] = _list(map(swift_string, made.runtime["labels"]))
    if task == FILLING:
        found["maskToken"] = str(tokenizer.backend.mask_token_id)
    if task == ANSWERING:
        opening, middle, closing, kind = _pair(tokenizer)
        found["pairOpening"], found["pairMiddle"], found["pairClosing"] = map(
            _numbers, (opening, middle, closing)
        )
        found["pairType"] = str(kind)
    return found


def _output(made: Proven) -> str:
    (output,) = made.artifacts[0].signatures[0].outputs
    return output


def _pair(tokenizer: SourceTokenizer) -> tuple[list[int], list[int], list[int], int]:
    """Return what a question and a passage are put between, and the token type of a passage."""
    question, passage = "question", "passage"
    ids, types = tokenizer.encode_pair(question, passage)
    first, second = tokenizer.encode(question), tokenizer.encode(passage)
    at = _find(ids, first, 0)
    then = _find(ids, second, at + len(first))
    return ids[:at], ids[at + len(first) : then], ids[then + len(second) :], types[then] if types else 0


def _find(ids: Sequence[int], part: Sequence[int], start: int) -> int:
    return next(i for i in range(start, len(ids)) if list(ids[i : i + len(part)]) == list(part))


def _list(items: Iterable[str]) -> str:
    return f"[{', '.join(items)}]"


def _numbers(ids: Sequence[int]) -> str:
    # An empty literal has no type of its own.
    return _list(map(str, ids)) if ids else "[Int]()"
