"""Rotate what flows between layers, so that no channel sticks out; the model computes the same.

Given   Dense matrices of a decoder whose blocks read the residual stream through RMS norms and nothing else
Result  the same function: norms folded into the matrices that read them, and orthogonal matrices folded into all that
        write to the stream and read from it (R1), and into values and what reads them, head by head (R2)

R1 and R2 are those of Liu et al., "SpinQuant: LLM Quantization with Learned Rotations", 2024, and of Ashkboos et al.,
"QuaRot", 2024: random Hadamard matrices. Those that need an operator at run time (R3, R4) are left out. Nothing
here knows a family: the rotated model is run beside the source on sample tokens, and a family that does not permit it
(other norms, norms behind a block, something else between norm and matrix) is refused.

A tied model has one matrix for embedding and head, but the last norm can be folded into the head alone. So R1 takes
the two apart, which makes the model larger by a vocabulary, and is done only if ``untie`` says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slm_export.checkpoint import Checkpoint, PassResult
from slm_export.compression.blocks import LiveDialect, LiveLinear, run_model
from slm_export.compression.geometry import attentions
from slm_export.compression.workbench import DEFAULT, Workbench
from slm_export.errors import InputError
from slm_export.graph.model import build_reference
from slm_export.graph.norms import rms_norm_of
from slm_export.source.tasks import GENERATION
from slm_export.weights import Dense, Weight

_SAMPLE = 16  # tokens that the rotated model is held against the source on
_TOLERANCE = 1e-3
"""Largest difference of logits, as a share of the largest logit: float32 gives 1e-5, another formula gives 1."""

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rotate:
    """Options: which rotations, from which random numbers."""

    name: ClassVar[str] = "rotate"
    calibrated: ClassVar[bool] = False
    quantizes: ClassVar[bool] = False
    structural: ClassVar[bool] = True

    stream: bool = True
    """R1: the residual stream."""
    values: bool = True
    """R2: values, head by head."""
    untie: bool = False
    """Let a tied model have a head of its own, which R1 needs."""
    seed: int = 0

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse what has no residual stream behind RMS norms, and a tied model that is to stay one."""
        if checkpoint.task != GENERATION:
            raise InputError(f"{self.name}: only decoders can be rotated, not a model for {checkpoint.task}")
        if not (self.stream or self.values):
            raise InputError(f"{self.name}: stream and values are both false; nothing is left to do")
        if self.stream and checkpoint.tied and not self.untie:
            raise InputError(
                f"{self.name}: this model ties its head to its embedding, and rotating the stream takes them apart; "
                "give untie = true (the head then has a matrix of its own), or stream = false"
            )
        if not all(isinstance(weight, Dense) for weight in checkpoint.weights.values()):
            raise InputError(f"{self.name}: the model is quantized already; put this pass before that")

    def run(self, checkpoint: Checkpoint, work: Workbench = DEFAULT) -> PassResult:
        """Return the rotated model, which is seen to compute the same."""
        self.check(checkpoint)
        source = _untied(checkpoint) if self.stream and checkpoint.tied else checkpoint
        changes: dict[str, list[Change]] = {}
        generator = torch.Generator().manual_seed(self.seed)
        if self.values:
            self._rotate_values(source, changes, generator)
        if self.stream:
            self._rotate_stream(source, changes, generator)
        made = {
            name: work.keeper.keep(name, partial(_changed, source.weights[name], steps))
            for name, steps in changes.items()
        }
        rotated = source.with_weights(made)
        off = _difference(source, rotated)
        if off > _TOLERANCE:
            raise InputError(
                f"{self.name}: {checkpoint.config.model_type} computes something else when rotated (logits are off "
                f"by {off:.2g} of the largest); leave the pass out"
            )
        skipped = {
            name: "neither reads nor writes what is rotated"
            for name in checkpoint.weights
            if name not in made
        }
        return PassResult(rotated, skipped, (f"logits are off by {off:.1e} of the largest",))

    def _rotate_stream(
        self, source: Checkpoint, changes: dict[str, list[Change]], generator: torch.Generator
    ) -> None:
        model = build_reference(source, dialect=LiveDialect())
        width = int(source.config.get_text_config().hidden_size)
        turn = hadamard(width, generator)
        readers, norms = _readers(model, source)
        for name, factor in readers.items():
            changes.setdefault(f"{name}.weight", []).append(partial(_turn_columns, factor=factor, turn=turn))
        for name, plain in norms.items():
            changes.setdefault(f"{name}.weight", []).append(partial(torch.full_like, fill_value=plain))
        for path, part in model.named_modules():
            if isinstance(part, LiveLinear) and path not in readers and part.out_features == width:
                changes.setdefault(f"{path}.weight", []).append(partial(torch.matmul, turn.t()))
                if f"{path}.bias" in source.weights:
                    changes.setdefault(f"{path}.bias", []).append(partial(torch.matmul, turn.t()))
        for name, role in source.roles.items():
            if role == "embedding":
                changes.setdefault(name, []).append(partial(_turn_columns, factor=None, turn=turn))

    def _rotate_values(
        self, source: Checkpoint, changes: dict[str, list[Change]], generator: torch.Generator
    ) -> None:
        for parts in attentions(source, self.name):
            *_, (name, rows) = parts.rows.items()
            fused = len(parts.rows) == 1
            width = (rows.shape[1] - parts.columns.shape[1]) // 2 if fused else rows.shape[1]
            turn = hadamard(width, generator)
            changes.setdefault(f"{name}.weight", []).append(
                partial(_turn_rows, rows=rows[:, -width:], turn=turn)
            )
            if f"{name}.bias" in source.weights:
                changes.setdefault(f"{name}.bias", []).append(
                    partial(_turn_rows, rows=rows[:, -width:], turn=turn)
                )
            changes.setdefault(f"{parts.out}.weight", []).append(partial(_turn_heads, turn=turn))


def hadamard(width: int, generator: torch.Generator) -> Tensor:
    """Return a random orthogonal float32 (width, width) that mixes all channels evenly.

    A Hadamard matrix of the largest power of two in ``width``, with random signs; a random orthogonal matrix beside it
    (as a Kronecker product) for what is odd.
    """
    odd = width
    made = torch.ones(1, 1)
    while odd % 2 == 0:
        odd //= 2
        made = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5, made)
    if odd > 1:
        rest, _ = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64))
        made = torch.kron(made, rest.float().contiguous())
    signs = torch.randint(2, (width, 1), generator=generator) * 2.0 - 1
    return signs * made


def _untied(checkpoint: Checkpoint) -> Checkpoint:
    """Return the model with a head of its own, with the embedding's values."""
    config = copy.deepcopy(checkpoint.config)
    config.tie_word_embeddings = False
    heads: Mapping[str, Weight] = {name: checkpoint.weights[owner] for name, owner in checkpoint.tied.items()}
    return replace(
        checkpoint,
        config=config,
        weights={**checkpoint.weights, **heads},
        roles={**checkpoint.roles, **dict.fromkeys(heads, "head")},
        tied={},
    )


def _readers(model: nn.Module, source: Checkpoint) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the matrices that are given the output of a norm -> its factor; and norm -> the weight that makes it 1."""
    made: list[tuple[str, Tensor]] = []
    readers: dict[str, str] = {}

    def note_norm(path: str, output: Tensor) -> None:
        made.append((path, output))

    def note_linear(path: str, x: Tensor) -> None:
        # The head is given a view of all of it.
        norm = next((n for n, y in made if (y.data_ptr(), y.shape) == (x.data_ptr(), x.shape)), None)
        if norm is not None:
            readers[path] = norm

    hooks: list[Any] = []
    factors: dict[str, Tensor] = {}
    for path, part in model.named_modules():
        if isinstance(part, LiveLinear):
            hooks.append(
                part.register_forward_pre_hook(lambda _, args, path=path: note_linear(path, args[0]))
            )
        elif (found := rms_norm_of(part)) is not None:
            factors[path] = found[0].clone()
            hooks.append(
                part.register_forward_hook(lambda _, args, output, path=path: note_norm(path, output))
            )
    with torch.no_grad():
        run_model(model, torch.arange(2).unsqueeze(0))
    for hook in hooks:
        hook.remove()
    norms = {}
    for norm in dict.fromkeys(readers.values()):
        weight = source.weights[f"{norm}.weight"].float32()
        norms[norm] = 1.0 if torch.equal(weight, factors[norm]) else 0.0
    return {path: factors[norm] for path, norm in readers.items()}, norms


def _changed(weight: Weight, changes: list[Change]) -> Dense:
    values = weight.float32()
    for change in changes:
        values = change(values)
    return Dense(tuple(values.shape), values.dtype, lambda: values)


def _turn_columns(values: Tensor, factor: Tensor | None, turn: Tensor) -> Tensor:
    return (values if factor is None else values * factor) @ turn


def _turn_rows(values: Tensor, rows: Tensor, turn: Tensor) -> Tensor:
    """Rotate some rows of each part, int64 (parts, width), of a matrix or a bias."""
    made = values.clone()
    for part in rows:
        made[part] = turn.t() @ values[part]
    return made


def _turn_heads(values: Tensor, turn: Tensor) -> Tensor:
    """Rotate the columns of every head."""
    return (values.view(values.shape[0], -1, turn.shape[0]) @ turn).view(values.shape)


@torch.no_grad()
def _difference(source: Checkpoint, rotated: Checkpoint) -> float:
    vocabulary = next(
        source.weights[name].shape[0] for name, role in source.roles.items() if role == "embedding"
    )
    ids = torch.randint(vocabulary, (1, _SAMPLE), generator=torch.Generator().manual_seed(0))
    expected, got = (run_model(build_reference(c), ids).logits for c in (source, rotated))
    return float((got - expected).abs().max() / expected.abs().max())
