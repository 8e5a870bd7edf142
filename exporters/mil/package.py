"""A saved Core ML package (.mlpackage with an ML Program), read from disk alone.

Manifest.json names the specification (model.mlmodel, protobuf), the specification names its weight files. Everything
in them is checked before it is believed: `Package.open` raises `InputError` for a package that is not whole.
Of coremltools only the generated protobuf classes are used. Sources: mlmodel/format/Model.proto, FeatureTypes.proto
and MIL.proto of apple/coremltools.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from slm_export.errors import InputError, needs
from slm_export.exporters.mil.blob import Packed, WeightFile
from slm_export.exporters.mil.program import Operation, ProgramReader, TensorType, Value

MANIFEST = "Manifest.json"
_MODEL_PATH = "@model_path"
_ARRAY_TYPES = {
    65568: torch.float32,
    65600: torch.float64,
    131104: torch.int32,
    131080: torch.int8,
    65552: torch.float16,
}


@dataclass(frozen=True)
class Feature:
    """An input, output or state of a function, as the model description declares it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Required or default shape; empty for an output of flexible shape."""
    ranges: tuple[tuple[int, int | None], ...] | None = None
    """Least and greatest size of each dimension (None: any), where the shape is flexible."""
    enumerated: tuple[tuple[int, ...], ...] = ()
    """All shapes that are allowed, where they are listed."""
    optional: bool = False
    default: float | int | None = None
    """What fills an optional input that is not given."""

    def accepts(self, shape: Sequence[int]) -> bool:
        """Return whether a tensor of this shape may be given."""
        if self.enumerated:
            return tuple(shape) in self.enumerated
        if self.ranges is None:
            return tuple(shape) == self.shape
        return len(shape) == len(self.ranges) and all(
            least <= size and (most is None or size <= most)
            for size, (least, most) in zip(shape, self.ranges, strict=True)
        )

    @property
    def expected(self) -> str:
        """The shapes that are allowed, in words."""
        if self.enumerated:
            return " or ".join(str(list(shape)) for shape in self.enumerated)
        if self.ranges is None:
            return str(list(self.shape))
        sizes = (
            str(low) if low == high else f"{low}..{'' if high is None else high}" for low, high in self.ranges
        )
        return f"[{', '.join(sizes)}]"


@dataclass(frozen=True)
class Function:
    """One function of the program: what goes in and out, and its operations, in order."""

    name: str
    opset: int
    """The iOS release whose operators it is written in: 15 to 18, 26."""
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    states: tuple[Feature, ...]
    arguments: Mapping[str, TensorType]
    """Inputs and states as the program types them."""
    operations: tuple[Operation, ...]
    results: tuple[str, ...]
    """Names of the values that it returns."""


@dataclass(frozen=True, eq=False)
class Package:
    """A package on disk; its constants stay there until they are asked for."""

    path: Path
    functions: Mapping[str, Function]
    default: str
    """The function that runs when none is named."""
    metadata: Mapping[str, str]
    """User-defined entries, and shortDescription, versionString, author and license where they are given."""
    minimum: int
    """Specification version: 6 is iOS 15, 7 iOS 16, 8 iOS 17, 9 iOS 18."""

    @classmethod
    def open(cls, path: Path) -> Package:
        """Read and check the specification, map the weights.

        Raises
        ------
        InputError            the package is not whole, not an ML Program, or says what cannot be
        MissingComponentError coremltools is not installed
        """
        file = _specification_file(path)
        spec = _specification(file)
        if spec.WhichOneof("Type") != "mlProgram":
            raise InputError(
                f"{path}: holds a {spec.WhichOneof('Type') or 'model of unknown kind'}, not an ML Program"
            )
        reader = ProgramReader(_Weights(path, file.parent).read)
        description = spec.description
        described = {function.name: function for function in description.functions}
        default = description.defaultFunctionName
        if not described:
            default = (
                "main" if "main" in spec.mlProgram.functions else next(iter(spec.mlProgram.functions), "")
            )
            described = {default: description}
        if set(described) != set(spec.mlProgram.functions) or default not in described:
            raise InputError(
                f"{path}: describes the functions {sorted(described)} (default '{default}'), "
                f"its program has {sorted(spec.mlProgram.functions)}"
            )
        functions = {
            name: _function(f"{path}: function '{name}'", name, described[name], function, reader)
            for name, function in sorted(spec.mlProgram.functions.items())
        }
        return cls(path, functions, default, _metadata(description.metadata), spec.specificationVersion)

    def tensor(self, value: Value) -> Tensor | str:
        """Return a constant: a view of the file, a copy where elements are narrower than a byte; text as it is."""
        return value.tensor() if isinstance(value, Packed) else value

    @cached_property
    def prepared(self) -> dict[Any, Any]:
        """What evaluators of this package share: matrices ready for use, by the constants they come from."""
        return {}


class _Weights:
    """Finds the files that a specification names, each mapped once, each constant made once."""

    def __init__(self, package: Path, model: Path) -> None:
        self._package, self._model = package.resolve(), model.resolve()
        self._files: dict[str, WeightFile] = {}
        self._constants: dict[Any, Packed] = {}

    def read(self, name: str, offset: int, type: TensorType) -> Packed:
        shape = type.fixed
        key = (name, offset, type.element, shape)
        if key not in self._constants:
            if name not in self._files:
                self._files[name] = WeightFile(self._locate(name))
            self._constants[key] = self._files[name].packed(offset, type.element, shape)
        return self._constants[key]

    def _locate(self, name: str) -> Path:
        parts = PurePosixPath(name).parts
        try:
            path = self._model.joinpath(*parts[1:]).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # a zero byte, links that lead to each other
            raise InputError(f"{self._package}: weight file {name!r}: {error}") from error
        if parts[:1] != (_MODEL_PATH,) or not path.is_relative_to(self._package):
            raise InputError(f"{self._package}: weight file '{name}' is not in the package")
        if not path.is_file():
            raise InputError(f"{self._package}: weight file '{name}' is missing; export it again")
        return path


def _specification_file(path: Path) -> Path:
    manifest = path / MANIFEST
    if manifest.exists() and not manifest.is_file():  # a pipe would block, a device never end
        raise InputError(f"{manifest}: cannot be read: not a regular file; is it an .mlpackage?")
    try:
        entries = json.loads(manifest.read_bytes())
        name = entries["itemInfoEntries"][entries["rootModelIdentifier"]]["path"]
        file = Path(path, "Data", name).resolve()
    except OSError as error:
        raise InputError(
            f"{manifest}: cannot be read: {error.strerror or error}; is it an .mlpackage?"
        ) from error
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{manifest}: names no root model ({type(error).__name__}: {error})") from error
    if not file.is_relative_to(path.resolve()) or not file.is_file():
        raise InputError(f"{manifest}: its root model '{name}' is not in the package; export it again")
    return file


def _specification(file: Path) -> Any:
    with needs("coreml", "coremltools"):
        from coremltools.proto import Model_pb2
    from google.protobuf.message import DecodeError

    spec = Model_pb2.Model()
    try:
        spec.ParseFromString(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from error
    except DecodeError as error:
        raise InputError(f"{file}: is not a Core ML specification ({error}); export it again") from error
    return spec


def _metadata(metadata: Any) -> dict[str, str]:
    standard = {
        key: getattr(metadata, key) for key in ("shortDescription", "versionString", "author", "license")
    }
    return {**{key: text for key, text in standard.items() if text}, **dict(metadata.userDefined)}


def _function(where: str, name: str, described: Any, function: Any, reader: ProgramReader) -> Function:
    opset, arguments, operations, results = reader.function(where, function)
    inputs, outputs, states = (
        tuple(_feature(where, feature) for feature in features)
        for features in (described.input, described.output, described.state)
    )
    given = {feature.name: feature for feature in (*inputs, *states)}
    if set(given) != set(arguments):
        raise InputError(f"{where}: describes {sorted(given)}, its program takes {sorted(arguments)}")
    for feature in given.values():
        typed = arguments[feature.name]
        if typed.element.dtype != feature.dtype or not typed.accepts(feature.shape):
            raise InputError(
                f"{where}: '{feature.name}' is described as {feature.dtype} {list(feature.shape)}, typed as {typed}"
            )
    missing = sorted({feature.name for feature in outputs} - set(results))
    if missing:
        raise InputError(f"{where}: describes outputs that its program does not return: {', '.join(missing)}")
    return Function(name, opset, inputs, outputs, states, arguments, operations, results)


def _feature(where: str, feature: Any) -> Feature:
    kind = feature.type.WhichOneof("Type")
    if kind not in ("multiArrayType", "stateType"):
        raise InputError(f"{where}: '{feature.name}' is a {kind}; only arrays and states can be evaluated")
    array = feature.type.multiArrayType if kind == "multiArrayType" else feature.type.stateType.arrayType
    if array.dataType not in _ARRAY_TYPES:
        raise InputError(f"{where}: '{feature.name}' has elements of unknown type {array.dataType}")
    shape = tuple(array.shape)
    ranges: tuple[tuple[int, int | None], ...] | None = None
    enumerated: tuple[tuple[int, ...], ...] = ()
    flexible = array.WhichOneof("ShapeFlexibility")
    if flexible == "shapeRange":
        sizes = array.shapeRange.sizeRanges
        ranges = tuple((size.lowerBound, None if size.upperBound < 0 else size.upperBound) for size in sizes)
        shape = shape or tuple(low for low, _ in ranges)
    elif flexible == "enumeratedShapes":
        enumerated = tuple(tuple(choice.shape) for choice in array.enumeratedShapes.shapes)
        shape = shape or (enumerated[0] if enumerated else ())
    default = array.WhichOneof("defaultOptionalValue")
    made = Feature(
        feature.name,
        _ARRAY_TYPES[array.dataType],
        shape,
        ranges,
        enumerated,
        feature.type.isOptional,
        getattr(array, default) if default else None,
    )
    if any(size < 0 for size in shape) or not made.accepts(shape):
        raise InputError(
            f"{where}: '{feature.name}' has the default shape {list(shape)}, not {made.expected}"
        )
    return made
