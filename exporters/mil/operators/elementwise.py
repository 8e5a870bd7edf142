"""MIL's elementwise arithmetic, comparison and logic. Pages: ``iOS15.elementwise_binary``, ``elementwise_unary``.

Binary operators broadcast as NumPy does and take two operands of one type.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slm_export.errors import InputError
from slm_export.exporters.mil.blob import BY_NAME
from slm_export.exporters.mil.operators.registry import add, operator, same_type, wide

# torch computes these in float32 and rounds to fp16 once by itself (a test compares every pair of a large sample).
_NATIVE: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "equal": torch.eq,
    "not_equal": torch.ne,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
}
_WIDENED: dict[str, Callable[..., Tensor]] = {
    "floor_div": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "mod": torch.remainder,
    "pow": torch.pow,
}
_LOGICAL: dict[str, Callable[..., Tensor]] = {
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
}
# These either choose among fp16 values or, as the product above, are rounded by torch itself.
_EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "ceil": torch.ceil,
    "floor": torch.floor,
    "round": torch.round,
    "sign": torch.sign,
    "square": lambda x: torch.mul(x, x),
}
_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "acos": torch.acos,
    "asin": torch.asin,
    "atan": torch.atan,
    "atanh": torch.atanh,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "erf": torch.erf,
    "exp": torch.exp,
    "exp2": lambda x: torch.exp2(x.float()),
    "sin": torch.sin,
    "sinh": torch.sinh,
    "sqrt": torch.sqrt,
    "tan": torch.tan,
    "tanh": torch.tanh,
}


def _native(function: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def run(x: Tensor, y: Tensor) -> Tensor:
        same_type(x, y)
        return function(x, y)

    return run


def _widened(function: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def run(x: Tensor, y: Tensor) -> Tensor:
        same_type(x, y)
        return function(wide(x), wide(y)).to(x.dtype)

    return run


def _logical(function: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def run(x: Tensor, y: Tensor) -> Tensor:
        if x.dtype != torch.bool or y.dtype != torch.bool:
            raise InputError(f"takes bool, not {x.dtype} and {y.dtype}")
        return function(x, y)

    return run


def _plain(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        return function(x)

    return run


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        return function(wide(x)).to(x.dtype)

    return run


for _kind, _function in _NATIVE.items():
    add(_kind, _native(_function))
for _kind, _function in _WIDENED.items():
    add(_kind, _widened(_function))
for _kind, _function in _LOGICAL.items():
    add(_kind, _logical(_function))
for _kind, _function in _EXACT.items():
    add(_kind, _plain(_function))
for _kind, _function in _UNARY.items():
    add(_kind, _unary(_function))


@operator("real_div")
def real_div(x: Tensor, y: Tensor) -> Tensor:
    """``x / y``; of integers, the quotient without its fraction: iOS15.elementwise_binary."""
    same_type(x, y)
    if x.dtype.is_floating_point:
        return torch.div(x, y)
    return torch.div(x, y, rounding_mode="trunc")


@operator("logical_not")
def logical_not(x: Tensor) -> Tensor:
    """``not x`` of bool: iOS15.elementwise_unary."""
    if x.dtype != torch.bool:
        raise InputError(f"takes bool, not {x.dtype}")
    return torch.logical_not(x)


@operator("inverse")
def inverse(x: Tensor, epsilon: Tensor | float = 1e-4) -> Tensor:
    """``1 / (x + epsilon)``: iOS15.elementwise_unary."""
    return torch.reciprocal(wide(x) + epsilon).to(x.dtype)


@operator("log")
def log(x: Tensor, epsilon: Tensor | float = 1e-45) -> Tensor:
    """``log(x + epsilon)``: iOS15.elementwise_unary."""
    return torch.log(wide(x) + epsilon).to(x.dtype)


@operator("rsqrt")
def rsqrt(x: Tensor, epsilon: Tensor | float = 1e-12) -> Tensor:
    """``1 / sqrt(x + epsilon)``: iOS15.elementwise_unary."""
    return torch.rsqrt(wide(x) + epsilon).to(x.dtype)


@operator("clip")
def clip(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """``x`` held within ``[alpha, beta]``: iOS15.elementwise_unary."""
    return torch.clamp(wide(x), wide(alpha), wide(beta)).to(x.dtype)


@operator("threshold")
def threshold(x: Tensor, alpha: Tensor) -> Tensor:
    """``max(x, alpha)``: iOS15.elementwise_unary."""
    return torch.clamp_min(wide(x), wide(alpha)).to(x.dtype)


@operator("cast")
def cast(x: Tensor, dtype: str) -> Tensor:
    """``x`` in another type: iOS15.elementwise_unary.

    Floats lose their fraction. What lies outside of an integer type's range is not specified; it is held within the
    range and NaN becomes 0, as the conversions of ARM processors do.
    """
    if dtype not in BY_NAME:
        raise InputError(f"casts to '{dtype}', which is no type")
    target = BY_NAME[dtype].dtype
    if target == torch.bool:
        return x != 0
    if not x.dtype.is_floating_point or target.is_floating_point:
        return x.to(target, copy=True)
    limits = torch.iinfo(target)
    return x.double().nan_to_num(0.0, limits.max, limits.min).clamp(limits.min, limits.max).to(target)


@operator("select")
def select(cond: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """``a`` where cond is true, else ``b``; without them the indices where it is true: iOS15.control_flow."""
    if cond.dtype != torch.bool:
        raise InputError(f"takes a condition of bool, not {cond.dtype}")
    if a is None or b is None:
        if a is not None or b is not None:
            raise InputError("takes both a and b, or neither")
        return torch.nonzero(cond).to(torch.int32)
    same_type(a, b)
    return torch.where(cond, a, b)
