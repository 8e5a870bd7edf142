"""The machine that compiles: the program and its tokenizer, measured where they were made."""

from __future__ import annotations

from typing import ClassVar

from slm_export.targets.plain import PlainFolder


class Host(PlainFolder):
    """See the module."""

    name: ClassVar[str] = "host"
