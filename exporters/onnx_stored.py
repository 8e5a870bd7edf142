"""Weights as they lie in an ONNX file, and what stands in for them while a graph is traced.

float   NAME            float32 or float16 (out, in); of a norm or a bias float32 (out,)
int4    NAME.codes      uint8 (out, groups, group / 2): code + 8, even column in the low nibble
NAME.scales     float32 (out, groups)
int8    NAME.columns    int8 (in, out), where a matrix product reads it
NAME.codes      int8 (out, in), where rows are looked up
NAME.scales     float32 (out,)
NAME.sums       float32 (out,): scale times the sum of the codes, beside NAME.columns
"""

from __future__ import annotations

import torch
from torch import Tensor

from slm_export.weights import Dense, Weight, on_grid

CODES, COLUMNS, SCALES, SUMS = ".codes", ".columns", ".scales", ".sums"


class Stored:
    """What a file holds of one weight.

    Given   by_column: int8 for a matrix product, which wants (in, out)
    """

    def __init__(self, name: str, weight: Weight, by_column: bool = False) -> None:
        weight = on_grid(weight)
        self.name, self.weight, self.by_column = name, weight, by_column
        self.stand_ins: dict[str, Tensor] = {}
        """Initializer -> a tensor of its dtype and shape that takes no memory."""
        if isinstance(weight, Dense):
            self._add("", torch.float16 if weight.dtype == torch.float16 else torch.float32, weight.shape)
            return
        rows, columns = weight.shape
        if weight.bits == 4:
            groups = columns // weight.group
            self._add(CODES, torch.uint8, (rows, groups, weight.group // 2))
            self._add(SCALES, torch.float32, (rows, groups))
        else:
            if by_column:
                self._add(COLUMNS, torch.int8, (columns, rows))
                self._add(SUMS, torch.float32, (rows,))
            else:
                self._add(CODES, torch.int8, (rows, columns))
            self._add(SCALES, torch.float32, (rows,))

    def __getitem__(self, suffix: str) -> Tensor:
        return self.stand_ins[self.name + suffix]

    def tensor(self, name: str) -> Tensor:
        """Return the real content of an initializer, contiguous."""
        if isinstance(self.weight, Dense):
            made = self.weight.load() if self.weight.dtype == torch.float16 else self.weight.float32()
        elif name.endswith(SCALES):
            made = self.weight.scales
        elif name.endswith(SUMS):
            made = self.weight.packed.sum(dim=1, dtype=torch.int32) * self.weight.scales.squeeze(1)
        elif self.weight.bits == 4:
            # Two's complement -> offset 8: the sign bit of each nibble flipped.
            made = self.weight.packed ^ 0x88
        else:
            made = self.weight.packed.t() if self.by_column else self.weight.packed
        return made.reshape(self.stand_ins[name].shape).contiguous()

    def _add(self, suffix: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.stand_ins[self.name + suffix] = torch.zeros((), dtype=dtype).expand(shape)
