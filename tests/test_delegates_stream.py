"""Delegates whose answers are shown as they are written, and whose endpoint sends them in pieces."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from delegating import Echo, delegates

from slm_export.delegates.config import Remote, Sampling
from slm_export.delegates.local import Answer, Bundles, Show
from slm_export.delegates.remote import ask
from slm_export.delegates.runner import Runner
from slm_export.delegates.screening import Screen
from slm_export.delegates.state import State
from slm_export.errors import InputError, MachineError

DEADLINE_S = 60
FILE = """
[delegates.d]
bundle   = "a-bundle"
trigger  = { stdin = true }
sampling = { stream = true }
output   = { stdout = true }
"""


def run(file: str, folder: Path, bundles: Bundles, lines: tuple[str, ...], **more: Any) -> list[Any]:
    """Run as the command does with --once; return the states of its triggers."""
    found = delegates(folder, file)
    with closing(State(Path(found.state))) as state:
        Runner(found, state, lambda _: None, bundles=bundles, lines=lines, screen=Screen(), **more).run_once()
        return [one.state for one in state.last("d", 10)]


def test_pieces_are_shown_before_the_answer_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    class Pieces(Echo):
        def answer(self, *asked: Any, show: Show, **more: Any) -> Answer:
            def shown(piece: str) -> None:
                show(piece)
                seen.append(capsys.readouterr().out)

            return super().answer(*asked, show=shown, **more)

    states = run(FILE, tmp_path, Pieces(), ("one", "two"))
    assert seen == ["echo ", "one", "\necho ", "two"]
    assert capsys.readouterr().out == "\n"
    assert states == ["done", "done"]


def test_an_answer_that_breaks_off_ends_its_line_and_is_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Breaks(Echo):
        def answer(self, *asked: Any, show: Show, **more: Any) -> Answer:
            if not self.asked:
                self.asked.append("")
                show("half")
                raise MachineError("it broke")
            return super().answer(*asked, show=show, **more)

    monkeypatch.setattr("slm_export.delegates.job._PAUSES_S", (0.0,))
    assert run(FILE, tmp_path, Breaks(), ("one",)) == ["done"]
    assert capsys.readouterr().out == "half\necho one\n"


def test_answers_that_are_shown_side_by_side_stay_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun, other = threading.Event(), threading.Event()

    class Meets(Echo):
        """The first answer waits in its midst until the second delegate wants to show its own."""

        def answer(self, *asked: Any, show: Show, **more: Any) -> Answer:
            prompt = asked[2]
            show("<")
            begun.set()
            assert other.wait(DEADLINE_S)
            show(f"{prompt}>")
            return Answer(prompt, "local", None)

    inbox = tmp_path / "inbox"
    inbox.mkdir()
    (inbox / "a.txt").write_text("second")
    second = FILE.replace("delegates.d", "delegates.e").replace(
        "stdin = true", 'watch = "inbox", existing = true'
    )
    found = delegates(tmp_path, FILE + second)
    bundles = Meets()
    with closing(State(Path(found.state))) as state:
        runner = Runner(found, state, lambda _: None, bundles=bundles, lines=("first",))
        thread = threading.Thread(target=runner.run)
        thread.start()
        assert begun.wait(DEADLINE_S)
        other.set()
        wait_for(lambda: all(state.counts(name).get("done") == 1 for name in "de"))
        runner.stop()
        thread.join(DEADLINE_S)
    assert sorted(capsys.readouterr().out.splitlines()) == ["<first>", "<second>"]


def wait_for(state: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(DEADLINE_S * 50):
        if state():
            return
        pause.wait(0.02)
    pytest.fail("it never came")


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (
            {"{ stdout = true }": '{ file = "out.jsonl" }'},
            "of use with output = { stdout = true } or an endpoint",
        ),
        (
            {"[delegates.d]": '[delegates.d]\nnearest = { file = "faq.toml" }'},
            "the answer of the nearest entry is there at once",
        ),
        (
            {
                "[delegates.d]": '[delegates.d]\nwhere = "local-then-remote"\nrule = { confidence_below = 0.5 }\n'
                'remote = { url = "https://api.example/v1", model = "large" }'
            },
            "an answer that may be doubted cannot be shown before its end",
        ),
        ({"stream = true": "streams = true"}, "stream"),
    ],
)
def test_what_cannot_be_streamed_is_refused(changed: dict[str, str], why: str, tmp_path: Path) -> None:
    text = FILE
    for old, new in changed.items():
        assert old in text
        text = text.replace(old, new)
    with pytest.raises(InputError, match=why):
        delegates(tmp_path, text)


# --- an endpoint, through the official client --------------------------------------------------------


@contextmanager
def endpoint(events: list[str]) -> Iterator[tuple[Remote, list[dict[str, Any]]]]:
    """Serve these lines as server-sent events."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            for event in events:
                self.wfile.write(f"data: {event}\n\n".encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/v1"
            yield Remote(url=url, model="large", retries=0), asked
        finally:
            server.shutdown()
            thread.join(DEADLINE_S)


def chunk(text: str | None, finish: str | None = None) -> str:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return json.dumps(
        {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "large", "choices": [choice]}
    )


def test_an_endpoint_sends_pieces() -> None:
    pieces: list[str] = []
    with endpoint([chunk("a "), chunk(None), chunk("b"), chunk("", "stop"), "[DONE]"]) as (remote, asked):
        found = ask(remote, "say", Sampling(stream=True, top_p=0.9), pieces.append)
    assert (found.text, pieces) == ("a b", ["a ", "b"])
    assert asked[0]["stream"] is True
    assert asked[0]["top_p"] == 0.9


def test_an_answer_that_an_endpoint_breaks_off_is_none() -> None:
    with (
        endpoint([chunk("a "), "[DONE]"]) as (remote, _),
        pytest.raises(MachineError, match="broke off in the midst"),
    ):
        ask(remote, "say", Sampling(stream=True))
