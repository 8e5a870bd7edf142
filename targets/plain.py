"""A bundle of plain files, measured on this machine: what the targets here have in common."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from slm_export.latency import measure
from slm_export.profile import FORMATS
from slm_export.results import Latency
from slm_export.runtime import Proven
from slm_export.tokenization.tokenizer import SourceTokenizer
from slm_export.tokenization.tokenizer_bundle import write_tokenizer


class PlainFolder:
    """Needs nothing beyond the exporters; puts ``tokenizer/`` beside the artifacts."""

    formats: ClassVar[tuple[str, ...]] = FORMATS

    def ready(self) -> None:
        """Nothing is needed."""

    def bundle(self, tokenizer: SourceTokenizer, folder: Path) -> None:
        """Write ``tokenizer/``."""
        write_tokenizer(tokenizer, folder / "tokenizer")

    def finish(self, made: Proven, folder: Path) -> tuple[str, ...]:
        """Nothing more is needed: apps open plain files."""
        return ()

    def benchmark(self, path: Path, format: str, task: str) -> Latency:
        """Measure on this machine."""
        return measure(path, format, task)
