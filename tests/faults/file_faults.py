"""Artifacts that are not what was written, and what they say of the model."""

from __future__ import annotations

from pathlib import Path

from fault import Fault
from rope_faults import config
from weight_faults import changed

from slm_export.checkpoint import Checkpoint
from slm_export.weights import grid_scale

KIND, METADATA = "files", "metadata"


def _largest(path: Path) -> Path:
    """Return the file that has the weights: of a package, or beside the program, it is another."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    beside = path.with_name(f"{path.name}.data")
    return max([*files, *([beside] if beside.exists() else [])], key=lambda file: file.stat().st_size)


def _flipped(path: Path) -> None:
    """Change one bit amid the weights."""
    file = _largest(path)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def _cut(path: Path) -> None:
    file = _largest(path)
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 9 // 10])


def _empty(path: Path) -> None:
    _largest(path).write_bytes(b"")


def _of_yesterday(checkpoint: Checkpoint) -> Checkpoint:
    """The same model, trained a little less: every scale is a little smaller."""
    return changed("proj.weight", lambda codes, scales: (codes, grid_scale(scales * 0.99)))(checkpoint)


FAULTS = (
    Fault("one bit of the weights is another", KIND, file=_flipped),
    Fault("the last tenth is missing", KIND, file=_cut),
    Fault("nothing is in it", KIND, file=_empty),
    Fault("an artifact of an earlier model", KIND, written=_of_yesterday),
    Fault(
        "another number of tokens", METADATA, formats=("executorch", "onnx"), written=config(vocab_size=4000)
    ),
)
