"""What is done to the weights: an ordered tuple of passes, from the device profile and the user's options.

The profile's recipe comes first; ``--bits`` and its kin (or the same keys of slm-export.toml) override the
options of its quantization, and ``--palettize`` puts tables in the place of that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from slm_export.checkpoint import Checkpoint, Pass
from slm_export.errors import InputError, suggestion
from slm_export.optimizers.awq import Awq
from slm_export.optimizers.drop_layers import DropLayers
from slm_export.optimizers.gptq import Gptq
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.optimizers.learned_rounding import LearnedRounding
from slm_export.optimizers.palettize import Palettize
from slm_export.optimizers.prune_kv_groups import PruneKvGroups
from slm_export.optimizers.prune_neurons import PruneNeurons
from slm_export.optimizers.recover import Recover
from slm_export.optimizers.rotate import Rotate
from slm_export.optimizers.sparsify import Sparsify
from slm_export.optimizers.trim_vocabulary import TrimVocabulary
from slm_export.profile import RecipeStep
from slm_export.quantization_options import QuantizationOptions as QuantizationOptions
from slm_export.quantization_options import merged
from slm_export.weights import Dense

PASSES: Mapping[str, type[Pass]] = {
    cls.name: cls
    for cls in (
        DropLayers,
        PruneKvGroups,
        PruneNeurons,
        TrimVocabulary,
        Rotate,
        Awq,
        Sparsify,
        GroupQuantize,
        Gptq,
        LearnedRounding,
        Palettize,
        Recover,
    )
}

Recipe = tuple[Pass, ...]

_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a word",
    dict: "a table of names and whole numbers",
}


def build_recipe(steps: Sequence[RecipeStep], options: QuantizationOptions, where: str) -> Recipe:
    """Return the passes of a profile's recipe with the user's options put in; ``where`` names the profile.

    Raises:
        InputError: an unknown pass, an unknown option, a value that the pass refuses.
    """
    quantizing = [name for name, cls in PASSES.items() if cls.quantizes]
    return tuple(make_pass(name, chosen, where) for name, chosen in merged(steps, options, quantizing))


def make_pass(name: str, options: Mapping[str, Any], where: str) -> Pass:
    """Return one pass with its options checked."""
    if name not in PASSES:
        raise InputError(f"{where}: unknown pass '{name}'{suggestion(name, PASSES)}")
    cls: Any = PASSES[name]
    known = {field.name: field for field in dataclasses.fields(cls)}
    made_of = dict(options)
    for key, value in options.items():
        if key not in known:
            raise InputError(f"{where}: {name}: unknown option '{key}'{suggestion(key, known)}")
        default = _default(known[key])
        kind = int if default is None else type(default)
        if kind is float and type(value) is int:
            made_of[key] = value = float(value)
        if type(value) is not kind and not (value is None and default is None):
            raise InputError(f"{where}: {name}: {key} must be {_KINDS[kind]}, not {value!r}")
    try:
        made: Pass = cls(**made_of)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return made


def _default(option: dataclasses.Field[Any]) -> Any:
    made = option.default_factory
    return option.default if made is dataclasses.MISSING else made()


def options_of(step: Pass) -> dict[str, Any]:
    """Return the options of a pass, as the manifest lists them."""
    return {field.name: getattr(step, field.name) for field in dataclasses.fields(step)}  # type: ignore[arg-type]


def lowest_bits(checkpoint: Checkpoint) -> int:
    """Return the fewest bits that any matrix is stored in, as gates go by them: tables of 6 are held to those of 8."""
    widths: Iterable[int] = (
        8 * weight.dtype.itemsize if isinstance(weight, Dense) else weight.bits
        for name, weight in checkpoint.weights.items()
        if checkpoint.roles[name] != "other"
    )
    fewest = min(widths, default=32)
    return 8 if fewest == 6 else fewest


def unaccounted(before: Checkpoint, after: Checkpoint, skipped: Mapping[str, str]) -> list[str]:
    """Return the weights that a pass neither changed nor gave a reason for, or gave a reason for and changed."""
    return [
        name
        for name, weight in before.weights.items()
        if (after.weights.get(name) is weight) != (name in skipped)
    ]
