"""The torch models that an artifact with an adapter on is compared with.

The base's matrices as the passes left them, and beside each what peft makes of the adapter, on activations that no
runtime has rounded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from slm_export.adapters.low_rank import LowRank
from slm_export.checkpoint import Checkpoint
from slm_export.fidelity.references import References
from slm_export.graph.dialect import ReferenceDialect, Rounding
from slm_export.graph.model import build_reference
from slm_export.weights import Weight

Deltas = Mapping[str, Callable[[], Tensor]]


class AdaptedReferences(References):
    """`References` of a base, with an adapter on in each of the three models."""

    def __init__(self, base: References, adapter: LowRank) -> None:
        super().__init__(base.source, base.quantized)
        self._deltas = adapter.deltas

    @functools.cached_property
    def source_model(self) -> nn.Module:
        """The model as it came, and the adapter."""
        return adapted_model(self.source, self._deltas)

    @functools.cached_property
    def quantized_model(self) -> nn.Module:
        """The weights of the artifacts, and the adapter."""
        return adapted_model(self.quantized, self._deltas)

    def lowered_model(self, rounding: Rounding) -> nn.Module:
        """Return the weights of an artifact with its runtime's rounding of activations, and the adapter."""
        return adapted_model(self.quantized, self._deltas, rounding)


def adapted_model(checkpoint: Checkpoint, deltas: Deltas, rounding: Rounding | None = None) -> nn.Module:
    """Return `build_reference`'s module with an adapter on.

    Given   deltas: weight -> what is added to it, float32 (out, in), made as it is used
    """
    return build_reference(checkpoint, dialect=_Adapted(checkpoint, deltas, rounding))


class _Adapted(ReferenceDialect):
    def __init__(self, checkpoint: Checkpoint, deltas: Deltas, rounding: Rounding | None) -> None:
        super().__init__(rounding)
        self._deltas = {id(checkpoint.weights[name]): delta for name, delta in deltas.items()}

    def linear(self, weight: Weight, bias: Tensor | None) -> nn.Module:
        """Return a linear layer, with what the adapter adds where it adds something."""
        part, delta = super().linear(weight, bias), self._deltas.get(id(weight))
        return part if delta is None else _Sum(part, delta)


class _Sum(nn.Module):
    def __init__(self, part: nn.Module, delta: Callable[[], Tensor]) -> None:
        super().__init__()
        self.part, self._delta = part, delta
        self.in_features, self.out_features = part.in_features, part.out_features

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.part(x) + F.linear(x, self._delta())
        return made
