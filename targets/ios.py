"""iPhone, iPad and Mac: the bundle is a Swift package that an app adds as it is.

The artifact and the tokenizer stay where they are in every bundle; ``Package.swift`` names them as resources, and
``Sources/`` holds the code that loads and runs them. A program for ExecuTorch is measured on this machine, and the
report says so; Core ML runs on Apple's systems alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from slm_export.runtime import Proven
from slm_export.targets.ios_package import FORMATS, write_package
from slm_export.targets.ios_tokenizer import check_tokenizer
from slm_export.targets.plain import PlainFolder
from slm_export.tokenization.tokenizer import SourceTokenizer


class Ios(PlainFolder):
    """See the module."""

    name: ClassVar[str] = "ios"
    formats: ClassVar[tuple[str, ...]] = FORMATS

    def bundle(self, tokenizer: SourceTokenizer, folder: Path) -> None:
        """Write ``tokenizer/``.

        Raises:
            InputError: no tokenizer in Swift reads this kind.
        """
        super().bundle(tokenizer, folder)
        check_tokenizer(folder / "tokenizer")

    def finish(self, made: Proven, folder: Path) -> tuple[str, ...]:
        """Write the Swift package around the artifact."""
        write_package(made, folder)
        return ()
