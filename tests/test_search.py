"""A budget's recipe: expected, exported, measured, corrected; with exports that answer at once."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TOKENIZER_FILES

from slm_export import driver
from slm_export.budget import costs, losses, problem, search
from slm_export.budget.budget import Budget
from slm_export.budget.choices import FLOAT16, INT8, Choice, options_for
from slm_export.budget.costs import Speed, encoded, read_per_token
from slm_export.budget.expectation import Expectation, Loss
from slm_export.budget.problem import gates_of_fewer_parts
from slm_export.budget.structure import kinds_of
from slm_export.bundles.finished import CACHE_VARIABLE
from slm_export.compilation import Request, make_plan
from slm_export.compression.calibration import Calibration
from slm_export.compression.workbench import Workbench
from slm_export.errors import InputError
from slm_export.fidelity.judging import checks_of
from slm_export.fidelity.thresholds import default_gates
from slm_export.optimizers.drop_layers import DropLayers
from slm_export.progress import Progress
from slm_export.proof import FailedGateError
from slm_export.recipe import QuantizationOptions
from slm_export.results import Artifact, FormatResult, Report, TokenLatency, TokenQuality
from slm_export.source.load import load_checkpoint

FOUR = Choice(4, 32)


@pytest.fixture(scope="module")
def model(tmp_path_factory, pycode):
    """A Llama of four layers, whose vocabulary is a small part of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "small"
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(pycode / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def source(model):
    return load_checkpoint(model)


@pytest.fixture(autouse=True)
def _a_tokenizer_of_another_model(monkeypatch):
    """It is only looked at; what reads no text needs none that fits."""
    monkeypatch.setattr(problem, "refuse_large_vocabulary", lambda *_: None)


@pytest.fixture(autouse=True)
def _few_points(monkeypatch):
    """A frontier has its own tests; here every export has one."""
    monkeypatch.setattr("slm_export.budget.frontier.POINTS", 2)


@pytest.fixture
def known_costs(monkeypatch, source):
    """Every matrix costs the same per value: 0.02 in int4 groups of 32, in all, and next to nothing in int8."""
    per_value = {16: 0.0, 8: 1e-4, 4: 0.02}
    options = options_for(source)
    values = sum(source.weights[name].count for name in options)
    made = {
        name: {
            c: per_value[c.bits] * math.sqrt(max(c.group, 32) / 32) * source.weights[name].count / values
            for c in of
        }
        for name, of in options.items()
    }
    monkeypatch.setattr(losses, "measure", lambda *_: made)
    monkeypatch.setattr(losses, "_text", lambda *_: None)
    return made


class Exports:
    """In place of the driver: an artifact is ``larger`` and ``worse`` than expected, and judged by the plan's gates."""

    def __init__(self, source, expected_costs, larger=0, worse=1.0, rounding=0.0):
        self.source, self.costs = source, expected_costs
        self.larger, self.worse, self.rounding = larger, worse, rounding
        self.program = costs.program_bytes(source, options_for(source), "executorch")
        self.made: list[dict[str, Choice]] = []

    def __call__(self, plan, progress):
        step = plan.recipe[-1]
        options = options_for(self.source)
        allocation = {
            name: Choice(bits, step.group_by_tensor.get(name, 0))
            for name, bits in step.bits_by_tensor.items()
        }
        assert allocation.keys() == options.keys()
        self.made.append(allocation)
        size = (
            costs.total(encoded(self.source, options, "executorch"), allocation) + self.program + self.larger
        )
        weights = self.worse * costs.total(self.costs, allocation)
        kl = weights + self.rounding
        quality = TokenQuality(kl_mean=kl, quantization_kl_mean=weights, perplexity_ratio=math.exp(kl))
        artifact = Artifact(Path("model.pte"), "executorch", round(size), "0" * 64, None)
        rate = 1 / (0.001 + costs.total(read_per_token(self.source, options), allocation) / 1e9)
        latency = TokenLatency(
            "host CPU", 1, 1, 1, decode_tokens_per_s=rate, model_rss_mb=20 + 2 * size / 2**20
        )
        gates = plan.request.gates
        checks = (
            *checks_of(artifact, gates, {}),
            *checks_of(quality, gates, {}),
            *checks_of(latency, gates, {}),
        )
        result = FormatResult(artifact, quality, checks, latency)
        report = Report(None, "host", "host", "This machine", (), (result,), {}, 0.0, {}, 0.0)
        if not result.passed:
            raise FailedGateError("not good enough", report)
        return report, Path("out")


def planned(model: Path, budget: Budget, **more):
    request = Request(
        model=str(model), target="host", formats=("executorch",), context=32, budget=budget, **more
    )
    return make_plan(request)


def problem_of(model: Path, budget: Budget):
    return problem.read_problem(planned(model, budget), Progress(silent=True))


def run(monkeypatch, model, source, known_costs, budget, **behaviour):
    exports = Exports(source, known_costs, **behaviour)
    monkeypatch.setattr(driver, "export", exports)
    report, _ = search.export(planned(model, budget), Progress(silent=True))
    return exports, report.formats[0]


def test_the_least_loss_within_a_size(monkeypatch, model, source, known_costs):
    exports, result = run(monkeypatch, model, source, known_costs, Budget(max_size=200_000))
    assert len(exports.made) == 1
    assert 0.98 * 200_000 < result.artifact.bytes <= 200_000
    assert {choice.bits for choice in exports.made[0].values()} >= {4, 8}


def test_a_file_that_is_larger_than_expected_is_corrected(monkeypatch, model, source, known_costs):
    exports, result = run(monkeypatch, model, source, known_costs, Budget(max_size=200_000), larger=20_000)
    assert len(exports.made) == 2
    assert exports.made[0] != exports.made[1]
    assert 0.98 * 200_000 < result.artifact.bytes <= 200_000


@pytest.mark.parametrize("behaviour", [{}, {"worse": 2.5}, {"worse": 0.9, "rounding": 0.002}])
def test_the_smallest_file_within_a_ratio(monkeypatch, model, source, known_costs, behaviour):
    budget = Budget(max_perplexity_ratio=1.006)
    exports, result = run(monkeypatch, model, source, known_costs, budget, **behaviour)
    assert len(exports.made) <= 2
    # Not better than it has to be: that would be a larger file.
    assert 1.005 < result.quality.perplexity_ratio <= 1.006


def test_a_rate_is_met_once_the_machine_is_known(monkeypatch, model, source, known_costs):
    monkeypatch.setattr(problem, "host_bandwidth", lambda: 1e9)
    exports, result = run(monkeypatch, model, source, known_costs, Budget(min_tokens_per_s=870.0))
    assert len(exports.made) == 2  # that a token takes a millisecond whatever it reads is found out
    assert result.latency.decode_tokens_per_s >= 870


def test_memory_is_met(monkeypatch, model, source, known_costs):
    limit = round(20.45 * 2**20)
    exports, result = run(monkeypatch, model, source, known_costs, Budget(max_memory=limit))
    assert result.latency.model_rss_mb <= 20.45
    assert {choice.bits for choice in exports.made[-1].values()} != {4}


def test_all_limits_together(monkeypatch, model, source, known_costs):
    budget = Budget(
        max_size=220_000, max_memory=round(20.47 * 2**20), min_tokens_per_s=840, max_perplexity_ratio=1.02
    )
    monkeypatch.setattr(problem, "host_bandwidth", lambda: 1e9)
    _, result = run(monkeypatch, model, source, known_costs, budget)
    assert result.artifact.bytes <= 220_000
    assert result.latency.decode_tokens_per_s >= 840
    assert result.quality.perplexity_ratio <= 1.02


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(max_size=80_000), "size of executorch: 80.0 kB are asked for"),
        (Budget(max_memory=4 << 20), "memory of executorch: 4.2 MB are asked for"),
        (Budget(min_tokens_per_s=1e6), "speed: 1,000,000.0 tokens/s are asked for"),
    ],
)
def test_what_no_allocation_fits_is_refused_by_headers(monkeypatch, model, budget, words):
    monkeypatch.setattr(losses, "measure", lambda *_: pytest.fail("measured before it was refused"))
    monkeypatch.setattr(problem, "host_bandwidth", lambda: 1e9)
    with pytest.raises(InputError, match="nearest that this model can do is about") as caught:
        search.export(planned(model, budget), Progress(silent=True))
    assert str(caught.value).startswith(words)


def test_limits_that_contradict_each_other_are_told_apart(monkeypatch, model, source, known_costs):
    budget = Budget(max_size=160_000, max_perplexity_ratio=1.001)
    monkeypatch.setattr(search, "narrower", lambda *_: None)  # nor does a model with fewer parts
    with pytest.raises(InputError) as caught:
        run(monkeypatch, model, source, known_costs, budget)
    first, best, enough = str(caught.value).splitlines()
    assert "a perplexity ratio of 1.001 and what it may cost do not go together" in first
    assert "within the limits on cost, the best to expect: 1" in best
    assert "kB, perplexity ratio 1.0" in best
    assert "for a perplexity ratio of 1.001, the least to expect" in enough


def test_what_is_never_within_the_budget_fails_its_gate(monkeypatch, model, source, known_costs):
    with pytest.raises(FailedGateError):
        run(monkeypatch, model, source, known_costs, Budget(max_size=165_000), larger=60_000)


def test_a_failure_that_bits_do_not_mend_is_not_tried_again(monkeypatch, model, source, known_costs):
    exports = Exports(source, known_costs)
    monkeypatch.setattr(driver, "export", exports)
    plan = planned(model, Budget(max_size=200_000))
    gates = plan.request.gates.model_copy(update={"max_lowering_kl_mean": 1e-9})
    with pytest.raises(FailedGateError):
        search.export(replace(plan, request=replace(plan.request, gates=gates)), Progress(silent=True))
    assert len(exports.made) == 1


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"quantization": QuantizationOptions(bits=8)}, "leave out --bits"),
        ({"verify": False}, "leave out --no-verify"),
        ({"bench": False, "budget": Budget(min_tokens_per_s=9.0)}, "leave out --no-bench"),
        ({"budget": Budget(min_cosine=0.9)}, "--min-cosine is of models whose output is an embedding"),
        (
            {"target": "android", "device": "pixel-8", "budget": Budget(min_tokens_per_s=9.0)},
            "the memory bandwidth of device pixel-8 is not in its profile",
        ),
    ],
)
def test_what_cannot_be_judged_is_refused(model, request_, words):
    base = planned(model, Budget(max_perplexity_ratio=1.01)).request
    with pytest.raises(InputError, match=words):
        search.export(make_plan(replace(base, **request_)), Progress(silent=True))


def test_perplexity_is_not_asked_of_an_encoder(minilm):
    with pytest.raises(InputError, match="give --min-cosine"):
        search.export(planned(minilm, Budget(max_perplexity_ratio=1.01)), Progress(silent=True))


def test_a_tied_vocabulary_is_read_for_every_token_and_another_is_not(source):
    options = options_for(source)
    reads = read_per_token(source, options)
    assert reads["model.embed_tokens.weight"][INT8] > 0
    untied = replace(source, tied={})
    assert read_per_token(untied, options)["model.embed_tokens.weight"][INT8] == 0


def test_speed_follows_what_is_measured():
    speed = Speed(1e9)
    assert speed.tokens_per_s(1e6) == pytest.approx(1000)
    slower = speed.corrected(400, 1e6)  # 1.5 ms more than reading takes
    assert slower.fixed_s == pytest.approx(0.0015)
    assert slower.tokens_per_s(1e6) == pytest.approx(400)
    assert slower.most_bytes(400) == pytest.approx(1e6)
    faster = speed.corrected(2000, 1e6)
    assert (faster.fixed_s, faster.bytes_per_s) == (0, pytest.approx(2e9))


def test_what_is_expected_of_an_encoder_is_a_cosine(minilm):
    checkpoint = load_checkpoint(minilm)
    expected = Expectation.of(checkpoint, ("onnx",), None, 0)
    even = {name: dict.fromkeys(choices, 0.001) for name, choices in expected.options.items()}
    expected = replace(expected, loss=Loss(even))
    figures = expected.figures("onnx", dict.fromkeys(expected.options, FLOAT16))
    assert figures["cosine_mean"] == pytest.approx(1 - 0.001 * len(expected.options))
    assert "perplexity_ratio" not in figures


def test_bits_are_found_for_what_other_passes_leave(monkeypatch, model, source):
    """Of four layers one is dropped: the budget is about the other three, and expects what that costs."""
    windows = torch.randint(0, 256, (9, 24), generator=torch.Generator().manual_seed(3)).tolist()
    monkeypatch.setattr(losses, "_text", lambda *_: Calibration(tuple(map(tuple, windows)), "a test"))
    seen = []
    monkeypatch.setattr(driver, "export", lambda plan, progress: (seen.append(plan), (None, None))[1])
    plan = planned(model, Budget(max_size=150_000))
    search.export(
        replace(plan, recipe=(DropLayers(count=1, tokens=100), *plan.recipe)), Progress(silent=True)
    )
    dropped, quantized = seen[0].recipe
    assert dropped == DropLayers(count=1, tokens=100)
    left = {name for name in options_for(source) if ".layers.3." not in name}  # numbered anew
    assert quantized.bits_by_tensor.keys() == left
    assert seen[0].frontier
    assert min(point.predicted_perplexity_ratio for point in seen[0].frontier) > 1.00001


@pytest.fixture
def some_text(monkeypatch):
    windows = torch.randint(0, 256, (16, 24), generator=torch.Generator().manual_seed(3)).tolist()
    text = Calibration(tuple(map(tuple, windows)), "a test")
    monkeypatch.setattr(losses, "_text", lambda *_: text)
    return text


def test_parts_are_taken_out_where_bits_alone_do_not_get_there(monkeypatch, model, source, some_text):
    monkeypatch.setattr("slm_export.budget.structure._FRACTIONS", (0.5, 0.75))
    seen = []
    monkeypatch.setattr(driver, "export", lambda plan, progress: (seen.append(plan), (None, None))[1])
    budget = Budget(max_size=85_000, max_perplexity_ratio=2.0)
    assert problem_of(model, budget).expectation(source).missed(budget) is not None
    search.export(planned(model, budget), Progress(silent=True))
    [plan] = seen
    first, second = plan.recipe
    assert first.structural
    assert second.quantizes
    assert any("parts of the model are taken out first" in note for note in plan.notes)
    gates = plan.request.gates
    assert (gates.max_bytes, gates.max_perplexity_ratio) == (85_000, 2.0)
    assert gates.max_kl_mean == pytest.approx(1.5 * math.log(2))
    assert gates.min_top1_agreement == pytest.approx(1 - math.sqrt(0.75 * math.log(2)))


def test_parts_are_not_taken_out_where_bits_are_enough(monkeypatch, model, source, known_costs):
    monkeypatch.setattr(search, "narrower", lambda *_: pytest.fail("bits are enough"))
    run(monkeypatch, model, source, known_costs, Budget(max_size=200_000, max_perplexity_ratio=1.02))


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(max_size=85_000), "only within a limit on quality: add one, such as --max-perplexity-ratio"),
        (
            Budget(max_size=20_000, max_perplexity_ratio=9.0),
            "no choice of bits and no fewer parts gets there",
        ),
    ],
)
def test_fewer_parts_than_there_are_or_than_may_go_are_refused_by_headers(monkeypatch, model, budget, words):
    monkeypatch.setattr(losses, "measure", lambda *_: pytest.fail("measured before it was refused"))
    with pytest.raises(InputError, match=words):
        search.export(planned(model, budget), Progress(silent=True))


def test_the_error_of_bits_is_kept_where_fewer_parts_are_worse(monkeypatch, model, source, some_text):
    monkeypatch.setattr(driver, "export", lambda *_: pytest.fail("nothing is within this budget"))
    monkeypatch.setattr("slm_export.budget.structure._FRACTIONS", (0.5, 0.75))
    budget = Budget(max_size=85_000, max_perplexity_ratio=1.00001)
    with pytest.raises(InputError, match="no model with fewer parts was found that costs as little"):
        search.export(planned(model, budget), Progress(silent=True))


def test_headers_promise_no_more_than_a_pass_keeps(source, some_text):
    for kind in kinds_of(source, ()):
        sizes = [structure.shapes.parameters for structure in kind]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] < source.parameters
        made = kind[0].step.run(source, Workbench(calibration=some_text)).checkpoint
        assert kind[0].shapes.parameters <= made.parameters < source.parameters
    assert [kind[0].step.name for kind in kinds_of(source, ())] == ["prune-neurons", "drop-layers"]
    assert kinds_of(source, (DropLayers(count=1),)) == ()


def test_thresholds_widen_with_the_limit_that_was_set():
    own = default_gates("text-generation", 4)
    assert (
        gates_of_fewer_parts(Budget(max_perplexity_ratio=1.05), "text-generation").max_kl_mean
        == own.max_kl_mean
    )
    wide = gates_of_fewer_parts(Budget(max_perplexity_ratio=3.0), "text-generation")
    assert wide.max_kl_mean == pytest.approx(1.5 * math.log(3))
    assert wide.max_lowering_kl_mean == own.max_lowering_kl_mean
    assert gates_of_fewer_parts(Budget(min_cosine=0.9), "sentence-embedding").min_cosine_min == pytest.approx(
        0.7
    )


def test_the_cache_is_where_the_user_says(tmp_path, monkeypatch, tiny_llama):
    """End to end on a model of one layer, but for the export itself."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("def add(a, b):\n    return a + b\n" * 60)
    seen = []
    monkeypatch.setattr(driver, "export", lambda plan, progress: (seen.append(plan), (None, None))[1])
    torch.set_num_threads(1)
    search.export(planned(tiny_llama, Budget(max_size=260_000), calibration=text), Progress(silent=True))
    [plan] = seen
    assert plan.request.calibration is None  # no pass of the recipe wants it
    assert plan.request.gates.max_bytes == 260_000
    assert any(note.startswith("the budget's recipe:") for note in plan.notes)
    assert list((tmp_path / "cache" / "sensitivity").iterdir())
