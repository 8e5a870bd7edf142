"""Which formats and recipes can keep adapters apart, said before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from slm_export.errors import InputError
from slm_export.runtime import AdapterExporter, Exporter
from slm_export.source.adapters import check_adapter

SAME_INPUTS = ("group-quantize", "gptq", "learned-rounding")
"""Passes that leave a matrix the inputs that it had; what an adapter learned holds for no others."""
_CANNOT: Mapping[str, str] = {
    "coreml": "what runs packages gives them tokens and a mask, and functions of one package cannot be added to",
}


def refuse_adapters(
    adapters: Sequence[tuple[str, Path]],
    passes: Sequence[str],
    exporters: Sequence[Exporter],
    *,
    searched: bool,
) -> None:
    """Raise InputError where there is no adapter, or it cannot be kept apart.

    Given   passes: names of the recipe's passes, in order
            searched: whether the recipe is still to be found
    """
    if not adapters:
        return
    for name, folder in adapters:
        check_adapter(name, folder)
    for made in exporters:
        if not isinstance(made, AdapterExporter):
            raise InputError(
                f"--adapter: format {made.name} cannot keep adapters apart: {_CANNOT[made.name]} (docs/adapters.md); "
                "export onnx, or merge the adapter: give it as MODEL"
            )
    if searched:
        raise InputError(
            "--adapter: a budget searches for a recipe that may change what adapters were trained on; leave out the "
            'budget, and put what it finds ("recipe" of manifest.json) into slm-export.toml as [[passes]]'
        )
    if changing := [name for name in passes if name not in SAME_INPUTS]:
        raise InputError(
            f"--adapter: pass {changing[0]} changes what matrices are given, so an adapter that was trained before it "
            f"no longer fits; only {', '.join(SAME_INPUTS)} do not (or merge the adapter: give it as MODEL)"
        )


def notes_on(adapters: Sequence[tuple[str, Path]], exporters: Sequence[Exporter]) -> tuple[str, ...]:
    """Return what people should know of the formats that adapters are for."""
    return tuple(
        f"{made.name}: {made.no_adapter_runner}"
        for made in exporters
        if adapters and isinstance(made, AdapterExporter) and made.no_adapter_runner
    )
