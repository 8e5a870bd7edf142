"""`slm-export bench --device all`: the real adb client and several phones, some of which fail."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from adb_device import Phone, adb_variables, plugged_in
from bench_devices import WORKLOAD, artifact, runner
from board import HOST, SSHD, switched_on
from conftest import Cli, command, environment
from rich.console import Console
from sample_reports import GATES, RUNTIME, artifact_of, decoder_report, fill

from slm_export.bench.command import BenchRequest, bench_fleet
from slm_export.bench.figures import Measurement
from slm_export.bench.fleet import DeviceResult, measure_fleet
from slm_export.bench.places import Place
from slm_export.bench.places.adb import Adb
from slm_export.bench.places.ssh import Ssh
from slm_export.bench.remote import measure_there
from slm_export.bench.show_fleet import print_fleet, to_json
from slm_export.bench.subject import Subject
from slm_export.bench.workload import Workload
from slm_export.bundles.bundle import staged, write_documents
from slm_export.errors import InputError, MachineError
from slm_export.progress import Progress

needs_adb = pytest.mark.skipif(
    shutil.which("adb") is None, reason="drives the real adb client: apt-get install adb"
)
needs_sshd = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None, reason="drives a real sshd: apt-get install openssh-server"
)


@pytest.fixture
def phones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Phone]]:
    made = [Phone(tmp_path / serial, serial) for serial in ("PHONE1", "PHONE2", "PHONE3")]
    with plugged_in(*made) as port:
        for name, value in adb_variables(port).items():
            monkeypatch.setenv(name, value)
        yield made


@pytest.fixture
def subject(tmp_path: Path, pycode: Path) -> Subject:
    return artifact(tmp_path, pycode)


@pytest.fixture
def bundle(tmp_path: Path, pycode: Path) -> Path:
    """A bundle whose program no runtime would load; the tokenizer is real, and a device of the tests wants no more."""
    with staged(tmp_path / "bundle", force=False) as staging:
        made = fill(staging.path)
        shutil.copy(pycode / "tokenizer.json", staging.path / "tokenizer" / "tokenizer.json")
        write_documents(staging.path, decoder_report(artifact_of(made)), runtime=RUNTIME, gates=GATES)
        staging.commit()
    return tmp_path / "bundle"


def measure(
    subject: Subject, program: Path, workload: Workload = WORKLOAD
) -> Callable[[Place, Progress], tuple[Measurement, ...]]:
    return lambda place, progress: measure_there(place, [subject], str(program), workload, progress)


def phone_places(phones: list[Phone]) -> dict[str, Callable[[threading.Event], Place]]:
    return {phone.serial: lambda stop, serial=phone.serial: Adb(serial, stop=stop) for phone in phones}  # type: ignore[misc]


def fleet(phones: list[Phone], subject: Subject, program: Path) -> tuple[DeviceResult, ...]:
    return measure_fleet(phone_places(phones), measure(subject, program), Progress(silent=True))


def left_on(phones: list[Phone]) -> list[str]:
    return [name for phone in phones for name in os.listdir(phone.tmp)]


@needs_adb
def test_phones_are_measured_at_the_same_time(phones: list[Phone], subject: Subject, tmp_path: Path) -> None:
    # Each waits until all three are at it: one after the other they would wait for ever.
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    all_there = f"[ $(ls {meeting} | wc -l) -ge 3 ]"
    wait = f"for n in $(seq 1200); do {all_there} && break; sleep 0.1; done; {all_there} || exit 9"
    before = f"touch {meeting}/${{PWD##*/}}; {wait}; sleep 0.3"
    results = fleet(phones, subject, runner(tmp_path, before))
    assert [one.device for one in results] == ["PHONE1", "PHONE2", "PHONE3"]
    assert [one.error for one in results] == [None] * 3
    assert [one.measurements[0].where for one in results] == [
        f"Test Phone ({phone.serial})" for phone in phones
    ]
    decodes = [speed.tokens_per_s for one in results for speed in one.measurements[0].decode]
    assert [found and found.median for found in decodes] == pytest.approx([100] * 6)
    assert left_on(phones) == []


@needs_adb
def test_one_that_vanishes_does_not_disturb_the_others(
    phones: list[Phone], subject: Subject, tmp_path: Path
) -> None:
    first, gone, locked = phones
    gone.gone_at = "measure.sh"
    locked.state = "unauthorized"
    results = fleet(phones, subject, runner(tmp_path))
    assert [one.exit_code for one in results] == [0, 4, 4]
    assert results[0].measurements[0].decode
    assert "the device went away while it should run the model" in str(results[1].error)
    assert "remove it with `adb -s PHONE2 shell rm -rf" in str(results[1].error)
    assert "unlock it and allow debugging" in str(results[2].error)
    assert left_on([first, locked]) == []

    document = to_json(results)
    assert [one["device"] for one in document["devices"]] == ["PHONE1", "PHONE2", "PHONE3"]
    assert document["devices"][0]["measurements"][0]["decode"][0]["tokens_per_s"]["median"] == pytest.approx(
        100
    )
    assert document["devices"][1]["measurements"] == []
    console = Console(record=True, width=200)
    print_fleet(console, results)
    text = console.export_text()
    assert "1 of 3 devices measured" in text
    assert "FAIL PHONE2: Test Phone (PHONE2): the device went away" in text


@needs_adb
def test_all_are_those_that_adb_knows(phones: list[Phone], tmp_path: Path) -> None:
    # The artifact is none of a bundle: every phone gets as far as being asked for its tokenizer.
    lone = tmp_path / "model.litertlm"
    lone.write_bytes(b"LITERTLM")
    results = bench_fleet(BenchRequest(lone, on="adb", devices=("all",)), Progress(silent=True))
    assert [one.device for one in results] == ["PHONE1", "PHONE2", "PHONE3"]
    assert {one.exit_code for one in results} == {2}
    for phone in phones:
        phone.gone = True
    with pytest.raises(MachineError, match="adb finds no device"):
        bench_fleet(BenchRequest(lone, on="adb", devices=("all",)), Progress(silent=True))


@pytest.mark.parametrize(
    ("on", "devices", "words"),
    [
        ("adb", ("A", "B", "A"), "--device A: is given twice"),
        ("adb", ("all", "A"), "--device all: is every device already"),
        ("ssh", ("all",), "--on ssh cannot list devices; name each"),
        ("devicectl", ("all",), "--on devicectl cannot list devices"),
    ],
)
def test_devices_that_make_no_sense_are_refused(
    on: str, devices: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    lone = tmp_path / "model.litertlm"
    lone.write_bytes(b"LITERTLM")
    with pytest.raises(InputError, match=words):
        bench_fleet(BenchRequest(lone, on=on, devices=devices), Progress(silent=True))


@needs_adb
def test_the_command_prints_all_and_exits_with_what_failed(
    phones: list[Phone], tmp_path: Path, bundle: Path, cli: Cli
) -> None:
    phones[2].full = True
    program = runner(tmp_path)
    asked = ("--on", "adb", "--runs", "1", "--threads", "3", "--prefill", "8", "--depth", "0")
    done = cli("bench", bundle, *asked, "--device", "all", "--runner", program, "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 4, done.stderr
    assert [one["exit_code"] for one in document["devices"]] == [0, 0, 4]
    assert "No space left on device; free some space there" in document["devices"][2]["error"]
    assert "PHONE1: done" in done.stderr
    assert "PHONE3: failed" in done.stderr

    chosen = ("--device", "PHONE1", "--device", "PHONE2")
    done = cli("bench", bundle, *asked, *chosen, "--runner", program)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 devices measured" in done.stdout
    assert done.stdout.count("Test Phone (PHONE") == 2
    assert left_on(phones) == []


@needs_adb
def test_an_interrupt_ends_every_job_and_cleans_up(phones: list[Phone], tmp_path: Path, bundle: Path) -> None:
    program = runner(tmp_path, "sleep 300")
    asked = ["--on", "adb", "--device", "all", "--threads", "3", "--prefill", "8", "--depth", "0"]
    arguments = command("bench", bundle, *asked, "--runner", str(program))
    with subprocess.Popen(arguments, env=environment(), stderr=subprocess.PIPE, text=True) as running:
        deadline = time.monotonic() + 120
        while not all(any(phone.tmp.glob("*/pid.txt")) for phone in phones):
            assert running.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        _, said = running.communicate(timeout=120)
    assert running.returncode == 130, said
    assert "interrupted; nothing was left behind" in said
    assert left_on(phones) == []


@needs_adb
def test_a_mistake_of_ours_passes_once_all_have_ended(
    phones: list[Phone], subject: Subject, tmp_path: Path
) -> None:
    ended = []

    def broken(place: Place, progress: Progress) -> tuple[Measurement, ...]:
        device = place.find()
        if "PHONE1" in device.title:
            raise ZeroDivisionError
        ended.extend(measure_there(place, [subject], str(runner(tmp_path)), WORKLOAD, progress))
        return tuple(ended)

    with pytest.raises(ZeroDivisionError):
        measure_fleet(phone_places(phones[:2]), broken, Progress(silent=True))
    assert len(ended) == 1


@needs_sshd
def test_boards_are_a_fleet_too(tmp_path: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    with switched_on(tmp_path / "board") as board:
        monkeypatch.setenv("PATH", f"{board.client}:/usr/bin:/bin")
        hosts = (HOST, "nobody@127.0.0.1.invalid")
        places: dict[str, Callable[[threading.Event], Place]] = {
            host: partial(Ssh, host, 30.0) for host in hosts
        }
        short = dataclasses.replace(WORKLOAD, runs=1, depth=(0,))
        results = measure_fleet(places, measure(subject, runner(tmp_path), short), Progress(silent=True))
    assert results[0].measurements[0].decode
    assert "ssh cannot reach it" in str(results[1].error)
