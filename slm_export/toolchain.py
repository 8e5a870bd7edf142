"""The packages that an export is made with."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from slm_export import __version__
from slm_export.compilation import Plan

_TOOLS = ("torch", "transformers", "tokenizers", "safetensors")


def tools_of(plan: Plan) -> tuple[str, ...]:
    """Return the packages that an export is made with."""
    return (*_TOOLS, *(package for exporter in plan.exporters for package in exporter.packages))


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of what an export was made with; a package that is not installed had no part in it."""
    found = {"slm-export": __version__}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
