"""What ships, in Arm's own kernels: a bundle's artifacts in emulated Arm processes, beside this machine's.

`pytest -m arm`, on Debian or Ubuntu with `apt-get install qemu-user`. The first run downloads some 300 MB; the folder
named by SLM_EXPORT_ARM_FOLDER is used again.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from arm_child import Logits
from arm_machine import QEMU, TOOLS, WHEELS, ArmMachine
from conftest import command, environment

from slm_export.bench.subject import Subject, find_subject
from slm_export.evaltext import load_documents
from slm_export.exporters.litert_container import Container
from slm_export.fidelity.thresholds import default_gates
from slm_export.source.tasks import GENERATION
from slm_export.tokenization.tokenizer import SourceTokenizer

pytestmark = [
    pytest.mark.arm,
    pytest.mark.skipif(
        QEMU is None or not all(map(shutil.which, TOOLS)),
        reason="runs Arm's programs: Debian or Ubuntu, with apt-get install qemu-user",
    ),
    pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine is an Arm machine"),
]
TOKENS = 24
GATES = default_gates(GENERATION, 4)
"""What a runtime may differ from the model that it was given; two processors may not differ by more."""


@pytest.fixture(scope="module")
def bundle(pycode: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("arm") / "bundle"
    formats = [part for format in WHEELS for part in ("--format", format)]
    options = ["--target", "android", "--bits", "4", "--no-verify", "--no-bench", "--out", str(out)]
    done = subprocess.run(
        command(pycode, *options, *formats), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> ArmMachine:
    named = os.environ.get("SLM_EXPORT_ARM_FOLDER")
    made = ArmMachine(Path(named) if named else tmp_path_factory.mktemp("machine") / "arm64")
    made.prepare()
    return made


@pytest.mark.parametrize("format", list(WHEELS))
def test_an_arm_process_says_what_this_machine_says(
    format: str, bundle: Path, machine: ArmMachine, tmp_path: Path
) -> None:
    subject = find_subject(bundle, format)
    tokens = SourceTokenizer.load(bundle / "tokenizer").encode(load_documents(None)[0])[:TOKENS]
    path = _for_the_runtime(subject, tmp_path)
    child = Path(__file__).with_name("arm_child.py")
    here, there = tmp_path / "here.npy", tmp_path / "there.npy"

    def arguments(out: Path) -> list[str | Path]:
        return [child, format, path, out, *map(str, tokens)]

    subprocess.run([sys.executable, *map(str, arguments(here))], check=True, capture_output=True)
    machine.run(format, arguments(there))
    expected, found = np.load(here), np.load(there)
    assert found.shape == expected.shape == (TOKENS // 2, 4096)
    kl = _kl(expected, found).mean()
    largest = np.abs(found - expected).max() / (expected.max() - expected.min())
    print(f"{format}: KL divergence {kl:.2e} nats, largest difference {largest:.2e} of the range")
    assert GATES.max_lowering_kl_mean is not None
    assert GATES.min_top1_agreement is not None
    assert kl <= GATES.max_lowering_kl_mean
    assert (found.argmax(-1) == expected.argmax(-1)).mean() >= GATES.min_top1_agreement
    # A model that says the same whatever it reads would pass too.
    assert _kl(expected[:-1], expected[1:]).mean() > 100 * GATES.max_lowering_kl_mean


def _kl(p_logits: Logits, q_logits: Logits) -> Logits:
    """Return the divergence of each row, in nats."""
    p, q = _log_softmax(p_logits), _log_softmax(q_logits)
    return (np.exp(p) * (p - q)).sum(-1)


def _log_softmax(logits: Logits) -> Logits:
    x = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _for_the_runtime(subject: Subject, folder: Path) -> Path:
    if subject.format != "litert":
        return subject.path
    with Container.read(subject.path).extracted() as model:
        return Path(shutil.copy(model, folder / "model.tflite"))
