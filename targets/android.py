"""Android: the program and its tokenizer, and ``android/``, from which an app's build takes them with a small API.

The runtimes open plain files by path; the code in ``android/`` brings them from an app's assets into its own storage.
No phone is needed here: speed is measured on this machine, and the report says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from slm_export.runtime import Proven
from slm_export.targets.android_library import write_library
from slm_export.targets.plain import PlainFolder


class Android(PlainFolder):
    """See the module."""

    name: ClassVar[str] = "android"

    def finish(self, made: Proven, folder: Path) -> tuple[str, ...]:
        """Write the Gradle modules and the code around the artifact; say so where Play's limit of an app is passed."""
        delivery = write_library(made, folder)
        return () if delivery.delivery == "app" else (delivery.note,)
