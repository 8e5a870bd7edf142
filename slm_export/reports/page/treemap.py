"""Where the bytes are: nested rectangles with areas in proportion, blocks of the model first, their parts inside.

Source: Bruls, Huizing, van Wijk, "Squarified Treemaps" (2000).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from slm_export.reports.details import WeightRow

_ASPECT = 1.5
"""Width by height that rectangles are laid out for: between a phone's and a desk's."""
_SMALLEST = 1 / 2000
"""Of the whole; smaller parts of a block are drawn as one."""
COLOURS = 6
"""Kinds of parts that have a colour of their own; the rest share one."""


@dataclass(frozen=True)
class Box:
    """A rectangle; everything in percent of the whole drawing."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Cell:
    """One part of one block."""

    box: Box
    title: str
    label: str
    """Short; empty where the group's own label says it."""
    bytes: int
    kind: int
    """Index of its kind in the legend, which is its colour; `COLOURS` for the rest."""


@dataclass(frozen=True)
class Group:
    """A block of the model with its parts, or a part outside all blocks."""

    box: Box
    label: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Kind:
    """A line of the legend."""

    index: int
    name: str
    bytes: int
    values: int
    share: float
    bits: str


@dataclass(frozen=True)
class Treemap:
    """Groups to draw, and the legend, largest first."""

    groups: tuple[Group, ...]
    kinds: tuple[Kind, ...]


def treemap(rows: Sequence[WeightRow]) -> Treemap:
    """Lay out the weights of a model; empty where there are none."""
    rows = [row for row in rows if row.bytes]
    kinds = _kinds(rows)
    index = {kind.name: kind.index for kind in kinds}
    blocks: dict[str, list[WeightRow]] = {}
    for row in rows:
        blocks.setdefault(_block_of(row), []).append(row)
    sizes = {label: sum(row.bytes for row in members) for label, members in blocks.items()}
    order = sorted(sizes, key=lambda label: -sizes[label])
    total = sum(sizes.values())
    boxes = squarify([sizes[label] for label in order], Box(0, 0, 100, 100))
    groups = (
        Group(box, label, tuple(_cells(blocks[label], box, total, index)))
        for label, box in zip(order, boxes, strict=True)
    )
    return Treemap(tuple(groups), kinds)


def kind_of(row: WeightRow) -> str:
    """Return what a weight is counted as: its role, or the component of its block that it belongs to."""
    if row.layer is None:
        return row.role if row.role in ("embedding", "head", "table") else "outside blocks"
    return row.part.split(".")[0]


def _block_of(row: WeightRow) -> str:
    if row.layer is not None:
        return f"layer {row.layer}"
    return row.role if row.role in ("embedding", "head") else row.part


def squarify(sizes: Sequence[float], box: Box) -> list[Box]:
    """Return a rectangle within ``box`` for every size (in descending order), areas in proportion."""
    total = sum(sizes)
    if not total:
        return []
    # Sides as they will be seen: percent of the width are longer than percent of the height.
    width, height = box.width * _ASPECT, box.height
    scale = width * height / total
    made = _place([size * scale for size in sizes], box.x * _ASPECT, box.y, width, height)
    return [Box(x / _ASPECT, y, w / _ASPECT, h) for x, y, w, h in made]


def _place(
    areas: Sequence[float], x: float, y: float, width: float, height: float
) -> Iterator[tuple[float, float, float, float]]:
    """Yield x, y, width, height of each area: row after row along the shorter side, as square as can be."""
    start = 0
    while start < len(areas):
        side = max(min(width, height), 1e-9)
        end = start + 1
        while end < len(areas) and _worst(areas[start : end + 1], side) <= _worst(areas[start:end], side):
            end += 1
        depth = sum(areas[start:end]) / side
        along = 0.0
        for area in areas[start:end]:
            length = area / max(depth, 1e-9)
            yield (x, y + along, depth, length) if height <= width else (x + along, y, length, depth)
            along += length
        if height <= width:
            x, width = x + depth, width - depth
        else:
            y, height = y + depth, height - depth
        start = end


def _worst(areas: Sequence[float], side: float) -> float:
    """Return the largest ratio of sides in a row of these areas along ``side``."""
    total = sum(areas)
    return max(max(side**2 * area / total**2, total**2 / (side**2 * area)) for area in areas)


def _cells(rows: Sequence[WeightRow], box: Box, total: int, index: dict[str, int]) -> Iterator[Cell]:
    shown = [row for row in rows if row.bytes >= _SMALLEST * total]
    small = [row for row in rows if row.bytes < _SMALLEST * total]
    parts = [(row.part, row.bytes, index[kind_of(row)]) for row in shown]
    if small:
        name = small[0].part if len(small) == 1 else f"{len(small)} small parts"
        parts.append((name, sum(row.bytes for row in small), COLOURS))
    parts.sort(key=lambda part: -part[1])
    boxes = squarify([size for _, size, _ in parts], box)
    for (title, size, kind), place in zip(parts, boxes, strict=True):
        label = title.rpartition(".")[2] if len(parts) > 1 else ""
        yield Cell(place, title, label, size, kind)


def _kinds(rows: Sequence[WeightRow]) -> tuple[Kind, ...]:
    members: dict[str, list[WeightRow]] = {}
    for row in rows:
        members.setdefault(kind_of(row), []).append(row)
    total = sum(row.bytes for row in rows)
    sizes = {name: sum(row.bytes for row in group) for name, group in members.items()}
    return tuple(
        Kind(
            min(index, COLOURS),
            name,
            sizes[name],
            sum(row.values for row in members[name]),
            sizes[name] / total,
            _bits(members[name]),
        )
        for index, name in enumerate(sorted(sizes, key=lambda name: -sizes[name]))
    )


def _bits(rows: Sequence[WeightRow]) -> str:
    """Return ``8 bits``, or ``4, 8 bits`` where weights differ."""
    return f"{', '.join(map(str, sorted({row.bits for row in rows})))} bits"
