"""What to compile, for what, and how: a request, checked as far as can be without reading the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from slm_export.adapters.formats import notes_on, refuse_adapters
from slm_export.budget.budget import Budget
from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError
from slm_export.gates import SPEED, TELLING, Gates
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.optimizers.palettize import Palettize
from slm_export.optimizers.sparsify import Sparsify
from slm_export.optimizers.trim_vocabulary import TrimVocabulary
from slm_export.profile import DeviceProfile, RecipeStep, default_profile, load_profile
from slm_export.recipe import QuantizationOptions, Recipe, build_recipe
from slm_export.registry import exporter, target
from slm_export.reports.details import FrontierPoint
from slm_export.runtime import Exporter, Target
from slm_export.settings import FILE_NAME, Settings
from slm_export.source.tasks import GENERATION

DEFAULT_CONTEXT = 2048


class CombinationError(InputError):
    """A format that cannot go with this device, recipe or gate; each is right by itself."""


@dataclass(frozen=True)
class Request:
    """What the command line asks for; None where it says nothing."""

    model: str | None = None
    revision: str | None = None
    target: str | None = None
    device: str | None = None
    formats: tuple[str, ...] | None = None
    passes: tuple[RecipeStep, ...] | None = None
    """In place of the device profile's recipe."""
    quantization: QuantizationOptions = field(default_factory=QuantizationOptions)
    context: int | None = None
    out: Path | None = None
    eval_text: Path | None = None
    calibration: Path | None = None
    gates: Gates = field(default_factory=Gates)
    budget: Budget = field(default_factory=Budget)
    """Limits that the recipe is searched for; see `search`."""
    locked: Path | None = None
    """The lock file that the export is held against."""
    adapters: tuple[tuple[str, Path], ...] = ()
    """Names and peft folders of adapters that stay apart."""
    force: bool = False
    verify: bool = True
    bench: bool = True

    def over(self, settings: Settings) -> Request:
        """Return this request with what it leaves open taken from slm-export.toml."""
        return replace(
            self,
            model=self.model or settings.model,
            # A revision belongs to the model that it was written beside.
            revision=self.revision or (None if self.model else settings.revision),
            target=self.target or settings.target,
            device=self.device or _device_for(self.target, settings),
            formats=self.formats or settings.formats,
            passes=self.passes or settings.passes,
            quantization=self.quantization.over(
                QuantizationOptions(
                    settings.bits,
                    settings.group_size,
                    settings.embedding_bits,
                    settings.head_bits,
                    settings.palettize,
                )
            ),
            context=self.context or settings.context,
            out=self.out or settings.out,
            eval_text=self.eval_text or settings.eval_text,
            calibration=self.calibration or settings.calibration,
            gates=self.gates.over(settings.gates),
            adapters=self.adapters or tuple((settings.adapters or {}).items()),
            budget=self.budget.over(settings.budget()),
        )


@dataclass(frozen=True)
class Plan:
    """A request with everything looked up that does not need the model."""

    request: Request
    model: str
    profile: DeviceProfile
    recipe: Recipe
    exporters: tuple[Exporter, ...]
    target: Target
    notes: tuple[str, ...]
    frontier: tuple[FrontierPoint, ...] = ()
    """What was expected of other recipes, where one was searched for."""

    def ready(self) -> None:
        """Raise MissingComponentError unless everything that the plan needs is installed."""
        self.target.ready()
        for made in self.exporters:
            made.ready()


def make_plan(request: Request) -> Plan:
    """Look up device, recipe, formats and target.

    Raises:
        CombinationError: one of the formats cannot go with the rest.
        InputError: something is unknown, missing or contradictory.
    """
    if not request.model:
        raise InputError(f"no model: give a model folder, or name one in {FILE_NAME} in the current folder")
    if request.target is None and request.device is None:
        raise InputError("no target: give --target android (or ios, linux, host), or a --device")
    profile = load_profile(request.device) if request.device else default_profile(str(request.target))
    if request.target not in (None, profile.target):
        raise InputError(
            f"device {profile.name} belongs to target {profile.target}, not {request.target}; "
            "leave out --target, or choose another --device (`slm-export devices` lists them)"
        )
    made_target = target(profile.target)
    formats = tuple(dict.fromkeys(request.formats or (profile.default_format,)))
    exporters = tuple(exporter(name) for name in formats)
    for name in formats:
        if name not in profile.formats:
            raise CombinationError(
                f"device {profile.name} does not run format {name}; it runs {', '.join(profile.formats)}"
            )
        if name not in made_target.formats:
            known = ", ".join(made_target.formats)
            raise CombinationError(
                f"target {profile.target} has no app code for format {name}; it has: {known}"
            )
    recipe = build_recipe(
        request.passes or profile.recipe, request.quantization, _source_of(request, profile)
    )
    refuse_adapters(
        request.adapters, [step.name for step in recipe], exporters, searched=bool(request.budget)
    )
    _refuse_tables(recipe, exporters, profile)
    _refuse_zeros(recipe, exporters, profile)
    _refuse_same_text(request)
    _refuse_locked_search(request)
    refuse_foreign_text(
        [step.name for step in recipe], request.calibration, request.eval_text, judged=request.verify
    )
    notes = [*notes_on(request.adapters, exporters)]
    if not request.verify:
        notes.append("fidelity was not verified, and no gate on it judged (--no-verify)")
    if not request.bench:
        notes.append("speed was not measured, and no gate on it judged (--no-bench)")
    return Plan(request, request.model, profile, recipe, exporters, made_target, tuple(notes))


def _source_of(request: Request, profile: DeviceProfile) -> str:
    """Return what names the passes of a request, for people."""
    if request.passes:
        return "passes"
    own_file = request.device and request.device.endswith(".toml")
    return str(request.device) if own_file else f"device {profile.name}"


def _refuse_tables(recipe: Recipe, exporters: Sequence[Exporter], profile: DeviceProfile) -> None:
    """Refuse to palettize for a format that has no tables, or not those that are asked for."""
    for step in recipe:
        if not isinstance(step, Palettize):
            continue
        for made in exporters:
            if not made.tables:
                raise CombinationError(
                    f"{step.name}: format {made.name} has no tables of values, only coreml does; export coreml for a "
                    f"device that runs it, or give --bits {4 if step.bits == 4 else 8} for codes and scales"
                )
        if step.group_channels and profile.coreml.ios < 18:
            raise CombinationError(
                f"{step.name}: coreml for iOS {profile.coreml.ios} has one table per matrix; write group_channels = 0 "
                f"in the recipe of device {profile.name}, or leave out coreml.ios = {profile.coreml.ios}"
            )


def _refuse_zeros(recipe: Recipe, exporters: Sequence[Exporter], profile: DeviceProfile) -> None:
    """Refuse to make matrices sparse where nothing is gained by that, or where a later pass would fill them again."""
    name = Sparsify.name
    behind = next((recipe[at + 1 :] for at, step in enumerate(recipe) if step.name == name), None)
    if behind is None:
        return
    for made in exporters:
        if made.dense_only:
            raise CombinationError(
                f"{name}: format {made.name} gains nothing from zeros: {made.dense_only}; leave the pass out, or take "
                "whole parts away (prune-neurons, prune-kv-groups, drop-layers), which every format gains from"
            )
    if profile.coreml.ios < 18:
        raise CombinationError(
            f"{name}: coreml for iOS {profile.coreml.ios} cannot store quantized matrices with a mask; leave out the "
            f"pass, or coreml.ios = {profile.coreml.ios} of device {profile.name}"
        )
    if filling := next((step.name for step in behind if step.name != GroupQuantize.name), None):
        raise InputError(
            f"{name}: {filling} behind it would not keep its zeros; {GroupQuantize.name} alone may follow it, so let "
            f"{filling} come before, or leave it out"
        )


def refuse_foreign_text(
    passes: Sequence[str], calibration: Path | None, eval_text: Path | None, *, judged: bool
) -> None:
    """Refuse to fit a model to a domain, or to judge it, on text that nobody said is of that domain."""
    name = TrimVocabulary.name
    if name not in passes:
        return
    if calibration is None:
        raise InputError(
            f"{name} keeps the tokens of the texts that the model is for: give such a text with --calibration FILE"
        )
    if judged and eval_text is None:
        raise InputError(
            f"{name} fits the model to texts of one domain, and the shipped sample is of none: give text of that "
            "domain to judge it on, other than for calibration, with --eval-text FILE (or no verdict: --no-verify)"
        )


def _refuse_locked_search(request: Request) -> None:
    """Refuse to hold against a lock what a search may find differently, as measured speed decides."""
    if request.locked is not None and request.budget:
        raise InputError(
            f"{request.locked}: a budget searches for a recipe anew, and a lock holds one fast: leave out the budget, "
            'and put what it found ("recipe" of manifest.json) into slm-export.toml as [[passes]]'
        )


def _refuse_same_text(request: Request) -> None:
    """Refuse to fit a model to the very text that it is judged on."""
    ours, theirs = request.calibration, request.eval_text
    if (
        ours is not None
        and theirs is not None
        and ours.exists()
        and theirs.exists()
        and ours.samefile(theirs)
    ):
        raise InputError(
            f"{ours}: is the evaluation text too; a verdict on text that the model was calibrated on means nothing: "
            "give another file, or leave out --calibration"
        )


def check_gates(plan: Plan) -> None:
    """Raise InputError for a gate that cannot be judged in a format that is to be written."""
    gates = plan.request.gates.over(plan.profile.gates)
    silent = [made.name for made in plan.exporters if made.name not in TELLING]
    if gates.min_accelerated is not None and silent:
        raise CombinationError(
            f"gate min_accelerated: of {' and '.join(silent)} cannot be told what an accelerator takes, only of "
            f"{' and '.join(TELLING)}; leave the gate out, or the format"
        )
    timed = [name for name in SPEED if getattr(gates, name) is not None]
    for made in plan.exporters:
        if made.elsewhere is not None and timed and plan.request.bench:
            raise CombinationError(
                f"gate {timed[0]}: the speed of {made.name} is not measured here ({made.elsewhere}); leave the gate "
                "out, or the format, or give --no-bench"
            )


def context_for(plan: Plan, checkpoint: Checkpoint) -> int:
    """Return the tokens that the artifact has room for.

    Raises:
        InputError: more were asked for than the model has positions.
    """
    most = checkpoint.positions
    asked = plan.request.context
    if asked is not None and most is not None and asked > most:
        raise InputError(
            f"context {asked} is longer than the {most} positions of {checkpoint.name}; ask for {most} or fewer"
        )
    if asked is not None:
        return asked
    if checkpoint.task != GENERATION:
        return most or DEFAULT_CONTEXT
    wanted = plan.profile.context or DEFAULT_CONTEXT
    return min(wanted, most) if most else wanted


def _device_for(target_name: str | None, settings: Settings) -> str | None:
    """The settings' device counts only for the target it is of: ``--target linux`` asks for another."""
    if target_name is None or settings.device is None or target_name == settings.target:
        return settings.device
    return settings.device if load_profile(settings.device).target == target_name else None
