"""Linux boards: the artifact and its tokenizer, as LiteRT-LM, onnxruntime-genai or ExecuTorch's C++ runners open them.

Speed is measured on this machine, and the report says so.
"""

from __future__ import annotations

from typing import ClassVar

from slm_export.targets.plain import PlainFolder


class Linux(PlainFolder):
    """See the module."""

    name: ClassVar[str] = "linux"
