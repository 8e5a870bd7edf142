"""A decoder artifact against its source, token by token, on held-out text.

The artifact reads every window one token at a time, as it will when it generates, and again some
prefixes in one call, as it will read prompts. The references read whole windows.

KL divergence is from the source's distribution to the artifact's, in nats; the perplexity ratio is that of the
artifact to the source on the same text, per token of the source. Where the artifact has fewer tokens than the source,
likelihoods are of the text in the tokens of each, and distributions are compared on the artifact's; see `vocabularies`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm_export.fidelity import examples
from slm_export.fidelity.greedy import Greedy, judge_greedy
from slm_export.fidelity.judging import checks_of
from slm_export.fidelity.prompts import Prompts, judge_prompts
from slm_export.fidelity.references import References
from slm_export.fidelity.vocabularies import FewerTokens, Passage, Vocabularies, Window
from slm_export.gates import Gates
from slm_export.graph.dialect import Rounding
from slm_export.reports.details import Divergence
from slm_export.results import Check, TokenQuality
from slm_export.runtime import DecoderSession
from slm_export.tokenization.tokenizer import SourceTokenizer

WINDOW = 256
TOKENS = 4096
_LOGITS_BYTES = 256 << 20  # of one reference's logits that stand in memory together

Advance = Callable[[int, str], None]


@dataclass
class _Sums:
    """What is kept of every scored position."""

    kl: list[Tensor] = field(default_factory=list)
    quantization_kl: list[Tensor] = field(default_factory=list)
    lowering_kl: list[Tensor] = field(default_factory=list)
    lowering_max: float = 0.0
    agree: list[Tensor] = field(default_factory=list)
    source_nll: list[Tensor] = field(default_factory=list)
    nll: list[Tensor] = field(default_factory=list)
    lacking: list[Tensor] = field(default_factory=list)
    read: int = 0
    """The source's tokens of the text."""
    alike: int = 0
    """Those of them that the artifact reads too."""
    worst_kl: float = -1.0
    worst: str = ""
    worst_lowering: str = ""
    examples: list[Divergence] = field(default_factory=list)


@torch.no_grad()
def judge_decoder(
    references: References,
    session: DecoderSession,
    rounding: Rounding,
    tokenizer: SourceTokenizer,
    documents: Sequence[str],
    gates: Gates,
    advance: Advance,
) -> tuple[TokenQuality, tuple[Check, ...]]:
    """Measure a decoder artifact and hold it against the thresholds.

    Given   the models that it was made from, the artifact open in its runtime, what that runtime does to activations;
            the artifact's tokenizer
    """
    lowered = references.lowered_model(rounding)
    both = references.vocabularies(tokenizer)
    passages = both.passages(documents, min(WINDOW, session.context), TOKENS)
    sums = _Sums()
    vocabulary = int(references.source.config.get_text_config().vocab_size)
    for number, batch in enumerate(_batches(passages, vocabulary)):
        texts, ours = [one.source for one in batch], [one.artifact for one in batch]
        theirs = [one.as_source for one in batch]
        advance(0, "the source model reads")
        likelihoods = references.kept(f"text-{number}", partial(_read, references.source_model, texts))
        originals = likelihoods
        if theirs != texts:
            originals = references.kept(f"source-{number}", partial(_read, references.source_model, theirs))
        quantizeds = references.kept(f"quantized-{number}", partial(_read, references.quantized_model, ours))
        lowereds = _read(lowered, ours)
        for index, passage in enumerate(batch):
            rows = slice(0, len(passage.artifact))
            _score_text(sums, passage, likelihoods[index, : len(passage.source)], both)
            _score(
                sums,
                passage,
                both.shared(originals[index, rows]),
                quantizeds[index, rows],
                lowereds[index, rows],
                session,
                both.artifact,
            )
            advance(len(passage.artifact), "the artifact reads")
    advance(0, "the artifact reads prompts")
    prompts = judge_prompts(lowered, session, passages, both.artifact, TOKENS)
    greedy = judge_greedy(references.source_model, session, both, passages, advance)
    quality = _quality(sums, prompts, greedy, both)
    details = {
        "kl_mean": sums.worst,
        "kl_p99": sums.worst,
        "kl_max": sums.worst,
        "top1_agreement": sums.worst,
        "perplexity_ratio": f"perplexity {quality.perplexity:.4g} where the source has {quality.source_perplexity:.4g}",
        "lowering_kl_mean": sums.worst_lowering,
        "lowering_max_abs": sums.worst_lowering,
        "prompt_kl_max": prompts.detail,
        "greedy_agreement": greedy.detail,
    }
    return quality, (*checks_of(quality, gates, details), *greedy.checks)


def _batches(passages: Sequence[Passage], vocabulary: int) -> Iterator[Sequence[Passage]]:
    longest = max(len(passage.source) for passage in passages)
    size = max(1, _LOGITS_BYTES // (4 * vocabulary * longest))
    for start in range(0, len(passages), size):
        yield passages[start : start + size]


def _read(model: nn.Module, windows: Sequence[Window]) -> Tensor:
    """Return float32 logits (windows, tokens, vocabulary); windows are padded behind, which causality hides."""
    longest = max(len(window) for window in windows)
    ids = torch.zeros(len(windows), longest, dtype=torch.int64)
    for row, window in enumerate(windows):
        ids[row, : len(window)] = torch.tensor(window)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.to(torch.float32)


def _score_text(sums: _Sums, passage: Passage, source: Tensor, both: Vocabularies) -> None:
    """Score what the source says of the text in its own tokens, logits (tokens, vocabulary)."""
    logs = F.log_softmax(source, -1)
    sums.source_nll.append(_unlikelihood(logs, passage.source, passage.places[0][0]))
    sums.lacking.append(both.lacking(logs))
    sums.read, sums.alike = sums.read + len(passage.source), sums.alike + passage.alike


def _score(
    sums: _Sums,
    passage: Passage,
    source: Tensor,
    quantized: Tensor,
    lowered: Tensor,
    session: DecoderSession,
    tokenizer: SourceTokenizer,
) -> None:
    """Score every token of the artifact; logits are (its tokens, its vocabulary)."""
    window = passage.artifact
    decoded = torch.stack([session.logits([token], at) for at, token in enumerate(window)])
    source_log, artifact_log = F.log_softmax(source, -1), F.log_softmax(decoded, -1)
    kl = _kl(source_log, artifact_log)
    sums.kl.append(kl)
    sums.quantization_kl.append(_kl(source_log, F.log_softmax(quantized, -1)))
    sums.agree.append(source.argmax(-1) == decoded.argmax(-1))
    sums.nll.append(_unlikelihood(artifact_log, window, passage.places[0][1]))
    sums.examples.append(examples.furthest_in(window, kl, source, decoded, tokenizer))
    if (largest := kl.max().item()) > sums.worst_kl or math.isnan(largest):
        sums.worst_kl = largest
        sums.worst = _where(int(kl.argmax()), window, source, decoded, tokenizer)
    prefix = _prefix_length(len(window), len(sums.kl))
    prompt = session.logits(window[:prefix], 0).unsqueeze(0)
    _score_lowering(
        sums,
        window,
        torch.cat((decoded, prompt)),
        torch.cat((lowered, lowered[prefix - 1 : prefix])),
        tokenizer,
    )


def _unlikelihood(logs: Tensor, window: Window, start: int) -> Tensor:
    """Return -log p of the tokens from ``start`` on, each after those before it."""
    following = torch.tensor(window[start:], dtype=torch.int64).unsqueeze(1)
    return -logs[start - 1 : -1].gather(1, following).squeeze(1)


def _prefix_length(tokens: int, turn: int) -> int:
    """Return a prompt length for the ``turn``-th window: all lengths get their turn, odd ones too."""
    return 1 + (turn * 37) % tokens


def _score_lowering(
    sums: _Sums, window: Window, artifact: Tensor, reference: Tensor, tokenizer: SourceTokenizer
) -> None:
    sums.lowering_kl.append(_kl(F.log_softmax(reference, -1), F.log_softmax(artifact, -1)))
    far = (artifact - reference).abs().amax(-1)
    if not (largest := far.max().item()) <= sums.lowering_max:
        sums.lowering_max = largest
        at = min(int(far.argmax()), len(window) - 1)
        sums.worst_lowering = (
            f"logits are {largest:.3g} apart at token {at}, after {_text(tokenizer, window[: at + 1])}"
        )


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) in nats per row, of log probabilities."""
    return (p.exp() * (p - q)).sum(-1)


def _where(at: int, window: Window, source: Tensor, artifact: Tensor, tokenizer: SourceTokenizer) -> str:
    def preferred(logits: Tensor) -> str:
        probability, token = logits[at].softmax(-1).max(-1)
        return f"{tokenizer.decode([int(token)])!r} ({float(probability):.2f})"

    return (
        f"they part most at token {at}, after {_text(tokenizer, window[: at + 1])}: "
        f"the source prefers {preferred(source)}, the artifact {preferred(artifact)}"
    )


def _text(tokenizer: SourceTokenizer, window: Window) -> str:
    return repr(tokenizer.decode(window[-12:]))


def _quality(sums: _Sums, prompts: Prompts, greedy: Greedy, both: Vocabularies) -> TokenQuality:
    kl, scored = torch.cat(sums.kl), torch.cat(sums.source_nll)
    source_nll, nll = scored.mean().item(), torch.cat(sums.nll).sum().item() / scored.numel()
    fewer = isinstance(both, FewerTokens)
    return TokenQuality(
        kl_mean=kl.mean().item(),
        kl_p99=kl.quantile(0.99).item(),
        kl_max=kl.max().item(),
        top1_agreement=torch.cat(sums.agree).to(torch.float32).mean().item(),
        perplexity_ratio=_exp(nll - source_nll),
        perplexity=_exp(nll),
        source_perplexity=_exp(source_nll),
        tokens=kl.numel(),
        quantization_kl_mean=torch.cat(sums.quantization_kl).mean().item(),
        lowering_kl_mean=torch.cat(sums.lowering_kl).mean().item(),
        lowering_max_abs=sums.lowering_max,
        prompt_kl_max=prompts.kl_max,
        greedy_tokens=greedy.tokens,
        greedy_agreement=greedy.agreement,
        greedy_first_difference=greedy.first_difference,
        greedy_text=greedy.text,
        same_tokens=sums.alike / sums.read if fewer else None,
        lacking_mass=torch.cat(sums.lacking).mean().item() if fewer else None,
        tokens_ratio=kl.numel() / sums.read if fewer else None,
        examples=(*examples.worst(sums.examples), *greedy.examples),
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
