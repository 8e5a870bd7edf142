"""``slm-export.lock``: what a bundle was made of and what came out, so that the same can be asked for again.

Every bundle holds one. It names no path of a machine and no time, so the same export gives the same bytes.

    {"schema": 1,
     "inputs":    {"toolchain", "source", "device", "formats", "context"?, "recipe", "text", "verified", "gates",
                   "adapters"},
     "platform":  {"system", "machine", "vectors"?},
     "artifacts": {FORMAT: {path in the bundle: sha256}}}

The inputs are known before an export begins. That artifacts are the same to the byte is promised for one platform:
matrix products of other processors round otherwise, and a rounding may decide between two codes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from slm_export.bundles.checksums import PortablePath, Sha256
from slm_export.errors import InputError, suggestion
from slm_export.gates import Gates
from slm_export.tomlfile import dotted

LOCK = "slm-export.lock"
SCHEMA = 1
_MAX_BYTES = 4 << 20
_TOOLS, _PASSES = "toolchain.", "recipe"
_NAMES = {
    "source.sha256": "the model's files",
    "source.revision": "the model's revision",
    "source.licences": "the model's licence",
    "device.sha256": "the device profile",
    "text.evaluation": "the evaluation text",
    "text.calibration": "the calibration text",
    "verified": "whether fidelity is verified",
}


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Source(_Entry):
    """The model: the hash that the manifest has, and the revision that was asked for.

    ``licences`` is of the licence's name and texts, which go into the bundle; None of a model without.
    """

    sha256: Sha256
    revision: str | None = None
    licences: Sha256 | None = None


class Device(_Entry):
    """The device profile; ``sha256`` is of all that it says."""

    target: str
    name: str
    sha256: Sha256


class Text(_Entry):
    """Hashes of the files that were given; None where none was: then it is the shipped sample, or the model's own."""

    evaluation: Sha256 | None = None
    calibration: Sha256 | None = None


class Inputs(_Entry):
    """What an export follows from."""

    toolchain: dict[str, str]
    source: Source
    device: Device
    formats: tuple[str, ...]
    context: int | None = None
    recipe: tuple[dict[str, Any], ...]
    text: Text
    verified: bool
    gates: Gates
    """Those of the device profile and the user; the built-in ones follow from the recipe."""
    adapters: dict[str, Sha256] = Field(default_factory=dict)
    """Those that stay apart, by name: of configuration and weights."""


class Platform(_Entry):
    """Where the artifacts were made."""

    system: str
    machine: str
    vectors: str | None = None
    """The instructions that torch computes with: AVX2, AVX512, ..."""

    def __str__(self) -> str:
        return " ".join(part for part in (self.system, self.machine, self.vectors) if part)


class Lock(_Entry):
    """Schema 1. Key order is the order of these fields."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    inputs: Inputs
    platform: Platform
    artifacts: dict[str, dict[PortablePath, Sha256]]


def write_lock(folder: Path, lock: Lock) -> Path:
    """Write ``slm-export.lock`` into a bundle."""
    data = lock.model_dump(mode="json", by_alias=True, exclude_none=True)
    path = folder / LOCK
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def read_lock(path: Path) -> Lock:
    """Read a lock file.

    Raises:
        InputError: there is none, or it is not one that this version fully understands.
    """
    if path.is_dir():
        raise InputError(
            f"{path}: a folder, where --locked takes a lock file; put MODEL before --locked, or give {path / LOCK}"
        )
    if path.exists() and not path.is_file():  # a pipe would block
        raise InputError(f"{path}: not a regular file; {accept(path)}")
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; {accept(path)}") from None
    try:
        data = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}; {accept(path)}") from None
    version = data.get("schema") if isinstance(data, dict) else None
    if type(version) is not int or version != SCHEMA:
        raise InputError(
            f"{path}: lock schema {version!r} is not one that this slm-export reads (it reads {SCHEMA}); {accept(path)}"
        )
    try:
        return Lock.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{path}: {_problem(error)}; {accept(path)}") from None


def accept(path: Path) -> str:
    """Say how what is made now becomes what is locked."""
    return f"export without --locked, and copy {LOCK} of the bundle to {path}"


def _problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    where = dotted(first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key '{where}'{suggestion(str(first['loc'][-1]), _keys_beside(first['loc']))}"
    return f"{where}: {first['msg']}"


def _keys_beside(location: tuple[int | str, ...]) -> list[str]:
    """Return the keys that the table of a location may have."""
    model: type[BaseModel] = Lock
    for part in location[:-1]:
        found = model.model_fields.get(str(part))
        if found is None or not isinstance(found.annotation, type):
            break
        model = found.annotation
    return [field.alias or name for name, field in model.model_fields.items()]


def differences(locked: Inputs, now: Inputs) -> tuple[str, ...]:
    """Return a line for everything in which two sets of inputs are not the same."""
    before, after = (_flat(one.model_dump(mode="json", exclude_none=True)) for one in (locked, now))
    differing = [name for name in dict.fromkeys((*before, *after)) if before.get(name) != after.get(name)]
    if _PASSES in differing:  # options of other passes say nothing more
        differing = [name for name in differing if not name.startswith(f"{_PASSES}[")]
    return tuple(_difference(name, before.get(name), after.get(name)) for name in differing)


def _flat(values: dict[str, Any]) -> dict[str, str]:
    """Return dotted name -> how the value reads."""
    flat = dict(_leaves(values, ""))
    flat["formats"] = ", ".join(values["formats"])
    flat[_PASSES] = ", ".join(str(step.get("pass")) for step in values["recipe"])
    return flat


def _leaves(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{where}.{key}" if where else key)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{where}[{index}]")
    else:
        yield where, value if isinstance(value, str) else json.dumps(value)


def _difference(name: str, before: str | None, after: str | None) -> str:
    if name.startswith(_TOOLS):
        return f"{name.removeprefix(_TOOLS)}: locked {before or 'none'}, installed {after or 'none'}"
    if name in _NAMES and name != "source.revision":
        before, after = (text and text[:12] for text in (before, after))
    return f"{_NAMES.get(name, name)}: locked {before or 'none'}, now {after or 'none'}"
