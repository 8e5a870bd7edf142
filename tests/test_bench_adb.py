"""`slm-export bench --on adb`: the real adb client, and a phone of the tests that can fail in every way."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from adb_device import Phone, adb_variables, plugged_in
from bench_devices import WORKLOAD, artifact, measured, runner

from slm_export.bench.command import BenchRequest, bench
from slm_export.bench.places.adb import Adb, thermal_state
from slm_export.bench.places.programs import machine_of
from slm_export.bench.subject import Subject
from slm_export.errors import InputError, MachineError, MissingComponentError
from slm_export.progress import Progress

needs_adb = pytest.mark.skipif(
    shutil.which("adb") is None, reason="drives the real adb client: apt-get install adb"
)


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Phone]:
    made = Phone(tmp_path / "phone")
    with plugged_in(made) as port:
        for name, value in adb_variables(port).items():
            monkeypatch.setenv(name, value)
        yield made


@pytest.fixture
def subject(tmp_path: Path, pycode: Path) -> Subject:
    return artifact(tmp_path, pycode)


def left_on(phone: Phone) -> list[str]:
    return os.listdir(phone.tmp)


@needs_adb
def test_a_phone_is_measured_with_the_vendors_program(phone: Phone, subject: Subject, tmp_path: Path) -> None:
    workload = dataclasses.replace(WORKLOAD, sustained_s=0.1)
    found = measured(Adb(None), subject, runner(tmp_path), workload)
    assert found.where == "Test Phone (PHONE1)"
    assert found.runtime == "llama_main"
    (prefill,) = found.prefill
    assert prefill.tokens == 32
    assert prefill.tokens_per_s is not None
    # 32 tokens in 32 ms; the runner counts tokens itself.
    assert prefill.tokens_per_s.values == pytest.approx([1000, 1000], rel=0.2)
    assert [speed.tokens for speed in found.decode] == [0, 32]
    assert [s.tokens_per_s and s.tokens_per_s.median for s in found.decode] == pytest.approx([100, 100])
    assert found.warm_load_ms is not None
    assert found.warm_load_ms.median == 250
    assert found.cold_load_ms is None
    assert found.model_rss_mb is None
    assert found.peak_rss_mb is not None
    assert 0 < found.peak_rss_mb < 100  # a shell
    assert (found.before.temperature_c, found.before.throttling) == (51.25, "moderate")
    assert found.before.available_mb is not None
    assert found.sustained[0].tokens_per_s == pytest.approx(100)
    assert found.sustained[0].throttling == "moderate"
    assert left_on(phone) == []


@needs_adb
def test_a_program_that_is_on_the_phone_is_used(phone: Phone, subject: Subject, tmp_path: Path) -> None:
    there = phone.folder / "bin" / "llama_main"
    shutil.copy(runner(tmp_path), there)
    there.chmod(0o755)
    assert measured(Adb("PHONE1"), subject, None).decode
    assert left_on(phone) == []


@needs_adb
def test_without_a_program_it_is_said_where_to_get_it(phone: Phone, subject: Subject) -> None:
    with pytest.raises(
        MissingComponentError, match=r"llama_main is built from ExecuTorch's source.*--runner"
    ):
        measured(Adb(None), subject, None)
    assert left_on(phone) == []


@needs_adb
@pytest.mark.parametrize(
    ("change", "asked", "error", "words"),
    [
        ({"gone": True}, None, MachineError, "finds no device"),
        ({}, "OTHER", InputError, r"knows no such device \(it knows: PHONE1\)"),
        ({"others": ("PHONE2",)}, None, InputError, "several devices: PHONE1, PHONE2"),
        ({"state": "unauthorized"}, None, MachineError, "'unauthorized'; unlock it and allow debugging"),
        ({"state": "offline"}, None, MachineError, "'offline'; plug it in again"),
        ({"free_kb": 100}, None, MachineError, "has 102.4 kB free where"),
        ({"full": True}, None, MachineError, "did not take .*No space left on device; free some space"),
        ({"gone_at": "mkdir"}, None, MachineError, "the device went away while it should make a folder"),
        ({"gone_at": "measure.sh"}, None, MachineError, "the device went away while it should run the model"),
    ],
)
def test_a_phone_that_fails_is_named_with_what_to_do(
    change: dict[str, object],
    asked: str | None,
    error: type[Exception],
    words: str,
    phone: Phone,
    subject: Subject,
    tmp_path: Path,
) -> None:
    for name, value in change.items():
        setattr(phone, name, value)
    with pytest.raises(error, match=words) as caught:
        measured(Adb(asked), subject, runner(tmp_path))
    if "gone_at" in change:
        # What could not be taken away is named, with the command that does it.
        assert "left behind on Test Phone (PHONE1): remove it with `adb -s PHONE1 shell rm -rf /data/" in str(
            caught.value
        )
    else:
        assert left_on(phone) == []


@needs_adb
def test_a_phone_that_does_not_answer_is_given_up(phone: Phone, subject: Subject, tmp_path: Path) -> None:
    phone.deaf_to = "thermalservice"
    with pytest.raises(MachineError, match="ask for temperatures: no answer within 1 s"):
        measured(Adb(None, patience_s=1), subject, runner(tmp_path))
    assert left_on(phone) == []


@needs_adb
@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("echo cannot load the model; exit 7", "", "ended with exit code 7\n  cannot load the model"),
        ("echo nothing of use; exit 0", "", "printed no figures that are known here\n  nothing of use"),
        ("exit 126", "", "does not start: the device refuses to execute it"),
        ("", "kill -9 $$", "ended with exit code 137"),
    ],
)
def test_a_runner_that_fails_says_why(
    before: str, after: str, words: str, phone: Phone, subject: Subject, tmp_path: Path
) -> None:
    with pytest.raises(MachineError, match=words):
        measured(Adb(None), subject, runner(tmp_path, before, after))
    assert left_on(phone) == []


@needs_adb
def test_a_program_for_another_processor_is_refused(phone: Phone, subject: Subject, tmp_path: Path) -> None:
    program = tmp_path / "llama_main"
    program.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\x3e\x00" + bytes(44))
    assert machine_of(program) == "x86_64"
    with pytest.raises(InputError, match=r"is for x86_64, but Test Phone \(PHONE1\) runs aarch64, arm"):
        measured(Adb(None), subject, program)
    program.write_bytes(b"MZ" + bytes(60))
    with pytest.raises(InputError, match="no program of Android or Linux"):
        measured(Adb(None), subject, program)
    assert left_on(phone) == []


INTERRUPTED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from bench_devices import artifact, measured
from slm_export.bench.places.adb import Adb
from slm_export.interrupts import catch_signals

catch_signals()
try:
    measured(Adb(None), artifact(Path(sys.argv[2]), Path(sys.argv[3])), sys.argv[4])
except KeyboardInterrupt:
    sys.exit(130)
"""


@needs_adb
def test_an_interrupted_run_leaves_nothing(phone: Phone, tmp_path: Path, pycode: Path) -> None:
    program = runner(tmp_path, "sleep 300")
    tests = Path(__file__).parent
    command = [sys.executable, "-c", INTERRUPTED, *map(str, (tests, tmp_path, pycode, program))]
    with subprocess.Popen(command) as running:
        while not (pids := list(phone.tmp.glob("*/pid.txt"))) or not pids[0].read_text().strip():
            assert running.poll() is None
            time.sleep(0.05)
        pid = int(pids[0].read_text())
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 130
    assert left_on(phone) == []
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text()


def test_without_adb_it_is_said_where_to_get_it(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MissingComponentError, match="adb is not installed; `apt-get install adb`"):
        measured(Adb(None), subject, None)


def test_a_lone_file_needs_its_bundle(tmp_path: Path) -> None:
    (tmp_path / "model.litertlm").write_bytes(b"LITERTLM")
    with pytest.raises(InputError, match="says nothing of its context; give the bundle that it is in"):
        bench(BenchRequest(tmp_path / "model.litertlm", on="adb"), Progress(silent=True))


def test_temperatures_are_those_of_now_and_of_the_processor() -> None:
    now = "Thermal Status: 0\nCurrent temperatures from HAL:\n\tTemperature{mValue=-1.5, mType=0, mName=A, mStatus=0}\n"
    assert thermal_state(now) == (-1.5, "none")
    assert thermal_state(now.replace("mType=0", "mType=3")) == (None, "none")
    assert thermal_state("Can't find service: thermalservice") == (None, None)
