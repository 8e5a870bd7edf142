"""What a decoder artifact writes by itself, read back by the source.

A model this small loops now and then, in any precision, so that alone condemns nothing. The artifact writes;
the source then reads that text and says at every step what it would have written. An artifact that
loops where the source would have gone on, or misses a stop of which the source is sure, has been damaged.

Where the artifact has fewer tokens than the source (see `vocabularies`), the source reads that text in its own. It
would have written a token if that is the one it prefers among those that both have, or if it goes on spelling the one
that it prefers among all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slm_export.fidelity.examples import own_text
from slm_export.fidelity.vocabularies import Passage, Vocabularies
from slm_export.reports.details import Divergence
from slm_export.results import Check
from slm_export.runtime import DecoderSession
from slm_export.tokenization.tokenizer import SourceTokenizer

PROMPTS = 3
PROMPT_TOKENS = 32
NEW_TOKENS = 160
SURE = 0.9
"""A source that gives a stop token this probability is sure of it; below 1 - SURE it is sure of the opposite."""
LONGEST_CYCLE = 16
CYCLE_TOKENS = 48
"""A cycle that goes on for so many tokens is a loop."""
_SHARED_ROUNDS = 0.5
"""A loop that the source would have gone round with in at least this share of its rounds is the model's own."""


@dataclass(frozen=True)
class Greedy:
    """What came of it."""

    tokens: int
    agreement: float | None
    first_difference: int | None
    text: str | None
    detail: str
    checks: tuple[Check, ...]
    examples: tuple[Divergence, ...]
    """The first difference of each text that has one."""


@dataclass(frozen=True)
class _Judgement:
    """What the source says of each token that the artifact wrote."""

    agree: Tensor
    """Whether it would have written that token, too."""
    stops: Tensor
    """The probability that it would have stopped; 0 within a token of its own."""
    logits: Tensor
    """(tokens, the artifact's vocabulary), before each token; within a token of its own, those before that."""
    common: Tensor
    """Whether no token of its own goes on there."""


def judge_greedy(
    source: nn.Module,
    session: DecoderSession,
    both: Vocabularies,
    passages: Sequence[Passage],
    advance: Callable[[int, str], None],
) -> Greedy:
    """Let the artifact continue the beginnings of some passages, and the source judge."""
    advance(0, "the artifact writes")
    tokenizer, room = both.artifact, session.context - NEW_TOKENS
    beginnings = [
        one.beginning(max(1, min(PROMPT_TOKENS, room, len(one.artifact) // 2))) for one in passages[:PROMPTS]
    ]
    prompts = [beginning.artifact for beginning in beginnings]
    texts = [_write(session, prompt, tokenizer.stop_ids) for prompt in prompts]
    written = [tokens for tokens, _ in texts]
    agrees: list[Tensor] = []
    examples = []
    loop, stop = "", ""
    for beginning, (tokens, sure) in zip(beginnings, texts, strict=True):
        judged = _judgement(source, beginning, tokens, both)
        agrees.append(judged.agree)
        shown = judged.agree | ~judged.common
        examples.append(own_text(beginning.artifact, tokens, shown, judged.logits, sure, tokenizer))
        loop = loop or _needless_loop(tokens, judged.agree, tokenizer)
        stop = stop or _wrong_stop(tokens, judged.stops, tokenizer)
    agreement = torch.cat(agrees).to(torch.float32).mean().item()
    first, detail = _first_difference(prompts, written, agrees, tokenizer)
    return Greedy(
        tokens=sum(len(tokens) for tokens in written),
        agreement=agreement,
        first_difference=first,
        text=tokenizer.decode([*prompts[0], *written[0]]),
        detail=detail,
        checks=(
            Check("degeneration", not loop, loop or "no loop that the source would not have entered"),
            Check(
                "stopping", not stop, stop or "the artifact stops where the source is sure, and nowhere else"
            ),
        ),
        examples=tuple(example for example in examples if example),
    )


def _write(
    session: DecoderSession, prompt: Sequence[int], stop_ids: Sequence[int]
) -> tuple[list[int], list[float]]:
    """Return up to NEW_TOKENS greedy tokens, a stop token included, and the probability of each."""
    logits = session.logits(prompt, 0)
    tokens: list[int] = []
    sure: list[float] = []
    while len(prompt) + len(tokens) < session.context and len(tokens) < NEW_TOKENS:
        tokens.append(int(logits.argmax()))
        sure.append(float(logits.softmax(-1)[tokens[-1]]))
        if tokens[-1] in stop_ids:
            break
        logits = session.logits([tokens[-1]], len(prompt) + len(tokens) - 1)
    return tokens, sure


def _judgement(source: nn.Module, prompt: Passage, tokens: Sequence[int], both: Vocabularies) -> _Judgement:
    """Let the source read prompt and tokens, and say what it would have written."""
    start, ours = len(prompt.artifact), (*prompt.artifact, *tokens)
    ids, places = both.reread(prompt, tokens)
    read = {artifact: own for own, artifact in places}
    base = max(place for place in read if place <= start)
    first = read[base]
    with_all = source(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=len(ids) - first + 1)
    all_logits = with_all.logits[0].to(torch.float32)
    preferred = all_logits.argmax(-1)
    shared = both.shared(all_logits)
    best = shared.argmax(-1)
    agree, rows, common = [], [], []
    for at in range(start, len(ours)):
        base = at if at in read else base
        row = read[base] - first
        spelled = both.spelled(int(preferred[row]))[: at + 1 - base]
        agree.append((at == base and int(best[row]) == ours[at]) or spelled == ours[base : at + 1])
        rows.append(row)
        common.append(at == base)
    at_common = torch.tensor(common)
    stops = all_logits.softmax(-1)[:, list(both.source.stop_ids)].sum(-1)[rows]
    return _Judgement(torch.tensor(agree), stops * at_common, shared[rows], at_common)


def _needless_loop(tokens: Sequence[int], agree: Tensor, tokenizer: SourceTokenizer) -> str:
    """Say where the text loops although the source would mostly have left the loop; empty if nowhere."""
    for period in range(1, LONGEST_CYCLE + 1):
        length = _cycle_length(tokens, period)
        if length < CYCLE_TOKENS:
            continue
        # A round is left where the source would have written one token otherwise; the rest follows from that.
        rounds = agree[-(length - length % period) :].view(-1, period)
        if rounds.all(dim=1).to(torch.float32).mean() < _SHARED_ROUNDS:
            cycle = tokenizer.decode(tokens[-period:])
            return f"loops on {cycle!r} for {length} tokens, where the source would go on otherwise"
    return ""


def _cycle_length(tokens: Sequence[int], period: int) -> int:
    """Return how many tokens at the end repeat with this period."""
    count = 0
    while count + period < len(tokens) and tokens[-1 - count] == tokens[-1 - count - period]:
        count += 1
    return count + period if count else 0


def _wrong_stop(tokens: Sequence[int], stops: Tensor, tokenizer: SourceTokenizer) -> str:
    """Say where the artifact stops or goes on although the source is sure of the opposite."""
    if not tokenizer.stop_ids:
        return ""
    for at, token in enumerate(tokens):
        before = repr(tokenizer.decode(tokens[max(0, at - 8) : at]))
        sure = float(stops[at])
        if token in tokenizer.stop_ids and sure < 1 - SURE:
            return f"stops after {at} tokens, {before}, where the source gives that {sure:.3f}"
        if token not in tokenizer.stop_ids and sure > SURE:
            return f"goes on after {at} tokens, {before}, where the source stops with {sure:.3f}"
    return ""


def _first_difference(
    prompts: Sequence[Sequence[int]],
    written: Sequence[Sequence[int]],
    agrees: Sequence[Tensor],
    tokenizer: SourceTokenizer,
) -> tuple[int | None, str]:
    """Return the earliest step at which the source would have written another token, and a word on it."""
    found: tuple[int, str] | None = None
    for prompt, tokens, agree in zip(prompts, written, agrees, strict=True):
        for at in (~agree).nonzero().flatten().tolist()[:1]:
            if found is None or at < found[0]:
                text = tokenizer.decode([*prompt, *tokens][: len(prompt) + at][-12:])
                found = (at, f"the source would first write something else after {at} tokens, {text!r}")
    return found if found else (None, "the source would have written the same throughout")
