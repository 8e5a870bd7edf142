"""Imports run one way, the three folders never meet, and heavy packages wait until they are needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("exporters", "optimizers", "targets")
HEAVY = (
    "ai_edge_litert",
    "coremltools",
    "executorch",
    "keras",
    "litert_lm",
    "litert_lm_builder",
    "litert_torch",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxruntime_genai",
    "onnxscript",
    "tensorflow",
    "torchao",
)
# The words that everything else speaks; they know nothing of passes, formats and targets.
CORE = (
    "weights",
    "checkpoint",
    "profile",
    "errors",
    "gates",
    "delegation",
    "results",
    "graph/dialect",
    "runtime",
    "graph/model",
    "source/load",
)
TOP = ("driver", "proof", "commands", "cli", "cli_measuring", "cli_serving", "opened")


def sources() -> list[Path]:
    return [
        path
        for folder in ("slm_export", *FOLDERS, "device_profiles")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not any(parent.is_symlink() for parent in path.parents)
    ]


def imported(path: Path, *, at_the_top_only: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if at_the_top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_there_are_sources() -> None:
    assert len(sources()) > 40


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_folders_never_import_each_other(folder: str) -> None:
    others = tuple(f"slm_export.{other}" for other in FOLDERS if other != folder)
    for path in (ROOT / folder).rglob("*.py"):
        assert not [name for name in imported(path) if name.startswith(others)], path


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_folders_do_not_import_what_drives_them(folder: str) -> None:
    above = tuple(f"slm_export.{name}" for name in (*TOP, "recipe", "registry"))
    for path in (ROOT / folder).rglob("*.py"):
        assert not [name for name in imported(path) if name.startswith(above)], path


def test_the_core_imports_neither_the_folders_nor_the_driver() -> None:
    above = tuple(f"slm_export.{name}" for name in (*FOLDERS, *TOP, "recipe", "registry"))
    for name in CORE:
        path = ROOT / "slm_export" / f"{name}.py"
        assert not [found for found in imported(path) if found.startswith(above)], path


def test_heavy_packages_are_imported_inside_functions() -> None:
    for path in sources():
        found = [name for name in imported(path, at_the_top_only=True) if name.split(".")[0] in HEAVY]
        assert not found, (path, found)


def test_nothing_uses_a_bare_folder_name() -> None:
    tests_and_more = [*(ROOT / "tests").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    for path in (*sources(), *tests_and_more):
        found = [name for name in imported(path) if name.split(".")[0] in (*FOLDERS, "device_profiles")]
        assert not found, (path, found)


def test_the_command_line_needs_no_torch_to_answer() -> None:
    script = (
        "import sys; from slm_export.cli import cli\n"
        "cli.main(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'numpy', 'executorch'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--target android" in done.stdout


def test_a_list_of_devices_needs_no_torch() -> None:
    script = (
        "import sys; from slm_export.cli import cli\n"
        "cli.main(['devices'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pixel-8" in done.stdout
