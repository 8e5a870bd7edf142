"""The same export gives the same bytes; and the command that says so can tell when it does not."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, environment
from sample_reports import make

COMMAND = ROOT / "benchmarks" / "determinism.py"


@pytest.fixture(scope="module")
def determinism() -> ModuleType:
    spec = importlib.util.spec_from_file_location("determinism", COMMAND)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["determinism"] = module
    spec.loader.exec_module(module)
    return module


def test_only_what_is_timed_may_differ(determinism: ModuleType, tmp_path: Path) -> None:
    first, other = (make(tmp_path / name) for name in ("one", "two"))
    before = dict(determinism.contents(first))

    def differing() -> dict[str, str]:
        after = dict(determinism.contents(other))
        assert list(after) == list(before)
        verdicts = {name: determinism.difference(before[name], after[name]) for name in before}
        return {name: verdict for name, verdict in verdicts.items() if verdict != "same"}

    def write(change: dict[str, object]) -> None:
        report = json.loads((first / "report.json").read_text())
        (other / "report.json").write_text(json.dumps({**report, **change}))

    write({"seconds": 1e6, "stages": {}, "peak_rss_mb": 1.0})
    assert differing() == {}
    write({"device": "another"})
    assert differing() == {"report.json": 'differs in device ("oneplus-12", "another")'}
    write({})
    artifact = other / "executorch" / "model.pte"
    content = artifact.read_bytes()
    artifact.write_bytes(content[:1000] + b"?" + content[1001:])
    assert differing() == {"executorch/model.pte": "differs at byte 1,000"}


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "executorch", "litert", "coreml"])
def test_an_export_gives_the_same_bytes_under_other_circumstances(format: str, tiny_llama: Path) -> None:
    arguments = [str(tiny_llama), "--format", format, "--no-verify"]
    done = subprocess.run(
        [sys.executable, str(COMMAND), *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("0 files differ\n")
