"""Android: the program and its tokenizer, as ``LlmModule`` and ``Module`` of executorch-android open them.

Both take paths of plain files, so an app ships them in an asset pack or downloads them, and keeps them in its
own storage. No phone is needed here: speed is measured on this machine, and the report says so.
"""

from __future__ import annotations

from typing import ClassVar

from slm_export.targets.plain import PlainFolder


class Android(PlainFolder):
    """See the module."""

    name: ClassVar[str] = "android"
