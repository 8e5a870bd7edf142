"""Axes and points of the plots, in percent of the drawing area: it stretches with the page, its text does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from slm_export.reports.details import FrontierPoint, Prediction
from slm_export.reports.words import figure, megabytes

_MARGIN = 0.06
"""Of the range of the data, left free on both sides."""


@dataclass(frozen=True)
class Axis:
    """Maps values to percent of the drawing area."""

    low: float
    high: float
    logarithmic: bool
    show: Callable[[float], str] | None = None
    """How a tick reads; by default with as many decimals as tell ticks apart."""

    def at(self, value: float) -> float:
        """Return where a value is, 0 to 100."""
        low, high, value = (self._scale(v) for v in (self.low, self.high, value))
        return 100 * (value - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """Return (where, text) of some round values."""
        values = _decades(self.low, self.high) if self.logarithmic else _round_steps(self.low, self.high)
        return [(self.at(value), (self.show or _fixed(values))(value)) for value in values]

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value


def linear(values: Sequence[float], show: Callable[[float], str] | None = None) -> Axis:
    """Return an axis that all values fit on, with room around them."""
    low, high = min(values), max(values)
    room = _MARGIN * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(low - room, high + room, False, show)


def logarithmic(values: Sequence[float], show: Callable[[float], str]) -> Axis:
    """Return an axis of whole decades that all values (positive) fit on."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return Axis(10.0**low, 10.0 ** (high if high > low else low + 1), True, show)


def _fixed(values: Sequence[float]) -> Callable[[float], str]:
    step = min((b - a for a, b in pairwise(values)), default=1.0)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return lambda value: f"{value:.{decimals}f}"


def _decades(low: float, high: float) -> list[float]:
    return [10.0**power for power in range(round(math.log10(low)), round(math.log10(high)) + 1)]


def _round_steps(low: float, high: float) -> list[float]:
    """Return three to seven multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step)
    return [step * index for index in range(first, math.floor(high / step) + 1)]


@dataclass(frozen=True)
class Mark:
    """A point; in percent, y from the top."""

    x: float
    y: float
    title: str
    label: str = ""
    measured: bool = True
    chosen: bool = False
    colour: int = 0


@dataclass(frozen=True)
class Line:
    """A straight line; in percent, y from the top."""

    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True)
class Plot:
    """Points and lines over two axes."""

    title: str
    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    """From the bottom, as everywhere but in `Mark` and `Line`."""
    marks: tuple[Mark, ...]
    lines: tuple[Line, ...] = ()


@dataclass(frozen=True)
class Sized:
    """A recipe: its size, and the quality that is predicted and measured of it."""

    label: str
    bytes: int
    predicted: float | None
    measured: float | None
    chosen: bool


def frontier(points: Sequence[FrontierPoint]) -> Plot | None:
    """Return size against perplexity ratio; None without a point that has both."""
    made = [
        Sized(p.label, p.bytes, p.predicted_perplexity_ratio, p.measured_perplexity_ratio, p.chosen)
        for p in points
    ]
    return size_against("perplexity ratio", made)


def size_against(quality: str, points: Sequence[Sized]) -> Plot | None:
    """Return size against a quality, what is predicted on a line; None without a point that has both."""
    values = [value for point in points for value in (point.predicted, point.measured) if value is not None]
    if not values:
        return None
    x = linear([point.bytes for point in points], lambda value: megabytes(round(value)))
    y = linear(values)
    marks, predicted = [], []
    for point in sorted(points, key=lambda point: point.bytes):
        for value, measured in ((point.predicted, False), (point.measured, True)):
            if value is None:
                continue
            word = "measured" if measured else "predicted"
            title = f"{point.label}: {megabytes(point.bytes)}, {quality} {figure(value)} {word}"
            chosen = point.chosen and measured
            label = point.label if chosen else ""
            mark = Mark(x.at(point.bytes), 100 - y.at(value), title, label, measured, chosen)
            marks.append(mark)
            predicted += [] if measured else [mark]
    lines = tuple(Line(a.x, a.y, b.x, b.y) for a, b in pairwise(predicted))
    title = f"Size against {quality}"
    return Plot(title, "size of the artifact", quality, x.ticks(), y.ticks(), tuple(marks), lines)


def roofline(predictions: Sequence[tuple[str, Prediction]]) -> Plot | None:
    """Return the roofline of a machine with what was predicted and measured under it; None without any.

    Given   (format, prediction) of one machine: the roof of the first is drawn
    """
    if not predictions:
        return None
    machine = predictions[0][1]
    ridge = machine.operations_per_s / machine.bytes_per_s
    phases = [(name, phase) for name, prediction in predictions for phase in prediction.phases]
    times = [t for _, phase in phases for t in (phase.predicted_s, phase.measured_s) if t]
    intensities = [phase.operations / phase.bytes for _, phase in phases]
    rates = [phase.operations / t for _, phase in phases for t in (phase.predicted_s, phase.measured_s) if t]
    if not times:
        return None
    x = logarithmic([*intensities, ridge], figure)
    y = logarithmic([*rates, machine.operations_per_s], _rate)
    marks = []
    for name, phase in phases:
        for seconds, measured in ((phase.predicted_s, False), (phase.measured_s, True)):
            if not seconds:
                continue
            rate = phase.operations / seconds
            word = "measured" if measured else "predicted"
            title = f"{name}, {phase.name}: {_rate(rate)} {word}"
            label = f"{phase.name}" if not measured else ""
            at = phase.operations / phase.bytes
            marks.append(Mark(x.at(at), 100 - y.at(rate), title, label, measured))
    start, flat = max(x.low, y.low / machine.bytes_per_s), 100 - y.at(machine.operations_per_s)
    lines = (
        Line(x.at(start), 100 - y.at(start * machine.bytes_per_s), x.at(ridge), flat),
        Line(x.at(ridge), flat, 100, flat),
    )
    return Plot(
        f"Roofline of {machine.where}",
        "operations per byte of memory traffic",
        "operations per second",
        x.ticks(),
        y.ticks(),
        tuple(marks),
        lines,
    )


def _rate(value: float) -> str:
    """Return operations per second as ``10 G``."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}"
