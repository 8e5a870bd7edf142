"""The gate must fail on what is broken: each check is shown a fault that it is there for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slm_export import fidelity
from slm_export.checkpoint import Checkpoint
from slm_export.evaltext import load_documents
from slm_export.exporters.executorch_dialect import xnnpack_rounding
from slm_export.fidelity.examples import SHOWN
from slm_export.fidelity.greedy import judge_greedy
from slm_export.fidelity.judging import checks_of
from slm_export.fidelity.vocabularies import OneVocabulary, Passage
from slm_export.gates import Gates
from slm_export.graph.model import build_reference
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.results import Check, EmbeddingQuality, TokenLatency, TokenQuality
from slm_export.source.load import load_checkpoint
from slm_export.tokenization.runtime_tokenizers import ExecuTorchTokenizer
from slm_export.tokenization.tokenizer import SourceTokenizer
from slm_export.weights import Dense

DOCUMENTS = load_documents(None)[:6]


class TorchSession:
    """A decoder session that computes in torch: a runtime without lowering loss, unless a fault is put in."""

    def __init__(self, checkpoint: Checkpoint, *, lowered: bool, fault: str = "") -> None:
        self.context = 256
        self.prefill_chunk = 256
        self.stop_ids, self.bos_id, self.vocabulary = (1,), 0, None
        self._model = build_reference(checkpoint, xnnpack_rounding if lowered else None)
        self._seen: list[int] = []
        self._known: dict[tuple[int, ...], Tensor] = {}
        self._fault = fault

    def logits(self, tokens: Sequence[int], start: int) -> Tensor:
        self._seen = [*self._seen[:start], *tokens]
        key = tuple(self._seen)
        if key not in self._known:
            # One pass gives every prefix: without a cache, a token at a time would take minutes.
            with torch.no_grad():
                rows = self._model(input_ids=torch.tensor([key])).logits[0]
            self._known[key] = rows[-1]
        return self._with_fault(self._known[key], start + len(tokens))

    def read_ahead(self, window: Sequence[int]) -> None:
        with torch.no_grad():
            rows = self._model(input_ids=torch.tensor([list(window)])).logits[0]
        for length in range(1, len(window) + 1):
            self._known[tuple(window[:length])] = rows[length - 1]

    def _with_fault(self, logits: Tensor, position: int) -> Tensor:
        if self._fault == "never stops":
            logits = logits.clone()
            logits[1] = -1e4
        if self._fault == "late positions" and position > 64:
            return logits.roll(1)
        return logits

    def metadata(self) -> Mapping[str, Any]:
        return {"get_eos_ids": [1]}

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def source(pycode: Path) -> Checkpoint:
    return load_checkpoint(pycode)


@pytest.fixture(scope="module")
def quantized(source: Checkpoint) -> Checkpoint:
    return GroupQuantize(bits=8).run(source).checkpoint


@pytest.fixture(scope="module")
def tokenizer(pycode: Path) -> SourceTokenizer:
    return SourceTokenizer.load(pycode)


def judged(
    source: Checkpoint,
    quantized: Checkpoint,
    session: TorchSession,
    tokenizer: SourceTokenizer,
    monkeypatch: Any,
) -> tuple[TokenQuality, dict[str, Check]]:
    from slm_export.evaltext import token_windows
    from slm_export.fidelity import greedy, tokens

    monkeypatch.setattr(tokens, "TOKENS", 512)
    monkeypatch.setattr(tokens, "WINDOW", 128)
    monkeypatch.setattr(greedy, "NEW_TOKENS", 12)
    for window in token_windows(DOCUMENTS, tokenizer.encode, tokens.WINDOW, None, 512):
        session.read_ahead(window)
    gates = fidelity.default_gates("text-generation", 8)
    quality, checks = fidelity.judge_decoder(
        fidelity.References(source, quantized),
        session,
        xnnpack_rounding,
        tokenizer,
        DOCUMENTS,
        gates,
        lambda count, note: None,
    )
    return quality, {check.name: check for check in checks}


def damaged(checkpoint: Checkpoint, name: str) -> Checkpoint:
    weight = checkpoint.weights[name]
    values = -weight.float32()
    return checkpoint.with_weights({name: Dense(weight.shape, torch.float32, lambda: values)})


def test_a_faithful_artifact_passes_without_lowering_loss(
    source: Checkpoint, quantized: Checkpoint, tokenizer: SourceTokenizer, monkeypatch: Any
) -> None:
    session = TorchSession(quantized, lowered=True)
    quality, checks = judged(source, quantized, session, tokenizer, monkeypatch)
    assert all(check.passed for check in checks.values()), checks
    # Not exactly 0: torch sums in another order when a matrix has other rows beside it.
    assert quality.lowering_kl_mean == pytest.approx(0, abs=1e-4)
    assert quality.kl_mean is not None
    assert quality.kl_mean > 1e-4
    assert quality.tokens == 512


def test_an_artifact_of_other_weights_fails_where_it_parts(
    source: Checkpoint, quantized: Checkpoint, tokenizer: SourceTokenizer, monkeypatch: Any
) -> None:
    wrong = damaged(quantized, "model.layers.3.mlp.down_proj.weight")
    session = TorchSession(wrong, lowered=True)
    quality, checks = judged(source, quantized, session, tokenizer, monkeypatch)
    failed = {name for name, check in checks.items() if not check.passed}
    assert failed >= {"kl_mean", "top1_agreement", "perplexity_ratio", "lowering_kl_mean"}
    assert "the source prefers" in checks["kl_mean"].detail
    assert "logits are" in checks["lowering_kl_mean"].detail
    shown = [example for example in quality.examples if example.where == "held-out text"]
    assert len(shown) == 4 < SHOWN  # one of each window
    assert shown[0].kl == pytest.approx(quality.kl_max)
    assert [one.kl for one in shown] == sorted((one.kl for one in shown), reverse=True)
    text = " ".join(DOCUMENTS)
    assert all(one.before + one.after in text for one in shown)


def test_a_fault_at_late_positions_only_is_seen(
    source: Checkpoint, quantized: Checkpoint, tokenizer: SourceTokenizer, monkeypatch: Any
) -> None:
    session = TorchSession(quantized, lowered=True, fault="late positions")
    _, checks = judged(source, quantized, session, tokenizer, monkeypatch)
    assert not checks["kl_mean"].passed
    assert not checks["lowering_kl_mean"].passed


class Script(nn.Module):
    """A source that is sure of one text: token t is followed by ``text[t]``."""

    def __init__(self, follows: Mapping[int, int]) -> None:
        super().__init__()
        self._follows = follows

    def forward(self, input_ids: Tensor, logits_to_keep: int, **_: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, 300)
        for at, token in enumerate(input_ids[0].tolist()):
            logits[0, at, self._follows.get(token, 5)] = 20
        return type("Output", (), {"logits": logits[:, -logits_to_keep:]})


class ScriptSession(TorchSession):
    def __init__(self, follows: Mapping[int, int]) -> None:
        self.context = 256
        self._follows = follows

    def logits(self, tokens: Sequence[int], start: int) -> Tensor:
        logits = torch.zeros(300)
        logits[self._follows.get(tokens[-1], 5)] = 20
        return logits


COUNTING = {token: token + 1 for token in range(10, 290)}


def counted(start: int, end: int) -> Passage:
    window = tuple(range(start, end))
    return Passage(window, window, window, tuple((i, i) for i in range(1, len(window) + 1)))


@pytest.mark.parametrize(
    ("artifact", "failing"),
    [
        (COUNTING, ""),
        ({**COUNTING, 60: 50}, "degeneration"),
        ({**COUNTING, 40: 1}, "stopping"),
        ({**COUNTING, 100: 101}, ""),
    ],
)
def test_loops_and_stops_are_judged_by_the_source(
    artifact: Mapping[int, int], failing: str, tokenizer: SourceTokenizer
) -> None:
    passages = [counted(10, 40)]
    found = judge_greedy(
        Script(COUNTING),
        ScriptSession(artifact),
        OneVocabulary(tokenizer),
        passages,
        lambda count, note: None,
    )
    assert {check.name for check in found.checks if not check.passed} == ({failing} if failing else set())


def test_a_missed_stop_is_noticed(tokenizer: SourceTokenizer) -> None:
    passages = [counted(10, 40)]
    source = Script({**COUNTING, 30: 1})
    found = judge_greedy(
        source, ScriptSession(COUNTING), OneVocabulary(tokenizer), passages, lambda count, note: None
    )
    stopping = next(check for check in found.checks if check.name == "stopping")
    assert not stopping.passed
    assert "goes on" in stopping.detail


def test_a_loop_of_the_source_itself_is_no_fault(tokenizer: SourceTokenizer) -> None:
    looping = {**COUNTING, 60: 50}
    passages = [counted(10, 40)]
    found = judge_greedy(
        Script(looping), ScriptSession(looping), OneVocabulary(tokenizer), passages, lambda count, note: None
    )
    assert all(check.passed for check in found.checks)
    assert found.agreement == 1
    assert found.examples == ()


def test_the_first_difference_of_a_text_is_shown_with_both_sides(tokenizer: SourceTokenizer) -> None:
    passages = [counted(40, 70)]
    session = ScriptSession({**COUNTING, 60: 100})
    found = judge_greedy(
        Script(COUNTING), session, OneVocabulary(tokenizer), passages, lambda count, note: None
    )
    (example,) = found.examples
    assert example.before == tokenizer.decode(range(40, 61))
    assert (example.source, example.artifact) == (tokenizer.decode([61]), tokenizer.decode([100]))
    assert example.after == tokenizer.decode(range(101, 113))
    assert example.source_probability == pytest.approx(1, abs=1e-4)
    assert example.artifact_probability == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("named", "passed"), [((1,), True), ((2,), False), ((), False)])
def test_stop_tokens_of_the_file(named: tuple[int, ...], passed: bool) -> None:
    assert fidelity.judge_stop_tokens(named, (1,)).passed is passed


def test_another_tokenizer_in_the_bundle_fails(
    tokenizer: SourceTokenizer, pycode: Path, tmp_path: Path
) -> None:
    text = (pycode / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace("Ġ", "_"))
    verdict = fidelity.judge_tokenizer(
        tokenizer,
        lambda: ExecuTorchTokenizer(tmp_path),
        "text-generation",
        fidelity.default_gates("text-generation", 8),
    )
    assert not all(check.passed for check in verdict.checks)


def test_thresholds_grow_stricter_with_the_bits() -> None:
    four, eight, sixteen = (fidelity.default_gates("text-generation", bits) for bits in (4, 8, 16))
    assert four.max_kl_mean > eight.max_kl_mean > sixteen.max_kl_mean  # type: ignore[operator]
    assert fidelity.default_gates("text-generation", 32) == sixteen


def test_a_figure_that_is_nan_or_missing_fails() -> None:
    gates = Gates(max_kl_mean=0.1, min_top1_agreement=0.5)
    nan, missing = checks_of(TokenQuality(kl_mean=float("nan")), gates, {})
    assert not nan.passed
    assert not missing.passed
    assert "not measured" in missing.detail


def test_only_figures_of_the_kind_are_judged() -> None:
    gates = Gates(max_kl_mean=0.1, min_cosine_mean=0.9, min_decode_tokens_per_s=10)
    (cosine,) = checks_of(EmbeddingQuality(cosine_mean=0.95), gates, {})
    assert cosine.passed
    slow = TokenLatency("host CPU", 2, 5, 128, decode_tokens_per_s=9.0)
    (speed,) = checks_of(slow, gates, {})
    assert not speed.passed


def test_scale_search_beats_min_max_on_a_trained_model(
    source: Checkpoint, tokenizer: SourceTokenizer
) -> None:
    """The figure that scale search is for: the divergence of a 4-bit model, not the error of its weights."""
    long = [ids for document in load_documents(None) if len(ids := tokenizer.encode(document)) >= 256]
    ids = torch.tensor([document[:256] for document in long])
    with torch.no_grad():
        expected = build_reference(source)(input_ids=ids).logits.log_softmax(-1)

    def divergence(search: bool) -> float:
        made = GroupQuantize(bits=4, group=32, search=search).run(source).checkpoint
        with torch.no_grad():
            got = build_reference(made)(input_ids=ids).logits.log_softmax(-1)
        return float((expected.exp() * (expected - got)).sum(-1).mean())

    assert divergence(True) < 0.95 * divergence(False)
