"""The four delegates of examples/delegates with the real models, as docs/delegates.md has them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from conftest import ROOT, command, environment
from forked import Forked

from slm_export.delegates.config import load_delegates
from slm_export.delegates.local import Bundles

pytestmark = pytest.mark.slow
PAGE = (ROOT / "docs" / "delegates.md").read_text(encoding="utf-8")
DEADLINE_S = 300


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, minilm: Path, pycode: Path, quick_cli: Forked) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "delegates"
    shutil.copytree(ROOT / "examples" / "delegates", folder)
    lines = subprocess.run(
        [sys.executable, "machine_log.py", "3000"], cwd=folder, check=True, capture_output=True, text=True
    )
    (folder / "labelled.jsonl").write_text(lines.stdout)
    done = quick_cli(*_taught(minilm), cwd=folder)
    assert done.returncode == 0, done.stderr
    models = ((minilm, "minilm"), (pycode, "pycode"), (folder / "watcher-model", "watcher"))
    for model, out in models:
        common = ("--target", "host", "--bits", "8", "--format", "onnx", "--no-verify", "--no-bench")
        done = quick_cli(model, *common, "--out", out, cwd=folder)
        assert done.returncode == 0, done.stderr
    hooks = re.search(r"^port", (folder / "delegates.toml").read_text(), re.MULTILINE)
    assert hooks is None
    text = (folder / "delegates.toml").read_text()
    (folder / "delegates.toml").write_text(text.replace("[webhook]", "[webhook]\nport = 0"))
    return folder


def _taught(minilm: Path) -> list[str]:
    """Return the page's command that teaches the watcher."""
    (line,) = re.findall(r"^    slm-export (adapt .*)$", PAGE, re.MULTILINE)
    return [str(minilm) if word == "MINILM" else word for word in line.split()]


def rows(delegate: str) -> list[tuple[str, str]]:
    """Return inputs and answers of a delegate, as the page's table has them."""
    found = re.findall(rf"^\| {delegate} \| `(.+?)` \| (.+?) \|", PAGE, re.MULTILINE)
    assert found, delegate
    return found


def test_what_the_page_says_is_answered(place: Path) -> None:
    delegates, bundles = load_delegates(place / "delegates.toml").delegates, Bundles()
    for name in ("notes", "machine", "questions"):
        one = delegates[name]
        for text, expected in rows(name):
            assert one.bundle is not None
            assert bundles.answer(one.bundle, None, text, one.sampling, one.nearest).text == expected
    bundles.close()


def test_they_run(place: Path) -> None:
    (place / "notes").mkdir()
    arguments = command("delegate", "run")
    with subprocess.Popen(
        arguments,
        cwd=place,
        env=environment({"DELEGATES_TOKEN": "secret"}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdin
        assert running.stdout
        assert running.stderr
        said = ""
        while "requests are taken at " not in said:
            said = running.stderr.readline()
            assert said
        url = said.split("requests are taken at ")[1].split("/delegates/")[0]
        (text, expected), *_ = rows("questions")
        asked = httpx.post(
            f"{url}/delegates/questions",
            json={"text": text},
            headers={"Authorization": "Bearer secret"},
            timeout=DEADLINE_S,
            trust_env=False,
        )
        assert asked.status_code == 202
        assert answered(place / "questions.jsonl") == expected
        print("def fibonacci(n):", file=running.stdin, flush=True)
        assert running.stdout.readline()
        running.terminate()
        running.communicate(timeout=DEADLINE_S)
    assert running.returncode == 0


def answered(path: Path) -> str:
    end = time.monotonic() + DEADLINE_S
    while not path.exists() or not path.read_text().endswith("\n"):
        assert time.monotonic() < end
        time.sleep(0.1)
    answer: str = json.loads(path.read_text().splitlines()[-1])["answer"]
    return answer
