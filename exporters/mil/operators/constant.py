"""Constants that are dequantized when they are used: whole where they fit a budget, else in blocks of rows."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from slm_export.exporters.mil.blob import Packed
from slm_export.exporters.mil.operators.registry import wide

_BLOCK = 1 << 18  # values of a matrix that stand in memory as float32 at a time: as many as caches hold


class Constant(ABC):
    """A tensor known before anything runs, of which rows can be had without the rest."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.pool: Pool | None = None
        """Where `ready` finds memory to keep what it makes."""
        self._ready: Tensor | None = None

    @abstractmethod
    def rows(self, begin: int, end: int) -> Tensor:
        """Return rows [begin, end) along the first dimension, rounded to the type of the constant."""

    @abstractmethod
    def take(self, index: Tensor) -> Tensor:
        """Return the rows at int64 index (n,), rounded to the type of the constant; only these are read."""

    def tensor(self) -> Tensor:
        """Return all of it."""
        return self.rows(0, self.shape[0])

    @property
    def ready_bytes(self) -> int:
        """What `ready` takes."""
        return math.prod(self.shape) * (4 if self.dtype.is_floating_point else self.dtype.itemsize)

    def ready(self) -> Tensor | None:
        """Return all of it as it is computed with (fp16 as float32), or None where that may not be kept."""
        if self._ready is None and self.pool is not None and self.pool.admits(self.ready_bytes):
            self._ready = wide(self.tensor())
        return self._ready

    def blocks(self) -> Iterator[Tensor]:
        """Yield all rows in order, as they are computed with, a few at a time."""
        step = max(1, _BLOCK // max(1, math.prod(self.shape[1:])))
        for begin in range(0, self.shape[0], step):
            yield wide(self.rows(begin, min(begin + step, self.shape[0])))


class Stored(Constant):
    """A constant as it lies in the file."""

    def __init__(self, packed: Packed) -> None:
        super().__init__(packed.shape, packed.element.dtype)
        self.packed = packed

    def rows(self, begin: int, end: int) -> Tensor:
        """Return rows of the file."""
        return self.packed.rows(begin, end)

    def take(self, index: Tensor) -> Tensor:
        """Return rows of the file."""
        return self.packed.take(index)

    def tensor(self) -> Tensor:
        """Return a view of the file; a scalar has no rows."""
        return self.packed.tensor()

    @property
    def ready_bytes(self) -> int:
        """Nothing where `ready` is a view of the file."""
        return 0 if self.dtype != torch.float16 and self.packed.element.bits >= 8 else super().ready_bytes


class Pool:
    """The constants of a package, each made once for all its functions, and the memory that ready ones may take."""

    def __init__(self, budget: int) -> None:
        self._left = budget
        self._made: dict[Any, tuple[tuple[Constant, ...], Any]] = {}

    def once(
        self, key: Any, make: Callable[[], Constant | tuple[Constant, ...]], operands: Any
    ) -> tuple[Constant, ...]:
        """Return the constants of a key; operands live as long as they do, so that their ids in the key are theirs."""
        if key not in self._made:
            made = make()
            constants = (made,) if isinstance(made, Constant) else made
            for constant in constants:
                constant.pool = self
            self._made[key] = constants, operands
        return self._made[key][0]

    def stored(self, packed: Packed) -> Constant:
        """Return a constant of the file."""
        (constant,) = self.once(id(packed), lambda: Stored(packed), packed)
        return constant

    def admits(self, size: int) -> bool:
        """Return whether this many bytes are left, and take them."""
        if size > self._left:
            return False
        self._left -= size
        return True


def dense(x: Tensor | Constant) -> Tensor:
    """Return a tensor, whatever is given."""
    return x if isinstance(x, Tensor) else x.tensor()
