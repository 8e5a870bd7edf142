"""Core ML packages: every family through the evaluator of saved programs, and what the files hold."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import INT8, WHOLE, apart, ids_of

from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError
from slm_export.exporters.coreml import CoreMLExporter
from slm_export.exporters.coreml_session import Decoder
from slm_export.exporters.mil.package import Package
from slm_export.exporters.mil.program import Name
from slm_export.exporters.mil.widened import widened
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.profile import CoreML
from slm_export.runtime import ExportOptions
from slm_export.source.load import load_checkpoint
from slm_export.weights import Quantized

CONTEXT = 64
TOKENS = 40
CACHE = 1e-3
"""Share of the range that a float16 cache may cost a program that computes in float32."""
EXACT = 1e-6
"""What the order of float operations may cost, as a share of the range."""
MOVES = {
    "reshape",
    "transpose",
    "concat",
    "expand_dims",
    "gather",
    "slice_by_index",
    "slice_update",
    "read_state",
}
"""Operators that make no new values."""
INT4 = GroupQuantize(bits=4, group=32, embedding_bits=8)


@dataclass(frozen=True)
class Exported:
    checkpoint: Checkpoint
    path: Path

    @property
    def package(self) -> Package:
        return Package.open(self.path)

    def session(self) -> Any:
        return CoreMLExporter().open(self.path, self.checkpoint.task)

    def exact(self) -> float:
        (check,) = CoreMLExporter().own_checks(self.path, self.checkpoint, ids_of(TOKENS)[0].tolist())
        assert check.value is not None
        return check.value


def source(name: str, folder: Path) -> Checkpoint:
    families.save((families.DECODERS | families.ENCODERS)[name], folder)
    return load_checkpoint(folder)


def export(checkpoint: Checkpoint, path: Path, coreml: CoreML | None = None) -> Exported:
    exporter = CoreMLExporter()
    exporter.ready()
    exporter.check(checkpoint)
    options = ExportOptions(context=CONTEXT, stop_ids=(2, 7), bos_id=1, coreml=coreml or CoreML())
    exporter.write(checkpoint, options, path)
    return Exported(checkpoint, path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return source("llama-3.2", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def int4(llama: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(INT4.run(llama).checkpoint, tmp_path_factory.mktemp("int4") / "Model.mlpackage")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return source("bert, classes", tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize("name", families.chosen(families.DECODERS, ("phi-4-mini",)))
def test_a_decoder_is_transformers_own(name: str, tmp_path: Path) -> None:
    """In 32 bits beside eager attention, prompt and single steps; in 8 bits as close as its own float16 allows."""
    checkpoint = source(name, tmp_path / "source")
    whole = export(WHOLE.run(checkpoint).checkpoint, tmp_path / "whole.mlpackage")
    ids = ids_of(TOKENS)
    with torch.no_grad():
        expected = families.eager(families.DECODERS[name], tmp_path / "source")(ids).logits[0]
    session = whole.session()
    got = [session.logits(ids[0, :30].tolist(), 0)]
    got += [session.logits([int(ids[0, at])], at) for at in range(30, TOKENS)]
    assert apart(torch.stack(got), expected[29:]) < CACHE
    assert whole.exact() < EXACT
    int8 = export(INT8.run(checkpoint).checkpoint, tmp_path / "int8.mlpackage")
    assert int8.exact() < CACHE
    assert rounding(int8) < 2**-11 * roundings(int8.package) ** 0.5


def rounding(made: Exported) -> float:
    """Return what float16 does to the scores of a prompt, as a share of their range."""
    tokens = ids_of(TOKENS)[0].tolist()
    package = made.package
    half, full = (Decoder(one).logits(tokens, 0) for one in (package, widened(package)))
    return apart(half, full)


def roundings(package: Package) -> int:
    """Return how many operators that round to float16 stand one behind the other, where most do.

    Each moves a value by up to 2^-11 of itself, in one direction or the other: n of them by the root of n times that.
    """
    depth: dict[str, int] = {}
    for operation in package.functions["prefill"].operations:
        names = [part.name for parts in operation.inputs.values() for part in parts if isinstance(part, Name)]
        before = max((depth.get(name, 0) for name in names), default=0)
        for name, type in operation.outputs:
            rounds = type.element.name == "fp16" and operation.kind not in MOVES
            depth[name] = before + rounds
    return depth["logits"]


@pytest.mark.parametrize("name", families.chosen(families.ENCODERS, ("bert, tokens",)))
def test_an_encoder_is_transformers_own(name: str, tmp_path: Path) -> None:
    checkpoint = source(name, tmp_path / "source")
    whole = export(WHOLE.run(checkpoint).checkpoint, tmp_path / "whole.mlpackage")
    assert whole.exact() < EXACT
    assert export(INT8.run(checkpoint).checkpoint, tmp_path / "int8.mlpackage").exact() < CACHE


def test_a_prompt_in_pieces_is_the_prompt(int4: Exported) -> None:
    """And what an earlier text left in the cache changes nothing."""
    tokens = ids_of(TOKENS)[0].tolist()
    session = int4.session()
    expected = session.logits(tokens, 0)
    session.logits(tokens[::-1], 0)
    session.logits(tokens[:7], 0)
    session.logits(tokens[7:20], 7)
    torch.testing.assert_close(session.logits(tokens[20:], 20), expected, rtol=0, atol=0.02)


def test_codes_and_scales_are_read_back_bit_for_bit(int4: Exported) -> None:
    stored = CoreMLExporter().stored(int4.path)
    expected = {name: w for name, w in int4.checkpoint.weights.items() if isinstance(w, Quantized)}
    assert stored.keys() == expected.keys()
    for name, weight in expected.items():
        assert (stored[name].bits, stored[name].group) == (weight.bits, weight.group)
        assert torch.equal(stored[name].codes(), weight.codes())
        assert torch.equal(stored[name].scales, weight.scales)


def test_functions_share_every_weight_and_a_tied_pair_is_one(int4: Exported) -> None:
    size = (int4.path / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size
    assert size < 1.3 * int4.checkpoint.bytes
    kinds = [operation.kind for operation in int4.package.functions["decode"].operations]
    matrices = sum(isinstance(weight, Quantized) for weight in int4.checkpoint.weights.values())
    assert kinds.count("constexpr_blockwise_shift_scale") == matrices
    assert (
        kinds.count("linear") == matrices
    )  # every matrix but the table, and the table once more as the head


def test_the_names_are_those_that_apps_look_for(int4: Exported) -> None:
    package = int4.package
    assert (sorted(package.functions), package.default, package.minimum) == (
        ["decode", "prefill"],
        "prefill",
        9,
    )
    for function in package.functions.values():
        assert [feature.name for feature in function.inputs] == ["inputIds", "causalMask"]
        assert [feature.name for feature in function.outputs] == ["logits"]
        assert [(state.name, state.shape) for state in function.states] == [
            ("keyCache", (3, 1, 2, CONTEXT, 16)),
            ("valueCache", (3, 1, 2, CONTEXT, 16)),
        ]
    assert package.metadata["slm_export.context"] == str(CONTEXT)
    assert json.loads(package.metadata["slm_export.stop_ids"]) == [2, 7]
    assert CoreMLExporter().open(int4.path, "text-generation").stop_ids == (2, 7)  # type: ignore[union-attr]


def test_coremltools_reads_the_package_back(int4: Exported, tmp_path: Path) -> None:
    """Its own loader builds the program anew, and infers every type itself (on a copy: it rewrites the manifest)."""
    import coremltools
    from coremltools.converters.mil.frontend.milproto.load import load

    copy = shutil.copytree(int4.path, tmp_path / "Model.mlpackage")
    model = coremltools.models.MLModel(str(copy), skip_model_load=True)
    program = load(model.get_spec(), model.get_spec().specificationVersion, model.weights_dir)
    assert sorted(program.functions) == ["decode", "prefill"]


def test_the_same_export_writes_the_same_bytes(int4: Exported, tmp_path: Path) -> None:
    again = export(int4.checkpoint, tmp_path / "Model.mlpackage")
    files = sorted(path.relative_to(int4.path) for path in int4.path.rglob("*") if path.is_file())
    assert len(files) == 3
    for file in files:
        assert (again.path / file).read_bytes() == (int4.path / file).read_bytes(), file


def test_prefill_shows_no_token_a_later_one_whatever_the_mask(int4: Exported) -> None:
    """swift-transformers hands in a mask of zeros."""
    from slm_export.exporters.mil.evaluator import Evaluator

    prefill = Evaluator(int4.package, "prefill")
    ids = ids_of(12).to(torch.int32)
    outputs = []
    for tokens in (12, 5):
        inputs = {
            "inputIds": ids[:, :tokens],
            "causalMask": torch.zeros(1, 1, tokens, tokens, dtype=torch.float16),
        }
        outputs.append(prefill.predict(inputs, prefill.make_state())["logits"][0, 4])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0.02)


@pytest.mark.parametrize("lengths", [pytest.param((1, 16), marks=pytest.mark.slow), (8, 32)])
def test_fixed_lengths_give_the_same(lengths: tuple[int, ...], int4: Exported, tmp_path: Path) -> None:
    fixed = export(int4.checkpoint, tmp_path / "Model.mlpackage", CoreML(query_lengths=lengths))
    (mask,) = (f for f in fixed.package.functions["decode"].inputs if f.name == "causalMask")
    assert (mask.shape, mask.ranges) == ((1, 1, 1, CONTEXT), None)
    assert fixed.exact() < EXACT
    tokens = ids_of(TOKENS)[0].tolist()
    got, expected = (made.session().logits(tokens, 0) for made in (fixed, int4))
    torch.testing.assert_close(got, expected, rtol=0, atol=0.02)


def test_a_length_beyond_the_context_is_refused(int4: Exported, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"query_lengths \[1, 128\].* longer than the context of 64"):
        export(int4.checkpoint, tmp_path / "Model.mlpackage", CoreML(query_lengths=(1, 128)))


def test_ios_17_has_encoders_of_8_bits(bert: Checkpoint, int4: Exported, tmp_path: Path) -> None:
    ios17 = CoreML(ios=17)
    quantized = INT8.run(bert).checkpoint
    made = export(quantized, tmp_path / "Model.mlpackage", ios17)
    assert made.package.minimum == 8
    assert made.exact() < CACHE
    stored = CoreMLExporter().stored(made.path)
    for name, weight in quantized.weights.items():
        if isinstance(weight, Quantized):
            assert torch.equal(stored[name].codes(), weight.codes())
            assert torch.equal(stored[name].scales, weight.scales)
    with pytest.raises(InputError, match="4 bits with a scale per group need iOS 18"):
        export(INT4.run(bert).checkpoint, tmp_path / "int4.mlpackage", ios17)
    with pytest.raises(InputError, match="states, which Core ML has from iOS 18 on"):
        export(int4.checkpoint, tmp_path / "decoder.mlpackage", ios17)


def test_an_encoder_pads_to_its_lengths(bert: Checkpoint, tmp_path: Path) -> None:
    made = export(INT8.run(bert).checkpoint, tmp_path / "Model.mlpackage")
    assert json.loads(made.package.metadata["slm_export.lengths"]) == [32, CONTEXT]
    assert json.loads(made.package.metadata["slm_export.labels"]) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    session = made.session()
    tokens = ids_of(20)[0].tolist()
    short, padded = session.outputs(tokens, [1] * 20), session.outputs(tokens + [0] * 20, [1] * 20 + [0] * 20)
    torch.testing.assert_close(short, padded, rtol=0, atol=0.02)


def test_a_package_that_is_not_ours_is_refused(int4: Exported, tmp_path: Path) -> None:
    import coremltools
    from coremltools.converters.mil import Builder as mb

    @mb.program(input_specs=[mb.TensorSpec(shape=(2,))])
    def program(x: Any) -> Any:
        return mb.add(x=x, y=1.0)

    path = tmp_path / "other.mlpackage"
    coremltools.convert(program, convert_to="mlprogram").save(str(path))
    for ask in (
        lambda: CoreMLExporter().open(path, "text-generation"),
        lambda: CoreMLExporter().stored(path),
    ):
        with pytest.raises(InputError, match="its metadata lacks"):
            ask()
