"""The jobs of docs/ci.md, line by line, as their servers would run them: only the installation is taken as done."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, environment

from slm_export.settings import load_settings

PAGE = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
INSTALL = 'pip install "$SLM_EXPORT"'


def block(name: str) -> str:
    """Return the code between two markers of the page."""
    found = re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```\n<!-- end -->", PAGE, re.DOTALL)
    assert found, name
    return found[1]


def github(branch: str) -> list[str]:
    """Return what the steps of the job run, on the main branch or for a pull request."""
    job = yaml.safe_load(block("github"))["jobs"]["export"]
    ref = f"refs/heads/{branch}"
    steps = []
    for step in job["steps"]:
        condition = step.get("if", "always()")
        assert condition in ("always()", "github.ref == 'refs/heads/main'")
        if "run" in step and (condition == "always()" or ref == "refs/heads/main"):
            steps.append(step["run"])
    return steps


def gitlab(branch: str) -> list[str]:
    lines: list[str] = yaml.safe_load(block("gitlab"))["model"]["script"]
    return lines


def run(steps: list[str], folder: Path, branch: str) -> subprocess.CompletedProcess[str]:
    """Run a job's steps one after the other, as a runner does; the first that fails ends it."""
    variables = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "GITHUB_STEP_SUMMARY": str(folder / "summary.md"),
        "CI_COMMIT_BRANCH": branch,
        "CI_DEFAULT_BRANCH": "main",
    }
    assert steps[0] == INSTALL
    done = None
    for step in steps[1:]:
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", step],
            cwd=folder,
            env=environment(variables),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            break
    assert done is not None
    return done


@pytest.fixture
def project(tmp_path: Path, pycode: Path) -> Path:
    folder = tmp_path / "project"
    shutil.copytree(pycode, folder)
    (folder / "slm-export.toml").write_text(block("settings"))
    return folder


def fresh(folder: Path) -> None:
    """Leave what a server's cache keeps between two runs."""
    shutil.rmtree(folder / "build", ignore_errors=True)


def outcomes(path: Path) -> list[str]:
    root: Any = ET.parse(path).getroot()
    return [case[0].tag if len(case) else "pass" for case in root.iter("testcase")]


def test_the_settings_of_the_page_are_settings(tmp_path: Path) -> None:
    (tmp_path / "slm-export.toml").write_text(block("settings"))
    settings = load_settings(tmp_path)
    assert settings is not None
    assert settings.diff.max_bytes_increase == 0.02


def test_both_jobs_run_the_same_commands() -> None:
    def commands(steps: list[str]) -> list[str]:
        lines = [line.strip() for step in steps for line in step.splitlines()]
        return [line.split(" >")[0] for line in lines if line.startswith("slm-export ")]

    assert commands(github("main")) == commands(gitlab("main"))
    assert len(commands(github("main"))) == 3


def test_every_limit_is_in_the_table() -> None:
    from slm_export.reports.diff_limits import DiffLimits

    table = PAGE[PAGE.index("## The limits") :]
    assert set(re.findall(r"`(max_\w+)`", table)) == set(DiffLimits.model_fields)


@pytest.mark.slow
@pytest.mark.parametrize("job", [github, gitlab])
def test_a_job_passes_on_main_and_judges_pull_requests(job: Any, project: Path) -> None:
    # The main branch: nothing to compare with yet; what it makes is the baseline.
    done = run(job("main"), project, "main")
    assert done.returncode == 0, done.stderr
    assert set(outcomes(project / "build" / "export.xml")) == {"pass"}
    assert json.loads((project / "build" / "export.json").read_text())["passed"] is True
    assert (project / "baseline" / "manifest.json").is_file()

    # A pull request that changes nothing of the model.
    fresh(project)
    done = run(job("feature"), project, "feature")
    assert done.returncode == 0, done.stderr
    assert set(outcomes(project / "build" / "diff.xml")) == {"pass"}
    assert "side by side" in (project / "build" / "compare.html").read_text()

    # One that makes it too large.
    fresh(project)
    settings = project / "slm-export.toml"
    settings.write_text(settings.read_text().replace("bits   = 8", "bits   = 8\nembedding_bits = 16"))
    done = run(job("feature"), project, "feature")
    assert done.returncode == 1
    assert "bytes_increase" in done.stderr
    assert outcomes(project / "build" / "diff.xml").count("failure") == 1
