"""The text that calibrated passes measure activations on: a user's file, or what the model itself writes.

    FILE.txt     documents, separated by a line that holds only a form feed
    FILE.jsonl   one example per line: {"messages": [{"role": ..., "content": ...}, ...]}, put through the model's own
                 chat template, or {"text": ...}
    none         decoders: sampled from the model at temperature 1 (LLM-QAT, Liu et al. 2023), so that nothing but
                 the model is needed; encoders: the shipped sample of text

What a verdict is given on must not be calibrated on, so a file that is also the evaluation text is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slm_export.errors import InputError
from slm_export.evaltext import load_documents, paragraphs, token_windows
from slm_export.source.tasks import GENERATION
from slm_export.tokenization.templates import render_chat
from slm_export.tokenization.tokenizer import SourceTokenizer

LENGTH = 256
"""Tokens of a window, unless the model has fewer positions."""
TOKENS = 32_768
"""Tokens in all, of a file that is long enough."""
OWN_TOKENS = 16_384
"""Tokens that a model is asked to write, all windows at a time."""
_HELD_OUT = 8
"""Every eighth window is kept from the passes that learn, to see when they should stop."""
_SEED = 20

Window = tuple[int, ...]


@dataclass(frozen=True)
class Calibration:
    """Windows of token ids."""

    windows: tuple[Window, ...]
    origin: str
    """Where they come from, for people."""
    documents: tuple[str, ...] = ()
    """The whole texts that they are cut from; none of what a model wrote itself, or of the shipped sample."""

    @property
    def learning(self) -> tuple[Window, ...]:
        """The windows that a pass may fit to."""
        return tuple(w for i, w in enumerate(self.windows) if i % _HELD_OUT != _HELD_OUT - 1) or self.windows

    @property
    def held_out(self) -> tuple[Window, ...]:
        """The windows that a pass may only measure on."""
        return self.windows[_HELD_OUT - 1 :: _HELD_OUT] or self.windows

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return sum(map(len, self.windows))

    @property
    def sha256(self) -> str:
        """Of ids and documents: passes that follow from other text are other passes."""
        return hashlib.sha256(json.dumps([self.windows, self.documents]).encode()).hexdigest()

    def read_by(self, tokenizer: SourceTokenizer, task: str, positions: int | None) -> Calibration:
        """Return the same text in the tokens of another tokenizer."""
        assert self.documents, self.origin
        return _cut(self.documents, tokenizer, task, positions, TOKENS, self.origin)


def read_calibration(
    path: Path, tokenizer: SourceTokenizer, task: str, positions: int | None, tokens: int = TOKENS
) -> Calibration:
    """Return the windows of a file.

    Given   positions: the most tokens of one input; None: without bound

    Raises:
        InputError: the file is no such text, or too short.
    """
    documents = _chats(path, tokenizer) if path.suffix == ".jsonl" else load_documents(path, "calibration")
    return _cut(documents, tokenizer, task, positions, tokens, str(path))


def shipped_calibration(tokenizer: SourceTokenizer, task: str, positions: int | None) -> Calibration:
    """Return windows of the shipped sample, for encoders: those are judged on other sentences."""
    made = _cut(load_documents(None), tokenizer, task, positions, TOKENS, "the shipped sample of text")
    return replace(made, documents=())


@torch.no_grad()
def own_calibration(
    model: nn.Module,
    tokenizer: SourceTokenizer,
    positions: int | None,
    advance: Callable[[int, str], None],
    tokens: int = OWN_TOKENS,
) -> Calibration:
    """Return windows that a decoder writes itself, sampled at temperature 1 from what opens a text.

    Given   model: a transformers decoder, float32 logits (batch, n, vocabulary)
    """
    length = min(LENGTH, positions or LENGTH)
    rows = max(1, tokens // length)
    generator = torch.Generator().manual_seed(_SEED)
    opening = tokenizer.bos_id if tokenizer.bos_id is not None else next(iter(tokenizer.stop_ids), None)
    if opening is None:
        first = torch.randint(tokenizer.vocab_size, (rows, 1), generator=generator)
    else:
        first = torch.full((rows, 1), opening)
    written, cache = [first], _cache(model)
    for _ in range(length - 1):
        logits = model(input_ids=written[-1], past_key_values=cache, use_cache=True).logits[:, -1].float()
        # Rows beyond the tokenizer's are padding of the table, and no text.
        chances = logits[:, : tokenizer.vocab_size].softmax(-1)
        written.append(torch.multinomial(chances, 1, generator=generator))
        advance(rows, "the model writes")
    windows = torch.cat(written, 1).tolist()
    return Calibration(tuple(map(tuple, windows)), "the model's own text")


def _cache(model: nn.Module) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _cut(
    documents: Sequence[str],
    tokenizer: SourceTokenizer,
    task: str,
    positions: int | None,
    tokens: int,
    origin: str,
) -> Calibration:
    length = min(LENGTH, positions or LENGTH)
    if task == GENERATION:
        bos = tokenizer.bos_id if tokenizer.adds_bos else None
        cut = token_windows(documents, tokenizer.encode, length, bos, tokens)
        return Calibration(cut, origin, tuple(documents))
    windows = []
    for text in paragraphs(documents):
        before, after = tokenizer.template
        ids = tokenizer.encode(text)[: length - len(before) - len(after)]
        windows.append((*before, *ids, *after))
        tokens -= len(windows[-1])
        if tokens <= 0:
            break
    return Calibration(tuple(windows), origin, tuple(documents))


def _chats(path: Path, tokenizer: SourceTokenizer) -> list[str]:
    """Return the texts of a JSONL file, chats as the model's template writes them."""
    texts = []
    for number, line in enumerate("\n".join(load_documents(path, "calibration")).split("\n"), 1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
            text = example.get("text") or _chat(example["messages"], tokenizer, f"{path}, line {number}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f'{path}, line {number}: expected {{"text": ...}} or {{"messages": [...]}} ({error})'
            ) from None
        texts.append(str(text))
    return texts


def _chat(messages: Any, tokenizer: SourceTokenizer, where: str) -> str:
    if tokenizer.chat_template is None:
        return "\n".join(str(message["content"]) for message in messages)
    return render_chat(tokenizer.backend, messages, where, answer=False)
