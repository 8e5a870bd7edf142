"""What no format knows, in models that are otherwise ordinary.

    python tests/planted.py ARGS

is ``slm-export ARGS`` with an unknown operator in place of SiLU and GELU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NAME = "slm_test.odd.default"


@torch.library.custom_op("slm_test::odd", mutates_args=())
def odd(x: Tensor) -> Tensor:
    """Return what nobody needs to compute."""
    return x * 2


@odd.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Odd(nn.Module):
    """Stands in for an activation."""

    def forward(self, x: Tensor) -> Tensor:
        """Return it by the operator."""
        made: Tensor = torch.ops.slm_test.odd(x)
        return made


def plant_operator() -> None:
    """Let every model compute its activation by `odd`, in this process."""
    from transformers.activations import ACT2FN

    ACT2FN |= {"silu": Odd, "gelu": Odd}


def attend_to_half(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
) -> Any:
    """Attend with values of half the width of their keys, as DeepSeek does with some."""
    from slm_export.graph.model import _attend

    return _attend(module, query, key, value[..., : value.shape[3] // 2], *args, **options)


if __name__ == "__main__":
    from slm_export.cli import main

    plant_operator()
    main()
