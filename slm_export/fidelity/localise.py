"""Where in a model do an artifact and its source part?

An artifact shows its scores alone. But a part of a layer can be silenced, by zeros in the matrix that takes its result
back into the model. If the artifact of that model gives its source's scores, the part that is silent is the one that
differs. This needs nothing of a format, and is asked in the vendor's own runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from slm_export.checkpoint import Checkpoint
from slm_export.compression.geometry import Parts, attentions, mlps
from slm_export.errors import InputError
from slm_export.weights import Dense

_ASKING = "a localiser"

Exact = Callable[[Checkpoint], bool]
"""Whether an artifact of this model gives the scores of its source."""


def located(model: Checkpoint, exact: Exact) -> str:
    """Return in which part of a model, whose artifact differs, it does: in words.

    Given   model: of few layers, in floats; every question costs an export of it
    """
    heard, thinking = _parts(attentions, model), _parts(mlps, model)
    if not heard or not thinking:
        return f"the layers of {model.config.model_type} cannot be silenced to see where"
    for parts in (heard, thinking):
        if exact(_silenced(model, parts)):
            return f"in {_named(model, parts, exact)} or its norm: with that silent, the scores are right"
    if exact(_silenced(model, (*heard, *thinking))):
        return "in attention and MLP both, as norms within layers are: with both silent, the scores are right"
    return "outside of the layers, if not within them too: in the embedding, the last norm or the head"


def _named(model: Checkpoint, parts: Sequence[Parts], exact: Exact) -> str:
    """Return the one layer's part that is to blame, where it is one."""
    if len(parts) > 1:
        for part in parts:
            if exact(_silenced(model, (part,))):
                return part.path
    return ", ".join(part.path for part in parts)


def _parts(find: Callable[[Checkpoint, str], tuple[Parts, ...]], model: Checkpoint) -> tuple[Parts, ...]:
    try:
        return find(model, _ASKING)
    except InputError:
        return ()


def _silenced(model: Checkpoint, parts: Sequence[Parts]) -> Checkpoint:
    """Return the model without what these parts have to say."""
    names = [f"{part.out}.{kind}" for part in parts for kind in ("weight", "bias")]
    return model.with_weights(
        {name: _zeros(model.weights[name].shape) for name in names if name in model.weights}
    )


def _zeros(shape: tuple[int, ...]) -> Dense:
    values = torch.zeros(shape)
    return Dense(shape, torch.float32, lambda: values)
