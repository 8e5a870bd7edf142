"""An encoder artifact against its source, over varied sentences and lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slm_export.checkpoint import Checkpoint
from slm_export.fidelity.judging import checks_of
from slm_export.gates import Gates
from slm_export.model import build_reference
from slm_export.results import Check, EmbeddingQuality, ScoreQuality
from slm_export.runtime import EncoderSession
from slm_export.tokenizer import SourceTokenizer

PADDING = 7
"""Padding tokens behind every fourth input: a mask that is not honoured shows in the figures."""


@dataclass(frozen=True)
class _Compared:
    """Outputs (inputs, width) of the source, of the torch reference of the artifact, and of the artifact."""

    source: Tensor
    lowered: Tensor
    artifact: Tensor


@torch.no_grad()
def judge_encoder(
    source: Checkpoint,
    quantized: Checkpoint,
    session: EncoderSession,
    tokenizer: SourceTokenizer,
    texts: Sequence[str],
    gates: Gates,
    advance: Callable[[int, str], None],
) -> tuple[EmbeddingQuality | ScoreQuality, tuple[Check, ...]]:
    """Measure an encoder artifact and hold it against the thresholds.

    Given   the source model, the checkpoint that the artifact was written from, the artifact open in its runtime;
            texts of any length: what exceeds the artifact's longest input is cut
    """
    compared = _compare(source, quantized, session, tokenizer, texts, advance)
    if source.task == "sentence-embedding":
        return _embeddings(compared, texts, gates)
    return _scores(compared, texts, gates)


def _compare(
    source: Checkpoint,
    quantized: Checkpoint,
    session: EncoderSession,
    tokenizer: SourceTokenizer,
    texts: Sequence[str],
    advance: Callable[[int, str], None],
) -> _Compared:
    original = build_reference(source)
    lowered = build_reference(quantized, quantize_activations=True)
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for index, text in enumerate(texts):
        ids = tokenizer.encode_with_template(text)[: session.context]
        padding = min(PADDING, session.context - len(ids)) if index % 4 == 3 else 0
        tokens, mask = torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64)
        padded = [*ids, *[0] * padding], [*[1] * len(ids), *[0] * padding]
        rows.append((original(tokens, mask)[0], lowered(tokens, mask)[0], session.outputs(*padded).flatten()))
        advance(1, "sentences")
    return _Compared(*(torch.stack(column).to(torch.float32) for column in zip(*rows, strict=True)))


def _embeddings(
    compared: _Compared, texts: Sequence[str], gates: Gates
) -> tuple[EmbeddingQuality, tuple[Check, ...]]:
    cosine = F.cosine_similarity(compared.source, compared.artifact, dim=-1)
    worst = texts[int(cosine.argmin())]
    quality = EmbeddingQuality(
        cosine_min=cosine.min().item(),
        cosine_mean=cosine.mean().item(),
        sentences=len(texts),
        worst_sentence=worst,
        lowering_max_abs=(compared.artifact - compared.lowered).abs().max().item(),
    )
    detail = f"furthest from the source on {worst[:120]!r}"
    return quality, checks_of(quality, gates, dict.fromkeys(("cosine_min", "cosine_mean"), detail))


def _scores(
    compared: _Compared, texts: Sequence[str], gates: Gates
) -> tuple[ScoreQuality, tuple[Check, ...]]:
    agree = compared.source.argmax(-1) == compared.artifact.argmax(-1)
    apart = (compared.source - compared.artifact).abs()
    quality = ScoreQuality(
        agreement=agree.to(torch.float32).mean().item(),
        max_abs=apart.max().item(),
        sentences=len(texts),
        lowering_max_abs=(compared.artifact - compared.lowered).abs().max().item(),
    )
    worst = texts[int(apart.amax(-1).argmax())]
    detail = f"scores are furthest apart on {worst[:120]!r}"
    return quality, checks_of(quality, gates, dict.fromkeys(("agreement", "max_abs"), detail))
