"""Do the formats of one bundle carry the same integers, and say the same?

trace_of   what an open artifact makes of a fixed text
compare    every pair of formats: their codes and scales, read back out of the files, and their traces
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from slm_export.checkpoint import Checkpoint
from slm_export.evaltext import load_sentences
from slm_export.results import Check, Pair
from slm_export.runtime import DecoderSession, EncoderSession, Session
from slm_export.source.tasks import EMBEDDING, rows
from slm_export.tokenization.tokenizer import SourceTokenizer
from slm_export.weights import Coded, Dense, Palettized

TOKENS = 128
GREEDY = 48
SENTENCES = 24
_NAMED = 3

Stored = Mapping[str, Coded]


@dataclass(frozen=True)
class Trace:
    """What an artifact makes of the text that all formats are given."""

    outputs: tuple[Tensor, ...]
    """Decoder: one, logits (tokens, vocabulary). Encoder: one per text, rows of what is chosen from, or a vector."""
    greedy: tuple[int, ...] = ()


def trace_of(session: Session, task: str, tokenizer: SourceTokenizer, documents: Sequence[str]) -> Trace:
    """Run the fixed text through an artifact: a document's beginning and a greedy continuation, or sentences."""
    if isinstance(session, DecoderSession):
        return _decoder_trace(session, tokenizer, documents[0])
    assert isinstance(session, EncoderSession)
    outputs = []
    for sentence in load_sentences()[:SENTENCES]:
        ids = tokenizer.encode_with_template(sentence)[: session.context]
        output = session.outputs(ids, [1] * len(ids))
        outputs.append(output if task == EMBEDDING else rows(task, output, len(ids)))
    return Trace(tuple(outputs))


def differing(one: Stored, other: Stored) -> tuple[str, ...]:
    """Return the names of the matrices that differ in kind, bits, group, codes or their meaning, or are on one side."""
    return tuple(name for name in sorted({*one, *other}) if not _same(one.get(name), other.get(name)))


def quantized_weights(checkpoint: Checkpoint) -> Stored:
    """Return the matrices of a checkpoint that are on the grid or in tables."""
    return {name: weight for name, weight in checkpoint.weights.items() if not isinstance(weight, Dense)}


def judge_codes(stored: Stored, quantized: Stored) -> Check:
    """Compare what a file holds with the checkpoint that it was written from."""
    wrong = differing(stored, quantized)
    tables = sum(isinstance(weight, Palettized) for weight in quantized.values())
    counts = (("codes and scales", len(quantized) - tables), ("indices and tables", tables))
    parts = [f"the {what} of {count} matrices" for what, count in counts if count or not tables]
    detail = f"{' and '.join(parts)} are the checkpoint's"
    return Check("codes", not wrong, _named("differ from the checkpoint", wrong) if wrong else detail)


def compare(traces: Mapping[str, Trace], stored: Mapping[str, Stored], task: str) -> tuple[Pair, ...]:
    """Return a row for every pair of formats."""
    return tuple(
        _pair(one, other, traces[one], traces[other], stored[one], stored[other], task)
        for one, other in combinations(traces, 2)
    )


def judge_pairs(pairs: Sequence[Pair]) -> tuple[Check, ...]:
    """Return a check for every pair: their integers must be the same."""
    return tuple(
        Check(
            f"codes of {pair.formats[0]} and {pair.formats[1]}",
            not pair.differing,
            _named("differ", pair.differing)
            if pair.differing
            else f"{pair.matrices} matrices are the same, code by code and scale by scale",
        )
        for pair in pairs
    )


def _decoder_trace(session: DecoderSession, tokenizer: SourceTokenizer, document: str) -> Trace:
    ids = tokenizer.encode_with_template(document)[: min(TOKENS, session.context // 2)]
    logits = torch.stack([session.logits([token], at) for at, token in enumerate(ids)])
    greedy: list[int] = []
    last, room = logits[-1], session.context - len(ids)
    while len(greedy) < min(GREEDY, room):
        greedy.append(int(last.argmax()))
        if greedy[-1] in tokenizer.stop_ids:
            break
        last = session.logits(greedy[-1:], len(ids) + len(greedy) - 1)
    return Trace((logits,), tuple(greedy))


def _pair(one: str, other: str, first: Trace, second: Trace, ours: Stored, theirs: Stored, task: str) -> Pair:
    figures: dict[str, float | int | None] = {}
    a, b = (
        torch.cat([x.reshape(-1, x.shape[-1]) for x in first.outputs]),
        torch.cat([x.reshape(-1, x.shape[-1]) for x in second.outputs]),
    )
    if task == EMBEDDING:
        cosines = F.cosine_similarity(a, b, dim=-1)
        figures |= {"cosine_min": cosines.min().item(), "cosine_mean": cosines.mean().item()}
    else:
        p, q = F.log_softmax(a, -1), F.log_softmax(b, -1)
        figures["top1_agreement"] = (a.argmax(-1) == b.argmax(-1)).to(torch.float32).mean().item()
        figures["kl_mean"] = (p.exp() * (p - q)).sum(-1).mean().item()
    if first.greedy:
        figures |= {"greedy_agreed": _agreed(first.greedy, second.greedy), "greedy_tokens": len(first.greedy)}
    return Pair(
        formats=(one, other),
        matrices=len(ours),
        differing=differing(ours, theirs),
        rows=len(a),
        max_abs=(a - b).abs().max().item(),
        **figures,  # type: ignore[arg-type]
    )


def _agreed(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two texts begin with alike."""
    return next(
        (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _same(one: Coded | None, other: Coded | None) -> bool:
    if one is None or other is None or type(one) is not type(other):
        return False
    if (one.shape, one.bits, one.group) != (other.shape, other.bits, other.group):
        return False
    return all(torch.equal(a, b) for a, b in zip(one.load(), other.load(), strict=True))


def _named(what: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{what}: {', '.join(names[:_NAMED])}{more}"
