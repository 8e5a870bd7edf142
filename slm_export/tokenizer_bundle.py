"""The ``tokenizer/`` folder of a bundle: the source's files, unchanged, and a tokenizer.json in any case."""

from __future__ import annotations

import shutil
from pathlib import Path

from slm_export.tokenizer import SourceTokenizer, tokenizer_files


def write_tokenizer(source: SourceTokenizer, folder: Path) -> None:
    """Copy the tokenizer's files to ``folder``, which must not exist yet."""
    folder.mkdir(parents=True)
    for file in tokenizer_files(source.folder):
        shutil.copyfile(file, folder / file.name)
    if not (folder / "tokenizer.json").exists():
        (folder / "tokenizer.json").write_bytes(source.tokenizer_json_bytes())
