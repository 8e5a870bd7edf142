"""Whatever happens to an export on its way, the folder it was to write is whole, or as it was before."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import command, environment
from forked import Forked

from slm_export.bundles.bundle import read_manifest, verify_files

PROFILE = 'schema = 1\nname = "mine"\ntitle = "Mine"\ntarget = "host"\nformats = ["executorch"]\n'
IMPOSSIBLE = PROFILE + "[gates]\nmax_bytes = 1000\n"
# Floats lower faster than integers.
FAST = ("--bits", "32", "--no-verify", "--no-bench", "--out", "out")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "my.toml").write_text(IMPOSSIBLE)
    return tmp_path / "work"


def interrupted(model: Path, work: Path, number: signal.Signals, times: int = 1) -> tuple[int, str]:
    """Export, and send a signal once the lowering has begun, or more of them; return exit code and stderr."""
    arguments = command(model, "--target", "host", *FAST)
    with subprocess.Popen(
        arguments, cwd=work, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as export:
        assert export.stderr
        assert export.stdout
        said = ""
        for line in export.stderr:
            said += line
            if line.startswith("write executorch"):
                break
        assert partial(work), said
        time.sleep(0.7)
        assert export.poll() is None, "the export was over before it could be interrupted"
        for _ in range(times):
            export.send_signal(number)  # does nothing once the process has ended
            time.sleep(0.002)
        said += export.stderr.read()
        assert export.stdout.read() == ""
    return export.returncode, said


def partial(work: Path) -> list[str]:
    return [name for name in os.listdir(work) if name.endswith(".partial")]


def tree(folder: Path) -> dict[str, str]:
    """Return path -> sha256 of everything in a folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def after_a_kill(
    tiny_llama: Path, quick_cli: Forked, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], list[str], Path]:
    """Export where a killed export was: what the killed one left, what is there after the next, and its bundle."""
    work = tmp_path_factory.mktemp("killed")
    code, said = interrupted(tiny_llama, work, signal.SIGKILL)
    assert code == -signal.SIGKILL, said
    left = os.listdir(work)
    done = quick_cli(tiny_llama, "--target", "host", *FAST, cwd=work)
    assert done.returncode == 0, done.stderr
    return left, os.listdir(work), work / "out"


def test_the_next_export_cleans_up_after_a_killed_one(
    after_a_kill: tuple[list[str], list[str], Path],
) -> None:
    left, found, out = after_a_kill
    assert [name.endswith(".partial") for name in left] == [True]
    assert found == ["out"]
    assert verify_files(out) == ()


@pytest.mark.parametrize(("number", "times"), [(signal.SIGINT, 100), (signal.SIGTERM, 1)])
def test_an_interrupted_export_leaves_nothing(
    tiny_llama: Path, work: Path, number: signal.Signals, times: int
) -> None:
    """Ctrl-C is pressed more than once: that must not interrupt the cleaning up."""
    code, said = interrupted(tiny_llama, work, number, times)
    assert code == 130, said
    assert said.endswith("error: interrupted; nothing was left behind\n")
    assert "Traceback" not in said
    assert os.listdir(work) == ["my.toml"]


def after_signals(*lines: str) -> str:
    """Return what a program prints that runs these lines with our handlers in place."""
    program = [
        "import signal as s",
        "from slm_export.interrupts import catch_signals as catch, still_an_interrupt",
        *lines,
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(program)], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_first_signal_interrupts_and_those_behind_it_do_not() -> None:
    caught = ["try: s.raise_signal(s.SIGINT)", "except KeyboardInterrupt: print('interrupted')"]
    assert after_signals("catch()", *caught, "s.raise_signal(s.SIGTERM)", *caught) == "interrupted\n"


def test_what_a_library_makes_of_an_interrupt_is_one() -> None:
    made = [
        "try:",
        " with still_an_interrupt():",
        "  try: s.raise_signal(s.SIGINT)",
        "  except KeyboardInterrupt: raise TypeError from None",
        "except KeyboardInterrupt: print('interrupted')",
    ]
    assert after_signals("catch()", *made) == "interrupted\n"


def test_an_error_without_a_signal_stays_what_it_is() -> None:
    lines = ["try:", " with still_an_interrupt(): raise TypeError", "except TypeError: print('an error')"]
    assert after_signals("catch()", *lines) == "an error\n"


def test_nohup_is_obeyed() -> None:
    lines = ("s.signal(s.SIGHUP, s.SIG_IGN)", "catch()", "s.raise_signal(s.SIGHUP)", "print('alive')")
    assert after_signals(*lines) == "alive\n"


def test_a_failed_gate_keeps_nothing_and_shows_what_was_measured(
    tiny_llama: Path, quick_cli: Forked, work: Path
) -> None:
    done = quick_cli(tiny_llama, "--device", "my.toml", *FAST, "--json", cwd=work)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    document = json.loads(done.stdout)
    assert document["error"]["exit_code"] == 1
    message = document["error"]["message"]
    assert "executorch: bytes is" in message
    assert "limit 1000" in message
    assert f"error: {message}\n" in done.stderr
    assert document["report"]["formats"][0]["artifact"]["bytes"] > 1000
    assert os.listdir(work) == ["my.toml"]


@pytest.mark.parametrize(
    ("options", "largest_file", "code", "says"),
    [
        (("--device", "my.toml", "--force"), None, 1, "nothing of it was kept"),
        (("--target", "host", "--force"), 280_000, 4, "disk full"),
        (("--target", "host"), None, 2, "exists already; use --force to replace it"),
    ],
    ids=["failed gate", "full disk", "without --force"],
)
def test_an_old_bundle_survives_an_export_that_fails(
    tiny_llama: Path,
    quick_cli: Forked,
    work: Path,
    after_a_kill: tuple[list[str], list[str], Path],
    options: tuple[str, ...],
    largest_file: int | None,
    code: int,
    says: str,
) -> None:
    shutil.copytree(after_a_kill[2], work / "out")
    before = tree(work)
    done = quick_cli(tiny_llama, *options, *FAST, cwd=work, largest_file=largest_file)
    assert done.returncode == code, done.stderr
    assert says in done.stderr.partition("error: ")[2]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert tree(work) == before
    assert not partial(work)


def test_force_replaces_an_old_bundle_with_a_complete_new_one(
    tiny_llama: Path, quick_cli: Forked, work: Path, after_a_kill: tuple[list[str], list[str], Path]
) -> None:
    shutil.copytree(after_a_kill[2], work / "out")
    (work / "out" / "executorch" / "model.pte").write_bytes(b"spoilt")
    done = quick_cli(tiny_llama, "--target", "host", *FAST, "--context", "32", "--force", cwd=work)
    assert done.returncode == 0, done.stderr
    assert verify_files(work / "out") == ()
    assert read_manifest(after_a_kill[2]).runtime["context"] == 64
    assert read_manifest(work / "out").runtime["context"] == 32
    assert sorted(os.listdir(work)) == ["my.toml", "out"]
