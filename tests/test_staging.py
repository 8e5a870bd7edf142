"""A folder appears whole or not at all, whatever happens on the way."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from sample_reports import fill, make, tree

from slm_export.bundles import staging as staging_module
from slm_export.bundles.bundle import machine_errors, staged, verify_files
from slm_export.errors import GateError, InputError, MachineError

# --- whole or absent ---------------------------------------------------------------------------------


def test_a_committed_bundle_is_the_only_thing_left(tmp_path: Path) -> None:
    out = make(tmp_path / "deep" / "er" / "out")
    assert os.listdir(tmp_path / "deep" / "er") == ["out"]
    assert verify_files(out) == ()
    assert sorted(os.listdir(out)) == [
        "executorch",
        "manifest.json",
        "report.html",
        "report.json",
        "sbom.cdx.json",
        "tokenizer",
    ]


def test_the_bundle_has_the_mode_that_the_umask_asks_for(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    assert make(tmp_path / "out").stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit, GateError("no")])
def test_any_exception_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure if isinstance(failure, type) else type(failure)):  # noqa: SIM117, PT012
        with staged(tmp_path / "new" / "out") as staging:
            fill(staging.path)
            raise failure
    assert os.listdir(tmp_path) == []


def test_without_a_commit_nothing_stays(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as staging:
        fill(staging.path)
    assert os.listdir(tmp_path) == []


def test_out_is_invisible_until_the_commit(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged(out) as staging:
        fill(staging.path)
        assert not out.exists()
        assert staging.path.stat().st_dev == tmp_path.stat().st_dev
        staging.commit()
        assert (out / "executorch" / "model.pte").exists()


def test_force_replaces_at_the_commit_and_not_before(tmp_path: Path) -> None:
    out = make(tmp_path / "out", text="old")
    before = tree(out)
    with pytest.raises(RuntimeError, match="half-way"), staged(out, force=True) as staging:  # noqa: PT012
        fill(staging.path)
        assert tree(out) == before
        raise RuntimeError("half-way")
    assert tree(out) == before
    make(out, force=True, text="new")
    assert (out / "tokenizer" / "note.txt").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_where_folders_cannot_be_exchanged_two_renames_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging_module, "exchange", lambda first, second: False)
    out = make(tmp_path / "out", text="old")
    make(out, force=True, text="new")
    assert (out / "tokenizer" / "note.txt").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_a_replacement_that_stops_between_two_renames_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make(tmp_path / "out", text="old")
    before = tree(out)
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if Path(source).name == "bundle":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(staging_module, "exchange", lambda first, second: False)
    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(KeyboardInterrupt):
        make(out, force=True, text="new")
    assert tree(out) == before
    assert os.listdir(tmp_path) == ["out"]


# --- killed processes, and live ones -----------------------------------------------------------------

CHILD = """
    import os, sys, time
    from pathlib import Path
    from slm_export.bundles import staging
    from slm_export.bundles.bundle import staged
    sys.path.insert(0, {tests!r})
    from sample_reports import make, fill
    out, where = Path(sys.argv[1]), sys.argv[2]
    def stop(*_):
        print("here", flush=True)
        time.sleep(60)
    if where == "renames":
        rename = os.rename
        staging.exchange = lambda first, second: False
        staging.os.rename = lambda a, b: stop() if Path(a).name == "bundle" else rename(a, b)
        make(out, force=True)
    with staged(out, force=True) as staging_:
        fill(staging_.path)
        if where == "exchanged":
            staging._discard = stop
            staging_.commit()
        else:
            stop()
"""


def child(out: Path, where: str) -> subprocess.Popen[bytes]:
    code = textwrap.dedent(CHILD.format(tests=str(Path(__file__).parent)))
    process = subprocess.Popen([sys.executable, "-c", code, str(out), where], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"here\n"
    return process


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_two_exports_at_once_into_one_place_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = child(out, "writing")
    try:
        with pytest.raises(InputError, match=rf"another export \(process {process.pid}\)"):
            make(out)
        link = tmp_path / "link"
        link.symlink_to(tmp_path)
        with pytest.raises(InputError, match="another export"):
            make(link / "out")
        assert make(tmp_path / "out2").exists(), "another place is free"
    finally:
        kill(process)
    assert verify_files(make(out)) == ()
    assert sorted(os.listdir(tmp_path)) == ["link", "out", "out2"]


def test_the_next_export_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    kill(child(out, "writing"))
    assert not out.exists()
    (left,) = os.listdir(tmp_path)
    assert re.fullmatch(r"\.out\.\d+\.[0-9a-f]{8}\.partial", left)
    make(out)
    assert os.listdir(tmp_path) == ["out"]


def test_a_kill_right_after_the_exchange_leaves_the_new_bundle(tmp_path: Path) -> None:
    out = make(tmp_path / "out", text="old")
    kill(child(out, "exchanged"))
    assert tree(out).keys() == {"executorch/model.pte", "tokenizer/tokenizer.json"}


def test_a_kill_between_two_renames_is_mended_by_the_next_export(tmp_path: Path) -> None:
    out = make(tmp_path / "out", text="old")
    before = tree(out)
    kill(child(out, "renames"))
    assert not out.exists()
    with pytest.raises(InputError, match="exists already"):
        make(out)
    assert tree(out) == before
    assert os.listdir(tmp_path) == ["out"]


def test_folders_of_other_names_and_owners_are_left_alone(tmp_path: Path) -> None:
    kept = [".out.1.deadbeef.partial", ".other.1.deadbeef.partial", ".out.x.partial", "out.partial"]
    for name in kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("precious")
    make(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "out"])


# --- what is refused before any work -----------------------------------------------------------------


def test_an_existing_bundle_needs_force(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    with pytest.raises(InputError, match="--force"):
        make(out)


@pytest.mark.parametrize(
    "files",
    [
        {"thesis.tex": "years of work"},
        {"manifest.json": '{"manifest_version": 3, "name": "a browser extension"}', "a.js": ""},
        {"manifest.json": "not json"},
        {"manifest.json": '{"schema": 1, "artifacts": [], "files": []}', "notes.txt": "mine"},
        {"manifest.json": '{"schema": 1, "artifacts": [], "files": [7]}'},
    ],
)
def test_force_never_replaces_a_folder_that_is_not_only_a_bundle(
    tmp_path: Path, files: dict[str, str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name, text in files.items():
        (out / name).write_text(text)
    before = tree(out)
    with pytest.raises(InputError, match="even with --force"):
        make(out, force=True)
    assert tree(out) == before


def test_force_replaces_an_empty_folder_and_ignores_desktop_litter(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    make(out, force=True)
    (out / ".DS_Store").write_bytes(b"x")
    make(out, force=True)
    assert verify_files(out) == ()


def test_a_file_the_root_and_the_current_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/"), tmp_path / "none" / ".."):
        with pytest.raises(InputError, match=r"--out|mount point"):
            make(out, force=True)
    assert (tmp_path / "file").read_text() == "mine"
    monkeypatch.chdir(make(tmp_path / "out"))
    with pytest.raises(InputError, match="current folder"):
        make(Path(), force=True)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is of Linux")
def test_a_parent_that_nobody_can_write_is_an_input_error(tmp_path: Path) -> None:
    for out in (Path("/proc/out"), Path("/proc/new/out"), tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="cannot be written"):
            make(out)
    assert os.listdir(tmp_path) == []


def test_a_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    make(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    assert make(tmp_path / "link", force=True, text="new") == tmp_path / "real"
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "tokenizer" / "note.txt").read_text() == "new"


def test_a_folder_that_comes_in_during_the_export_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="exists already"), staged(out) as staging:  # noqa: PT012
        fill(staging.path)
        out.mkdir()
        (out / "mine").write_text("precious")
        staging.commit()
    assert tree(out) == {"mine": b"precious"}
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_was_removed_meanwhile_is_not_committed_with_what_came_after(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="was removed while"), staged(tmp_path / "out") as staging:  # noqa: PT012
        (staging.path / "tokenizer").mkdir()
        shutil.rmtree(staging.path.parent)
        # As exporters make the folder of their artifact.
        (staging.path / "onnx").mkdir(parents=True)
        staging.commit()
    assert os.listdir(tmp_path) == []


# --- the machine -------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_machine_error_and_leaves_nothing(tmp_path: Path, code: int) -> None:
    with pytest.raises(MachineError, match="disk full"), staged(tmp_path / "out") as staging:  # noqa: PT012
        fill(staging.path)
        raise OSError(code, os.strerror(code))
    assert os.listdir(tmp_path) == []


def test_a_write_that_the_system_cuts_short_is_a_machine_error(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(MachineError, match="disk full"), staged(tmp_path / "out") as staging:
            (staging.path / "model.pte").write_bytes(b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_a_failing_sync_stops_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("slm_export.bundles.atomic.os.fsync", failing)
    with pytest.raises(MachineError, match="cannot write the bundle"), staged(tmp_path / "out") as staging:  # noqa: PT012
        fill(staging.path)
        staging.commit()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (Exception("I/O error: No space left on device (os error 28)"), "disk full"),
        (OSError(errno.EIO, "Input/output error", "/data/x"), "/data/x"),
    ],
)
def test_faults_of_the_machine_are_told_from_ours(error: Exception, words: str) -> None:
    with pytest.raises(MachineError, match=words) as caught, machine_errors("load the model"):
        raise error
    assert str(caught.value).startswith("cannot load the model: ")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("error", [ValueError("x"), FileNotFoundError(2, "x"), InputError("out of memory")])
def test_other_errors_pass_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, machine_errors("load"):
        raise error
    assert caught.value is error


def test_a_stale_start_lock_is_not_waited_for_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging_module, "_START_WAIT_S", 0.1)
    monkeypatch.setattr(staging_module, "try_lock", lambda file: False)
    with pytest.raises(InputError, match="locked by another program"):
        make(tmp_path / "out")
