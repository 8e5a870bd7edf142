"""Labelled examples as the teacher: classes of texts and of words, embeddings of pairs, answers to prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm_export.errors import InputError
from slm_export.graph.pooling import Pooling
from slm_export.learning.chats import completion_ids, prompt_ids
from slm_export.learning.evaluation import batches
from slm_export.learning.examples import Labelled, Row
from slm_export.learning.heads import with_head
from slm_export.learning.measures import Interval, mean, share
from slm_export.learning.models import Model
from slm_export.learning.self_supervised import new_parts
from slm_export.learning.trainer import IGNORED, Batch, Example, Loss, causal_loss, hard_loss
from slm_export.source.tasks import CLASSIFICATION, EMBEDDING, GENERATION, TOKENS
from slm_export.tokenization.tokenizer import SourceTokenizer

_SCALE = 20.0
"""Of cosines, before the softmax over a batch (sentence-transformers' MultipleNegativesRankingLoss)."""
_TOGETHER = 32


class _Supervised:
    """What the four have in common; see `objectives.Objective`."""

    loss: Loss
    whole: tuple[str, ...] = ()

    def __init__(self, start: Model, rows: Labelled, length: int) -> None:
        self.start = start
        self._length, self._shortened = length, 0
        self.training: Sequence[Example] = self._examples(rows.training)
        self.held_out: Sequence[Example] = self._examples(rows.held_out)
        if not self.training or not self.held_out:
            raise InputError(f"no example fits --length {length}; raise it")
        self.notes: tuple[str, ...] = ()
        if rows.duplicates:
            self.notes += (f"{rows.duplicates:,} examples say the same as another and were left out",)
        if self._shortened:
            self.notes += (f"{self._shortened:,} examples are longer than {length} tokens: {self._cut}",)

    _cut = "their ends were cut off"

    def result(self, model: Model) -> Model:
        """Keep it as it is."""
        return model

    def _examples(self, rows: Sequence[Row]) -> list[Example]:
        return [made for row in rows if (made := self._example(row)) is not None]

    def _example(self, row: Row) -> Example | None:
        raise NotImplementedError

    def _around(self, ids: Sequence[int]) -> list[int]:
        """Return ids of a text with the special tokens around it, cut to the length."""
        before, after = self.start.tokenizer.template
        room = self._length - len(before) - len(after)
        self._shortened += len(ids) > room
        return [*before, *ids[:room], *after]


class Classify(_Supervised):
    """One class of a text."""

    def __init__(self, model: Model, rows: Labelled, length: int, seed: int) -> None:
        self._numbers = {label: number for number, label in enumerate(rows.labels)}
        start = with_head(model, CLASSIFICATION, seed, rows.labels)
        self.whole = new_parts(start.module)
        self.loss = class_loss
        super().__init__(start, rows, length)

    def figures(self, model: Model) -> Mapping[str, Interval]:
        """Return the accuracy."""
        right = 0
        for batch, output in _outputs(model, self.held_out):
            right += int((output.logits.argmax(-1) == batch["labels"]).sum())
        return {"accuracy": share(right, len(self.held_out))}

    def _example(self, row: Row) -> Example:
        ids = self._around(self.start.tokenizer.encode(row.given))
        return {"input_ids": ids, "labels": [self._numbers[row.wanted[0]]]}


class Tag(_Supervised):
    """One class of each word: its first token carries it."""

    def __init__(self, model: Model, rows: Labelled, length: int, seed: int) -> None:
        self._numbers = {label: number for number, label in enumerate(rows.labels)}
        start = with_head(model, TOKENS, seed, rows.labels)
        self.whole = new_parts(start.module)
        self.loss = tag_loss
        super().__init__(start, rows, length)

    def figures(self, model: Model) -> Mapping[str, Interval]:
        """Return the share of words with the right class."""
        right, counts = [], []
        for batch, output in _outputs(model, self.held_out):
            seen = batch["labels"] != IGNORED
            right += ((output.logits.argmax(-1) == batch["labels"]) & seen).sum(1).tolist()
            counts += seen.sum(1).tolist()
        return {"word_accuracy": mean(right, counts, list(range(len(right))))}

    def _example(self, row: Row) -> Example | None:
        ids, labels = _word_ids(self.start.tokenizer, row, self._numbers)
        before, _ = self.start.tokenizer.template
        made = self._around(ids)
        kept = [*[IGNORED] * len(before), *labels][: len(made)]
        kept += [IGNORED] * (len(made) - len(kept))
        if len(ids) + len(before) > len(made):  # cut: what stands there now is what closes the text
            _, after = self.start.tokenizer.template
            kept[len(made) - len(after) :] = [IGNORED] * len(after)
        return {"input_ids": made, "labels": kept} if any(label != IGNORED for label in kept) else None


class Embed(_Supervised):
    """Which text of a batch belongs to which: in-batch negatives, and given ones."""

    def __init__(self, model: Model, rows: Labelled, length: int, seed: int) -> None:
        start = with_head(model, EMBEDDING, seed)
        self._pooling = start.pooling or Pooling()
        self.loss = lambda module, batch: contrastive_loss(module, batch, self._pooling)
        super().__init__(start, rows, length)

    def figures(self, model: Model) -> Mapping[str, Interval]:
        """Return how many texts find their own among all positives of the held-out pairs, and their mean cosine."""
        texts, positives = [], []
        with torch.no_grad():
            for batch in batches(self.held_out, model.tokenizer.pad_id, _TOGETHER):
                vectors = _vectors(
                    model.module, {k: v.to(model.device) for k, v in batch.items()}, self._pooling
                )
                texts.append(vectors[0])
                positives.append(vectors[1])
        ours, theirs = torch.cat(texts), torch.cat(positives)
        found = (ours @ theirs.t()).argmax(-1) == torch.arange(len(ours), device=ours.device)
        cosines = (ours * theirs).sum(-1).tolist()
        groups = list(range(len(cosines)))
        return {
            "found_first": share(int(found.sum()), len(ours)),
            "cosine": mean(cosines, [1.0] * len(groups), groups),
        }

    def _example(self, row: Row) -> Example:
        ids: list[int] = []
        numbers: list[int] = []
        for number, text in enumerate((row.given, *row.wanted)):
            part = self._around(self.start.tokenizer.encode(text))
            ids += part
            numbers += [number] * len(part)
        return {"input_ids": ids, "part": numbers}


class Generate(_Supervised):
    """The answer behind a prompt."""

    _cut = "they were left out"

    def __init__(self, model: Model, rows: Labelled, length: int) -> None:
        if model.task != GENERATION:
            raise InputError(
                f"{model.folder}: a model for {model.task}; --task generate takes one that generates text"
            )
        self.loss = causal_loss
        super().__init__(model, rows, length)

    def figures(self, model: Model) -> Mapping[str, Interval]:
        """Return the perplexity of the answers."""
        sums, counts = [], []
        for batch, output in _outputs(model, self.held_out, 8):
            for index in range(len(batch["input_ids"])):
                one = {name: values[index : index + 1] for name, values in batch.items()}
                count = int((one["labels"][:, 1:] != IGNORED).sum())
                sums.append(float(hard_loss(output.logits[index : index + 1], one)) * count)
                counts.append(count)
        return {"answer_perplexity": mean(sums, counts, list(range(len(sums)))).through(math.exp)}

    def _example(self, row: Row) -> Example | None:
        prompt = prompt_ids(self.start.tokenizer, row.given, plain="{problem}")
        answer = completion_ids(self.start.tokenizer, row.given, row.wanted[0])
        if len(prompt) + len(answer) > self._length:
            self._shortened += 1
            return None
        return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}


def class_loss(module: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross entropy of the classes of texts, in nats."""
    output = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return F.cross_entropy(output.logits.float(), batch["labels"])


def tag_loss(module: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross entropy of the classes of words, in nats."""
    output = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return F.cross_entropy(
        output.logits.float().flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED
    )


def contrastive_loss(module: nn.Module, batch: Batch, pooling: Pooling) -> Tensor:
    """Return the cross entropy of finding each text's positive among all positives and negatives of the batch."""
    texts, *others = _vectors(module, batch, pooling)
    likeness = _SCALE * texts @ torch.cat(others).t()
    return F.cross_entropy(likeness, torch.arange(len(texts), device=texts.device))


def _vectors(module: nn.Module, batch: Batch, pooling: Pooling) -> list[Tensor]:
    """Return unit vectors (texts, width) of the texts, of their positives, and of the negatives that there are."""
    ids, part, mask = batch["input_ids"], batch["part"], batch["attention_mask"].bool()
    made = []
    for number in range(int(part.max()) + 1):
        rows = [row[(parts == number) & seen] for row, parts, seen in zip(ids, part, mask, strict=True)]
        rows = [row for row in rows if len(row)]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        seen = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        hidden = module(input_ids=padded, attention_mask=seen).last_hidden_state.float()
        made.append(F.normalize(pooling(hidden, seen), dim=-1))
    return made


def _outputs(model: Model, examples: Sequence[Example], together: int = _TOGETHER) -> Any:
    """Yield batches with what the model makes of them."""
    with torch.no_grad():
        for batch in batches(examples, model.tokenizer.pad_id, together):
            moved = {name: values.to(model.device) for name, values in batch.items()}
            yield moved, model.module(input_ids=moved["input_ids"], attention_mask=moved["attention_mask"])


def _word_ids(
    tokenizer: SourceTokenizer, row: Row, numbers: Mapping[str, int]
) -> tuple[list[int], list[int]]:
    """Return the tokens of a text with the class of every word on its first token.

    The text is read as a whole, words with spaces between them, as it will be when the model is used.
    """
    backend = tokenizer.backend
    if not getattr(backend, "is_fast", False):
        raise InputError(
            f"{tokenizer.folder}: --task tag needs a tokenizer.json, which tells where words lie"
        )
    encoded = backend(row.given, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts, at = {}, 0
    for word, label in zip(row.words, row.wanted, strict=True):
        starts[at] = (at + len(word), numbers[label])
        at += len(word) + 1
    labels = [IGNORED] * len(encoded["input_ids"])
    for start, (end, number) in starts.items():
        for index, (low, high) in enumerate(encoded["offset_mapping"]):
            if low < end and high > start and labels[index] == IGNORED:
                labels[index] = number
                break
    return list(encoded["input_ids"]), labels
