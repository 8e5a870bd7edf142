"""What single matrices are stored in, where that differs from the rest of their kind.

A table of a quantizing pass maps names to whole numbers, as TOML and the manifest have it:

    [recipe.bits_by_tensor]
    "model.layers.0.mlp.down_proj.weight" = 8
    "*.self_attn.v_proj.weight"           = 8

A name with ``*``, ``?`` or ``[`` is a pattern. A name given in full goes before patterns, and of several patterns that
fit the last one counts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError, suggestion

ByName = Mapping[str, int]
"""Read-only by agreement; a plain dict, because it is also JSON."""

BITS = (4, 8, 16, 32)


def chosen(table: ByName, name: str) -> int | None:
    """Return what a table says of a weight; None where it says nothing."""
    if name in table:
        return table[name]
    fitting = [value for pattern, value in table.items() if fnmatchcase(name, pattern)]
    return fitting[-1] if fitting else None


def refuse_values(option: str, table: ByName, allowed: Sequence[int]) -> None:
    """Raise InputError for a value that no matrix can have."""
    for name, value in table.items():
        if type(value) is not int or value not in allowed:
            known = ", ".join(map(str, allowed[:-1]))
            raise InputError(f"{option}: '{name}' must be {known} or {allowed[-1]}, not {value!r}")


def refuse_names(option: str, table: ByName, checkpoint: Checkpoint) -> None:
    """Raise InputError for a name that fits no matrix of the model."""
    names = [name for name in checkpoint.weights if checkpoint.roles.get(name, "other") != "other"]
    for pattern in table:
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        if (shared := checkpoint.tied.get(pattern)) is not None:
            raise InputError(f"{option}: '{pattern}' has no values of its own, it shares those of '{shared}'")
        raise InputError(f"{option}: no matrix is called '{pattern}'{_nearest(pattern, names)}")


def _nearest(pattern: str, names: Collection[str]) -> str:
    # Hundreds of names are no help; one that is nearly the same is.
    hint = suggestion(pattern, names)
    return hint if "did you mean" in hint else ""
