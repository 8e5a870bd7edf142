"""``matrix.toml``: which models, devices, formats and recipes are exported with each other.

    models  = ["pycode-5m", "org/name@v2"]
    devices = ["android-8gb", "raspberry-pi-5"]
    formats = ["executorch", "onnx"]

    [recipes.int4]
    bits = 4

Relative paths are relative to the folder of the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from slm_export.errors import InputError
from slm_export.gates import SPEED, Gates
from slm_export.profile import FormatName, Slug
from slm_export.settings import (
    RecipeSettings,
    Text,
    as_path,
    device_from,
    each_once,
    model_from,
    path_from,
)
from slm_export.tomlfile import read_model

OWN_RECIPE = "profile"
"""How the recipe of the device profile is called, where the file has no recipes."""
AXES = ("model", "recipe", "device", "format")

Names = Annotated[tuple[Text, ...], Field(min_length=1)]


class Exclusion(BaseModel):
    """Combinations to leave out: those with all that is named here."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    model: Text | None = None
    recipe: Text | None = None
    device: Text | None = None
    format: Text | None = None

    @model_validator(mode="after")
    def _names_something(self) -> Exclusion:
        if not self.model_fields_set:
            raise ValueError(
                "names nothing, and would leave out everything; give model, recipe, device or format"
            )
        return self


class Matrix(BaseModel):
    """What ``matrix.toml`` says; paths are absolute here."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    models: Names
    """Folders, or names on the hub: ``org/name``, or ``org/name@revision``."""
    devices: Names
    """Names of shipped profiles, or paths ending in ``.toml``."""
    formats: Annotated[tuple[FormatName, ...], Field(min_length=1)] | None = None
    """By default the first format of each device."""
    recipes: dict[Slug, RecipeSettings] = Field(
        default_factory=lambda: {OWN_RECIPE: RecipeSettings()}, min_length=1
    )
    gates: Gates = Field(default_factory=lambda: Gates.model_validate({}))
    """Of every cell; those of a recipe go before them."""
    exclude: tuple[Exclusion, ...] = ()
    eval_text: Path | None = None
    calibration: Path | None = None
    verify: bool = True
    bench: bool = False
    """Whether speed is measured. Then one cell is made at a time, because others would slow it down."""
    out: Path = Path("matrix")

    @field_validator("models", "devices", "formats")
    @classmethod
    def _none_twice(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return each_once(names)

    @field_validator("eval_text", "calibration", "out", mode="before")
    @classmethod
    def _text_is_a_path(cls, value: object) -> object:
        return as_path(value)

    @model_validator(mode="after")
    def _gates_can_be_judged(self) -> Matrix:
        for name, gates in {
            "": self.gates,
            **{f"recipes.{k}.": one.gates for k, one in self.recipes.items()},
        }.items():
            timed = [gate for gate in SPEED if getattr(gates, gate) is not None]
            if timed and not self.bench:
                raise ValueError(f"{name}gates.{timed[0]} needs the measurement of speed: write bench = true")
        return self


def load_matrix(path: Path) -> Matrix:
    """Read a matrix.

    Raises:
        InputError: the file is missing or wrong.
    """
    matrix = read_model(path, Matrix)
    folder = path.absolute().parent

    def texts(of: RecipeSettings | Matrix) -> dict[str, Path | None]:
        return {name: path_from(folder, getattr(of, name)) for name in ("eval_text", "calibration")}

    speaking: list[RecipeSettings | Matrix] = [matrix, *matrix.recipes.values()]
    for text in [text for of in speaking for text in texts(of).values() if text]:
        if not text.is_file():
            raise InputError(f"{path}: {text}: no such file")
    return matrix.model_copy(
        update={
            "models": tuple(model_from(folder, model) for model in matrix.models),
            "devices": tuple(device_from(folder, device) for device in matrix.devices),
            "recipes": {name: one.model_copy(update=texts(one)) for name, one in matrix.recipes.items()},
            "out": path_from(folder, matrix.out),
            **texts(matrix),
        }
    )
