"""Converted functions and a checkpoint -> an ``.mlpackage``, with every weight in its place.

A function arrives with its matrices as inputs. Here they become constants: codes and scales of the checkpoint as
``constexpr_blockwise_shift_scale``, indices and tables as ``constexpr_lut_to_dense``, bit for bit, or floats. All
functions name the same constants of one weight file.
"""

from __future__ import annotations

import json
import re
import struct
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from slm_export.checkpoint import Checkpoint
from slm_export.exporters.coreml_blobs import BlobWriter
from slm_export.exporters.coreml_graph import WEIGHT, Function
from slm_export.exporters.coreml_metadata import WEIGHTS
from slm_export.exporters.mil.blob import BY_CODE, BY_NAME, WeightFile
from slm_export.exporters.mil.package import MANIFEST
from slm_export.weights import Dense, Palettized, Quantized, Weight

_AUTHOR = "com.apple.CoreML"
_MODEL, _FOLDER = f"{_AUTHOR}/model.mlmodel", f"{_AUTHOR}/weights"
_FILE = "@model_path/weights/weight.bin"
_IOS_18 = 9
"""The version of the specification that has scales per group."""
_TORCH = {"fp16": torch.float16, "fp32": torch.float32}


class PackageWriter:
    """Writes one package of one or more functions."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, path: Path) -> None:
        from coremltools.proto import Model_pb2

        self._checkpoint = checkpoint
        self._dtype = dtype
        self._data = path / "Data"
        self._path = path
        self._spec = Model_pb2.Model()
        self._constants: dict[str, Any] = {}
        """Checkpoint's name -> the operation that makes the matrix."""

    def write(
        self, functions: Mapping[str, Function], default: str, metadata: Mapping[str, str], **facts: str
    ) -> None:
        """Write the package.

        Given   default: the function that runs where an app names none; facts: author, license, versionString and
                shortDescription
        """
        folder = self._data / _FOLDER
        folder.mkdir(parents=True)
        with BlobWriter(folder / "weight.bin") as blobs:
            for name, function in functions.items():
                self._add(name, function, blobs, alone=len(functions) == 1)
        description = self._spec.description
        if len(functions) > 1:
            description.defaultFunctionName = default
        for key, value in facts.items():
            setattr(description.metadata, key, value)
        names = {identifier(name): name for name in self._constants}
        for key, value in {**metadata, WEIGHTS: json.dumps(names, sort_keys=True)}.items():
            description.metadata.userDefined[key] = value
        (self._data / _MODEL).write_bytes(self._spec.SerializeToString(deterministic=True))
        self._write_manifest()

    def _add(self, name: str, function: Function, blobs: BlobWriter, *, alone: bool) -> None:
        spec = function.model.get_spec()
        self._spec.specificationVersion = spec.specificationVersion
        self._spec.mlProgram.version = spec.mlProgram.version
        program = spec.mlProgram.functions["main"]
        block = program.block_specializations[program.opset]
        inputs = {f"{WEIGHT}{index}": weight for index, weight in enumerate(function.names)}
        operations = list(block.operations)
        constants = WeightFile(Path(function.model.weights_dir) / "weight.bin")
        for operation in operations:
            _move_constants(operation, constants, blobs)
        del block.operations[:]
        block.operations.extend(self._constant(weight, blobs) for weight in inputs.values())
        block.operations.extend(_with_weights(_constants_first(operations), inputs))
        kept = [argument for argument in program.inputs if argument.name not in inputs]
        del program.inputs[:]
        program.inputs.extend(kept)
        self._describe(name, spec.description, inputs, alone=alone)
        self._spec.mlProgram.functions["main" if alone else name].CopyFrom(program)

    def _describe(self, name: str, source: Any, inputs: Mapping[str, str], *, alone: bool) -> None:
        """Describe a function by what it is called with, without the weights."""
        target = self._spec.description
        if not alone:
            target = target.functions.add()
            target.name = name
        target.input.extend(feature for feature in source.input if feature.name not in inputs)
        target.output.extend(source.output)
        target.state.extend(source.state)

    def _constant(self, name: str, blobs: BlobWriter) -> Any:
        if name not in self._constants:
            weight, dtype = self._checkpoint.weights[name], self._dtype
            grouped = self._spec.specificationVersion >= _IOS_18
            if isinstance(weight, Dense):
                made = _dense(name, weight, dtype, blobs)
            elif isinstance(weight, Palettized):
                made = (_tables if grouped else _table)(name, weight, dtype, blobs)
            else:
                made = (_blockwise if grouped else _affine)(name, weight, dtype, blobs)
            self._constants[name] = made
        return self._constants[name]

    def _write_manifest(self) -> None:
        items = {
            str(uuid.uuid5(uuid.NAMESPACE_URL, path)).upper(): {
                "author": _AUTHOR,
                "description": f"CoreML Model {kind}",
                "name": Path(path).name,
                "path": path,
            }
            for path, kind in ((_MODEL, "Specification"), (_FOLDER, "Weights"))
        }
        manifest = {
            "fileFormatVersion": "1.0.0",
            "itemInfoEntries": items,
            "rootModelIdentifier": next(iter(items)),
        }
        (self._path / MANIFEST).write_text(json.dumps(manifest, indent=4) + "\n", encoding="ascii")


def identifier(name: str) -> str:
    """Return the name of a weight as the program may spell it."""
    return re.sub(r"\W", "_", name)


def _dense(name: str, weight: Weight, dtype: str, blobs: BlobWriter) -> Any:
    """Return the operation that makes a matrix of floats, its data stored."""
    operation = _operation("const", name, dtype, weight)
    offset = blobs.tensor(dtype, weight.float32().to(_TORCH[dtype]))
    _set_file(operation.attributes["val"], offset, dtype, weight.shape)
    return operation


def _blockwise(name: str, weight: Quantized, dtype: str, blobs: BlobWriter) -> Any:
    """Return the operation that makes a matrix of codes and scales per group (iOS 18)."""
    operation = _operation("constexpr_blockwise_shift_scale", name, dtype, weight)
    packed, scales = weight.load()
    element = f"int{weight.bits}"
    offset = blobs.tensor(element, packed)
    _set_file(operation.inputs["data"].arguments.add().value, offset, element, weight.shape)
    # Exact: a scale is a bfloat16 value that float16 can hold.
    offset = blobs.tensor(dtype, scales.to(_TORCH[dtype]))
    _set_file(operation.inputs["scale"].arguments.add().value, offset, dtype, tuple(scales.shape))
    return operation


def _affine(name: str, weight: Quantized, dtype: str, blobs: BlobWriter) -> Any:
    """Return the operation that makes a matrix of int8 codes and a scale per row (iOS 16)."""
    operation = _operation("constexpr_affine_dequantize", name, dtype, weight)
    packed, scales = weight.load()
    assert scales.shape[1] == 1, "refused before"
    offset = blobs.tensor("int8", packed)
    _set_file(operation.attributes["quantized_data"], offset, "int8", weight.shape)
    offset = blobs.tensor(dtype, scales[:, 0].to(_TORCH[dtype]))
    _set_file(operation.attributes["scale"], offset, dtype, weight.shape[:1])
    zero, axis = operation.attributes["zero_point"], operation.attributes["axis"]
    _set_type(zero.type, "int8", ())
    zero.immediateValue.tensor.bytes.values = bytes(1)
    _set_type(axis.type, "int32", ())
    axis.immediateValue.tensor.ints.values.append(0)
    return operation


def _tables(name: str, weight: Palettized, dtype: str, blobs: BlobWriter) -> Any:
    """Return the operation that makes a matrix of indices and a table per group of rows (iOS 18)."""
    operation = _operation("constexpr_lut_to_dense", name, dtype, weight)
    packed, tables = weight.load()
    element = f"uint{weight.bits}"
    offset = blobs.tensor(element, packed)
    _set_file(operation.inputs["indices"].arguments.add().value, offset, element, weight.shape)
    offset = blobs.tensor(dtype, tables.to(_TORCH[dtype]))
    # One table for all columns; its entries are values, vectors of one element.
    shape = (tables.shape[0], 1, tables.shape[1], 1)
    _set_file(operation.inputs["lut"].arguments.add().value, offset, dtype, shape)
    return operation


def _table(name: str, weight: Palettized, dtype: str, blobs: BlobWriter) -> Any:
    """Return the operation that makes a matrix of indices into one table (iOS 16)."""
    operation = _operation("constexpr_lut_to_dense", name, dtype, weight)
    packed, tables = weight.load()
    assert tables.shape[0] == 1, "refused before"
    offset = blobs.tensor("uint8", packed)
    _set_file(operation.attributes["indices"], offset, "uint8", (packed.numel(),))
    offset = blobs.tensor(dtype, tables.to(_TORCH[dtype]))
    _set_file(operation.attributes["lut"], offset, dtype, (tables.shape[1],))
    shape = operation.attributes["shape"]
    _set_type(shape.type, "uint32", (2,))
    shape.immediateValue.tensor.bytes.values = struct.pack("<2I", *weight.shape)
    return operation


def _operation(kind: str, name: str, dtype: str, weight: Weight) -> Any:
    from coremltools.proto import MIL_pb2

    operation = MIL_pb2.Operation(type=kind)
    operation.attributes["name"].CopyFrom(_text(f"{identifier(name)}_op"))
    _set_type(operation.outputs.add(name=identifier(name)).type, dtype, weight.shape)
    return operation


def _constants_first(operations: Sequence[Any]) -> list[Any]:
    """Return the operations in an order in which every constant is there before anything could ask for it."""
    return sorted(operations, key=lambda operation: operation.type != "const")


def _with_weights(operations: Sequence[Any], inputs: Mapping[str, str]) -> list[Any]:
    """Return the operations with matrices by the names of their constants, and products with them as ``linear``."""
    result: list[Any] = []
    uses = _uses(operations)
    products: dict[str, Any] = {}
    for operation in operations:
        for argument in operation.inputs.values():
            for binding in argument.arguments:
                if binding.name in inputs:
                    binding.name = identifier(inputs[binding.name])
                    if operation.type == "matmul":
                        products[operation.outputs[0].name] = operation
        if operation.type == "matmul" and operation.outputs[0].name in products:
            _make_linear(operation)
        elif operation.type == "add" and (product := products.get(operation.inputs["x"].arguments[0].name)):
            bias = operation.inputs["y"].arguments[0].name
            if uses[product.outputs[0].name] == 1 and _is_vector(bias, operations):
                product.inputs["bias"].arguments.add(name=bias)
                product.outputs[0].CopyFrom(operation.outputs[0])
                continue
        result.append(operation)
    return result


def _make_linear(operation: Any) -> None:
    weight = operation.inputs["y"].arguments[0].name
    operation.type = "linear"
    for name in ("y", "transpose_x", "transpose_y"):
        del operation.inputs[name]
    operation.inputs["weight"].arguments.add(name=weight)


def _is_vector(name: str, operations: Sequence[Any]) -> bool:
    return any(
        operation.type == "const"
        and operation.outputs[0].name == name
        and operation.outputs[0].type.tensorType.rank == 1
        for operation in operations
    )


def _uses(operations: Sequence[Any]) -> dict[str, int]:
    uses: dict[str, int] = {}
    for operation in operations:
        for argument in operation.inputs.values():
            for binding in argument.arguments:
                uses[binding.name] = uses.get(binding.name, 0) + 1
    return uses


def _move_constants(operation: Any, source: WeightFile, blobs: BlobWriter) -> None:
    """Copy what an operation keeps in its converter's weight file to ours."""
    values = [*operation.attributes.values()]
    values += [binding.value for argument in operation.inputs.values() for binding in argument.arguments]
    for value in values:
        if value.WhichOneof("value") == "blobFileValue":
            tensor = value.type.tensorType
            shape = tuple(dimension.constant.size for dimension in tensor.dimensions)
            element = BY_CODE[tensor.dataType]
            data = source.packed(value.blobFileValue.offset, element, shape).data
            offset = blobs.small(element.name, data.numpy().tobytes())
            value.blobFileValue.fileName = _FILE
            value.blobFileValue.offset = offset


def _set_file(value: Any, offset: int, element: str, shape: Sequence[int]) -> None:
    _set_type(value.type, element, shape)
    value.blobFileValue.fileName = _FILE
    value.blobFileValue.offset = offset


def _set_type(type: Any, element: str, shape: Sequence[int]) -> None:
    type.tensorType.dataType = BY_NAME[element].code
    type.tensorType.rank = len(shape)
    for size in shape:
        type.tensorType.dimensions.add().constant.size = size


def _text(text: str) -> Any:
    from coremltools.proto import MIL_pb2

    value = MIL_pb2.Value()
    value.type.tensorType.dataType = MIL_pb2.STRING
    value.immediateValue.tensor.strings.values.append(text)
    return value
