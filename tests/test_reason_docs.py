"""The walks of docs/distillation.md for adapt and reason, typed as they stand there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from walks import page, typed, walk

PAGE = page("distillation.md")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "out"), [("adapt", "prose"), ("reason", "sums")])
def test_a_walk_does_what_it_says(name: str, out: str, tmp_path: Path) -> None:
    done = typed(walk(PAGE, name), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "child after" in done.stdout
    learned = json.loads((tmp_path / out / "learning.json").read_text())["learned"]
    assert learned["by"] == name
    if name == "reason":
        manifest = json.loads((tmp_path / "sums-android" / "manifest.json").read_text())
        assert manifest["model"]["learned"]["by"] == "reason"
        assert re.search(r"Held-out problems, solved by the artifact\n +executorch: \d+ of 60", done.stdout)


def test_every_option_on_the_page_is_one() -> None:
    from slm_export.cli import cli

    known = {option for command in cli.commands.values() for each in command.params for option in each.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE)) - {"--port", "--out"}
    assert named
    assert named <= known | {"--nproc-per-node", "--standalone"}, named - known
