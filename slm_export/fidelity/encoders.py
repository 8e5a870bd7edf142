"""An encoder artifact against its source, over varied sentences and lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm_export.fidelity.examples import SHOWN
from slm_export.fidelity.judging import checks_of
from slm_export.fidelity.references import References
from slm_export.gates import Gates
from slm_export.graph.dialect import Rounding
from slm_export.reports.details import Furthest
from slm_export.results import Check, EmbeddingQuality, ScoreQuality
from slm_export.runtime import EncoderSession
from slm_export.source.tasks import ANSWERING, EMBEDDING, rows
from slm_export.tokenization.tokenizer import SourceTokenizer

PADDING = 7
"""Padding tokens behind every fourth input: a mask that is not honoured shows in the figures."""


LONGEST_SHOWN = 200
"""Characters of a text that a report shows."""


@dataclass(frozen=True)
class _Compared:
    """Outputs for one text: of the source, of the torch reference of the artifact, and of the artifact."""

    text: str
    source: Tensor
    lowered: Tensor
    artifact: Tensor

    @property
    def lowering(self) -> float:
        """The largest difference that lowering makes."""
        return (self.artifact - self.lowered).abs().max().item()


@torch.no_grad()
def judge_encoder(
    references: References,
    session: EncoderSession,
    rounding: Rounding,
    tokenizer: SourceTokenizer,
    texts: Sequence[str],
    gates: Gates,
    advance: Callable[[int, str], None],
) -> tuple[EmbeddingQuality | ScoreQuality, tuple[Check, ...]]:
    """Measure an encoder artifact and hold it against the thresholds.

    Given   the models that it was made from, the artifact open in its runtime, what that runtime does to activations;
            the artifact's tokenizer; texts of any length: what exceeds the artifact's longest input is cut
    """
    source, original = references.source, references.source_model
    lowered, theirs = references.lowered_model(rounding), references.vocabularies(tokenizer).source
    compared = []
    for index, text in enumerate(texts):
        question = texts[index - 1] if source.task == ANSWERING else None
        padding = PADDING if index % 4 == 3 else 0
        if theirs is not tokenizer:
            text = _fitting(text, (theirs, tokenizer), session.context)
        inputs = _inputs(tokenizer, text, question, session.context, padding)
        own = inputs if theirs is tokenizer else _inputs(theirs, text, question, session.context, padding)
        expected = references.kept(f"source-{index}", partial(_output, original, _tensors(own)))
        outputs = (expected, lowered(*_tensors(inputs))[0], session.outputs(*inputs))
        compared.append(_Compared(text, *(rows(source.task, output, sum(inputs[1])) for output in outputs)))
        advance(1, "texts")
    return (_embeddings if source.task == EMBEDDING else _scores)(compared, gates)


def _fitting(text: str, tokenizers: Sequence[SourceTokenizer], longest: int) -> str:
    """Return the beginning of a text that no tokenizer makes more than ``longest`` tokens of."""
    while (count := max(len(one.encode_with_template(text)) for one in tokenizers)) > longest:
        text = text[: len(text) * longest // count]
        # Half a word is none of the domain's, and may be spelled by a token that is gone.
        text = (text.rsplit(None, 1) or [text])[0]
    return text


def _tensors(inputs: Sequence[Sequence[int]]) -> list[Tensor]:
    return [torch.tensor([values]) for values in inputs if values]


def _output(model: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """Return what an encoder makes of one text, without batch."""
    output: Tensor = model(*inputs)[0]
    return output


def _inputs(
    tokenizer: SourceTokenizer, text: str, question: str | None, longest: int, padding: int
) -> tuple[list[int], list[int], list[int]]:
    """Return ids, mask and token types (empty without a question), with padding behind where there is room."""
    types: list[int] = []
    if question is None:
        ids = tokenizer.encode_with_template(text)[:longest]
    else:
        ids, types = tokenizer.encode_pair(question, text)
        ids, types = ids[:longest], types[:longest]
    padding = min(padding, longest - len(ids))
    blank = [0] * padding
    return [*ids, *[tokenizer.pad_id] * padding], [*[1] * len(ids), *blank], [*types, *blank] if types else []


def _embeddings(compared: Sequence[_Compared], gates: Gates) -> tuple[EmbeddingQuality, tuple[Check, ...]]:
    cosines = [F.cosine_similarity(one.source, one.artifact, dim=-1).item() for one in compared]
    worst = compared[cosines.index(min(cosines))].text
    quality = EmbeddingQuality(
        cosine_min=min(cosines),
        cosine_mean=sum(cosines) / len(cosines),
        sentences=len(compared),
        worst_sentence=worst,
        lowering_max_abs=max(one.lowering for one in compared),
        examples=_furthest(compared, cosines, smallest=True),
    )
    detail = f"furthest from the source on {worst[:120]!r}"
    return quality, checks_of(quality, gates, dict.fromkeys(("cosine_min", "cosine_mean"), detail))


def _scores(compared: Sequence[_Compared], gates: Gates) -> tuple[ScoreQuality, tuple[Check, ...]]:
    agree = torch.cat([one.source.argmax(-1) == one.artifact.argmax(-1) for one in compared])
    apart = [(one.source - one.artifact).abs().max().item() for one in compared]
    worst = compared[apart.index(max(apart))].text
    quality = ScoreQuality(
        agreement=agree.to(torch.float32).mean().item(),
        max_abs=max(apart),
        sentences=len(compared),
        lowering_max_abs=max(one.lowering for one in compared),
        examples=_furthest(compared, apart, smallest=False),
    )
    detail = f"scores are furthest apart on {worst[:120]!r}"
    return quality, checks_of(quality, gates, dict.fromkeys(("agreement", "max_abs"), detail))


def _furthest(
    compared: Sequence[_Compared], values: Sequence[float], *, smallest: bool
) -> tuple[Furthest, ...]:
    ranked = sorted(zip(values, compared, strict=True), key=lambda pair: pair[0], reverse=not smallest)
    return tuple(Furthest(one.text[:LONGEST_SHOWN], value) for value, one in ranked[:SHOWN])
