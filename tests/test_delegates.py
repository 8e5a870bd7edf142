"""Delegates at work, with bundles that answer without a model: nothing lost, nothing done twice, nothing leaked."""

from __future__ import annotations

import json
import re
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from delegating import Echo, delegates

from slm_export.delegates.config import Delegates, Remote, Sampling
from slm_export.delegates.job import prompt_of, work_off
from slm_export.delegates.local import Answer, Show
from slm_export.delegates.routing import Machine, answer
from slm_export.delegates.runner import Runner
from slm_export.delegates.screening import Screen
from slm_export.delegates.state import Event, State
from slm_export.errors import InputError, MachineError, MissingComponentError

NOON = datetime(2026, 6, 1, 12, tzinfo=timezone.utc)
DEADLINE_S = 120
FILE = """
[delegates.d]
bundle  = "a-bundle"
{more}
trigger = {{ {trigger} }}
output  = {{ {output} }}
"""
OUT = 'file = "out.jsonl"'
NEVER: Any = lambda *_: pytest.fail("it left this machine")  # noqa: E731


def words(text: str) -> list[SimpleNamespace]:
    """Find what is written in capitals."""
    return [
        SimpleNamespace(start=found.start(), end=found.end(), kind="NAME")
        for found in re.finditer(r"\b[A-Z]{3,}\b", text)
    ]


SEES = Screen(lambda: words)


def one(folder: Path, trigger: str, output: str = OUT, more: str = "") -> Delegates:
    return delegates(folder, FILE.format(trigger=trigger, output=output, more=more))


@contextmanager
def open_state(found: Delegates) -> Iterator[State]:
    with closing(State(Path(found.state))) as state:
        yield state


def run_once(found: Delegates, now: datetime = NOON, lines: tuple[str, ...] = (), **more: Any) -> list[str]:
    """Run as the command does with --once; return what was said."""
    said: list[str] = []
    with open_state(found) as state:
        given = {
            "bundles": Echo(),
            "clock": lambda: now,
            "lines": lines,
            "ask": NEVER,
            "screen": SEES,
            **more,
        }
        Runner(found, state, said.append, **given).run_once()
    return said


def answers(folder: Path) -> list[str]:
    out = folder / "out.jsonl"
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    return [json.loads(line)["answer"] for line in lines]


def until(state: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not state():
        assert time.monotonic() < end
        time.sleep(0.02)


# --- sources -----------------------------------------------------------------------------------------


def test_every_line_is_a_trigger(tmp_path: Path) -> None:
    found = one(tmp_path, "stdin = true", more='prompt = "about {text}: {path}"')
    run_once(found, lines=("first\n", "second {path}\n"))
    assert answers(tmp_path) == ["echo about first: ", "echo about second {path}: "]
    # The same lines in another run are other events.
    run_once(found, lines=("first\n",))
    assert answers(tmp_path)[2:] == ["echo about first: "]


def test_files_that_change_are_triggers_once_each(tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    (inbox / "old.txt").write_text("was there before")
    found = one(tmp_path, 'watch = "inbox", match = "*.txt"')
    run_once(found)
    assert answers(tmp_path) == []
    (inbox / "a.txt").write_text("new")
    (inbox / "b.log").write_text("of another name")
    (inbox / "old.txt").write_text("changed")
    run_once(found)
    run_once(found)
    assert answers(tmp_path) == ["echo new", "echo changed"]
    # Written again as it was: no change. Another content, and the first one again: two.
    (inbox / "a.txt").write_text("new")
    run_once(found)
    assert len(answers(tmp_path)) == 2
    for text in ("newer", "new"):
        (inbox / "a.txt").write_text(text)
        run_once(found)
    assert answers(tmp_path)[2:] == ["echo newer", "echo new"]


def test_files_of_before_count_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("was there before")
    found = one(tmp_path, 'watch = "note.txt", existing = true')
    run_once(found)
    run_once(found)
    assert answers(tmp_path) == ["echo was there before"]


def test_a_file_that_is_no_text_fails_alone(tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    found = one(tmp_path, 'watch = "inbox", existing = true')
    (inbox / "a").write_bytes(b"\xff\xfe\x00")
    (inbox / "b").write_bytes(b"x" * ((1 << 20) + 1))
    (inbox / "c").write_text("well")
    said = run_once(found)
    assert sorted(said) == [
        f"d: {inbox / 'a'} is not UTF-8 text",
        f"d: {inbox / 'b'} has 1,048,577 bytes; at most 1,048,576 are an input",
    ]
    assert answers(tmp_path) == ["echo well"]
    assert not run_once(found)


def test_a_schedule_reads_a_file_each_time(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("1")
    found = one(tmp_path, 'cron = "0 * * * *", read = "log.csv"', more='prompt = "{time} {text}"')
    run_once(found)
    (tmp_path / "log.csv").write_text("2")
    run_once(found, NOON + timedelta(hours=1))
    run_once(found, NOON + timedelta(hours=1, minutes=30))
    (tmp_path / "log.csv").unlink()
    said = run_once(found, NOON + timedelta(hours=2))
    assert answers(tmp_path) == ["echo 2026-06-01T13:00:00+00:00 2"]
    assert said == [f"d: {tmp_path / 'log.csv'}: No such file or directory"]


@pytest.mark.parametrize(("missed", "hours"), [("once", [17]), ("all", [13, 14, 15, 16, 17]), ("skip", [])])
def test_times_at_which_nothing_ran(missed: str, hours: list[int], tmp_path: Path) -> None:
    found = one(tmp_path, f'every = "1h", missed = "{missed}"', more='prompt = "{time}"')
    run_once(found)
    for _ in range(2):
        run_once(found, NOON + timedelta(hours=5, minutes=30))
    assert answers(tmp_path) == [f"echo 2026-06-01T{hour}:00:00+00:00" for hour in hours]


@pytest.mark.parametrize(("overlap", "count"), [("queue", 3), ("skip", 1)])
def test_a_time_at_which_the_one_before_is_at_work(overlap: str, count: int, tmp_path: Path) -> None:
    found = one(tmp_path, f'every = "1h", missed = "all", overlap = "{overlap}"')
    hold, now = threading.Event(), [NOON]
    bundles = Echo(before=lambda _: hold.wait(DEADLINE_S) or pytest.fail("held too long"))
    with open_state(found) as state:
        runner = Runner(found, state, lambda _: None, bundles=bundles, clock=lambda: now[0], ask=NEVER)
        thread = threading.Thread(target=runner.run)
        thread.start()
        until(lambda: bool(state.marks("d")))
        # The clock is looked at when it is due to: three times, the first of which is at work all along.
        for hour in (1, 2, 3):
            from slm_export.delegates.sources import look_at_clock

            now[0] = NOON + timedelta(hours=hour)
            look_at_clock(found.delegates, state, now[0], lambda _: None)
            runner._tell(found.delegates)
        hold.set()
        until(lambda: state.next("d") is None)
        runner.stop()
        thread.join(DEADLINE_S)
        assert state.counts("d").get("skipped", 0) == 3 - count
    assert len(answers(tmp_path)) == count


def test_requests_are_taken_with_the_token_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK_TOKEN", "secret")
    text = '[webhook]\nport = 0\ntoken_env = "HOOK_TOKEN"\n'
    found = delegates(tmp_path, text + FILE.format(trigger="webhook = true", output=OUT, more=""))
    with open_state(found) as state:
        runner = Runner(found, state, lambda _: None, bundles=Echo(), ask=NEVER)
        thread = threading.Thread(target=runner.run)
        thread.start()
        until(lambda: runner.port is not None)
        with httpx.Client(
            base_url=f"http://127.0.0.1:{runner.port}/delegates", timeout=DEADLINE_S, trust_env=False
        ) as client:
            assert client.post("/d", json={"text": "x"}).status_code == 401
            client.headers["authorization"] = "Bearer secret"
            twice = [
                client.post("/d", json={"text": "hello"}, headers={"Idempotency-Key": "1"}) for _ in range(2)
            ]
            assert [done.status_code for done in twice] == [202, 200]
            assert client.post("/d", json={"txt": "x"}).status_code == 400
            assert client.post("/other", json={"text": "x"}).status_code == 404
            assert client.post("/d", content="x", headers={"content-type": "text/plain"}).status_code == 415
        until(lambda: state.counts("d").get("done", 0) == 1)
        runner.stop()
        thread.join(DEADLINE_S)
    assert answers(tmp_path) == ["echo hello"]


# --- nothing is lost, nothing is done twice ----------------------------------------------------------


class KilledError(BaseException):
    """What a kill is to the code: no handler of ours runs."""


def test_what_was_recorded_before_a_kill_is_done_after_it(tmp_path: Path) -> None:
    found = one(tmp_path, "stdin = true")

    def killed(prompt: str) -> None:
        if prompt == "second":
            raise KilledError

    with pytest.raises(KilledError):
        run_once(found, lines=("first", "second", "third"), bundles=Echo(before=killed))
    assert answers(tmp_path) == ["echo first"]
    bundles = Echo()
    run_once(found, bundles=bundles)
    assert answers(tmp_path) == ["echo first", "echo second", "echo third"]
    assert bundles.asked == ["second", "third"]


def test_an_answer_that_was_kept_is_not_computed_again(tmp_path: Path) -> None:
    found = one(tmp_path, "stdin = true")
    with open_state(found) as state:
        state.record(Event("d", "k", "question", "now"))
        trigger = state.next("d")
        assert trigger is not None
        work_off(found.delegates["d"], trigger, state, Echo(), lambda _: False, NEVER)
    bundles = Echo()
    run_once(found, bundles=bundles)
    assert bundles.asked == []
    assert answers(tmp_path) == ["echo question"]


def test_a_kill_between_a_line_and_its_record_does_not_repeat_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = one(tmp_path, "stdin = true")

    def killed(*_: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(State, "over", killed)
        with pytest.raises(KilledError):
            run_once(found, lines=("only",))
    assert answers(tmp_path) == ["echo only"]
    # And half a line, as a power cut leaves it, is ended before the next.
    with open(tmp_path / "out.jsonl", "ab") as file:
        file.write(b'{"id": 9, "ans')
    run_once(found, lines=("next",))
    lines = (tmp_path / "out.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["answer"] for line in (lines[0], lines[2])] == ["echo only", "echo next"]
    assert len(lines) == 3


def test_one_process_at_a_time_has_the_state(tmp_path: Path) -> None:
    found = one(tmp_path, "stdin = true")
    with open_state(found), pytest.raises(InputError, match="another `slm-export delegate run` has it"):
        State(Path(found.state))
    with closing(State(Path(found.state), reading=True)) as state:
        assert state.counts("d") == {}


def test_a_state_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("no base of SQLite, but some text that is long enough for a header" * 20)
    with pytest.raises(InputError, match="no state of delegates"):
        State(tmp_path / "s")
    with closing(sqlite3.connect(tmp_path / "newer")) as base:
        base.execute("PRAGMA user_version = 7")
    with pytest.raises(InputError, match="schema 7; this slm-export reads 1"):
        State(tmp_path / "newer")


def test_old_triggers_are_forgotten_and_open_ones_are_not(tmp_path: Path) -> None:
    with closing(State(tmp_path / "s")) as state:
        for number in range(10):
            id = state.record(Event("d", str(number), "private text", "now"))
            assert id is not None
            if number:
                state.over(id, "done")
        state.prune("d", kept=3)
        assert state.counts("d") == {"waiting": 1, "done": 3}
    # What is over leaves nothing of its input behind.
    with closing(sqlite3.connect(tmp_path / "s")) as base:
        texts = [row[0] for row in base.execute("SELECT text FROM triggers WHERE state = 'done'")]
    assert texts == [""] * 3


# --- outputs -----------------------------------------------------------------------------------------


def test_an_output_that_crashes_is_tried_again_and_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slm_export.delegates.job._PAUSES_S", (0.0,))
    script = tmp_path / "deliver.py"
    script.write_text(
        "import os, sys\n"
        "text = sys.stdin.read()\n"
        "with open(os.environ['LOG'], 'a') as log:\n"
        "    log.write(os.environ['SLM_EXPORT_TRIGGER'] + ' ' + text + '\\n')\n"
        "tries = open(os.environ['LOG']).read().splitlines().count(os.environ['SLM_EXPORT_TRIGGER'] + ' ' + text)\n"
        "if 'bad' in text or ('slow' in text and tries < 2):\n"
        "    sys.exit('cannot deliver ' + text)\n"
    )
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    found = one(tmp_path, "stdin = true", f'command = ["{sys.executable}", "{script}"], attempts = 3')
    said = run_once(found, lines=("bad; rm -rf $HOME", "slow", "good"))
    delivered = (tmp_path / "log").read_text().splitlines()
    assert delivered == ["1 echo bad; rm -rf $HOME"] * 3 + ["2 echo slow"] * 2 + ["3 echo good"]
    assert said[2].startswith("d 1: failed: ")
    assert "ended with exit code 1: cannot deliver echo bad" in said[2]
    with open_state(found) as state:
        assert state.counts("d") == {"failed": 1, "done": 2}


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ('command = ["/no/such/program"]', "/no/such/program cannot be started"),
        ('command = ["sleep", "60"], timeout = "1s"', "sleep took longer than 1 s"),
        ('webhook = "http://127.0.0.1:1/x"', "http://127.0.0.1:1/x cannot be reached"),
        ('file = "/proc/no/such/file"', "/proc/no/such/file"),
    ],
)
def test_an_output_that_fails_says_why(output: str, words: str, tmp_path: Path) -> None:
    found = one(tmp_path, "stdin = true", f"{output}, attempts = 1")
    (said,) = run_once(found, lines=("x",))
    assert said.startswith("d 1: failed: ")
    assert words in said


def test_a_webhook_is_given_the_answer_and_is_not_followed_elsewhere(tmp_path: Path) -> None:
    got: list[tuple[str, str | None, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            got.append((self.path, self.headers["idempotency-key"], body))
            self.send_response(302 if body["answer"].endswith("elsewhere") else 204)
            self.send_header("location", "/elsewhere")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}/in"
        found = one(tmp_path, "stdin = true", f'webhook = "{url}", attempts = 1', "private = true")
        said = run_once(found, lines=("hello", "go elsewhere"))
        server.shutdown()
        thread.join()
    assert [path for path, _, _ in got] == ["/in", "/in"]
    assert got[0][1] == "d-1"
    assert {key: got[0][2][key] for key in ("id", "delegate", "place", "answer")} == {
        "id": 1,
        "delegate": "d",
        "place": "local",
        "answer": "echo hello",
    }
    assert said == [f"d 2: failed: {url} answers 302"]


def test_an_answer_goes_to_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_once(one(tmp_path, "stdin = true", "stdout = true"), lines=("x",))
    assert capsys.readouterr().out == "echo x\n"


# --- where it runs -----------------------------------------------------------------------------------

BY_RULE = """
where  = "local-then-remote"
remote = { url = "https://api.example/v1", model = "large" }
rule   = { longer_than = 3, confidence_below = 0.5, busy_above = 2, hotter_than = 80 }
"""
CALM = Machine(0.1, 40.0)


def far(remote: Remote, prompt: str, sampling: Sampling, show: Show) -> Answer:
    return Answer(f"{remote.model}: {prompt}", "api.example")


@pytest.mark.parametrize(
    ("prompt", "confidence", "machine", "place", "why"),
    [
        ("short", 0.9, CALM, "local", ""),
        ("short", 0.4, CALM, "api.example", "a confidence of 0.40 is below 0.5"),
        ("short", None, CALM, "local", ""),
        ("one two three four", 0.9, CALM, "api.example", "4 tokens are more than 3"),
        ("short", 0.9, Machine(2.5, None), "api.example", "the load of 2.50 for each core is above 2"),
        ("short", 0.9, Machine(0.1, 81.0), "api.example", "81 °C are above 80"),
    ],
)
def test_the_rule_decides(
    prompt: str, confidence: float | None, machine: Machine, place: str, why: str, tmp_path: Path
) -> None:
    delegate = one(tmp_path, "stdin = true", more=BY_RULE).delegates["d"]
    found = answer(delegate, prompt, False, Echo(confidence), far, lambda: machine)
    assert (found.answer.place, found.why) == (place, why)


@pytest.mark.parametrize("prompt", ["short", "one two three four"])
def test_what_is_private_stays_whatever_the_rule_says(prompt: str, tmp_path: Path) -> None:
    delegate = one(tmp_path, "stdin = true", more=BY_RULE).delegates["d"]
    hot = Machine(9.0, 99.0)
    assert answer(delegate, prompt, True, Echo(0.0), NEVER, lambda: hot).answer.place == "local"
    marked = delegate.model_copy(update={"private": True})
    with open_state(one(tmp_path, "stdin = true", more=BY_RULE)) as state:
        for private, of in ((True, delegate), (False, marked)):
            state.record(Event("d", f"{private}", prompt, "now", private=private))
            trigger = state.next("d")
            assert trigger is not None
            assert trigger.private == private
            assert work_off(of, trigger, state, Echo(0.0), lambda _: False, NEVER) is None
            state.over(trigger.id, "done")


def test_an_endpoint_that_fails_leaves_the_local_answer(tmp_path: Path) -> None:
    def fails(*_: object) -> Answer:
        raise MachineError("api.example cannot be reached")

    delegate = one(tmp_path, "stdin = true", more=BY_RULE).delegates["d"]
    bundles = Echo(0.1)
    found = answer(delegate, "short", False, bundles, fails, lambda: CALM)
    assert found.answer.text == "echo short"
    assert found.why == "a confidence of 0.10 is below 0.5, but api.example cannot be reached"
    assert bundles.asked == ["short"]
    assert answer(delegate, "a b c d", False, bundles, fails, lambda: CALM).answer.place == "local"


def test_a_private_request_to_a_remote_delegate_fails_here(tmp_path: Path) -> None:
    text = """
[delegates.d]
where   = "remote"
remote  = { url = "https://api.example/v1", model = "large" }
trigger = { stdin = true }
output  = { file = "out.jsonl" }
"""
    found = delegates(tmp_path, text)
    with open_state(found) as state:
        state.record(Event("d", "1", "secret", "now", private=True))
        state.record(Event("d", "2", "open", "now"))
    said = run_once(found, ask=far)
    assert said == ["d 1: failed: it must not leave (private), and no bundle is named to answer it here"]
    assert answers(tmp_path) == ["large: open"]


WITH_BUNDLE = """
[delegates.d]
bundle  = "a-bundle"
where   = "local-then-remote"
rule    = { longer_than = 1 }
remote  = { url = "https://api.example/v1", model = "large" }
trigger = { stdin = true }
output  = { file = "out.jsonl" }
"""


@pytest.mark.parametrize(
    ("personal_data", "expected"),
    [
        ("", ["echo call ANNA or BERT or ANNA", "large: call somebody or other"]),
        ("stay", ["echo call ANNA or BERT or ANNA", "large: call somebody or other"]),
        ("replace", ["large: call <NAME_1> or <NAME_2> or <NAME_1>", "large: call somebody or other"]),
        ("send", ["large: call ANNA or BERT or ANNA", "large: call somebody or other"]),
    ],
)
def test_personal_data_leaves_as_is_said_alone(
    personal_data: str, expected: list[str], tmp_path: Path
) -> None:
    said = f'where = "local-then-remote"\npersonal_data = "{personal_data}"' if personal_data else None
    text = WITH_BUNDLE.replace('where   = "local-then-remote"', said) if said else WITH_BUNDLE
    found = delegates(tmp_path, text)
    run_once(found, lines=("call ANNA or BERT or ANNA", "call somebody or other"), ask=far)
    assert answers(tmp_path) == expected
    if personal_data in ("", "stay"):
        with closing(State(Path(found.state))) as state:
            assert [one.detail for one in state.last("d", 2)] == ["4 tokens are more than 1", "it holds NAME"]


def test_a_net_that_is_not_there_is_told_before_anything_leaves(tmp_path: Path) -> None:
    def missing() -> Any:
        raise MissingComponentError("no net")

    for text, lines in (
        (WITH_BUNDLE, 0),
        (WITH_BUNDLE.replace("where ", 'personal_data = "send"\nwhere '), 1),
    ):
        found = delegates(tmp_path, text)
        if lines:
            run_once(found, lines=("two words",), ask=far, screen=Screen(missing))
            assert answers(tmp_path) == ["large: two words"]
        else:
            with pytest.raises(MissingComponentError, match="no net"):
                run_once(found, lines=("two words",), ask=far, screen=Screen(missing))


def test_the_anonymiser_sees_what_patterns_see() -> None:
    screen = Screen()
    text = "Write to anna.kowalska@example.com or pay to DE89 3704 0044 0532 0130 00."
    assert {"EMAIL_ADDRESS", "IBAN_CODE"} <= set(screen.kinds(text))
    assert "anna" not in screen.replaced(text)
    assert screen.kinds("def add(first, second): return first + second") == ()


def test_a_prompt_is_filled_in_one_pass(tmp_path: Path) -> None:
    found = one(tmp_path, "stdin = true", more='prompt = "<{text}> {path} {x"')
    with open_state(found) as state:
        state.record(Event("d", "1", "{path}{time}{text}", "now", "/a/b"))
        trigger = state.next("d")
    assert trigger is not None
    assert prompt_of(found.delegates["d"], trigger) == "<{path}{time}{text}> /a/b {x"
