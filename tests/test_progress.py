"""The display is alive, truthful and harmless."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from rich.console import Console

from slm_export.memory import peak_resident_mb, resident_mb
from slm_export.progress import Progress


def plain(heartbeat: float = 10.0) -> tuple[Progress, io.StringIO]:
    stream = io.StringIO()
    return Progress(Console(file=stream, width=60), heartbeat=heartbeat), stream


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "progress"]


def run(code: str) -> subprocess.CompletedProcess[bytes]:
    source = "import os, sys, time\nfrom slm_export.progress import Progress\n" + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", source], capture_output=True, timeout=300, check=False)


def test_stages_are_timed_in_order_and_names_add_up() -> None:
    progress, _ = plain()
    began = time.monotonic()
    for name in ("load", "lower", "load"):
        with progress.stage(name):
            time.sleep(0.05)
    whole = time.monotonic() - began
    assert list(progress.stages) == ["load", "lower"]
    assert progress.stages["load"] >= 0.1
    assert progress.stages["lower"] >= 0.05
    assert sum(progress.stages.values()) <= whole


def test_an_inner_stage_is_shown_and_not_counted_twice() -> None:
    progress, stream = plain()
    with progress.stage("outer"), progress.stage("inner"):
        pass
    assert list(progress.stages) == ["outer"]
    assert "inner: done" in stream.getvalue()


def test_lines_at_start_and_end() -> None:
    progress, stream = plain()
    with progress.stage("a name that is so long that a line of sixty columns cannot hold it"):
        pass
    first, last = stream.getvalue().splitlines()
    assert first.endswith("cannot hold it ...")
    assert " hold it: done, " in last
    assert last.endswith(" MiB at the peak")


def test_a_heartbeat_says_how_far_it_is() -> None:
    progress, stream = plain(heartbeat=0.1)
    with progress.stage("lower", total=16) as stage:
        stage.advance(3, "layer 3")
        deadline = time.monotonic() + 60
        while "3/16, layer 3" not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    beats = [line for line in stream.getvalue().splitlines() if line.endswith("3/16, layer 3")]
    assert beats
    assert "MiB" in beats[0]


@pytest.mark.parametrize(
    ("error", "word"),
    [(ValueError, "failed"), (KeyboardInterrupt, "interrupted"), (SystemExit, "interrupted")],
)
def test_an_exception_passes_and_leaves_no_thread(error: type[BaseException], word: str) -> None:
    progress, stream = plain()
    with pytest.raises(error), progress.stage("lower"):
        raise error
    assert f"lower: {word}" in stream.getvalue()
    assert "lower" in progress.stages
    assert not watchers()
    with progress.stage("next"):
        assert len(watchers()) == 1


def test_silent_shows_nothing_and_still_measures(capfd: pytest.CaptureFixture[str]) -> None:
    progress = Progress(silent=True)
    with progress.stage("lower") as stage:
        stage.advance()
        progress.say("nothing")
    assert capfd.readouterr() == ("", "")
    assert "lower" in progress.stages
    assert progress.peak_rss_mb > 0


def test_stdout_stays_empty() -> None:
    done = run("with Progress().stage('lower'): pass")
    assert done.stdout == b""
    assert b"lower: done" in done.stderr


def test_the_peak_covers_memory_that_was_given_back() -> None:
    progress = Progress(silent=True)
    before = progress.peak_rss_mb
    with progress.stage("allocate"):
        block = bytearray(200 << 20)
        block[:: os.sysconf("SC_PAGE_SIZE")] = b"x" * len(block[:: os.sysconf("SC_PAGE_SIZE")])
        held = resident_mb()
        del block
    assert resident_mb() < held - 150
    # The two counters of the kernel lag behind each other by some pages.
    assert progress.peak_rss_mb >= max(before, held) - 4


def test_the_peak_is_our_own_and_not_that_of_the_process_that_started_us() -> None:
    block = b"x" * (300 << 20)
    done = run("print(Progress(silent=True).peak_rss_mb)")
    assert len(block)
    assert float(done.stdout) < 250
    assert peak_resident_mb() >= 300


@pytest.mark.parametrize(
    "break_it",
    [
        "os.close(2)",
        "sys.stderr.close()",
        "sys.stderr = None",
        "os.dup2(os.open('/dev/full', os.O_WRONLY), 2)",
    ],
)
def test_a_broken_stderr_disturbs_nothing(break_it: str) -> None:
    done = run(f"""
        {break_it}
        progress = Progress(heartbeat=0.1)
        with progress.stage("lower") as stage:
            stage.advance()
            time.sleep(0.5)
        progress.say("x")
        print(list(progress.stages))
    """)
    assert done.stdout == b"['lower']\n"


def test_a_reader_that_went_away_disturbs_nothing() -> None:
    source = """if True:
        import os, time
        from slm_export.progress import Progress
        reader, writer = os.pipe()
        os.dup2(writer, 2)
        os.close(writer)
        os.close(reader)
        with Progress(heartbeat=0.1).stage("lower"):
            time.sleep(0.5)
        print("alive", flush=True)
        os._exit(0)
    """
    done = subprocess.run([sys.executable, "-c", source], stdout=subprocess.PIPE, timeout=300, check=False)
    assert done.stdout == b"alive\n"


def test_a_stage_never_closed_does_not_keep_the_process_alive() -> None:
    done = run("stage = Progress(silent=True).stage('lower'); stage.__enter__(); sys.exit(7)")
    assert done.returncode == 7


def on_terminal(code: str) -> tuple[str, str]:
    """Run code with a terminal for stderr; return what it drew there and what it wrote to stdout."""
    leader, follower = pty.openpty()
    source = "import sys, time, warnings\nfrom slm_export.progress import Progress\n" + textwrap.dedent(code)
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    command = [sys.executable, "-c", source]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=follower, env=environment)
    os.close(follower)
    drawn = b""
    while True:
        try:
            block = os.read(leader, 4096)
        except OSError:
            break
        if not block:
            break
        drawn += block
    os.close(leader)
    written, _ = process.communicate(timeout=300)
    return drawn.decode(), written.decode()


def test_a_terminal_gets_a_live_line_and_its_cursor_back() -> None:
    drawn, written = on_terminal("""
        with Progress().stage("lower", total=3) as stage:
            time.sleep(0.4)
            stage.advance(2, "layer 2")
            time.sleep(0.5)
            print("a warning", file=sys.stderr)
            print('{"json": 1}')
            time.sleep(0.3)
    """)
    assert "0/3" in drawn
    assert "2/3, layer 2" in drawn
    assert "a warning" in drawn
    assert written == '{"json": 1}\n'
    assert "lower: done" in drawn
    assert drawn.rindex("\x1b[?25h") > drawn.rindex("\x1b[?25l")


def test_an_interrupted_stage_gives_the_cursor_back() -> None:
    drawn, _ = on_terminal("""
        with Progress().stage("lower"):
            time.sleep(0.4)
            raise KeyboardInterrupt
    """)
    assert "lower: interrupted" in drawn
    assert drawn.rindex("\x1b[?25h") > drawn.rindex("\x1b[?25l")


def test_forced_colours_do_not_animate_a_log() -> None:
    stream = io.StringIO()
    with Progress(Console(file=stream, force_terminal=True)).stage("lower"):
        time.sleep(0.3)
    assert "\x1b[?25l" not in stream.getvalue()


def test_control_characters_are_shown_not_obeyed() -> None:
    progress, stream = plain()
    with progress.stage("lower \x1b[2J"):
        progress.say("\x07")
    assert "\x1b" not in stream.getvalue()
    assert "\x07" not in stream.getvalue()
