"""How much memory a cell will take, and how much there is."""

from __future__ import annotations

from pathlib import Path

from slm_export.errors import InputError
from slm_export.matrix.cells import Cell
from slm_export.planning.conversion import conversion_of
from slm_export.planning.model import read_model
from slm_export.source.hub import find_model

MARGIN = 0.1
"""Of the memory that is there, what is left to others."""
_RUNTIME = 250 << 20
"""What a further format's compiler and runtime leave in memory."""
_VERIFYING = 400 << 20
"""What comparing an artifact with its source takes beside the source."""
_CGROUP = Path("/sys/fs/cgroup")


def peak_of(cell: Cell) -> int | None:
    """Return the predicted peak of a cell's export in bytes; None where nothing is known of such a model.

    Formats are written one after the other, so their conversion takes what the worst of them takes (docs/plan.md). What
    comes on top was seen in exports of pycode-5m and MiniLM in one to three formats, and bounds all of them.
    """
    try:
        model = read_model(find_model(str(cell.settings.model), cell.settings.revision))
    except InputError:
        # A Keras model, or one that the export will refuse with its own words.
        return None
    made = [conversion_of(model, format) for format in cell.formats]
    peaks = [one.peak_bytes for one in made if one is not None]
    if len(peaks) < len(made):
        return None
    # The source is mapped, and read as a whole to be compared with.
    verifying = _VERIFYING + model.source_bytes if cell.plan.request.verify else 0
    return max(peaks) + (len(peaks) - 1) * _RUNTIME + verifying


def available_bytes() -> int:
    """Return the memory that exports may take now: what is available, or what a container has left, less a margin."""
    import psutil

    there = [int(psutil.virtual_memory().available)]
    limit, used = (_number(_CGROUP / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        there.append(max(0, limit - used))
    return round((1 - MARGIN) * min(there))


def _number(path: Path) -> int | None:
    """Return the number in a file; None where there is no such file, or it says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
