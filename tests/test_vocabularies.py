"""A text in the source's tokens and in an artifact's: cut at the same places, judged by what both have in common."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from test_fidelity import TorchSession
from torch import Tensor

from slm_export import fidelity
from slm_export.checkpoint import Checkpoint
from slm_export.compression.calibration import Calibration
from slm_export.compression.workbench import Workbench
from slm_export.errors import GateError
from slm_export.fidelity import tokens as judged_tokens
from slm_export.fidelity.greedy import judge_greedy
from slm_export.fidelity.vocabularies import FewerTokens, OneVocabulary, Passage
from slm_export.graph.model import build_reference
from slm_export.optimizers.trim_vocabulary import TrimVocabulary
from slm_export.results import EmbeddingQuality, TokenQuality
from slm_export.source.load import load_checkpoint
from slm_export.tokenization.tokenizer import SourceTokenizer, tokenizer_of
from slm_export.weights import Weight

DOMAIN = tuple(
    (Path(__file__).parents[1] / "slm_export" / f"{name}.py").read_text("utf-8")
    for name in ("source/load", "graph/model")
)
OTHER = "name, größe = '日本', 1\nwhile 🙂 >= größe:\n    unheard_of.vocabulary(größe)\n" * 12


@pytest.fixture(scope="module")
def source(pycode: Path) -> Checkpoint:
    return load_checkpoint(pycode)


@pytest.fixture(scope="module")
def trimmed(source: Checkpoint) -> Checkpoint:
    work = Workbench(calibration=Calibration((), "a text", DOMAIN))
    return TrimVocabulary(tokens=768).run(source, work).checkpoint


@pytest.fixture(scope="module")
def both(source: Checkpoint, trimmed: Checkpoint) -> FewerTokens:
    made = fidelity.References(source, trimmed).vocabularies(tokenizer_of(trimmed))
    assert isinstance(made, FewerTokens)
    return made


def ends(tokenizer: SourceTokenizer, window: tuple[int, ...], places: list[int]) -> list[str]:
    return [tokenizer.decode(window[:count]) for count in places]


@pytest.mark.parametrize("length", [24, 64, 256])
def test_passages_are_the_same_text_on_both_sides(both: FewerTokens, length: int) -> None:
    documents = (*DOMAIN, OTHER)
    passages = both.passages(documents, length, 3000)
    assert len(passages) > 8
    assert sum(len(one.artifact) for one in passages) <= 3000
    spelled = 0
    for one in passages:
        assert max(len(one.source), len(one.artifact)) <= length
        assert one.as_source == tuple(both.kept[token] for token in one.artifact)
        assert one.places[-1] == (len(one.source), len(one.artifact))
        theirs = ends(both.source, one.source, [own for own, _ in one.places])
        assert theirs == ends(both.artifact, one.artifact, [artifact for _, artifact in one.places])
        text = theirs[-1].strip("\ufffd")  # a passage may begin or end within a character
        assert any(text in document for document in documents)
        spelled += len(one.artifact) > len(one.source)
    assert spelled > 4


def test_passages_are_long_and_leave_nothing_of_a_document_out(both: FewerTokens) -> None:
    passages = both.passages((DOMAIN[0],), 128, 10**6)
    read = "".join(both.artifact.decode(one.artifact) for one in passages)
    assert DOMAIN[0].startswith(read)
    assert len(DOMAIN[0]) - len(read) < 200  # a tail too short to judge
    assert all(len(one.artifact) > 118 for one in passages[:-1])


def test_every_document_has_its_turn(both: FewerTokens) -> None:
    passages = both.passages((*DOMAIN, OTHER), 64, 64 * 3)
    assert [both.source.decode(one.source)[:12] for one in passages] == [t[:12] for t in (*DOMAIN, OTHER)]


def test_a_text_that_is_too_short_is_refused(both: FewerTokens) -> None:
    with pytest.raises(GateError, match="too short"):
        both.passages(("x = 1",), 64, 1000)


def test_tokens_read_alike_are_counted(both: FewerTokens) -> None:
    for one in both.passages((*DOMAIN, OTHER), 200, 1000):
        lost = sum(token not in both.kept for token in one.source)
        # Spelled tokens are lost ones; next to them a token that is kept may be merged otherwise.
        assert 0 <= len(one.source) - one.alike - lost <= lost
    same = OneVocabulary(both.source).passages(DOMAIN, 64, 500)
    assert all(one.alike == len(one.source) for one in same)


def test_with_one_vocabulary_nothing_changes(both: FewerTokens) -> None:
    one = OneVocabulary(both.source)
    (passage, *_) = one.passages(DOMAIN, 64, 500)
    assert passage.source is passage.artifact is passage.as_source
    assert passage.places == tuple((i, i) for i in range(1, 65))
    logs = torch.randn(3, 7).log_softmax(-1)
    assert one.shared(logs) is logs
    assert one.lacking(logs).tolist() == [0, 0, 0]
    assert one.reread(passage.beginning(4), (5, 6)) == (
        (*passage.source[:4], 5, 6),
        tuple((i, i) for i in range(1, 7)),
    )


def test_probabilities_are_shares_of_what_both_have(both: FewerTokens) -> None:
    logs = torch.randn(5, 4096, generator=torch.Generator().manual_seed(3)).log_softmax(-1)
    shared, lacking = both.shared(logs), both.lacking(logs)
    kept = logs.exp()[:, list(both.kept)]
    torch.testing.assert_close(shared.exp().sum(-1), torch.ones(5))
    torch.testing.assert_close(lacking, 1 - kept.sum(-1))
    torch.testing.assert_close(shared.exp() * (1 - lacking).unsqueeze(-1), kept)


def test_a_lost_token_is_spelled_by_tokens_of_the_same_text(both: FewerTokens) -> None:
    lost = [token for token in range(4096) if token not in both.kept]
    assert len(lost) == 4096 - 768
    for token in lost:
        spelled = both.spelled(token)
        assert len(spelled) > 1
        assert both.artifact.decode(spelled) == both.source.decode([token])
    assert all(both.spelled(old) == (new,) for new, old in enumerate(both.kept))


def test_what_was_written_is_read_in_the_sources_own_tokens(both: FewerTokens) -> None:
    (passage,) = both.passages((OTHER,), 48, 48)
    written = both.artifact.encode(" unheard_of.vocabulary(")
    ids, places = both.reread(passage, written)
    assert both.source.decode(ids) == both.artifact.decode([*passage.artifact, *written])
    assert len(ids) < len(passage.artifact) + len(written)
    assert ids == tuple(both.source.encode(both.source.decode(ids)))
    assert places[-1] == (len(ids), len(passage.artifact) + len(written))


def test_half_a_character_is_read_token_by_token(both: FewerTokens) -> None:
    (passage,) = both.passages((OTHER,), 48, 48)
    half = both.artifact.encode("日")[:1]
    ids, places = both.reread(passage, half)
    assert ids == (*passage.source, both.kept[half[0]])
    assert places[-1] == (len(ids), len(passage.artifact) + 1)


class Following:
    """Says that one token follows another for certain, as a model or as a session."""

    context, prefill_chunk, stop_ids, bos_id, vocabulary = 256, 256, (1,), None, None

    def __init__(self, rows: int, after: dict[int, int], otherwise: int) -> None:
        self.rows, self.after, self.otherwise = rows, after, otherwise

    def __call__(self, input_ids: Tensor, use_cache: bool, logits_to_keep: int) -> Following:
        ids = input_ids[0].tolist()[-logits_to_keep:]
        made = torch.stack([self.logits([token], 0) for token in ids])
        answer = Following(self.rows, self.after, self.otherwise)
        answer.logits = made.unsqueeze(0)  # type: ignore[method-assign, assignment]
        return answer

    def logits(self, tokens: list[int], start: int) -> Tensor:
        made = torch.zeros(self.rows)
        made[self.after.get(tokens[-1], self.otherwise)] = 20.0
        return made


def test_a_lost_token_spelled_to_its_end_is_what_the_source_would_have_written(both: FewerTokens) -> None:
    """The source wants a token that is gone again and again; the artifact spells it, or begins to and goes astray."""
    lost = next(t for t in range(3000, 4096) if len(both.spelled(t)) == 3 and t not in both.kept)
    spelled = both.spelled(lost)
    assert tuple(both.source.encode(both.source.decode([lost] * 40))) == (lost,) * 40
    prompt = Passage((lost,), spelled, tuple(both.kept[t] for t in spelled), ((1, 3),))
    circle = dict(zip(spelled, (*spelled[1:], spelled[0]), strict=True))
    wanted = Following(4096, {}, lost)
    found = judge_greedy(wanted, Following(768, circle, 5), both, [prompt], lambda count, note: None)  # type: ignore[arg-type]
    assert found.agreement == 1
    assert all(check.passed for check in found.checks)
    astray = {**circle, spelled[1]: spelled[0]}
    found = judge_greedy(wanted, Following(768, astray, 5), both, [prompt], lambda count, note: None)  # type: ignore[arg-type]
    assert found.agreement is not None
    assert found.agreement < 0.8
    assert "degeneration" in {check.name for check in found.checks if not check.passed}


def judged(source: Checkpoint, trimmed: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> TokenQuality:
    from slm_export.fidelity import greedy

    monkeypatch.setattr(judged_tokens, "TOKENS", 700)
    monkeypatch.setattr(greedy, "NEW_TOKENS", 12)
    references = fidelity.References(source, trimmed)
    session = TorchSession(trimmed, lowered=False)
    tokenizer = tokenizer_of(trimmed)
    for one in references.vocabularies(tokenizer).passages(DOMAIN, 256, 700):
        session.read_ahead(one.artifact)
    quality, _ = fidelity.judge_decoder(
        references,
        session,
        _unrounded,
        tokenizer,
        DOMAIN,
        fidelity.default_gates("text-generation", 16),
        _silent,
    )
    return quality


def _unrounded(x: Tensor, weight: Weight) -> Tensor:
    return x


def _silent(count: int, note: str) -> None:
    pass


def test_the_figures_of_a_trimmed_model_are_those_of_the_text(
    source: Checkpoint, trimmed: Checkpoint, both: FewerTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    quality = judged(source, trimmed, monkeypatch)
    # The same rows in torch: whatever the vocabulary cost is in the likelihood of the text, and there alone.
    assert quality.kl_mean == pytest.approx(0, abs=1e-5)
    assert quality.top1_agreement == 1
    assert quality.perplexity_ratio != pytest.approx(1, abs=0.01)
    assert quality.tokens_ratio is not None
    assert 1 < quality.tokens_ratio < 1.3
    assert quality.same_tokens is not None
    assert 0.5 < quality.same_tokens < 1
    passages = both.passages(DOMAIN, 256, 700)
    theirs = sum(_nll(source, one.source, one.places[0][0]) for one in passages)
    ours = sum(_nll(trimmed, one.artifact, one.places[0][1]) for one in passages)
    count = sum(len(one.source) - one.places[0][0] for one in passages)
    assert quality.perplexity_ratio == pytest.approx(math.exp((ours - theirs) / count), rel=1e-3)
    assert quality.source_perplexity == pytest.approx(math.exp(theirs / count), rel=1e-3)


def test_where_no_token_is_spelled_the_text_gains_what_the_lost_ones_had(
    source: Checkpoint, trimmed: Checkpoint, both: FewerTokens
) -> None:
    """-log p' = -log p + log(share of the tokens that stay), token by token: the price of a smaller vocabulary."""
    (passage, *_) = both.passages(("    def f(self):\n        return self\n\n" * 30,), 128, 128)
    assert passage.alike == len(passage.source) == len(passage.artifact)
    with torch.no_grad():
        logs = build_reference(source)(input_ids=torch.tensor([passage.source])).logits[0].log_softmax(-1)
    gained = -(1 - both.lacking(logs[:-1])).log().sum().item()
    difference = _nll(source, passage.source, 1) - _nll(trimmed, passage.artifact, 1)
    assert gained > 0
    assert difference == pytest.approx(gained, rel=1e-3)


@torch.no_grad()
def _nll(checkpoint: Checkpoint, window: tuple[int, ...], start: int) -> float:
    logs = build_reference(checkpoint)(input_ids=torch.tensor([window])).logits[0].float().log_softmax(-1)
    return -sum(logs[at - 1, window[at]].item() for at in range(start, len(window)))


class Embedding:
    """An encoder session that computes in torch."""

    context = 128

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.model = build_reference(checkpoint)
        self.longest = 0

    def outputs(self, tokens: list[int], mask: list[int], types: tuple[int, ...] = ()) -> Tensor:
        assert len(tokens) <= self.context
        self.longest = max(self.longest, sum(mask))
        embedding: Tensor = self.model(torch.tensor([tokens]), torch.tensor([mask]))[0]
        return embedding


def test_an_encoder_is_compared_on_the_same_texts(minilm: Path) -> None:
    source = load_checkpoint(minilm)
    texts = (*DOMAIN[0].split("\n\n")[:6], DOMAIN[0])
    work = Workbench(calibration=Calibration((), "a text", (DOMAIN[0],)))
    trimmed = TrimVocabulary(tokens=4096).run(source, work).checkpoint
    session, references = Embedding(trimmed), fidelity.References(source, trimmed)
    gates = fidelity.default_gates("sentence-embedding", 16)
    unheard = (*texts, "Unheard-of mountaineers whispered melancholy lullabies, " * 20)
    figures = []
    for judged_on in (texts, unheard):
        quality, _ = fidelity.judge_encoder(
            references, session, _unrounded, tokenizer_of(trimmed), judged_on, gates, _silent
        )
        assert isinstance(quality, EmbeddingQuality)
        figures.append(quality)
    # Every token of the domain stays, so nothing changes; a whole document is cut where both still read it.
    assert figures[0].cosine_min == pytest.approx(1, abs=1e-5)
    assert session.longest > 100
    assert figures[1].cosine_min is not None
    assert figures[1].cosine_min < 0.95
    assert figures[1].lowering_max_abs == pytest.approx(0, abs=1e-5)
