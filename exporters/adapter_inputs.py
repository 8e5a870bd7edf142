"""What formats share whose adapters are files of a function's inputs; `adapter_matrices` writes those, with torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from slm_export.runtime import Factors


class AdaptersAsInputs:
    """A part of an exporter: files read back, and the word for a stock runner that knows nothing of them."""

    no_adapter_runner: ClassVar[str | None]

    def stored_factors(self, path: Path, base: Path) -> Mapping[str, Factors]:
        """Return what an adapter's file for the artifact at ``base`` adds to each weight."""
        from slm_export.exporters.adapter_matrices import read_factors

        return read_factors(path, base)

    def generate_adapted(
        self, path: Path, tokenizer: Path, prompt: str, tokens: int, bos: int, adapter: Path
    ) -> str:
        """Not there: see `no_adapter_runner`."""
        raise AssertionError(self.no_adapter_runner)
