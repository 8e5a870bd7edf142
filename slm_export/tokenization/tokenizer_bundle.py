"""The ``tokenizer/`` folder of a bundle: the tokenizer's files, unchanged, and a tokenizer.json in any case."""

from __future__ import annotations

from pathlib import Path

from slm_export.tokenization.tokenizer import SourceTokenizer


def write_tokenizer(source: SourceTokenizer, folder: Path) -> None:
    """Write the tokenizer's files to ``folder``, which must not exist yet."""
    folder.mkdir(parents=True)
    for name, content in source.files().items():
        (folder / name).write_bytes(content)
