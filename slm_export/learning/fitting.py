"""A size budget -> the shape of a student, by the cost model of `plan`: nothing is exported to find it.

Of all shapes that fit, the one with the most parameters is taken; of equal ones the deepest, because what neurons cost
can be won back more easily than what layers cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError
from slm_export.learning.distil_settings import Grid
from slm_export.learning.models import Model
from slm_export.learning.shapes import Shape, passes_of, refuse_unsayable
from slm_export.planning.model import ModelShape, read_model
from slm_export.planning.shaping import shaped
from slm_export.planning.sizes import sizes_of
from slm_export.planning.storage import store
from slm_export.recipe import options_of
from slm_export.reports.words import megabytes
from slm_export.source.load import load_checkpoint

_SHARES = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)
_FORMAT = "executorch"
_CONTEXT = 2048


def shape_within(teacher: Model, most: int, grid: Grid | None) -> Shape:
    """Return the largest shape whose artifact is at most ``most`` bytes, as predicted.

    Given   grid: what its matrices will be stored in; None: 4 bits, the embedding 8

    Raises:
        InputError: even the smallest shape that is tried is larger.
    """
    whole = read_model(teacher.folder)
    found = [(size, parameters, shape) for shape, size, parameters in _sizes(teacher, whole, grid)]
    fitting = [(parameters, shape.layers, shape) for size, parameters, shape in found if size <= most]
    if not fitting:
        least = min((size for size, _, _ in found), default=0)
        raise InputError(
            f"--max-size: no part of {whole.name} fits into {megabytes(most)}; the smallest that is tried takes about "
            f"{megabytes(least)}; most of that may be its vocabulary (trim-vocabulary takes tokens away)"
        )
    return max(fitting, key=lambda one: one[:2])[2]


def _sizes(teacher: Model, whole: ModelShape, grid: Grid | None) -> Iterator[tuple[Shape, int, int]]:
    """Yield every shape that the model allows with the predicted bytes of its artifact and its parameters."""
    checkpoint = load_checkpoint(teacher.folder)

    def allowed(part: str) -> list[float]:
        return [1.0, *(share for share in _SHARES if _fits(Shape(**{part: share}), checkpoint))]

    options = {
        "bits": grid.bits if grid else 4,
        "group": grid.group if grid else 32,
        "embedding_bits": grid.embedding_bits if grid else 8,
    }
    for layers, neurons, kv_groups in product(allowed("layers"), allowed("neurons"), allowed("kv_groups")):
        shape = Shape(layers=layers, neurons=neurons, kv_groups=kv_groups)
        recipe = [(step.name, options_of(step)) for step in passes_of(shape)]
        smaller, notes = shaped(whole, recipe)
        if not notes:
            stored, _ = store(smaller, [("group-quantize", options)])
            yield shape, sizes_of(smaller, stored, _FORMAT, _CONTEXT).total, smaller.parameters


def _fits(shape: Shape, checkpoint: Checkpoint) -> bool:
    """Whether the passes accept a shape, and a configuration can say it."""
    try:
        for step in passes_of(shape):
            step.check(checkpoint)
        refuse_unsayable(checkpoint, shape)
    except InputError:
        return False
    return True
