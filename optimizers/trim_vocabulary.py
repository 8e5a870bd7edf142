"""Take the tokens away that the text of a domain does not need, rows of embedding and head with them.

Given   the text (`Workbench.text`); embedding, head and head's bias: Dense, a row per token
Result  the same with the rows of the tokens that stay, in their order; a tokenizer that has those alone; a
        configuration with the new size and ids

What stays and why any text can still be read: `spelling`. Of a next token the model then says what it said before,
shared out among fewer: rows are neither changed nor trained.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from slm_export.checkpoint import Checkpoint, PassResult, Vocabulary
from slm_export.compression.calibration import Calibration
from slm_export.compression.workbench import DEFAULT, Workbench
from slm_export.errors import InputError
from slm_export.source.load import architecture_of
from slm_export.source.tasks import ANSWERING, FILLING, TOKENS
from slm_export.tokenization.spelling import chosen, spelling_of
from slm_export.tokenization.tokenizer import SourceTokenizer, tokenizer_of
from slm_export.tokenization.tokenizer_trim import (
    LEFT_OUT,
    document_of,
    indispensable,
    renumbered,
    trimmed_files,
)
from slm_export.weights import Dense

_MULTIPLE = 32
"""Rows that kernels and groups of rows like to come in."""
_NO_ROWS = "has no row per token"


@dataclass(frozen=True)
class TrimVocabulary:
    """Options: the share of tokens that stays, or their number; rounded up to a multiple of 32."""

    name: ClassVar[str] = "trim-vocabulary"
    calibrated: ClassVar[bool] = True
    quantizes: ClassVar[bool] = False
    structural: ClassVar[bool] = True

    keep: float = 0.25
    tokens: int = 0
    """0: as ``keep`` says."""

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise InputError(f"trim-vocabulary: keep must be a share between 0 and 1, not {self.keep!r}")
        if self.tokens < 0:
            raise InputError(f"trim-vocabulary: tokens must not be negative, and is {self.tokens}")

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse a model whose outputs are one per token, or that has other tables with a row per token."""
        if checkpoint.task in (TOKENS, ANSWERING, FILLING):
            raise InputError(
                f"trim-vocabulary: a model for {checkpoint.task} answers token by token, and with another vocabulary "
                "the tokens of a text are others; leave the pass out"
            )
        config = checkpoint.config.get_text_config().to_dict()
        others = [
            key for key in config if "vocab_size" in key and key not in ("vocab_size", "type_vocab_size")
        ]
        if "vocab_size" not in config or others:
            raise InputError(
                f"trim-vocabulary: {checkpoint.config.model_type} has "
                f"{f'more than one vocabulary ({others[0]})' if others else 'no vocab_size'}; leave the pass out"
            )
        before, size = config["vocab_size"], self._size(config["vocab_size"])
        if before <= size:
            raise InputError(
                f"trim-vocabulary: {checkpoint.name} has {before:,} tokens, and {size:,} are to stay: there is nothing "
                "to take away"
            )

    def run(self, checkpoint: Checkpoint, work: Workbench = DEFAULT) -> PassResult:
        """Choose the tokens, write the tokenizer, take the rows."""
        self.check(checkpoint)
        text = work.text(self.name)
        tokenizer = tokenizer_of(checkpoint)
        stay = self._chosen(checkpoint, tokenizer, text)
        new_ids = {token: row for row, token in enumerate(stay)}
        _refuse_other_positions(checkpoint, new_ids)
        vocabulary = Vocabulary(
            tokens=stay
            if checkpoint.vocabulary is None
            else tuple(checkpoint.vocabulary.tokens[i] for i in stay),
            files=trimmed_files(document_of(tokenizer), tokenizer, new_ids),
        )
        config = _resized(checkpoint.config, new_ids)
        changed: dict[str, Dense] = {}
        for name in _with_a_row_per_token(checkpoint, config):
            weight = checkpoint.weights[name]
            if not isinstance(weight, Dense):
                raise InputError(f"trim-vocabulary: {name} is quantized already; let this pass come before")
            changed[name] = work.keeper.keep(name, lambda weight=weight: _rows(weight, stay))  # type: ignore[misc]
        skipped = {name: _NO_ROWS for name in checkpoint.weights if name not in changed}
        made = replace(checkpoint.with_weights(changed), config=config, vocabulary=vocabulary)
        return PassResult(made, skipped, _notes(tokenizer, tokenizer_of(made), text, vocabulary))

    def _size(self, before: int) -> int:
        return -(-(self.tokens or round(self.keep * before)) // _MULTIPLE) * _MULTIPLE

    def _chosen(
        self, checkpoint: Checkpoint, tokenizer: SourceTokenizer, text: Calibration
    ) -> tuple[int, ...]:
        if not text.documents:
            raise InputError(
                f"trim-vocabulary: {text.origin} says nothing of the texts that the model is for; give such a text "
                "with --calibration FILE"
            )
        document = document_of(tokenizer)
        always = indispensable(document, tokenizer, checkpoint.config)
        uses = Counter(token for part in text.documents for token in tokenizer.encode(part))
        try:
            left = chosen(spelling_of(document), always, uses, self._size(tokenizer.vocab_size))
        except InputError as error:
            raise InputError(f"trim-vocabulary: {error}") from None
        return tuple(sorted(left))


def _refuse_other_positions(checkpoint: Checkpoint, new_ids: Mapping[int, int]) -> None:
    """RoBERTa and its kin count positions from behind the id of the padding token."""
    pad = getattr(checkpoint.config.get_text_config(), "pad_token_id", None)
    counted = [n for n, role in checkpoint.roles.items() if role == "table" and "position_embedding" in n]
    if counted and pad is not None and new_ids.get(pad) != pad:
        raise InputError(
            f"trim-vocabulary: {checkpoint.name} may count its positions from the padding token, whose id {pad} would "
            "change; leave the pass out"
        )


def _resized(config: Any, new_ids: Mapping[int, int]) -> Any:
    """Return a copy of a configuration for the tokens that stay."""
    made = copy.deepcopy(config)
    for part in {id(part): part for part in (made, made.get_text_config())}.values():
        content = part.to_dict()
        for key, value in renumbered(content, new_ids).items():
            if value != content[key]:
                setattr(part, key, value)
        part.vocab_size = len(new_ids)
    return made


def _with_a_row_per_token(checkpoint: Checkpoint, config: Any) -> list[str]:
    """Return the weights that the module itself makes shorter when its configuration has fewer tokens."""
    before, after = (
        {name: tuple(value.shape) for name, value in architecture_of(made).empty_module().named_parameters()}
        for made in (checkpoint, replace(checkpoint, config=config))
    )
    names = [name for name in checkpoint.weights if before.get(name) != after.get(name)]
    assert names, "no weight has a row per token"
    return names


def _rows(weight: Dense, rows: tuple[int, ...]) -> Dense:
    values = weight.load()[torch.tensor(rows)]
    return Dense(tuple(values.shape), weight.dtype, lambda: values)


def _notes(
    before: SourceTokenizer, after: SourceTokenizer, text: Calibration, vocabulary: Vocabulary
) -> tuple[str, ...]:
    first, second = (sum(len(t.encode(part)) for part in text.documents) for t in (before, after))
    notes = [
        f"{len(vocabulary.tokens):,} of {before.vocab_size:,} tokens stay; {text.origin} is read in {second:,} tokens "
        f"instead of {first:,} ({second / max(1, first):.3f} times as many)"
    ]
    notes += [
        f"{name} is left out of the bundle: it is SentencePiece's form of the whole vocabulary, and tokenizer.json has "
        "the one that is left"
        for name in LEFT_OUT
        if name in before.files()
    ]
    return tuple(notes)
