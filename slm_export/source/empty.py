"""Modules built without their weights, within bounds: a configuration of a few lines can ask for any number of them.

The matrices of every layer come from ``torch.empty`` and are put on the meta device; computed buffers are real.
``torch.device("meta")`` would swallow those too, such as the frequencies of a rotary embedding, which no checkpoint
holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from slm_export.errors import InputError

MOST_VALUES = 1 << 26
"""Of one buffer that is computed; a causal mask of 8192 positions is as large."""
SPARE = 1000
"""Parameters that a module may have beyond twice the tensors of its files; each is missing, which is told later."""


@contextmanager
def empty_on_meta(tensors: int | None) -> Iterator[None]:
    """Let ``torch.empty`` make meta tensors.

    Given   tensors: how many the files hold; None: no bound

    Raises:
        InputError: more parameters, or a larger buffer, than a model with these files can have.
    """
    most = None if tensors is None else 2 * tensors + SPARE
    made = 0

    class EmptyOnMeta(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal made
            kwargs = dict(kwargs or {})
            made += func in _FILLED
            if most is not None and made > most:
                raise InputError(
                    f"it asks for more than {most:,} parameters, where the files hold {tensors:,}"
                )
            if func is torch.empty:
                kwargs["device"] = "meta"
            elif (values := _values(func, args, kwargs)) > MOST_VALUES:
                raise InputError(f"it asks for a buffer of {values:,} values")
            return func(*args, **kwargs)

    with EmptyOnMeta():
        yield


_FILLED = (torch.empty, torch.ones, torch.zeros, torch.full)


def _values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return how many values a function that makes a tensor of nothing makes; 0 of any other."""
    if func is torch.arange:
        numbers = [float(number) for number in args[:3]] or [float(kwargs.get("end", 0))]
        begin, end = (0.0, numbers[0]) if len(numbers) == 1 else numbers[:2]
        step = numbers[2] if len(numbers) == 3 else float(kwargs.get("step", 1))
        return int(abs((kwargs.get("end", end) - begin) / (step or 1)))
    if func not in _FILLED:
        return 0
    size = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
    return math.prod(int(extent) for extent in size)
