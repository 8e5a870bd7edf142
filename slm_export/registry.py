"""The formats and targets there are: name -> what makes it. Adding one is a file and a line here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from slm_export.errors import InputError, suggestion
from slm_export.runtime import Exporter, Target

_EXPORTERS: Mapping[str, str] = {
    "executorch": "executorch:ExecuTorchExporter",
    "litert": "litert:LiteRTExporter",
    "onnx": "onnx:OnnxExporter",
    "coreml": "coreml:CoreMLExporter",
}
_TARGETS: Mapping[str, str] = {
    "android": "android:Android",
    "ios": "ios:Ios",
    "linux": "linux:Linux",
    "host": "host:Host",
}


def exporter(format: str) -> Exporter:
    """Return the exporter of a format; InputError where there is none."""
    made: Exporter = _make("exporters", _EXPORTERS, format, "format")
    return made


def target(name: str) -> Target:
    """Return a target; InputError where there is none."""
    made: Target = _make("targets", _TARGETS, name, "target")
    return made


def _make(folder: str, table: Mapping[str, str], name: str, kind: str):  # type: ignore[no-untyped-def]
    if name not in table:
        raise InputError(f"unknown {kind} '{name}'{suggestion(name, table)}")
    module, _, cls = table[name].partition(":")
    return getattr(importlib.import_module(f"slm_export.{folder}.{module}"), cls)()
