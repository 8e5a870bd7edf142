"""A student cut out of its teacher: fewer layers, neurons and key-value groups, of the teacher's own weights.

    layers=0.5,neurons=0.75,kv_groups=0.5     the share of each that stays

The passes that prune do it (drop-layers, prune-kv-groups, prune-neurons), every layer alike: what comes out is a model
folder that transformers reads, and a configuration has one width for all layers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from slm_export.checkpoint import Checkpoint, Pass
from slm_export.compression.calibration import Calibration
from slm_export.compression.geometry import attentions, mlps
from slm_export.compression.workbench import Workbench
from slm_export.errors import InputError, suggestion
from slm_export.learning.models import Model, dtype_of, module_of, save
from slm_export.learning.settings import Frozen
from slm_export.learning.trainer import Example
from slm_export.optimizers.drop_layers import DropLayers
from slm_export.optimizers.prune_kv_groups import PruneKvGroups
from slm_export.optimizers.prune_neurons import PruneNeurons
from slm_export.progress import Progress
from slm_export.source.load import load_checkpoint

_WINDOWS = 64
"""Of training text, that the passes measure on."""
_MULTIPLE = 64
"""Neurons that stay are a multiple of this: groups of 32 and 64 divide them, and what was asked for is come near to."""
_WIDTHS = ("intermediate_size", "n_inner", "hidden_dim", "ffn_dim")


class Shape(Frozen):
    """Shares of the teacher that stay, each more than 0 and at most 1."""

    layers: float = Field(default=1.0, gt=0, le=1)
    neurons: float = Field(default=1.0, gt=0, le=1)
    kv_groups: float = Field(default=1.0, gt=0, le=1)

    @property
    def is_whole(self) -> bool:
        """Whether nothing goes."""
        return self.layers == self.neurons == self.kv_groups == 1

    def __str__(self) -> str:
        shares = self.model_dump()
        return ",".join(f"{name}={share:g}" for name, share in shares.items() if share != 1) or "whole"


def parse_shape(text: str) -> Shape:
    """Return the shape of ``layers=0.5,neurons=0.75``.

    Raises:
        InputError: an unknown part, or a share that is none.
    """
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if name not in Shape.model_fields:
            raise InputError(f"--shrink: unknown part '{name}'{suggestion(name, Shape.model_fields)}")
        if name in shares:
            raise InputError(f"--shrink: {name} is given twice")
        try:
            shares[name] = float(value) if equals else float("nan")
        except ValueError:
            shares[name] = float("nan")
        if not 0 < shares[name] <= 1:
            raise InputError(
                f"--shrink: {name} is the share that stays, above 0 and at most 1: {name}=0.5, not '{part.strip()}'"
            )
    return Shape(**shares)


def passes_of(shape: Shape) -> tuple[Pass, ...]:
    """Return the passes that leave these shares."""
    made: list[Pass] = []
    if shape.layers < 1:
        made.append(DropLayers(fraction=_gone(shape.layers)))
    if shape.kv_groups < 1:
        made.append(PruneKvGroups(fraction=_gone(shape.kv_groups), uniform=True))
    if shape.neurons < 1:
        made.append(PruneNeurons(fraction=_gone(shape.neurons), multiple=_MULTIPLE, uniform=True))
    return tuple(made)


def shrink(
    teacher: Model, shape: Shape, examples: Sequence[Example], out: Path, progress: Progress
) -> tuple[str, ...]:
    """Write the student of a shape, and return what the passes said of it.

    Given   examples: training text, that the passes measure on; at least two

    Raises:
        InputError: the family has no such parts, too few of them, or a configuration that cannot say so.
    """
    checkpoint = load_checkpoint(teacher.folder)
    refuse_unsayable(checkpoint, shape)
    windows = tuple(tuple(example["input_ids"]) for example in examples[:_WINDOWS])
    calibration = Calibration(windows, "the training text")
    notes: list[str] = []
    for step in passes_of(shape):
        step.check(checkpoint)
        with progress.stage(step.name) as stage:
            result = step.run(checkpoint, Workbench(calibration=calibration, advance=stage.advance))
        checkpoint = result.checkpoint
        notes += [f"{step.name}: {note}" for note in result.notes]
    checkpoint = replace(checkpoint, config=_configured(checkpoint, shape))
    module = module_of(checkpoint)
    made = replace(teacher, module=module, dtype=dtype_of(checkpoint))
    save(made, out)
    return tuple(notes)


def _gone(share: float) -> float:
    # Decimal as a person wrote it: 1 - 0.7 is 0.30000000000000004.
    return round(1 - share, 9)


def refuse_unsayable(checkpoint: Checkpoint, shape: Shape) -> None:
    """Raise InputError where a configuration has no word for what a shape changes; reads no weight."""
    text = checkpoint.config.get_text_config()
    if shape.neurons < 1 and _width_of_mlps(text) is None:
        raise InputError(
            f"--shrink neurons: {text.model_type} has no width of its MLPs in its configuration; leave it out"
        )
    if shape.kv_groups < 1 and not (
        isinstance(getattr(text, "head_dim", None), int)
        and isinstance(getattr(text, "num_key_value_heads", None), int)
    ):
        raise InputError(
            f"--shrink kv_groups: the configuration of {text.model_type} has no width of a head (head_dim), and fewer "
            "heads would make those that stay wider; leave it out, and let layers or neurons go"
        )


def _width_of_mlps(text: Any) -> str | None:
    """Return what a configuration calls the number of neurons."""
    return next((key for key in _WIDTHS if isinstance(getattr(text, key, None), int)), None)


def _configured(checkpoint: Checkpoint, shape: Shape) -> Any:
    """Return a configuration that says what widths the weights have."""
    config = copy.deepcopy(checkpoint.config)
    text = config.get_text_config()
    if shape.neurons < 1:
        setattr(text, str(_width_of_mlps(text)), mlps(checkpoint, "--shrink neurons")[0].count)
    if shape.kv_groups < 1:
        groups = attentions(checkpoint, "--shrink kv_groups")[0]
        text.num_key_value_heads = groups.count
        text.num_attention_heads = groups.columns.numel() // text.head_dim
    return config
