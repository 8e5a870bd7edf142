"""The cells of a matrix: one for each model, recipe and device, with all its formats.

A cell is one export, so that its formats are made from one quantized checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from slm_export.compilation import CombinationError, Plan, Request, check_gates, make_plan
from slm_export.errors import InputError, suggestion
from slm_export.matrix.matrix_file import AXES, Exclusion, Matrix
from slm_export.profile import DeviceProfile, load_profile
from slm_export.recipe import options_of
from slm_export.settings import RecipeSettings, Settings

EXCLUDED = "excluded"
"""Why a combination is left out that the user did not want."""


@dataclass(frozen=True)
class Cell:
    """One export."""

    model: str
    """How the model is called here; ``settings`` says where it is."""
    recipe: str
    device: str
    settings: Settings
    """What the ``slm-export.toml`` of this export says."""
    plan: Plan
    """The same, looked up and checked."""

    @property
    def name(self) -> str:
        """What its folder is called."""
        return f"{self.model}.{self.recipe}.{self.device}"

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats that it is written in."""
        return tuple(self.settings.formats or ())

    def stages(self) -> tuple[str, ...]:
        """Return a key for each pass, of all that its result follows from: cells with one in common share weights.

        A recipe that is searched for has none: its passes are not known before.
        """
        if self.settings.budget():
            return ()
        calibrated = any(step.calibrated for step in self.plan.recipe)
        done: list[object] = [self.settings.model, self.settings.revision]
        done.append(str(self.settings.calibration) if calibrated else None)
        keys = []
        for step in self.plan.recipe:
            done.append({"pass": step.name, **options_of(step)})
            keys.append(hashlib.sha256(json.dumps(done).encode()).hexdigest())
        return tuple(keys)


@dataclass(frozen=True)
class Skipped:
    """A combination that is not exported, and why."""

    model: str
    recipe: str
    device: str
    format: str
    reason: str


def cells_of(matrix: Matrix) -> tuple[tuple[Cell, ...], tuple[Skipped, ...]]:
    """Return the cells of a matrix, model by model, and what it leaves out.

    Raises:
        InputError: a device, a recipe or an exclusion is wrong, or nothing is left.
    """
    labels = _labels(matrix.models)
    profiles = {device: load_profile(device) for device in matrix.devices}
    names = [profile.name for profile in profiles.values()]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"devices: two are called {repeated}; give one of them another name")
    formats = sorted({name for profile in profiles.values() for name in _formats(matrix, profile)})
    _check_exclusions(matrix.exclude, (list(labels.values()), list(matrix.recipes), names, formats))
    cells: list[Cell] = []
    skipped: list[Skipped] = []
    for (model, label), (recipe, options), (device, profile) in product(
        labels.items(), matrix.recipes.items(), profiles.items()
    ):
        fit = []
        for format in _formats(matrix, profile):
            where = (label, recipe, profile.name, format)
            settings = _settings(matrix, model, options, device, (format,))
            if reason := _refusal(matrix, settings, where):
                skipped.append(Skipped(*where, reason))
            else:
                fit.append(format)
        if fit:
            settings = _settings(matrix, model, options, device, tuple(fit))
            plan = make_plan(_request(matrix, settings))
            cells.append(Cell(label, recipe, profile.name, settings, plan))
    if not cells:
        told = "\n".join(f"  {one.device}, {one.format}: {one.reason}" for one in skipped[:3])
        raise InputError(f"nothing is left to export\n{told}")
    return tuple(cells), tuple(skipped)


def _labels(models: Sequence[str]) -> dict[str, str]:
    """Return model -> a name for folders: the last part of its path, or as many parts as tell all of them apart."""
    for parts in range(1, 1 + max(len(Path(model).parts) for model in models)):
        labels = {
            model: re.sub(r"[^A-Za-z0-9_-]+", "-", "-".join(Path(model).parts[-parts:])).strip("-")
            for model in models
        }
        if len(set(labels.values())) == len(models):
            return labels
    raise InputError(f"models: {' and '.join(models)} cannot be told apart by their names; rename a folder")


def _formats(matrix: Matrix, profile: DeviceProfile) -> tuple[str, ...]:
    return tuple(matrix.formats or (profile.default_format,))


def _settings(
    matrix: Matrix, model: str, recipe: RecipeSettings, device: str, formats: tuple[str, ...]
) -> Settings:
    """Return what an ``slm-export.toml`` would say of one cell."""
    place, _, revision = (model, "", "") if Path(model).exists() else model.partition("@")
    said = {
        **{name: getattr(recipe, name) for name in RecipeSettings.model_fields},
        "model": place,
        "revision": revision or None,
        "device": device,
        "formats": formats,
        "gates": recipe.gates.over(matrix.gates),
        "eval_text": recipe.eval_text or matrix.eval_text,
        "calibration": recipe.calibration or matrix.calibration,
    }
    return Settings.model_validate(said)


def _request(matrix: Matrix, settings: Settings) -> Request:
    return Request(verify=matrix.verify, bench=matrix.bench).over(settings)


def _refusal(matrix: Matrix, settings: Settings, where: tuple[str, ...]) -> str | None:
    """Return why a combination is left out; None where it is not."""
    if any(_covers(one, where) for one in matrix.exclude):
        return EXCLUDED
    try:
        check_gates(make_plan(_request(matrix, settings)))
    except CombinationError as error:
        return str(error)
    return None


def _covers(exclusion: Exclusion, where: tuple[str, ...]) -> bool:
    wanted = [getattr(exclusion, axis) for axis in AXES]
    return all(want in (None, is_) for want, is_ in zip(wanted, where, strict=True))


def _check_exclusions(exclusions: Sequence[Exclusion], known: Sequence[Sequence[str]]) -> None:
    """Refuse an exclusion that excludes nothing: it was meant to."""
    for at, exclusion in enumerate(exclusions):
        for axis, names in _named(exclusion, known):
            word = getattr(exclusion, axis)
            if word not in names:
                raise InputError(
                    f"exclude[{at}].{axis}: the matrix has no {axis} '{word}'{suggestion(word, names)}"
                )


def _named(exclusion: Exclusion, known: Sequence[Sequence[str]]) -> Iterator[tuple[str, Sequence[str]]]:
    return (
        (axis, names) for axis, names in zip(AXES, known, strict=True) if getattr(exclusion, axis) is not None
    )
