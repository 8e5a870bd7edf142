"""The user's own ``slm-export.toml``: what ``slm-export --target android`` means in this folder.

Every key is optional, and an option on the command line overrides it. Relative paths are relative to
the folder of the file, so a CI job may start anywhere.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from slm_export.budget.budget import Budget, parse_bytes
from slm_export.errors import InputError
from slm_export.gates import Gates
from slm_export.profile import FormatName, RecipeStep, TargetName
from slm_export.reports.diff_limits import DiffLimits
from slm_export.tomlfile import read_model

FILE_NAME = "slm-export.toml"

Bits = Literal[4, 8, 16, 32]
EmbeddingBits = Literal[4, 6, 8, 16, 32]
"""6: in tables alone."""
GroupSize = Literal[32, 64, 128, 256]
Text = Annotated[str, Field(min_length=1)]


class RecipeSettings(BaseModel):
    """How a model is compressed, and what it is then held to; None where nothing is said."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    passes: tuple[RecipeStep, ...] | None = Field(default=None, min_length=1)
    """In place of the device profile's recipe, and in its form."""
    bits: Bits | None = None
    group_size: GroupSize | None = None
    embedding_bits: EmbeddingBits | None = None
    head_bits: EmbeddingBits | None = None
    palettize: Literal[4, 6] | None = None
    """Bits of tables for Core ML, in place of ``bits`` and ``group_size``."""
    context: int | None = Field(default=None, ge=1)
    eval_text: Path | None = None
    calibration: Path | None = None
    max_size: Text | None = None
    """As ``--max-size``: 600MB, 0.6GB, 572MiB."""
    max_memory: Text | None = None
    min_tokens_per_s: float | None = Field(default=None, gt=0)
    max_perplexity_ratio: float | None = Field(default=None, gt=1)
    min_cosine: float | None = Field(default=None, gt=0, lt=1)
    gates: Gates = Field(default_factory=lambda: Gates.model_validate({}))

    @field_validator("max_size", "max_memory")
    @classmethod
    def _a_size(cls, text: str | None) -> str | None:
        if text is not None:
            try:
                parse_bytes(text, "")
            except InputError as error:
                raise ValueError(str(error).removeprefix(": ")) from None
        return text

    @field_validator("eval_text", "calibration", mode="before")
    @classmethod
    def _text_is_a_path(cls, value: object) -> object:
        return as_path(value)

    def budget(self) -> Budget:
        """Return the limits that a recipe is searched for."""
        size, memory = (
            None if text is None else parse_bytes(text, FILE_NAME)
            for text in (self.max_size, self.max_memory)
        )
        return Budget(size, memory, self.min_tokens_per_s, self.max_perplexity_ratio, self.min_cosine)


class Settings(RecipeSettings):
    """What ``slm-export.toml`` says; None where it says nothing."""

    model: Text | None = None
    """A folder (absolute here), or the name of a model on the Hugging Face hub."""
    revision: Text | None = None
    target: TargetName | None = None
    device: Text | None = None
    """The name of a shipped profile, or a path ending in ``.toml`` (absolute here)."""
    formats: tuple[FormatName, ...] | None = Field(default=None, min_length=1)
    adapters: dict[Text, Path] | None = None
    """Low-rank adapters that stay apart: name -> peft's folder."""
    out: Path | None = None
    diff: DiffLimits = Field(default_factory=DiffLimits)
    """How far a bundle may be from an older one, for `slm-export diff`."""

    @field_validator("formats")
    @classmethod
    def _no_format_twice(cls, formats: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return each_once(formats)

    @field_validator("out", mode="before")
    @classmethod
    def _out_is_a_path(cls, value: object) -> object:
        return as_path(value)


def each_once(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Return names as they are; ValueError where one is there twice."""
    for index, name in enumerate(names or ()):
        if name in (names or ())[:index]:
            raise ValueError(f"'{name}' is listed twice")
    return names


def as_path(value: object) -> object:
    """Return text as a path; ValueError where it is empty."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        # Path("") is the current folder, which nobody means by it
        raise ValueError("an empty path")
    return Path(value.strip())


def load_settings(folder: Path) -> Settings | None:
    """Read ``slm-export.toml`` of exactly this folder (no parent is searched); None where there is none.

    Raises:
        InputError: the file is there, but wrong.
    """
    path = folder / FILE_NAME
    if not os.path.lexists(path):
        return None
    settings = read_model(path, Settings, label=FILE_NAME)
    return settings.model_copy(
        update={
            "model": None if settings.model is None else model_from(folder, settings.model),
            "device": None if settings.device is None else device_from(folder, settings.device),
            "eval_text": path_from(folder, settings.eval_text),
            "calibration": path_from(folder, settings.calibration),
            "adapters": settings.adapters and {n: path_from(folder, p) for n, p in settings.adapters.items()},
            "out": path_from(folder, settings.out),
        }
    )


def model_from(folder: Path, model: str) -> str:
    """Return what a file in ``folder`` calls a model: a path made absolute, or a name on the hub."""
    # "org/name" may be a folder or a hub name: it is a folder if one is there.
    looks_like_path = re.match(r"\.{1,2}(/|$)|/|~", model) is not None or Path(model).is_absolute()
    if looks_like_path or os.path.exists(folder / model):
        return str(path_from(folder, Path(model)))
    return model


def device_from(folder: Path, device: str) -> str:
    """Return what a file in ``folder`` calls a device: a path to a profile made absolute, or a name."""
    return str(path_from(folder, Path(device))) if device.endswith(".toml") else device


def path_from(folder: Path, path: Path | None) -> Path | None:
    """Return a path that a file in ``folder`` names, made absolute."""
    # abspath and not resolve(): links stay as the user named them
    return None if path is None else Path(os.path.abspath(folder / os.path.expanduser(path)))
