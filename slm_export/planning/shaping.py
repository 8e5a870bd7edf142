"""What passes that take parts out leave of a model's shapes. Which parts go is measured; how many, the options say.

Where layers may lose unlike numbers, each is given the mean: the sum is the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from slm_export.planning.model import Matrix, ModelShape, number_of
from slm_export.planning.storage import Recipe

_GROUPS = (32, 64, 128, 256)
_TOKENS_MULTIPLE = 32
_ATTENTION_ROWS = re.compile(r"[qkv]_proj")
_ATTENTION_COLUMNS = re.compile(r"o_proj")


def shaped(model: ModelShape, recipe: Recipe) -> tuple[ModelShape, tuple[str, ...]]:
    """Return the model as the recipe's passes leave its shapes, and a note on each of which that cannot be told."""
    notes = []
    for name, options in recipe:
        if name not in SHAPING:
            continue
        changed = SHAPING[name](model, options)
        if changed is None:
            notes.append(
                f"{name}: what it narrows cannot be told from headers; figures are of the model before it"
            )
        else:
            model = changed
    return model, tuple(notes)


def _drop_layers(model: ModelShape, options: Mapping[str, Any]) -> ModelShape | None:
    gone = int(options.get("count", 0)) or max(1, round(options.get("fraction", 0.0) * model.layers))
    left = model.layers - gone
    if left < 1 or model.repeats > 1:
        return None
    kept = [m for m in model.matrices if (number := number_of(m.name)) is None or number < left]
    share = left / model.layers
    return replace(
        model,
        matrices=tuple(kept),
        layers=left,
        vectors=round(model.vectors * share),
        kv_values=round(model.kv_values * share),
    )


def _trim_vocabulary(model: ModelShape, options: Mapping[str, Any]) -> ModelShape | None:
    before = next((m.shape[0] for m in model.matrices if m.role == "embedding"), 0)
    wanted = int(options.get("tokens", 0)) or round(options.get("keep", 0.25) * before)
    rows = -(-wanted // _TOKENS_MULTIPLE) * _TOKENS_MULTIPLE
    if not 0 < rows < before:
        return None
    return _with(
        model,
        (
            replace(m, shape=(rows, m.shape[1])) if m.role in ("embedding", "head") else m
            for m in model.matrices
        ),
    )


def _prune_neurons(model: ModelShape, options: Mapping[str, Any]) -> ModelShape | None:
    width, hidden = model.intermediate, model.hidden
    if not width or hidden in (width, 2 * width):
        return None
    multiple = int(options.get("multiple", 0)) or max(
        (group for group in _GROUPS if not width % group and group < width), default=1
    )
    layers = 1 if options.get("uniform", False) else model.layers
    gone = round(options.get("fraction", 0.2) * width * layers / multiple) * multiple // layers
    # Two layers of neurons may be one matrix: gate and up.
    narrower = {width: width - gone, 2 * width: 2 * (width - gone)}

    def of(matrix: Matrix) -> Matrix:
        if matrix.role != "linear" or number_of(matrix.name) is None:
            return matrix
        rows, columns = (narrower.get(length, length) for length in matrix.shape)
        return replace(matrix, shape=(rows, columns))

    return _with(model, map(of, model.matrices))


def _prune_kv_groups(model: ModelShape, options: Mapping[str, Any]) -> ModelShape | None:
    groups = model.kv_heads
    gone = round(options.get("fraction", 0.25) * groups)
    if not 0 < gone < groups or not any(_ATTENTION_ROWS.fullmatch(_last(m)) for m in model.matrices):
        return None

    def of(matrix: Matrix) -> Matrix:
        rows, columns = matrix.shape
        if _ATTENTION_ROWS.fullmatch(_last(matrix)):
            rows = rows // groups * (groups - gone)
        elif _ATTENTION_COLUMNS.fullmatch(_last(matrix)):
            columns = columns // groups * (groups - gone)
        return replace(matrix, shape=(rows, columns))

    left = replace(model, kv_values=model.kv_values // groups * (groups - gone), kv_heads=groups - gone)
    return _with(left, map(of, model.matrices))


SHAPING: Mapping[str, Callable[[ModelShape, Mapping[str, Any]], ModelShape | None]] = {
    "drop-layers": _drop_layers,
    "prune-kv-groups": _prune_kv_groups,
    "prune-neurons": _prune_neurons,
    "trim-vocabulary": _trim_vocabulary,
}


def _with(model: ModelShape, matrices: Iterable[Matrix]) -> ModelShape:
    return replace(model, matrices=tuple(matrices))


def _last(matrix: Matrix) -> str:
    return matrix.name.removesuffix(".weight").rpartition(".")[2]
