"""Faults planted in a saved Core ML package: each is caught by a check of the gate."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
from families import INT8, ids_of

from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError
from slm_export.exporters.coreml import CoreMLExporter
from slm_export.exporters.mil.package import Package
from slm_export.parity import judge_codes, quantized_weights
from slm_export.runtime import ExportOptions
from slm_export.source.load import load_checkpoint

MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    folder = tmp_path_factory.mktemp("good")
    families.save(families.DECODERS["llama-3.2"], folder)
    checkpoint = INT8.run(load_checkpoint(folder)).checkpoint
    path = folder / "Model.mlpackage"
    CoreMLExporter().write(checkpoint, ExportOptions(context=64, stop_ids=(2,), bos_id=1), path)
    return checkpoint, path


def caught(checkpoint: Checkpoint, path: Path) -> list[str]:
    """Return the checks that fail; a package that cannot run at all fails with its first word."""
    exporter = CoreMLExporter()
    try:
        checks = [
            judge_codes(exporter.stored(path), quantized_weights(checkpoint)),
            *exporter.own_checks(path, checkpoint, ids_of(40)[0].tolist()),
        ]
    except InputError:
        return ["cannot run"]
    return [check.name for check in checks if not check.passed]


def functions(spec: Any) -> Iterator[Any]:
    """Yield the operations of every function."""
    for function in spec.mlProgram.functions.values():
        yield function.block_specializations[function.opset].operations


def constant(operations: Any, name: str) -> Any:
    """Return the immediate value behind a name."""
    (found,) = (op for op in operations if op.type == "const" and op.outputs[0].name == name)
    return found.attributes["val"].immediateValue.tensor


def operand(operation: Any, parameter: str, at: int = 0) -> str:
    return str(operation.inputs[parameter].arguments[at].name)


def half(tensor: Any, change: Callable[[float], float]) -> None:
    """Change a float16 number in place."""
    value = np.frombuffer(tensor.bytes.values, np.float16)[0]
    tensor.bytes.values = np.float16(change(float(value))).tobytes()


def larger_epsilon(operations: Any) -> None:
    """Ten times the epsilon of one norm."""
    divisions = [op for op in operations if op.type == "real_div"]
    names = {op.outputs[0].name for op in operations if op.type == "const"}
    (first, *_) = (op for op in divisions if operand(op, "x") in names)
    half(constant(operations, operand(first, "x")), lambda root: root * 10**0.5)


def open_mask(operations: Any) -> None:
    """What hides a position hides it no more."""
    subtractions = {op.outputs[0].name for op in operations if op.type == "sub"}
    (first, *_) = (op for op in operations if op.type == "mul" and operand(op, "x") in subtractions)
    half(constant(operations, operand(first, "y")), lambda _: 1.0)


def shifted_slice(operations: Any) -> None:
    """Of what the first layer has stored, all is read one position early: the newest is missed."""
    stored = {op.outputs[0].name for op in operations if op.type == "read_state"}
    (first, *_) = (op for op in operations if op.type == "slice_by_index" and operand(op, "x") in stored)
    begin = constant(operations, operand(first, "begin")).ints.values
    assert list(begin) == [0, 0, 0, 0, 0]
    begin[0], begin[3] = 0, 1


def lost_update(operations: Any) -> None:
    """What the second layer stores is forgotten."""
    writes = [index for index, op in enumerate(operations) if op.type == "write_state"]
    del operations[writes[2]]


def wrong_gate(operations: Any) -> None:
    """The ungated activation: sigmoid in place of SiLU."""
    (first, *_) = (op for op in operations if op.type == "silu")
    first.type = "sigmoid"


def exchanged_matrices(operations: Any) -> None:
    """Two layers have each other's matrix."""
    products = [op for op in operations if op.type == "linear"]
    one, other = (op.inputs["weight"].arguments[0] for op in (products[0], products[7]))
    one.name, other.name = str(other.name), str(one.name)


def swapped_scales(path: Path, checkpoint: Checkpoint) -> None:
    """Two rows of one matrix have each other's scale."""
    data = bytearray((path / WEIGHTS).read_bytes())
    begin = blob(path, "scale")
    data[begin : begin + 2], data[begin + 2 : begin + 4] = (
        data[begin + 2 : begin + 4],
        data[begin : begin + 2],
    )
    (path / WEIGHTS).write_bytes(data)


def transposed_matrix(path: Path, checkpoint: Checkpoint) -> None:
    """A square matrix lies on its side."""
    begin = blob(path, "data")
    data = bytearray((path / WEIGHTS).read_bytes())
    codes = np.frombuffer(bytes(data[begin : begin + 64 * 64]), np.int8).reshape(64, 64)
    data[begin : begin + 64 * 64] = codes.T.tobytes()
    (path / WEIGHTS).write_bytes(data)


def blob(path: Path, parameter: str) -> int:
    """Return where the data of the first square matrix begin."""
    operations = Package.open(path).functions["decode"].operations
    (first, *_) = (
        op for op in operations if op.kind.startswith("constexpr") and op.outputs[0][1].shape == (64, 64)
    )
    wanted = first.inputs[parameter][0].data.numpy().tobytes()  # type: ignore[union-attr]
    return (path / WEIGHTS).read_bytes().index(wanted)


IN_PROGRAM = (
    larger_epsilon,
    open_mask,
    shifted_slice,
    lost_update,
    wrong_gate,
    exchanged_matrices,
)
IN_WEIGHTS = (swapped_scales, transposed_matrix)


def test_a_good_package_raises_no_alarm(good: tuple[Checkpoint, Path]) -> None:
    assert caught(*good) == []


@pytest.mark.parametrize("fault", IN_PROGRAM, ids=lambda fault: fault.__name__)
def test_a_fault_in_the_program_is_caught(
    fault: Callable[[Any], None], good: tuple[Checkpoint, Path], tmp_path: Path
) -> None:
    from coremltools.proto import Model_pb2

    checkpoint, path = good[0], tmp_path / "Model.mlpackage"
    shutil.copytree(good[1], path)
    spec = Model_pb2.Model()
    spec.ParseFromString((path / MODEL).read_bytes())
    for operations in functions(spec):
        fault(operations)
    (path / MODEL).write_bytes(spec.SerializeToString())
    # A slice of another size no longer fits its mask.
    assert caught(checkpoint, path) == ["cannot run" if fault is shifted_slice else "exact_lowering"]


@pytest.mark.parametrize("fault", IN_WEIGHTS, ids=lambda fault: fault.__name__)
def test_a_fault_in_the_weights_is_caught(
    fault: Callable[[Path, Checkpoint], None], good: tuple[Checkpoint, Path], tmp_path: Path
) -> None:
    checkpoint, path = good[0], tmp_path / "Model.mlpackage"
    shutil.copytree(good[1], path)
    fault(path, checkpoint)
    assert caught(checkpoint, path) == ["codes", "exact_lowering"]
