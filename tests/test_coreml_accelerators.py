"""Which units may run a Core ML package, told of the file by public rules; and the gate on it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from families import DECODERS, ENCODERS, save, save_tokenizer
from forked import Forked

from slm_export.compilation import Request, check_gates, make_plan
from slm_export.delegation import Delegation
from slm_export.errors import InputError
from slm_export.exporters.coreml import CoreMLExporter
from slm_export.exporters.coreml_accelerator_rules import GPU, NEURAL_ENGINE, RULES
from slm_export.exporters.coreml_accelerators import load_memory, predict
from slm_export.exporters.coreml_sizes import Call, sizes_of
from slm_export.exporters.mil.blob import BY_NAME, Packed, size_of
from slm_export.exporters.mil.evaluator import Evaluator
from slm_export.exporters.mil.package import Feature, Function, Package
from slm_export.exporters.mil.program import Name, Operation, TensorType
from slm_export.fidelity.judging import judge_acceleration
from slm_export.gates import TELLING, Gates
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.profile import FORMATS, CoreML
from slm_export.registry import exporter
from slm_export.runtime import ExportOptions
from slm_export.settings import load_settings
from slm_export.source.load import load_checkpoint

CONTEXT = 64
SETTINGS = 'model = "model"\ntarget = "ios"\nformats = ["{}"]\n[gates]\nmin_accelerated = {}\n'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma, whose heads are as wide as the Neural Engine wants states to be."""
    folder = tmp_path_factory.mktemp("model")
    save(DECODERS["gemma"], folder)
    return folder


def written(model: Path, path: Path, bits: int, asked: CoreML) -> Path:
    checkpoint = GroupQuantize(bits=bits, embedding_bits=8).run(load_checkpoint(model)).checkpoint
    options = ExportOptions(context=CONTEXT, stop_ids=(2,), bos_id=1, coreml=asked)
    CoreMLExporter().write(checkpoint, options, path)
    return path


@pytest.fixture(scope="module")
def decoder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder in int4 in groups of 32, its vocabulary in int8 per row, for any number of tokens."""
    return written(model, tmp_path_factory.mktemp("any") / "Model.mlpackage", 4, CoreML())


@pytest.fixture(scope="module")
def listed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder in int8 per row, for numbers of tokens that are listed."""
    asked = CoreML(query_lengths=(1, 16, 32))
    return written(model, tmp_path_factory.mktemp("listed") / "Model.mlpackage", 8, asked)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small BERT, for the command line."""
    folder = tmp_path_factory.mktemp("work")
    save(ENCODERS["bert, masks"], folder / "model")
    save_tokenizer(folder / "model")
    return folder


@pytest.fixture(scope="module")
def bundle(work: Path, quick_cli: Forked) -> Path:
    """The BERT in int8 per row, for lengths that are listed, exported with a gate that it passes."""
    (work / "slm-export.toml").write_text(SETTINGS.format("coreml", 0.95))
    done = quick_cli("--target", "ios", "--bits", "8", "--no-verify", "--no-bench", "--out", "out", cwd=work)
    assert done.returncode == 0, done.stderr
    return work / "out"


def largest(feature: Feature) -> tuple[int, ...]:
    if feature.enumerated:
        return max(feature.enumerated)
    return feature.shape if feature.ranges is None else tuple(most or 1 for _, most in feature.ranges)


def fixed(function: Function) -> Function:
    """Return a function for inputs of one size, as an exporter for the Neural Engine would write it."""
    inputs = (replace(feature, ranges=None, shape=largest(feature)) for feature in function.inputs)
    return replace(function, inputs=tuple(inputs))


# --- functions of one operation ----------------------------------------------------------------------


def packed(element: str, *shape: int) -> Packed:
    return Packed(
        BY_NAME[element], shape, torch.zeros(size_of(BY_NAME[element], shape)[0], dtype=torch.uint8)
    )


def made(kind: str, shape: tuple[int, ...], element: str = "fp16", /, **inputs: Any) -> Operation:
    """An operation that makes ``y``; text is the name of a value."""
    operands = {
        name: tuple(Name(part) if isinstance(part, str) else part for part in parts)
        for name, parts in ((name, v if isinstance(v, list) else [v]) for name, v in inputs.items())
    }
    return Operation(kind, kind, operands, (("y", TensorType(BY_NAME[element], shape)),))


def function(
    *operations: Operation,
    x: tuple[int, ...] = (1, 64),
    ranges: tuple[tuple[int, int], ...] | None = None,
    state: tuple[int, ...] = (1, 64),
) -> Function:
    """A function of ``x``, of an integer ``at`` and of the state ``s``."""
    given = Feature("x", torch.float16, x, ranges)
    at = Feature("at", torch.int32, (len(x),))
    held = Feature("s", torch.float16, state)
    return Function("main", 18, (given, at), (), (held,), {}, operations, ("y",))


def matrix(blocks: int) -> tuple[Operation, Operation]:
    """A product with 8 rows of 64 int4 and some scales for each."""
    weight = made(
        "constexpr_blockwise_shift_scale",
        (8, 64),
        data=packed("int4", 8, 64),
        scale=packed("fp16", 8, blocks),
    )
    return replace(weight, outputs=(("w", weight.outputs[0][1]),)), made("linear", (1, 8), x="x", weight="w")


def updated(begin: Any) -> Operation:
    return made("slice_update", (1, 64), x="x", update="x", begin=begin, end=packed("int32", 2))


RELU = made("relu", (1, 64), x="x")
LSTM = made("lstm", (4, 1, 8), x="x", weight_ih=packed("fp16", 32, 64), weight_hh=packed("fp16", 32, 8))
CASES: Mapping[str, tuple[Function, Function]] = {
    "range": (function(RELU, ranges=((1, 1), (1, 64))), function(RELU, ranges=((1, 1), (64, 64)))),
    "float32": (
        function(made("relu", (1, 64), "fp32", x="x")),
        function(made("cast", (1, 64), "fp32", x="x")),
    ),
    "blocks": (function(*matrix(2)), function(*matrix(1))),
    "state-width": (function(RELU, state=(64, 48)), function(RELU, state=(48, 64))),
    "state-position": (function(updated("at")), function(updated(packed("int32", 2)))),
    "rank": (
        function(made("relu", (1, 1, 1, 1, 64), x="x"), x=(1, 1, 1, 1, 64)),
        function(made("relu", (1, 1, 1, 64), x="x"), x=(1, 1, 1, 64)),
    ),
    "long-axis": (
        function(made("relu", (1, 16_385), x="x"), x=(1, 16_385)),
        function(made("relu", (1, 16_384), x="x"), x=(1, 16_384)),
    ),
    "gather": (function(made("gather", (2, 64), x="x", indices="at")), function(RELU)),
    "topk": (function(made("topk", (1, 4), x="x")), function(RELU)),
    "recurrent": (function(LSTM, x=(4, 1, 64)), function(RELU)),
    "iphone-slice": (function(made("slice_by_index", (1, 8), x="x")), function(RELU)),
}
"""A function that each rule is for, and one just outside of it."""


@pytest.mark.parametrize("name", CASES)
def test_a_rule_is_for_what_it_says_and_for_nothing_else(name: str) -> None:
    (rule,) = (rule for rule in RULES if rule.name == name)
    hit, missed = (predict(case) for case in CASES[name])
    (risk,) = (risk for risk in hit.risks if risk.reason == rule.reason)
    assert (risk.unit, risk.source) == (rule.unit, rule.source)
    assert sum(risk.operators.values()) == 1
    assert rule.reason not in {risk.reason for risk in missed.risks}


def test_every_rule_is_tested_and_has_a_public_source_that_the_page_names() -> None:
    page = (ROOT / "docs" / "ios.md").read_text()
    assert list(CASES) == [rule.name for rule in RULES]
    assert all(rule.source.startswith("https://") and f"({rule.source})" in page for rule in RULES)
    assert {rule.unit for rule in RULES} == {NEURAL_ENGINE, GPU}


@pytest.mark.parametrize("kind", ["gather_along_axis", "gather_nd"])
def test_other_gathers_stay_on_the_cpu_too(kind: str) -> None:
    (risk,) = predict(function(made(kind, (2, 64), x="x", indices="at"))).risks
    assert risk.operators == {kind: 1}


PRODUCTS: Mapping[str, tuple[int, Function]] = {
    "linear": (64 * 8, function(*matrix(1))),
    "matmul": (
        2 * 5 * 3 * 7,
        function(made("matmul", (2, 5, 7), x="x", y=packed("fp16", 2, 3, 7)), x=(2, 5, 3)),
    ),
    "matmul, transposed": (
        2 * 5 * 3 * 7,
        function(
            replace(
                made("const", (), "bool", val=Packed(BY_NAME["bool"], (), torch.ones(1, dtype=torch.uint8))),
                outputs=(("turned", TensorType(BY_NAME["bool"], ())),),
            ),
            made("matmul", (2, 5, 7), x="x", y=packed("fp16", 2, 3, 7), transpose_x="turned"),
            x=(2, 3, 5),
        ),
    ),
    "attention": (
        2 * 4 * 8 * (64 + 16),
        function(
            made(
                "scaled_dot_product_attention",
                (2, 4, 16),
                query="x",
                key=packed("fp16", 2, 8, 64),
                value=packed("fp16", 2, 8, 16),
            ),
            x=(2, 4, 64),
        ),
    ),
    "conv": (
        8 * 10 * (4 * 3),
        function(made("conv", (1, 8, 10), x="x", weight=packed("fp16", 8, 4, 3)), x=(1, 4, 12)),
    ),
    "lstm": (4 * (32 * 64 + 32 * 8), function(LSTM, x=(4, 1, 64))),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_multiply_adds_are_those_of_the_formula(name: str) -> None:
    expected, case = PRODUCTS[name]
    assert predict(case).multiplications == expected


# --- whole packages ----------------------------------------------------------------------------------


def shapes_of(package: Package, name: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of everything that a function computes, by running it on its largest inputs."""
    function = package.functions[name]
    computed = [output for operation in Call.of(function).operations for output in operation.outputs]
    outputs = tuple(Feature(name, type.element.dtype, ()) for name, type in computed)
    every = replace(function, outputs=outputs, results=tuple(name for name, _ in computed))
    evaluator = Evaluator(replace(package, functions={name: every}, default=name))
    # Ids that are 0; a mask of a first call, which is what a fixed decoder tells its positions by.
    inputs = {
        feature.name: torch.full(
            largest(feature), -math.inf if feature.dtype.is_floating_point else 0, dtype=feature.dtype
        ).triu(1)
        for feature in function.inputs
    }
    return {
        name: tuple(value.shape) for name, value in evaluator.predict(inputs, evaluator.make_state()).items()
    }


@pytest.mark.parametrize("name", ["decode", "prefill"])
@pytest.mark.parametrize("kind", ["decoder", "listed"])
def test_sizes_of_a_decoder_are_those_of_a_run(kind: str, name: str, request: pytest.FixtureRequest) -> None:
    package = Package.open(request.getfixturevalue(kind))
    expected = shapes_of(package, name)
    found = sizes_of(package.functions[name])
    assert len(expected) > 200
    assert {key: found[key] for key in expected} == expected


def test_sizes_of_an_encoder_are_those_of_a_run(bundle: Path) -> None:
    package = Package.open(bundle / "coreml" / "Model.mlpackage")
    expected = shapes_of(package, "main")
    found = sizes_of(package.functions["main"])
    assert {key: found[key] for key in expected} == expected


def test_a_decoder_of_any_length_is_for_the_gpu(decoder: Path) -> None:
    found = CoreMLExporter().delegation(decoder)
    layers, width, head, heads, inner, vocabulary = 3, 64, 32, 4, 128, 512
    projections = 2 * width * heads * head + 2 * width * 2 * head + 3 * width * inner
    attention = heads * CONTEXT * 2 * head
    assert found.function == "decode"
    assert found.multiplications == layers * (projections + attention) + vocabulary * width
    assert found.units == {NEURAL_ENGINE: 0, GPU: 1}
    assert found.delegate == "GPU (predicted from public rules, not measured)"
    assert found.predicted
    assert found.accelerated == 1
    assert found.taken == found.operators - sum(found.rest.values())
    blocks = next(risk for risk in found.risks if "block" in risk.reason)
    assert blocks.multiplications == layers * projections


def test_with_inputs_of_one_size_only_its_blocks_keep_a_decoder_off_the_neural_engine(decoder: Path) -> None:
    found = predict(fixed(Package.open(decoder).functions["decode"]))
    assert found.delegate.startswith(NEURAL_ENGINE)
    left = next(risk.multiplications for risk in found.risks if "block" in risk.reason)
    assert found.taken_multiplications == found.multiplications - left
    assert 0 < found.accelerated < 0.95
    (check,) = judge_acceleration(found, Gates(min_accelerated=0.95))
    assert not check.passed
    assert "block" in check.detail
    assert "predicted" in check.detail


def test_int8_for_listed_lengths_is_for_the_neural_engine(listed: Path) -> None:
    found = CoreMLExporter().delegation(listed)
    assert found.delegate.startswith(NEURAL_ENGINE)
    assert found.units == {NEURAL_ENGINE: 1, GPU: 1}
    (check,) = judge_acceleration(found, Gates(min_accelerated=1))
    assert check.passed


def test_the_function_that_is_taken_least_of_is_reported(
    decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Package.open(decoder)
    functions = {name: package.functions[name] for name in ("decode", "prefill")}
    functions["prefill"] = fixed(functions["prefill"])
    monkeypatch.setattr(Package, "open", lambda path: replace(package, functions=functions))
    assert CoreMLExporter().delegation(decoder).function == "prefill"


def test_constants_are_counted_once_packed_and_expanded(decoder: Path) -> None:
    found = load_memory(Package.open(decoder))
    matrices = 3 * (2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 128)
    packed = matrices // 2 + 2 * matrices // 32 + 512 * 64 + 2 * 512
    assert found.expanded_bytes - found.packed_bytes == 2 * (matrices + 512 * 64) - packed
    assert packed < found.packed_bytes < (decoder / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size
    assert found.state_bytes == 2 * 2 * (3 * 2 * CONTEXT * 32)


def test_a_size_that_depends_on_data_is_an_error() -> None:
    case = function(
        replace(made("non_zero", (), x="x"), outputs=(("y", TensorType(BY_NAME["int32"], (None, 2))),))
    )
    with pytest.raises(InputError, match="non_zero: its size cannot be told without running"):
        predict(case)


# --- the gate ----------------------------------------------------------------------------------------


def taking(share: float) -> Delegation:
    return Delegation("XNNPACK", "decode", 10, 9, 1000, math.floor(1000 * share), {"GATHER": 1})


@pytest.mark.parametrize(("share", "passed"), [(1.0, True), (0.95, True), (0.949, False), (0.0, False)])
def test_the_gate_is_a_lower_bound_on_a_measured_share_too(share: float, passed: bool) -> None:
    (check,) = judge_acceleration(taking(share), Gates(min_accelerated=0.95))
    assert (check.name, check.passed, check.value, check.limit) == ("accelerated", passed, share, 0.95)


def test_without_the_gate_nothing_is_judged() -> None:
    assert judge_acceleration(taking(0.0), Gates()) == ()


def test_what_cannot_be_told_fails() -> None:
    (check,) = judge_acceleration(None, Gates(min_accelerated=0.5))
    assert not check.passed
    assert check.value is None


@pytest.mark.parametrize("format", FORMATS)
def test_a_format_that_tells_nothing_is_refused(format: str) -> None:
    target = {"coreml": "ios", "onnx": "linux", "litert": "android", "executorch": "android"}[format]
    plan = make_plan(Request(model="m", target=target, formats=(format,), gates=Gates(min_accelerated=0.9)))
    tells = exporter(format).delegation.__annotations__["return"] != "None"
    assert tells == (format in TELLING)
    if tells:
        check_gates(plan)
        return
    with pytest.raises(InputError, match=f"min_accelerated: of {format} cannot be told"):
        check_gates(plan)


def test_settings_hold_the_gate_and_its_bounds(tmp_path: Path) -> None:
    file = tmp_path / "slm-export.toml"
    file.write_text(SETTINGS.format("coreml", 0.95))
    settings = load_settings(tmp_path)
    assert settings is not None
    assert settings.gates.min_accelerated == 0.95
    file.write_text(SETTINGS.format("coreml", 95))
    with pytest.raises(InputError, match="min_accelerated"):
        load_settings(tmp_path)


def test_the_command_refuses_a_gate_that_cannot_be_judged(tmp_path: Path, quick_cli: Forked) -> None:
    (tmp_path / "slm-export.toml").write_text(SETTINGS.format("executorch", 0.95))
    done = quick_cli("--target", "ios", cwd=tmp_path)
    assert done.returncode == 2
    assert "gate min_accelerated: of executorch cannot be told" in done.stderr


def test_a_build_below_the_gate_fails_and_leaves_nothing(work: Path, bundle: Path, quick_cli: Forked) -> None:
    """With int4 in blocks only the attention is left to the Neural Engine."""
    arguments = ("--target", "ios", "--bits", "4", "--no-verify", "--no-bench", "--out", "four", "--json")
    done = quick_cli(*arguments, cwd=work)
    assert done.returncode == 1, done.stderr
    assert not (work / "four").exists()
    (result,) = json.loads(done.stdout)["report"]["formats"]
    (check,) = (check for check in result["checks"] if check["name"] == "accelerated")
    assert not check["passed"]
    assert 0 < check["value"] < check["limit"] == 0.95
    assert "accelerated is" in done.stderr + done.stdout


def test_the_report_tells_units_risks_and_memory(bundle: Path, quick_cli: Forked) -> None:
    (result,) = json.loads((bundle / "report.json").read_text())["formats"]
    found = result["delegation"]
    assert found["predicted"]
    assert found["delegate"].startswith("Neural Engine (predicted")
    assert found["units"] == {NEURAL_ENGINE: 1.0, GPU: 1.0}
    assert found["memory"]["packed_bytes"] < found["memory"]["expanded_bytes"]
    page = (bundle / "report.html").read_text()
    for risk in found["risks"]:
        assert risk["source"] in page
    assert "coreml: units and memory, predicted and not measured" in page
    assert json.loads((bundle / "manifest.json").read_text())["gates"]["min_accelerated"] == 0.95


def test_verify_judges_the_gate_again(bundle: Path, quick_cli: Forked) -> None:
    done = quick_cli("verify", bundle, "--json", cwd=bundle.parent)
    assert done.returncode == 0, done.stderr
    assert "accelerated" in done.stdout
