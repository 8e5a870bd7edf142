"""What people see of a matrix: a table on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import os
import pty
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from slm_export.matrix.show import Board, last_line


def cell(name: str) -> Any:
    return SimpleNamespace(name=name)


def result(name: str, outcome: str, reason: str = "") -> Any:
    return SimpleNamespace(cell=cell(name), outcome=outcome, reason=reason, seconds=3.0)


def play(console: Console, log: Path) -> None:
    log.write_bytes(b"read the model ...\nwrite onnx ...\n")
    with Board(console, 3) as board:
        board.ended(result("a", "kept"))
        board.started(cell("b"), log, 2 * 10**9)
        board.started(cell("c"), log.parent / "none", None)
        board.beat(1)
        board.ended(result("b", "failed", "onnx: kl_mean is 9, limit 1\x1b[2J"))
        board.ended(result("c", "made"))


def test_elsewhere_a_line_for_every_beginning_and_end(tmp_path: Path) -> None:
    out = io.StringIO()
    play(Console(file=out, width=100), tmp_path / "log")
    assert out.getvalue().splitlines() == [
        "a: kept  (1 of 3)",
        "b ...  2.0 GB of memory predicted",
        "c ...",
        "b: failed, 3.0 s  (2 of 3)",
        "  onnx: kl_mean is 9, limit 1\\x1b[2J",
        "c: made, 3.0 s  (3 of 3)",
    ]


def test_on_a_terminal_a_table_of_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    with open(theirs, "w", encoding="utf-8") as terminal:
        play(Console(file=terminal, width=100, force_terminal=True), tmp_path / "log")
        terminal.flush()
        shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "2 running, 1 waiting" in shown
    assert "write onnx ..." in shown
    assert "2.0 GB" in shown
    assert "c: made, 3.0 s  (3 of 3)" in shown
    # What a log or a reason says does not command the terminal.
    assert "limit 1\x1b[2J" not in shown


def test_a_reader_that_is_gone_disturbs_nothing(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(file=out)
    out.close()
    play(console, tmp_path / "log")


def test_the_last_line_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_line(log) == ""
    log.write_text("x" * 9000 + "\n  write onnx  3 s\n\n")
    assert last_line(log) == "write onnx  3 s"
