"""A runtime that dies of an artifact is a failed check of `verify`, not the end of it."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from slm_export import opened, probe
from slm_export.child import Child
from slm_export.errors import InputError
from slm_export.judge import Judgement
from slm_export.progress import Progress
from slm_export.results import Check

BUNDLE = Path(__file__).resolve().parent / "hostile" / "good" / "bundle"
ONNX = BUNDLE / "onnx" / "model.onnx"


def test_a_good_artifact_opens() -> None:
    assert probe.judge_opening("onnx", ONNX, "text-generation").passed


def test_a_file_that_is_none_is_refused_in_the_runtimes_words(tmp_path: Path) -> None:
    shutil.copy(ONNX.with_name("genai_config.json"), tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(InputError, match=r"model\.onnx"):
        probe.judge_opening("onnx", tmp_path / "model.onnx", "text-generation")


def test_a_runtime_that_dies_is_a_failed_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dying.py").write_text("import os, sys\nsys.stdin.readline()\nos.abort()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(probe, "Child", lambda module, *rest: Child("dying", *rest))
    check = probe.judge_opening("onnx", ONNX, "text-generation")
    assert not check.passed
    assert "open model.onnx in its runtime died (SIGABRT)" in check.detail


def test_the_other_artifacts_are_judged_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parity of those that remain is no question any more where one is left."""
    shutil.copytree(BUNDLE, tmp_path / "bundle")
    manifest = json.loads((BUNDLE / "manifest.json").read_text())
    formats = [one["format"] for one in manifest["artifacts"]]

    def judged(format: str, *_: Any) -> Check:
        return Check("opens", format == "onnx", "")

    def asked(kind: str, subject: Any, *_: Any, **__: Any) -> Any:
        seen.append((kind, subject.exporter.name))
        return Judgement((), ())

    seen: list[tuple[str, str]] = []
    monkeypatch.setattr(opened, "judge_opening", judged)
    monkeypatch.setattr(opened, "self_check", partial(asked, "self"))
    found = opened.verify(tmp_path / "bundle", None, None, None, Progress(silent=True))
    assert seen == [("self", "onnx")]
    assert not found.passed
    assert {name: checks[0].passed for name, checks in found.checks.items() if name in formats} == {
        name: name == "onnx" for name in formats
    }
