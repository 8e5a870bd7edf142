"""Round a matrix onto the integer grid so that its products with measured inputs change least.

With G the mean of x x^T over the inputs x, rounding W (out, in) to Q costs tr((W - Q) G (W - Q)^T) per input. It is
lessened in turn, and never raised:

    weighted_scales  a scale per group by search, columns weighted by the diagonal of G
    feed_back        codes, column by column, each column's error made good by those after it (Frantar et al.,
                     "GPTQ", 2022); columns of large inputs first
    descend          one code at a time to the best value given all others (Behdin et al., "QuantEase", 2023)
    refit            the scales of least cost, given all codes: one small linear system per row

Matrices are kept as (in, out) while columns are worked on, because those are then contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slm_export.weights import CODE_RANGE, SMALLEST_SCALE, Quantized, grid_scale, quantized

_CLIPS = {
    4: (10.0, 9.3, 8.7, 8.2, 7.8, 7.4, 7.0, 6.7, 6.4, 6.0),
    8: (135.0, 131.0, 129.0, 127.0),
}
"""The largest magnitude is mapped to these codes: from a little beyond the range (which clips it) to inside."""
_COLUMNS = 128  # whose effect on the columns behind them is applied at once
_VALUES = 1 << 18  # of a matrix whose scales are sought at a time: they stay in cache
_REFIT_VALUES = 1 << 21  # of a matrix whose scales are fitted at a time


@dataclass(frozen=True)
class Compensation:
    """How hard to try."""

    damping: float = 0.01
    """Added to the diagonal of G, as a share of its mean: what keeps few inputs from being trusted too far."""
    rounds: int = 2
    """Of descend and refit, after the first feedback."""
    act_order: bool = True
    """Whether columns of large inputs come first."""


def round_matrix(values: Tensor, gram: Tensor, bits: int, group: int, how: Compensation) -> Quantized:
    """Return ``values``, floats (out, in), on the grid; ``gram`` is float32 (in, in)."""
    values = values.float()
    gram = damped(gram, how.damping)
    scales = weighted_scales(values, gram.diagonal(), bits, group)
    codes = feed_back(values, gram, scales, bits, how.act_order)
    for _ in range(how.rounds):
        codes = descend(values, gram, codes, scales, bits)
        scales = refit(values, gram, codes, scales)
    if how.rounds:
        codes = descend(values, gram, codes, scales, bits)
    return quantized(codes.to(torch.int8), scales, bits)


def damped(gram: Tensor, damping: float) -> Tensor:
    """Return the matrix with a share of its mean diagonal added; inputs that are never there count as much."""
    mean = gram.diagonal().mean().clamp_min(1e-12)
    return gram + damping * mean * torch.eye(gram.shape[0])


def cost(values: Tensor, gram: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Return (out,): what rounding each row costs per input."""
    error = values - _values(codes, scales)
    return ((error @ gram) * error).sum(-1)


def weighted_scales(values: Tensor, weights: Tensor, bits: int, group: int) -> Tensor:
    """Return the scales, float32 (out, groups) on the grid, of least squared error, columns weighted (in,)."""
    # The diagonal of a matrix is a view whose every value lies in a cache line of its own.
    weights = weights.contiguous()
    return torch.cat([_weighted_scales(rows, weights, bits, group) for rows in _few(values, _VALUES)])


def _weighted_scales(values: Tensor, weights: Tensor, bits: int, group: int) -> Tensor:
    groups = values.view(values.shape[0], -1, group)
    per_column = weights.view(-1, group)
    weighted = groups * per_column
    largest = groups.abs().amax(-1)
    best = grid_scale(largest / CODE_RANGE[bits][1])
    least = _weighted_error(groups, best, per_column, bits)
    for clip in _CLIPS[bits]:
        scale = largest / clip
        for _ in range(2):
            codes = nearest(groups, scale.clamp_min(SMALLEST_SCALE).unsqueeze(-1), bits)
            product = (codes * weighted).sum(-1)
            scale = product / codes.square_().mul_(per_column).sum(-1).clamp_min(1e-30)
        scale = grid_scale(scale)
        error = _weighted_error(groups, scale, per_column, bits)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def feed_back(values: Tensor, gram: Tensor, scales: Tensor, bits: int, act_order: bool = True) -> Tensor:
    """Return codes, float32 (out, in), by error feedback."""
    diagonal = gram.diagonal() if act_order else torch.zeros(len(gram))
    order = diagonal.argsort(descending=True, stable=True)
    upper = _inverse_factor(gram[order][:, order])
    group = values.shape[1] // scales.shape[1]
    columns, steps = values.t()[order].contiguous(), scales.t().contiguous()
    codes = torch.empty_like(columns)
    for start in range(0, len(order), _COLUMNS):
        stop = min(start + _COLUMNS, len(order))
        errors = torch.empty(stop - start, columns.shape[1])
        for j in range(start, stop):
            step = steps[order[j] // group]
            codes[j] = nearest(columns[j], step, bits)
            errors[j - start] = (columns[j] - codes[j] * step) / upper[j, j]
            columns[j + 1 : stop].addr_(upper[j, j + 1 : stop], errors[j - start], alpha=-1)
        columns[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
    back = torch.empty_like(codes)
    back[order] = codes
    return back.t().contiguous()


def descend(values: Tensor, gram: Tensor, codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Return codes after one sweep: each in turn takes the value of least cost, given all others."""
    group = values.shape[1] // scales.shape[1]
    slope = gram @ (values - _values(codes, scales)).t()
    columns, steps = codes.t().contiguous(), scales.t().contiguous()
    for start in range(0, len(columns), _COLUMNS):
        stop = min(start + _COLUMNS, len(columns))
        moved = torch.empty(stop - start, columns.shape[1])
        for j in range(start, stop):
            step = steps[j // group]
            best = nearest(columns[j] * step + slope[j] / gram[j, j], step, bits)
            moved[j - start] = (best - columns[j]) * step
            columns[j] = best
            slope[j:stop].addr_(gram[j, j:stop], moved[j - start], alpha=-1)
        slope[stop:].addmm_(gram[stop:, start:stop], moved, alpha=-1)
    return columns.t().contiguous()


def refit(values: Tensor, gram: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Return the scales of least cost given the codes, rounded to the grid; a row that would lose keeps its own."""
    rows = _rows(values, _REFIT_VALUES)
    together = zip(*(torch.split(part, rows) for part in (values, codes, scales)), strict=True)
    return torch.cat([_refit_rows(w, q, s, gram) for w, q, s in together])


def _refit_rows(values: Tensor, codes: Tensor, scales: Tensor, gram: Tensor) -> Tensor:
    rows, count = scales.shape
    group = values.shape[1] // count
    by_group = codes.view(rows, count, group)
    system = torch.empty(rows, count, count)
    for g in range(count):
        # It is symmetric: what lies before the diagonal is known.
        reached = by_group[:, g] @ gram[g * group : (g + 1) * group, g * group :]
        system[:, g, g:] = (reached.view(rows, count - g, group) * by_group[:, g:]).sum(-1)
        system[:, g:, g] = system[:, g, g:]
    residual = (values - _values(codes, scales)) @ gram
    wanted = (residual.view(rows, count, group) * by_group).sum(-1)
    # Groups without a code other than 0 have no say; the share of the diagonal keeps the system regular.
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal += 1e-4 * diagonal.mean(-1, keepdim=True) + 1e-12
    # Not torch.linalg.solve: its batched LU, in several threads, is wrong or hangs from 150 groups on
    # (https://github.com/pytorch/pytorch/issues/142815).
    lower, failed = torch.linalg.cholesky_ex(system)
    moved = torch.cholesky_solve(wanted.unsqueeze(-1), lower).squeeze(-1)
    solved = (failed == 0).unsqueeze(-1) & (scales + moved > SMALLEST_SCALE) & by_group.any(-1)
    made = torch.where(solved, grid_scale(scales + moved), scales)
    step = made - scales
    change = ((system @ step.unsqueeze(-1)).squeeze(-1) - 2 * wanted) * step
    return torch.where(change.sum(-1, keepdim=True) < 0, made, scales)


def _inverse_factor(gram: Tensor) -> Tensor:
    """Return upper U with U^T U = gram^-1; more damping where the machine's precision calls for it."""
    assert gram.isfinite().all(), "second moments of activations that are no numbers"
    more = 0.0
    while True:
        lower, failed = torch.linalg.cholesky_ex(damped(gram, more) if more else gram)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return torch.as_tensor(upper)
        more = max(1e-3, more * 10)


def _few(values: Tensor, most: int) -> tuple[Tensor, ...]:
    return torch.split(values, _rows(values, most))


def _rows(values: Tensor, most: int) -> int:
    return max(1, most // values.shape[1])


def nearest(values: Tensor, step: Tensor, bits: int) -> Tensor:
    """Return the codes next to values, float32, of steps of the same shape or one that broadcasts."""
    return (values / step).round_().clamp_(*CODE_RANGE[bits])


def _values(codes: Tensor, scales: Tensor) -> Tensor:
    return (codes.view(*scales.shape, -1) * scales.unsqueeze(-1)).view(codes.shape)


def _weighted_error(groups: Tensor, scales: Tensor, weights: Tensor, bits: int) -> Tensor:
    steps = scales.unsqueeze(-1)
    missed = nearest(groups, steps, bits).mul_(steps).sub_(groups)
    return missed.square_().mul_(weights).sum(-1)
