"""`slm-export bench --on devicectl`: the frame, with a stand-in for Xcode's tool, which exists on a Mac alone."""

from __future__ import annotations

import json
import plistlib
from pathlib import Path

import pytest
from bench_devices import artifact, measured, runner

from slm_export.bench.places.devicectl import Devicectl
from slm_export.bench.subject import Subject
from slm_export.errors import InputError, MachineError, MissingComponentError

APP = "org.example.runner"
XCRUN = r"""#!/bin/sh
# devicectl as its help describes it: a phone whose app has a folder Documents.
phone=FOLDER
echo "$@" >> $phone/calls.txt
[ "$1" = devicectl ] || exit 64
case "$2 $3 $4" in
    "list devices --json-output") cat $phone/devices.json > "$5"; exit 0 ;;
esac
[ "$5" = --device ] || [ "$4" = --device ] || exit 64
case "$2 $3 $4" in
    "device install app") [ -e $phone/locked ] && { echo "ERROR: the device is locked" >&2; exit 1; }; exit 0 ;;
    "device uninstall app") rm -f $phone/Documents/*; exit 0 ;;
    "device copy to")
        while [ $# -gt 1 ]; do
            case $1 in --source) source=$2 ;; --destination) destination=$2 ;; esac
            shift
        done
        cp "$source" "$phone/$destination" ;;
    "device process launch")
        shift 8
        [ "$1" = APP ] || exit 65
        shift
        cd $phone/Documents && sh $phone/llama_main "$@" ;;
    *) exit 64 ;;
esac
"""


@pytest.fixture
def subject(tmp_path: Path, pycode: Path) -> Subject:
    return artifact(tmp_path, pycode)


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "phone"
    (folder / "Documents").mkdir(parents=True)
    tools = tmp_path / "tools"
    tools.mkdir()
    xcrun = tools / "xcrun"
    xcrun.write_text(XCRUN.replace("FOLDER", str(folder)).replace("APP", APP), encoding="utf-8")
    xcrun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    (folder / "llama_main").write_text(runner(tmp_path, "").read_text(encoding="utf-8"), encoding="utf-8")
    has(folder, "My iPhone")
    return folder


def has(folder: Path, *names: str) -> None:
    devices = [{"identifier": f"ID-{name}", "deviceProperties": {"name": name}} for name in names]
    (folder / "devices.json").write_text(json.dumps({"result": {"devices": devices}}), encoding="utf-8")


@pytest.fixture
def app(tmp_path: Path) -> Path:
    folder = tmp_path / "Runner.app"
    folder.mkdir()
    (folder / "Info.plist").write_bytes(plistlib.dumps({"CFBundleIdentifier": APP}))
    return folder


def test_an_app_is_installed_measured_and_taken_off(phone: Path, app: Path, subject: Subject) -> None:
    found = measured(Devicectl(None), subject, app)
    assert found.where == "My iPhone"
    assert [s.tokens_per_s and s.tokens_per_s.median for s in found.decode] == pytest.approx([100, 100])
    assert (found.peak_rss_mb, found.before.temperature_c, found.cold_load_ms) == (None, None, None)
    calls = (phone / "calls.txt").read_text().splitlines()
    assert calls[1] == f"devicectl device install app --device ID-My iPhone {app}"
    assert calls[-1] == f"devicectl device uninstall app --device ID-My iPhone {APP}"
    assert not list((phone / "Documents").iterdir())


def test_files_in_an_app_that_stays_are_emptied(phone: Path, subject: Subject) -> None:
    assert measured(Devicectl("My iPhone"), subject, APP).decode
    sizes = {file.name: file.stat().st_size for file in (phone / "Documents").iterdir()}
    assert sizes.pop("model-0.pte") == 0
    assert set(sizes.values()) == {0}


@pytest.mark.parametrize(
    ("names", "asked", "program", "error", "words"),
    [
        ((), None, APP, MachineError, "devicectl finds no device"),
        (("A", "B"), None, APP, InputError, "several devices: A, B; choose one"),
        (("A",), "C", APP, InputError, r"knows no such device \(it knows: A\)"),
        (("A",), None, None, MissingComponentError, "on an Apple device an app does what"),
        (("A",), None, "Other.app", InputError, "no app with an Info.plist"),
        (("A",), None, "org.example.other", MachineError, "ended with exit code 65"),
    ],
)
def test_what_fails_is_named(
    names: tuple[str, ...],
    asked: str | None,
    program: str | None,
    error: type[Exception],
    words: str,
    phone: Path,
    subject: Subject,
) -> None:
    has(phone, *names)
    with pytest.raises(error, match=words):
        measured(Devicectl(asked), subject, program)


def test_a_locked_phone_says_so(phone: Path, app: Path, subject: Subject) -> None:
    (phone / "locked").touch()
    with pytest.raises(MachineError, match="did not install the app: ERROR: the device is locked"):
        measured(Devicectl(None), subject, app)


def test_without_xcode_it_is_said_where_to_get_it(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MissingComponentError, match="xcrun is not installed; it comes with Xcode"):
        measured(Devicectl(None), subject, APP)


def test_the_flags_are_those_of_the_help(phone: Path, subject: Subject) -> None:
    measured(Devicectl(None), subject, APP)
    lines = (phone / "calls.txt").read_text().splitlines()
    launches = [line for line in lines if " process launch " in line]
    assert launches[0].startswith(
        f"devicectl device process launch --device ID-My iPhone --console --terminate-existing {APP} --model_path="
    )
    copies = [line for line in lines if " copy to " in line]
    container = f"--domain-type appDataContainer --domain-identifier {APP}"
    assert all(container in line and " --destination Documents/" in line for line in copies)
