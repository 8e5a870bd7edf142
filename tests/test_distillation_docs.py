"""The walk of docs/distillation.md for distil, typed as it stands there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from walks import page, typed, walk


@pytest.mark.slow
def test_the_walk_of_distil_ends_in_a_verified_bundle(tmp_path: Path) -> None:
    done = typed(walk(page("distillation.md"), "distil"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "How it was taught" in done.stdout
    assert "artifact" in done.stdout
    learned = json.loads((tmp_path / "child-android" / "manifest.json").read_text())["model"]["learned"]
    assert [row["name"] for row in learned["rows"]] == ["teacher", "child before", "child after"]
    before, after = (row["figures"]["perplexity"]["value"] for row in learned["rows"][1:])
    assert after < before
    assert learned["data_licence"] == "Apache-2.0"
    assert "How it was taught" in (tmp_path / "child-android" / "report.html").read_text()
