"""Device profiles: what a device is, what it can hold, and how a model is compiled for it.

A profile is a TOML file. Every figure in it names its public source; what is not publicly known is
absent (None here) and never invented. ``docs/devices.md`` has the table of keys.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_serializer,
    model_validator,
)

from slm_export.errors import InputError, suggestion
from slm_export.gates import Gates
from slm_export.tomlfile import parse_model, read_model

TargetName = Literal["android", "ios", "linux", "host"]
FormatName = Literal["executorch", "litert", "coreml", "onnx"]
Feature = Literal[
    "neon",
    "fp16",
    "dotprod",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
    "sme",
    "sme2",
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
]

TARGETS: tuple[str, ...] = get_args(TargetName)
FORMATS: tuple[str, ...] = get_args(FormatName)

_DEFAULTS = {
    "android": "android-8gb",
    "ios": "iphone-15-pro",
    "linux": "raspberry-pi-5",
    "host": "host",
}
_PACKAGE = "slm_export.device_profiles"


def _slug(text: str) -> str:
    if re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", text) is None:
        raise ValueError(f"'{text}' must be lower-case letters and digits, joined by single hyphens")
    return text


Slug = Annotated[str, AfterValidator(_slug)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)


class Figure(_Frozen):
    """A number and where it is published."""

    value: float = Field(gt=0)
    source: str = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _no_bare_number(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            raise ValueError(f'a figure names its source: {{ value = {value}, source = "..." }}')
        return value


class Cluster(_Frozen):
    """Cores of one kind. ``ghz`` is the highest clock; None where it is not published."""

    core: str = Field(min_length=1)
    count: int = Field(ge=1)
    ghz: float | None = Field(default=None, gt=0)

    def __str__(self) -> str:
        """Return e.g. ``4 x Cortex-A76 at 2.4 GHz``."""
        return f"{self.count} x {self.core}" + (f" at {self.ghz:g} GHz" if self.ghz is not None else "")


class Cores(_Frozen):
    """The kinds of cores, fastest first."""

    clusters: tuple[Cluster, ...] = Field(min_length=1)
    source: str = Field(min_length=1)

    @property
    def count(self) -> int:
        """Number of cores."""
        return sum(cluster.count for cluster in self.clusters)


class InstructionSets(_Frozen):
    """Optional instruction sets that every core has and that an app may use."""

    features: tuple[Feature, ...] = Field(min_length=1)
    source: str = Field(min_length=1)


class Cpu(_Frozen):
    """What is known of the processor."""

    cores: Cores | None = None
    isa: InstructionSets | None = None


class Memory(_Frozen):
    """Memory as it is sold: 1 GB of capacity is 2^30 bytes, 1 GB/s of bandwidth is 10^9 bytes/s."""

    total_gb: Figure
    app_limit_gb: Figure | None = None
    bandwidth_gb_s: Figure | None = None

    @property
    def total_bytes(self) -> int:
        """All memory of the device, in bytes."""
        return round(self.total_gb.value * 2**30)

    @property
    def app_limit_bytes(self) -> int | None:
        """What one app may use, in bytes; None where no such limit is published."""
        return None if self.app_limit_gb is None else round(self.app_limit_gb.value * 2**30)


class Limits(_Frozen):
    """What the store accepts. 1 GB is 10^9 bytes here, the stricter of the two readings."""

    pack_gb: Figure | None = None
    """Largest single pack that the store delivers beside the app."""
    app_gb: Figure | None = None
    """Largest app with everything that is delivered with it."""


class CoreML(_Frozen):
    """How a Core ML package is written."""

    ios: Literal[17, 18] = 18
    """The oldest system that opens it: iOS 17 with macOS 14, or iOS 18 with macOS 15. Decoders and int4 need 18."""
    query_lengths: Literal["dynamic"] | tuple[Annotated[int, Field(ge=1)], ...] = "dynamic"
    """Tokens that one call of a decoder takes: any number, or one of these. The Neural Engine wants fixed ones."""

    @field_validator("query_lengths")
    @classmethod
    def _ascending(cls, lengths: Any) -> Any:
        if lengths != "dynamic" and (not lengths or list(lengths) != sorted(set(lengths))):
            raise ValueError('give "dynamic", or lengths in ascending order, each once, such as [1, 64]')
        return lengths


class RecipeStep(_Frozen):
    """One pass of a recipe; the pass itself validates its options."""

    pass_name: Slug = Field(alias="pass")
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, table: Any) -> Any:
        if not isinstance(table, dict):
            return table
        options = {key: value for key, value in table.items() if key != "pass"}
        # without a pass the options mean nothing, and only its absence should be reported
        return {"pass": table["pass"], "options": options} if "pass" in table else {}

    @model_serializer
    def _flat(self) -> dict[str, Any]:
        return {"pass": self.pass_name, **self.options}


class DeviceProfile(_Frozen):
    """A device, or a class of devices, to compile for."""

    schema_version: Literal[1] = Field(alias="schema")
    name: Slug
    title: str = Field(min_length=1)
    target: TargetName
    formats: tuple[FormatName, ...] = Field(min_length=1)
    soc: str | None = Field(default=None, min_length=1)
    context: int | None = Field(default=None, ge=1)
    cpu: Cpu | None = None
    memory: Memory | None = None
    limits: Limits = Limits()
    coreml: CoreML = CoreML()
    gates: Gates = Field(default_factory=lambda: Gates.model_validate({}))
    recipe: tuple[RecipeStep, ...] = ()

    @field_validator("formats")
    @classmethod
    def _no_format_twice(cls, formats: tuple[str, ...]) -> tuple[str, ...]:
        for index, name in enumerate(formats):
            if name in formats[:index]:
                raise ValueError(f"'{name}' is listed twice")
        return formats

    @property
    def default_format(self) -> str:
        """The format that is exported when none is asked for."""
        return self.formats[0]

    def figures(self) -> Iterator[tuple[str, str, str]]:
        """Yield (dotted key, value with unit, source) of everything here that has a source."""
        cpu = self.cpu or Cpu()
        if cpu.cores is not None:
            yield "cpu.cores", ", ".join(map(str, cpu.cores.clusters)), cpu.cores.source
        if cpu.isa is not None:
            yield "cpu.isa", ", ".join(cpu.isa.features), cpu.isa.source
        for table, group in (("memory", self.memory), ("limits", self.limits)):
            for key in type(group).model_fields if group is not None else ():
                figure = getattr(group, key)
                if figure is not None:
                    unit = "GB/s" if key.endswith("_gb_s") else "GB"
                    yield f"{table}.{key}", f"{figure.value:g} {unit}", figure.source


def load_profile(name_or_path: str) -> DeviceProfile:
    """Load a shipped profile by its name, or a profile file by its path (ending in ``.toml``).

    Raises:
        InputError: there is no such profile, or the file is wrong.
    """
    if name_or_path.endswith(".toml"):
        return _load_file(name_or_path)
    if (profile := _shipped().get(name_or_path)) is not None:
        return profile
    hint = _nearest(name_or_path) or f"; shipped: {', '.join(_shipped())}, or give the path of a .toml file"
    raise InputError(f"unknown device '{name_or_path}'{hint}")


def shipped_profiles() -> tuple[DeviceProfile, ...]:
    """Return every shipped profile, ordered by name (numbers by value: 4gb before 12gb)."""
    return tuple(_shipped().values())


def default_profile(target: str) -> DeviceProfile:
    """Return the profile that ``target`` compiles for when no device is named.

    Raises:
        InputError: the target is unknown, or nothing is shipped for it.
    """
    if target not in TARGETS:
        raise InputError(f"unknown target '{target}'{suggestion(target, TARGETS)}")
    if target not in _DEFAULTS:
        raise InputError(
            f"no device profile is shipped for target '{target}'; "
            "write one (docs/devices.md tells how) and give it with --device FILE.toml"
        )
    return _shipped()[_DEFAULTS[target]]


def _load_file(text: str) -> DeviceProfile:
    path = Path(os.path.expanduser(text))
    stem = text.removesuffix(".toml")
    if stem in _shipped() and not os.path.exists(path):
        raise InputError(f"{text}: no such file; the shipped profile is named '{stem}', without .toml")
    return read_model(path, DeviceProfile, label=text)


def _nearest(name: str) -> str:
    # People write "Pixel 8" or "pixel_8"; compare in the spelling of the names.
    slug = re.sub(r"[\s_]+", "-", name.strip().lower())
    near = difflib.get_close_matches(slug, _shipped(), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


@lru_cache(maxsize=1)
def _shipped() -> dict[str, DeviceProfile]:
    files = [file for file in resources.files(_PACKAGE).iterdir() if file.name.endswith(".toml")]
    profiles = [parse_model(file.read_text("utf-8"), DeviceProfile, file.name) for file in files]
    return {profile.name: profile for profile in sorted(profiles, key=_natural)}


def _natural(profile: DeviceProfile) -> list[tuple[int, str]]:
    parts = re.findall(r"\d+|\D+", profile.name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
