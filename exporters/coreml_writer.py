"""Converted functions and a checkpoint -> an ``.mlpackage``, with every weight in its place.

A function arrives with its matrices as inputs. Here they become constants: codes and scales of the checkpoint as
``constexpr_blockwise_shift_scale``, indices and tables as ``constexpr_lut_to_dense``, bit for bit, or floats. All
functions name the same constants of one weight file.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slm_export.checkpoint import Checkpoint
from slm_export.exporters.coreml_blobs import BlobWriter
from slm_export.exporters.coreml_constants import FILE, constant, identifier
from slm_export.exporters.coreml_graph import WEIGHT, Function
from slm_export.exporters.coreml_metadata import WEIGHTS
from slm_export.exporters.mil.blob import BY_CODE, WeightFile
from slm_export.exporters.mil.package import MANIFEST

_AUTHOR = "com.apple.CoreML"
_MODEL, _FOLDER = f"{_AUTHOR}/model.mlmodel", f"{_AUTHOR}/weights"
_IOS_18 = 9
"""The version of the specification that has scales per group."""


class PackageWriter:
    """Writes one package of one or more functions."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, path: Path) -> None:
        from coremltools.proto import Model_pb2

        self._checkpoint = checkpoint
        self._dtype = dtype
        self._data = path / "Data"
        self._path = path
        self._spec = Model_pb2.Model()
        self._constants: dict[str, list[Any]] = {}
        """Checkpoint's name -> the operations that make the matrix."""

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
        for weight in inputs.values():
            block.operations.extend(self._constant(weight, blobs))
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

    def _constant(self, name: str, blobs: BlobWriter) -> list[Any]:
        if name not in self._constants:
            grouped = self._spec.specificationVersion >= _IOS_18
            self._constants[name] = constant(
                name, self._checkpoint.weights[name], self._dtype, blobs, grouped
            )
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
            value.blobFileValue.fileName = FILE
            value.blobFileValue.offset = offset
