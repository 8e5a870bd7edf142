"""Two processes that share a child out learn what one learns; started as docs/distillation.md says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import environment
from safetensors.torch import load_file
from test_distil import teacher, text  # noqa: F401 - fixtures


@pytest.mark.slow
def test_two_processes_learn_what_one_does(teacher: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    command = ["distil", teacher, "--data", text, "--shrink", "layers=0.5", "--steps", "6", "--batch", "4"]
    command += ["--together", "2", "--length", "32", "--hard", "0"]
    quiet = environment({"OMP_NUM_THREADS": "1", "SLM_EXPORT_CACHE": str(tmp_path / "cache")})
    alone = [sys.executable, "-m", "slm_export", *map(str, command), "--out", str(tmp_path / "one")]
    subprocess.run(alone, env=quiet, check=True, capture_output=True, timeout=600)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    both = [*torchrun, "-m", "slm_export", *map(str, command), "--out", str(tmp_path / "two")]
    done = subprocess.run(both, env=quiet, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("child after") == 1
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    moved = False
    for name, values in one.items():
        # Sums in another order; a share that was lost would show in every value.
        torch.testing.assert_close(two[name], values, rtol=1e-3, atol=2e-5, msg=name)
        moved = moved or not torch.equal(two[name], values)
    assert not os.listdir(tmp_path / "cache" / "learning")
