"""What ``anonymise`` does and prints: kinds and numbers, and nothing of the texts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from slm_export.commands.terminal import working
from slm_export.errors import InputError
from slm_export.privacy.anonymise import Anonymiser
from slm_export.privacy.entities import KINDS, read_entities
from slm_export.privacy.files import REPORT, anonymise_files
from slm_export.privacy.finder import Finder


def anonymise_command(asked: dict[str, Any], as_json: bool) -> None:
    """Anonymise files and say what was found, and what cannot be found this way."""
    own = read_entities(asked["entities"]) if asked["entities"] else ()
    key = _key(asked["how"], asked["key_env"])
    with working() as progress:
        with progress.stage("prepare the recognizers"):
            finder = Finder(asked["only"] or None, own, asked["ner"])
        anonymiser = Anonymiser(finder, asked["how"], key)
        out: Path = asked["out"]
        with progress.stage("anonymise") as stage:
            done = anonymise_files(asked["files"], out, anonymiser, stage.advance)
    if as_json:
        print((out / REPORT).read_text(encoding="utf-8"))
        return
    console = Console()
    table = Table("found", "", "is")
    for kind in finder.kinds:
        table.add_row(kind, f"{done.found.get(kind, 0):,}", KINDS.get(kind, "yours").split(":")[0])
    console.print(table)
    console.print(f"{done.files} files, {done.characters:,} characters, into {out}", markup=False)
    for what in done.blind_to:
        console.print(f"not found without a NER model (--ner): {what}", markup=False)
    console.print("Read a sample before you share it: no tool finds everything (docs/privacy.md).")


def _key(how: str, variable: str | None) -> bytes:
    if how != "hash":
        if variable is not None:
            raise InputError("--key-env is the key of --how hash; leave it out, or ask for that")
        return b""
    if variable is None:
        raise InputError("--how hash needs --key-env NAME: a variable with a secret of at least 16 bytes")
    key = os.environ.get(variable, "").encode()
    if len(key) < 16:
        raise InputError(f"${variable} has {len(key)} bytes; the key of the hash needs at least 16")
    return key
