"""`slm-export bench --on ssh`: the real ssh client and a real sshd on the loopback interface."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench_devices import artifact, measured, runner
from board import HOST, SSHD, Board, switched_on

from slm_export.bench.places.ssh import Ssh, board_state
from slm_export.bench.subject import Subject
from slm_export.errors import InputError, MachineError, MissingComponentError

needs_sshd = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None, reason="drives a real sshd: apt-get install openssh-server"
)

# Ends the sshd that serves this connection, as a board without power would.
PULL_THE_PLUG = """
p=$$
while :; do
    case $(cat /proc/$p/comm) in sshd*) break ;; esac
    set -- $(cat /proc/$p/stat); p=$4
done
kill -9 $p; sleep 1
"""


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    with switched_on(tmp_path / "board") as made:
        monkeypatch.setenv("PATH", f"{made.client}:/usr/bin:/bin")
        yield made


@pytest.fixture
def subject(tmp_path: Path, pycode: Path) -> Subject:
    return artifact(tmp_path, pycode)


@pytest.fixture(autouse=True)
def _nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What these tests put on the board is gone; others may be at work in the same folder."""
    drawn: list[uuid.UUID] = []
    draw = uuid.uuid4
    monkeypatch.setattr(uuid, "uuid4", lambda: drawn.append(draw()) or drawn[-1])
    yield
    assert not [left for one in drawn for left in Path("/tmp").glob(f"slm-export-{one.hex[:12]}/measure.sh")]


@needs_sshd
def test_a_board_is_measured_with_the_vendors_program(board: Board, subject: Subject, tmp_path: Path) -> None:
    board.says("vcgencmd", "echo throttled=0x50005")
    found = measured(Ssh(HOST), subject, runner(tmp_path))
    assert HOST in found.where
    assert [s.tokens_per_s and s.tokens_per_s.median for s in found.decode] == pytest.approx([100, 100])
    assert found.warm_load_ms is not None
    assert found.warm_load_ms.median == 250
    assert found.peak_rss_mb is not None
    assert 0 < found.peak_rss_mb < 100  # a shell
    assert found.before.throttling == "under-voltage, throttled"
    assert found.before.available_mb is not None


@needs_sshd
def test_a_board_that_fails_is_named_with_what_to_do(board: Board, subject: Subject, tmp_path: Path) -> None:
    board.says("df", 'echo F B U A C M; echo "/dev/root 1000 900 100 90% /"')
    with pytest.raises(MachineError, match=r"has 102\.4 kB free where"):
        measured(Ssh(HOST), subject, runner(tmp_path))
    (board.bin / "df").unlink()
    with pytest.raises(
        MissingComponentError, match=r"no-such-runner: no such file here, and no such program"
    ):
        measured(Ssh(HOST), subject, "no-such-runner")
    program = tmp_path / "llama_main"
    program.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\xf3\x00" + bytes(44))
    with pytest.raises(InputError, match="is for riscv, but"):
        measured(Ssh(HOST), subject, program)
    board.says("chmod", "exec /bin/chmod 644 $2")
    with pytest.raises(MachineError, match="the runner does not start: the device refuses to execute it"):
        measured(Ssh(HOST), subject, runner(tmp_path))


@needs_sshd
def test_a_board_that_loses_power_is_named(board: Board, subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(
        MachineError, match=r"ssh cannot reach it to run the model|went away while it should run"
    ):
        measured(Ssh(HOST), subject, runner(tmp_path, PULL_THE_PLUG))


@needs_sshd
def test_a_board_that_does_not_answer_is_given_up(board: Board, subject: Subject) -> None:
    board.says("uname", "sleep 20")
    with pytest.raises(MachineError, match="say what it is: no answer within 2 s"):
        measured(Ssh(HOST, patience_s=2), subject, "llama_main")


@needs_sshd
def test_a_board_that_refuses_the_key_is_named(board: Board, subject: Subject) -> None:
    (board.folder / "user_key.pub").write_text("", encoding="utf-8")
    with pytest.raises(MachineError, match=r"ssh cannot reach it to say what it is: .*Permission denied"):
        measured(Ssh(HOST), subject, "llama_main")
    with pytest.raises(MachineError, match="ssh cannot reach it"):
        measured(Ssh("nobody@127.0.0.1.invalid"), subject, "llama_main")


@pytest.mark.parametrize(
    ("host", "words"), [(None, "needs --device HOST"), ("-oProxyCommand=x", "no name of a host")]
)
def test_a_host_must_be_named(host: str | None, words: str, subject: Subject) -> None:
    with pytest.raises(InputError, match=words):
        measured(Ssh(host), subject, "llama_main")


def test_what_boards_say_of_themselves_is_understood() -> None:
    assert board_state("45123\n61000\nthrottled=0x0\ncpufreq policy0 1 2") == (61.0, "none")
    assert board_state("cpufreq policy0 1500000 2400000\ncpufreq policy4 1800000 1800000\n") == (
        None,
        "frequency capped at 1500 of 2400 MHz",
    )
    assert board_state("cpufreq policy0 2400000 2400000") == (None, "none")
    assert board_state("") == (None, None)
