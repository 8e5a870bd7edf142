"""``manifest.json``: what a bundle is, in a stable schema that other programs read.

    write_manifest  Manifest -> folder, in one step
    read_manifest   folder -> Manifest, and refuses what it does not fully understand

The manifest lists every file of the bundle but itself. `build.build_manifest` makes it from a report.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import from_json

from slm_export.bundles.checksums import FileEntry, PortablePath, Sha256, sha256_entries
from slm_export.errors import InputError
from slm_export.gates import Gates

SCHEMA = 1
MANIFEST = "manifest.json"
_MAX_BYTES = 16 << 20

Figure = float | int | str | dict[str, float] | None


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class ModelEntry(_Entry):
    """The source model."""

    name: str
    architecture: str
    task: str
    parameters: int = Field(ge=0)
    source_sha256: Sha256
    source_bytes: int = Field(ge=0)
    licence: str | None = None
    context: int | None = None
    learned: dict[str, Any] | None = None
    """How slm-export taught it: teacher and child on the same held-out text, settings, licence of the text."""
    adapter: dict[str, Any] | None = None
    """Where the model is a base with an adapter merged in: names of both, kind, rank, hash of the adapter."""


class CalibrationEntry(_Entry):
    """The text of calibrated passes; ``sha256`` is of its token ids."""

    origin: str
    tokens: int
    sha256: Sha256


class SignatureEntry(_Entry):
    """One callable method of an artifact."""

    name: str
    inputs: dict[str, str]
    outputs: dict[str, str]


class ArtifactEntry(_Entry):
    """One artifact: a file, or a package folder whose ``sha256`` is that of its tree."""

    format: str
    path: PortablePath
    bytes: int = Field(ge=0)
    sha256: Sha256
    bits_per_weight: float | None
    signatures: tuple[SignatureEntry, ...] = ()
    data: tuple[PortablePath, ...] = ()
    """Files that belong to it, counted in ``bytes``; ``sha256`` is of ``path`` alone."""


class AdapterEntry(_Entry):
    """A low-rank adapter that can be turned on while an artifact runs."""

    name: str
    format: str
    path: PortablePath
    bytes: int = Field(ge=0)
    sha256: Sha256
    base_sha256: Sha256
    """Of the artifact that it was made and judged for; another refuses it."""
    source_sha256: Sha256
    """Of the adapter as peft saved it: configuration and weights."""
    rank: int = Field(ge=1)
    parameters: int = Field(ge=0)
    targets: tuple[str, ...]
    quality: dict[str, Figure] | None
    """With the adapter on, against the source with it on."""


class _Runtime(BaseModel):
    """The types of what is known of `Manifest.runtime`; other keys may be there."""

    model_config = ConfigDict(extra="allow", strict=True)

    task: str | None = None
    context: int | None = Field(default=None, ge=1, lt=1 << 31)
    bos_id: int | None = None
    adds_bos: bool = False
    stop_ids: list[int] = []
    tokenizer: dict[str, str] | None = None
    labels: list[str] = []
    vocabulary: int | None = None
    threshold: float = 0.5
    source: str | None = None


class Manifest(_Entry):
    """Schema 1. Key order is the order of these fields."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    model: ModelEntry
    target: str
    device: str
    recipe: tuple[dict[str, Any], ...]
    calibration: CalibrationEntry | None = None
    """What calibrated passes measured activations on."""
    artifacts: tuple[ArtifactEntry, ...]
    adapters: tuple[AdapterEntry, ...] = ()
    files: tuple[FileEntry, ...]
    quality: dict[str, dict[str, Figure] | None]
    latency: dict[str, dict[str, Figure] | None]
    parity: tuple[dict[str, Any], ...] = ()
    """Every pair of formats beside each other."""
    gates: Gates
    """The thresholds in force, so that the judgement can be repeated."""
    runtime: dict[str, Any] = Field(default_factory=dict)
    """What running the model needs: task, context, bos_id, stop_ids, max_tokens and the like."""
    toolchain: dict[str, str]

    @field_validator("runtime")
    @classmethod
    def _of_known_types(cls, runtime: dict[str, Any]) -> dict[str, Any]:
        _Runtime.model_validate(runtime)
        return runtime

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if not self.artifacts:
            raise ValueError("no artifact is listed")
        paths = [entry.path for entry in self.files]
        if len(set(paths)) != len(paths):
            raise ValueError("the list of files names one path twice")
        if MANIFEST in paths:
            raise ValueError("the list of files names the manifest itself")
        for artifact in self.artifacts:
            if not entries_of(artifact, self.files):
                raise ValueError(f"artifact {artifact.path!r} is not in the list of files")
        self._refuse_odd_adapters()
        return self

    def _refuse_odd_adapters(self) -> None:
        bases = {artifact.format: artifact.sha256 for artifact in self.artifacts}
        hashes = {entry.path: entry.sha256 for entry in self.files}
        named = [(each.name, each.format) for each in self.adapters]
        if len(set(named)) != len(named):
            raise ValueError("two adapters of one format have one name")
        for each in self.adapters:
            if hashes.get(each.path) != each.sha256:
                raise ValueError(f"adapter {each.path!r} is not in the list of files, or with another sha256")
            if bases.get(each.format) != each.base_sha256:
                raise ValueError(
                    f"adapter {each.name!r} was made for another {each.format} artifact than that of the bundle"
                )

    def artifact(self, format: str) -> ArtifactEntry:
        """Return the artifact of one format; InputError when the bundle has none."""
        for entry in self.artifacts:
            if entry.format == format:
                return entry
        known = ", ".join(entry.format for entry in self.artifacts)
        raise InputError(f"the bundle has no {format} artifact; it has: {known}")


def to_text(manifest: Manifest) -> str:
    """Return the text of ``manifest.json``: the same bytes for the same manifest."""
    data = manifest.model_dump(mode="json", by_alias=True)
    data["gates"] = manifest.gates.model_dump(mode="json", exclude_none=True)
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Write ``folder/manifest.json`` in one step: a reader sees the old one or the new one."""
    path, partial = folder / MANIFEST, folder / f".{MANIFEST}.partial"
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            file.write(to_text(manifest))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``folder/manifest.json``; InputError for anything that is not a bundle of ours."""
    path = folder / MANIFEST
    data = read_raw(path)
    version = data.get("schema")
    if type(version) is not int or version != SCHEMA:
        raise InputError(
            f"{path}: manifest schema {version!r} is not one that this slm-export reads (it reads {SCHEMA}); "
            "upgrade slm-export or export the model again"
        )
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise InputError(f"{path}: {where}: {first['msg']}; export the model again") from None
    for listed in manifest.files:
        _refuse_links(folder, listed.path)
    return manifest


def read_raw(path: Path) -> dict[str, Any]:
    """Read a manifest of any schema version; InputError unless it is a JSON object in a plain file."""
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path}: not a plain file; give the folder that slm-export wrote")
        if found.st_size > _MAX_BYTES:
            raise InputError(
                f"{path}: {found.st_size:,} bytes are too many for a manifest; export the model again"
            )
        data = from_json(path.read_bytes(), allow_inf_nan=False)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give the folder that slm-export wrote") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}; export the model again") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: not a manifest; export the model again")
    return data


def _refuse_links(folder: Path, path: str) -> None:
    """A link could make us hash, run or ship a file from anywhere on the machine."""
    place = folder
    for part in path.split("/"):
        place = place / part
        if place.is_symlink():
            raise InputError(f"{place}: a symbolic link, which a bundle may not hold; export the model again")


def entries_of(artifact: ArtifactEntry, files: Sequence[FileEntry]) -> list[FileEntry]:
    """Return the listed files that an artifact consists of: itself and its data, or those of its folder."""
    below = artifact.path + "/"
    own = (artifact.path, *artifact.data)
    return [entry for entry in files if entry.path in own or entry.path.startswith(below)]


def total_of(artifact: ArtifactEntry, entries: Sequence[FileEntry]) -> tuple[int, str]:
    """Return bytes and hash of an artifact as its listed files give them."""
    alone = {entry.path: entry for entry in entries}.get(artifact.path)
    if alone is not None:
        return sum(entry.bytes for entry in entries), alone.sha256
    start = len(artifact.path) + 1
    inside = [entry.model_copy(update={"path": entry.path[start:]}) for entry in entries]
    return sum(entry.bytes for entry in entries), sha256_entries(inside)
