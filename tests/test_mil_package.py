"""Saved packages: what is read of them, and that damaged ones are refused in words."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slm_export.errors import InputError
from slm_export.exporters.mil.blob import Packed
from slm_export.exporters.mil.evaluator import Evaluator
from slm_export.exporters.mil.package import Package

pytest.importorskip("coremltools")

SPEC = Path("Data", "com.apple.CoreML", "model.mlmodel")
WEIGHTS = Path("Data", "com.apple.CoreML", "weights", "weight.bin")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x fp16 (1, 1..8, 64), state fp16 (1, 64) -> y: an int4 matrix in the weight file, its scales too."""
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types
    from coremltools.converters.mil.mil.types.type_mapping import nptype_from_builtin

    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, size=(32, 64)).astype(nptype_from_builtin(types.int4))
    scale = rng.normal(size=(32, 2)).astype(np.float16)

    @mb.program(
        input_specs=[
            mb.TensorSpec((1, 4, 64), dtype=types.fp16),
            mb.StateTensorSpec((1, 64), dtype=types.fp16),
        ],
        opset_version=ct.target.iOS18,
    )
    def program(x: Any, total: Any) -> Any:
        sum = mb.add(x=mb.read_state(input=total), y=mb.reduce_sum(x=x, axes=[1]))
        mb.coreml_update_state(state=total, value=sum)
        weight = mb.constexpr_blockwise_shift_scale(data=codes, scale=scale)
        return mb.linear(x=x, weight=weight, name="y")

    model = ct.convert(program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True)
    model.author, model.user_defined_metadata["slm"] = "somebody", "yes"
    path = tmp_path_factory.mktemp("coreml") / "small.mlpackage"
    model.save(str(path))
    return path


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "small.mlpackage"))


def test_what_a_package_says(saved: Path) -> None:
    package = Package.open(saved)
    assert (package.default, package.minimum) == ("main", 9)
    assert package.metadata["slm"] == "yes"
    assert package.metadata["author"] == "somebody"
    function = package.functions["main"]
    assert [(f.name, f.dtype, f.shape) for f in function.inputs] == [("x", torch.float16, (1, 4, 64))]
    assert [(f.name, f.dtype, f.shape) for f in function.states] == [("total", torch.float16, (1, 64))]
    assert [f.name for f in function.outputs] == ["y"]
    (scaled,) = [each for each in function.operations if each.kind.startswith("constexpr")]
    codes, scales = (package.tensor(scaled.inputs[name][0]) for name in ("data", "scale"))  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(codes, rng.integers(-8, 8, size=(32, 64)))
    np.testing.assert_array_equal(scales, rng.normal(size=(32, 2)).astype(np.float16))
    again = package.tensor(scaled.inputs["scale"][0])  # type: ignore[arg-type]
    assert again.data_ptr() == scales.data_ptr()  # type: ignore[union-attr]


def test_it_computes(saved: Path) -> None:
    evaluator = Evaluator(Package.open(saved))
    rng = np.random.default_rng(0)
    weight = rng.integers(-8, 8, size=(32, 64)) * rng.normal(size=(32, 2)).astype(np.float16).repeat(
        32, 1
    ).astype(float)
    # Dequantized to float16 before it is multiplied.
    weight = weight.astype(np.float16).astype(float)
    x = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(3)).half()
    state = evaluator.make_state()
    for calls in (1, 2):
        made = evaluator.predict({"x": x}, state)["y"]
        torch.testing.assert_close(
            made.double(), x.double() @ torch.from_numpy(weight).T, rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(state["total"].float(), x.float().sum(1) * calls, rtol=1e-3, atol=1e-2)


def refuse(path: Path, *words: str) -> None:
    with pytest.raises(InputError) as error:
        Evaluator(Package.open(path))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("length", [0, 10, 63, 64, 100, 1000, -1])
def test_a_truncated_weight_file(copied: Path, length: int) -> None:
    file = copied / WEIGHTS
    raw = file.read_bytes()
    file.write_bytes(raw[:length])
    refuse(copied, "weight.bin")


@pytest.mark.parametrize(
    ("at", "form", "value", "words"),
    [
        (4, "<I", 1, "version 1"),
        (64, "<I", 0xDEADBEE0, "no blob begins here"),
        (68, "<I", 11, "holds uint4, declared as int4"),
        (68, "<I", 99, "holds type 99, declared as int4"),
        (72, "<Q", 1 << 60, "takes 1024"),
        (72, "<Q", 1023, "takes 1024"),
        (80, "<Q", 1 << 62, "outside of the file"),
        (80, "<Q", 129, "outside of the file"),
        (80, "<Q", 64, "outside of the file"),
        (88, "<Q", 4, "4 unused bits"),
    ],
)
def test_a_damaged_weight_file(copied: Path, at: int, form: str, value: int, words: str) -> None:
    file = copied / WEIGHTS
    raw = bytearray(file.read_bytes())
    struct.pack_into(form, raw, at, value)
    file.write_bytes(raw)
    refuse(copied, "weight.bin", words)


@pytest.mark.parametrize("part", [SPEC, WEIGHTS, Path("Manifest.json")])
def test_a_missing_file(copied: Path, part: Path) -> None:
    (copied / part).unlink()
    refuse(copied, part.name)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"itemInfoEntries": 3, "rootModelIdentifier": "a"}', "[" * 100000]
)
def test_a_manifest_that_names_nothing(copied: Path, text: str) -> None:
    (copied / "Manifest.json").write_text(text)
    refuse(copied, "Manifest.json")


def test_paths_out_of_the_package(copied: Path) -> None:
    outside = copied.parent / "model.mlmodel"
    shutil.copy(copied / SPEC, outside)
    manifest = json.loads((copied / "Manifest.json").read_text())
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = "../../model.mlmodel"
    kept = (copied / "Manifest.json").read_text()
    (copied / "Manifest.json").write_text(json.dumps(manifest))
    refuse(copied, "not in the package")
    (copied / "Manifest.json").write_text(kept)
    shutil.copy(copied / WEIGHTS, copied.parent / "weight.bin")

    def lead_out(spec: Any) -> None:
        blob(spec).fileName = "@model_path/../../../weight.bin"

    refuse(changed(copied, lead_out), "not in the package")


def changed(path: Path, change: Callable[[Any], Any]) -> Path:
    """The package with its specification changed in place."""
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model()
    spec.ParseFromString((path / SPEC).read_bytes())
    change(spec)
    (path / SPEC).write_bytes(spec.SerializeToString())
    return path


def main(spec: Any) -> Any:
    return spec.mlProgram.functions["main"]


def block(spec: Any) -> Any:
    return main(spec).block_specializations["CoreML8"]


def found(spec: Any, kind: str) -> Any:
    return next(each for each in block(spec).operations if each.type == kind)


def blob(spec: Any) -> Any:
    return found(spec, "constexpr_blockwise_shift_scale").inputs["data"].arguments[0].value.blobFileValue


def resize(type: Any, *sizes: int) -> None:
    type.tensorType.rank = len(sizes)
    del type.tensorType.dimensions[:]
    for size in sizes:
        type.tensorType.dimensions.add().constant.size = size


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "another kind of model": (lambda s: s.neuralNetwork.SetInParent(), "not an ML Program"),
    "no function": (lambda s: s.mlProgram.functions.clear(), "describes the functions"),
    "another function": (lambda s: s.description.functions.add(name="other"), "describes the functions ['other']"),
    "unknown opset": (lambda s: setattr(main(s), "opset", "CoreML99"), "opset 'CoreML99'"),
    "unknown name": (
        lambda s: setattr(found(s, "linear").inputs["x"].arguments[0], "name", "nobody"),
        "uses 'nobody', which nothing before it makes",
    ),
    "a cycle": (
        lambda s: setattr(found(s, "add").inputs["x"].arguments[0], "name", "y"),
        "uses 'y', which nothing before it makes",
    ),
    "made twice": (
        lambda s: setattr(found(s, "linear").outputs[0], "name", found(s, "add").outputs[0].name),
        "is made twice",
    ),
    "unmade result": (lambda s: block(s).outputs.append("nobody"), "returns what nothing makes: nobody"),
    "undescribed input": (lambda s: s.description.input.pop(), "describes ['total']"),
    "another described type": (
        lambda s: setattr(s.description.input[0].type.multiArrayType, "dataType", 65568),
        "'x' is described as torch.float32",
    ),
    "an image": (lambda s: s.description.input[0].type.imageType.SetInParent(), "is a imageType"),
    "an output that is not returned": (
        lambda s: setattr(s.description.output[0], "name", "z"),
        "describes outputs that its program does not return: z",
    ),
    "an unknown operator": (lambda s: setattr(found(s, "add"), "type", "frobnicate"), "frobnicate (1: "),
    "an unknown parameter": (
        lambda s: found(s, "add").inputs["z"].CopyFrom(found(s, "add").inputs["y"]),
        "has no parameter z",
    ),
    "a missing parameter": (lambda s: found(s, "add").inputs.pop("y"), "lacks the parameter y"),
    "a state added": (
        lambda s: setattr(found(s, "add").inputs["x"].arguments[0], "name", "total"),
        "'x' cannot be a state",
    ),
    "a tensor read as a state": (
        lambda s: setattr(found(s, "read_state").inputs["input"].arguments[0], "name", "x"),
        "'input' has to be a state",
    ),
    "a constant of another shape": (
        lambda s: resize(found(s, "constexpr_blockwise_shift_scale").outputs[0].type, 64, 32),
        "is declared fp16 [64, 32], but is torch.float16 [32, 64]",
    ),
    "a huge constant": (
        lambda s: resize(
            found(s, "constexpr_blockwise_shift_scale").inputs["data"].arguments[0].value.type, 1 << 40, 1 << 40
        ),
        "takes 604462909807314587353088",
    ),
    "a rank that is not": (
        lambda s: setattr(found(s, "add").outputs[0].type.tensorType, "rank", 3),
        "rank 3 with 2 dimensions",
    ),
    "a constant that is not one": (
        lambda s: setattr(found(s, "constexpr_blockwise_shift_scale").inputs["scale"].arguments[0], "name", "x"),
        "takes constants only",
    ),
    "an immediate of too few values": (
        lambda s: found(s, "const").attributes["val"].immediateValue.tensor.ints.values.append(3),
        "given as 2 values",
    ),
    "an immediate of another kind": (
        lambda s: found(s, "const").attributes["val"].immediateValue.tensor.floats.values.append(1.5),
        "given as floats",
    ),
    "a blob that is not there": (lambda s: setattr(blob(s), "offset", 1 << 50), "outside of the file"),
    "a blob between": (lambda s: setattr(blob(s), "offset", 65), "not aligned to 64"),
    "another file": (lambda s: setattr(blob(s), "fileName", "@model_path/weights/other.bin"), "is missing"),
    "a file name that cannot be": (lambda s: setattr(blob(s), "fileName", "@model_path/a\0b"), "null byte"),
    "an absolute file": (lambda s: setattr(blob(s), "fileName", "/etc/passwd"), "not in the package"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_specification_that_cannot_be(copied: Path, name: str) -> None:
    change, words = CHANGES[name]
    refuse(changed(copied, change), "small.mlpackage", words)


def test_a_state_larger_than_the_machine(copied: Path) -> None:
    def enlarge(spec: Any) -> None:
        spec.description.state[0].type.stateType.arrayType.shape[:] = [1 << 30, 1 << 30]
        resize(main(spec).inputs[1].type.stateType.wrappedType, 1 << 30, 1 << 30)

    with pytest.raises(InputError, match="more than this machine has"):
        Evaluator(Package.open(changed(copied, enlarge))).make_state()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_anywhere_is_refused_or_harmless(saved: Path, tmp_path: Path, data: Any) -> None:
    path = tmp_path / "damaged.mlpackage"
    if not path.exists():
        shutil.copytree(saved, path)
    part = data.draw(st.sampled_from([SPEC, WEIGHTS]))
    raw = bytearray((saved / part).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    (path / part).write_bytes(raw)
    try:
        evaluator = Evaluator(Package.open(path))
        evaluator.predict({"x": torch.zeros(1, 4, 64).half()}, evaluator.make_state())
    except InputError as refused:
        message = str(refused)
        if "damaged.mlpackage" not in message:
            raise AssertionError(f"does not say which package: {message}") from refused
    finally:
        (path / part).write_bytes((saved / part).read_bytes())


def test_an_element_of_a_damaged_constant_is_never_out_of_bounds() -> None:
    from slm_export.exporters.mil.blob import BY_NAME

    packed = Packed(BY_NAME["int4"], (2, 3), torch.zeros(3, dtype=torch.uint8))
    assert packed.tensor().shape == (2, 3)
    with pytest.raises((RuntimeError, IndexError)):
        Packed(BY_NAME["int4"], (2, 30), torch.zeros(3, dtype=torch.uint8)).tensor()
