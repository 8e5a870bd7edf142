"""Temporary files that go with the command that made them, also where it was killed."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slm_export.bundles.held import Held, reclaim

_OURS = re.compile(r"slm-export-\d+-[0-9a-f]{16}")


@contextmanager
def scratch() -> Iterator[Path]:
    """Let all temporary files of this process and its children lie in one folder, and remove it at the end.

    What a killed command left in such a folder is removed by the next one.
    """
    root = Path(tempfile.gettempdir())
    _remove_dead(root)
    held = Held(root / f"slm-export-{os.getpid()}-{secrets.token_hex(8)}", 0o700)
    before, variable = tempfile.tempdir, os.environ.get("TMPDIR")
    tempfile.tempdir = os.environ["TMPDIR"] = str(held.folder)
    try:
        yield held.folder
    finally:
        tempfile.tempdir = before
        del os.environ["TMPDIR"]
        if variable is not None:
            os.environ["TMPDIR"] = variable
        held.leave(remove=True)


def _remove_dead(root: Path) -> None:
    with suppress(OSError), os.scandir(root) as entries:
        for entry in entries:
            if _OURS.fullmatch(entry.name) and entry.stat(follow_symlinks=False).st_uid == os.getuid():
                reclaim(Path(entry.path))
