"""The queue before a served model: how many may wait, and what becomes of those who leave."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
import uvicorn

from slm_export.opened import OpenBundle
from slm_export.runtime import DecoderSession
from slm_export.serving.engine import Engine, QueueFullError
from slm_export.serving.messages import CompletionRequest
from slm_export.serving.server import listen, make_app
from slm_export.serving.writing import Limits, Piece, write
from slm_export.source.tasks import GENERATION
from slm_export.tokenization.tokenizer import SourceTokenizer

DEADLINE_S = 120


class Stepwise:
    """A decoder that takes a step when it is let: it writes the letters of a text, over and over."""

    context, prefill_chunk, stop_ids, bos_id, vocabulary = 4096, 64, (), None, None

    def __init__(self, ids: Sequence[int], vocabulary: int) -> None:
        self._ids, self._size = ids, vocabulary
        self.steps = 0
        self.let = threading.Semaphore(0)
        self.closed = False

    def logits(self, tokens: Sequence[int], start: int) -> torch.Tensor:
        assert self.let.acquire(timeout=DEADLINE_S)
        found = torch.zeros(self._size)
        found[self._ids[self.steps % len(self._ids)]] = 1
        self.steps += 1
        return found

    def metadata(self) -> Mapping[str, Any]:
        return {}

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def tokenizer(pycode: Path) -> SourceTokenizer:
    return SourceTokenizer.load(pycode)


@pytest.fixture
def session(tokenizer: SourceTokenizer) -> Stepwise:
    return Stepwise(tokenizer.encode("abcdefgh"), tokenizer.vocab_size)


def opened(session: Stepwise, tokenizer: SourceTokenizer) -> OpenBundle:
    assert isinstance(session, DecoderSession)
    model = SimpleNamespace(name="stepwise", task=GENERATION)
    manifest: Any = SimpleNamespace(model=model, runtime={})
    return OpenBundle(manifest, session, tokenizer)


@contextmanager
def answering(
    session: Stepwise, tokenizer: SourceTokenizer, waiting: int
) -> Iterator[tuple[httpx.Client, Engine]]:
    """Serve from a thread of this process."""
    engine = Engine(lambda: opened(session, tokenizer), waiting)
    listening = listen("127.0.0.1", 0)
    config = uvicorn.Config(make_app(engine, None, True), log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    try:
        with httpx.Client(base_url=url, timeout=DEADLINE_S, trust_env=False) as client:
            yield client, engine
    finally:
        session.let.release(10_000)
        server.should_exit = True
        thread.join(DEADLINE_S)
        engine.close()
        listening.close()
    assert session.closed


def until(state: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not state():
        assert time.monotonic() < end
        time.sleep(0.01)


def asking(**more: Any) -> dict[str, Any]:
    return {"model": "stepwise", "prompt": "x", "max_tokens": 1000, "temperature": 0, **more}


def idle(engine: Engine) -> bool:
    return engine.load == 0


def test_a_client_that_leaves_a_stream_frees_the_model(session: Stepwise, tokenizer: SourceTokenizer) -> None:
    with answering(session, tokenizer, waiting=4) as (client, engine):
        session.let.release(3)
        with client.stream("POST", "/completions", json=asking(stream=True)) as response:
            first = next(line for line in response.iter_lines() if line)
            assert json.loads(first.removeprefix("data: "))["choices"][0]["text"]
        # It may be at a step, which it cannot leave; once it may go on, it does not ask for a thousand.
        time_limit = time.monotonic() + DEADLINE_S
        while not idle(engine) and time.monotonic() < time_limit:
            session.let.release()
            time.sleep(0.05)
        assert idle(engine)
        assert session.steps < 900
        session.let.release(1000)
        assert (
            client.post("/completions", json=asking(max_tokens=2)).json()["usage"]["completion_tokens"] == 2
        )


def test_a_client_that_does_not_wait_for_the_whole_frees_the_model(
    session: Stepwise, tokenizer: SourceTokenizer
) -> None:
    with answering(session, tokenizer, waiting=4) as (client, engine):
        with pytest.raises(httpx.ReadTimeout):
            client.post("/completions", json=asking(), timeout=httpx.Timeout(DEADLINE_S, read=0.5))
        time_limit = time.monotonic() + DEADLINE_S
        while not idle(engine) and time.monotonic() < time_limit:
            session.let.release()
            time.sleep(0.05)
        assert idle(engine)
        assert session.steps < 900


def test_more_than_may_wait_are_refused_and_who_leaves_makes_room(
    session: Stepwise, tokenizer: SourceTokenizer
) -> None:
    def post(**more: Any) -> None:
        answers.append(client.post("/completions", json=asking(max_tokens=2, **more)))

    answers: list[httpx.Response] = []
    with answering(session, tokenizer, waiting=1) as (client, engine):
        threads = [threading.Thread(target=post) for _ in range(2)]
        for number, thread in enumerate(threads, 1):
            thread.start()
            until(lambda number=number: engine.load == number)  # type: ignore[misc]
        refused = client.post("/completions", json=asking())
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "queue_full"
        assert "1 requests are waiting already" in refused.json()["error"]["message"]
        assert client.get("/models").status_code == 200
        session.let.release(100)
        for thread in threads:
            thread.join(DEADLINE_S)
        assert [answer.status_code for answer in answers] == [200, 200]
        assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [2, 2]


def test_who_leaves_the_queue_is_never_begun(session: Stepwise, tokenizer: SourceTokenizer) -> None:
    begun = []

    def work(name: str, hold: threading.Event) -> Callable[[OpenBundle], Iterator[str]]:
        def steps(model: OpenBundle) -> Iterator[str]:
            begun.append(name)
            assert hold.wait(DEADLINE_S)
            yield name

        return steps

    async def talk(engine: Engine) -> None:
        hold = threading.Event()
        first, second = (engine.submit(work(name, hold)) for name in ("first", "second"))
        with pytest.raises(QueueFullError):
            engine.submit(work("third", hold))
        second.give_up()
        third = engine.submit(work("third", hold))
        hold.set()
        assert [item async for item in first] == ["first"]
        assert [item async for item in third] == ["third"]
        assert begun == ["first", "third"]

    with closing(Engine(lambda: opened(session, tokenizer), 1)) as engine:
        asyncio.run(asyncio.wait_for(talk(engine), DEADLINE_S))


def test_a_mistake_is_one_answer_and_the_next_is_well(
    session: Stepwise, tokenizer: SourceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.let.release(100)
    with answering(session, tokenizer, waiting=1) as (client, _):
        logits = session.logits
        monkeypatch.setattr(session, "logits", lambda *_: 1 / 0)
        failed = client.post("/completions", json=asking(max_tokens=2))
        assert failed.status_code == 500
        assert "slm-export itself is at fault" in failed.json()["error"]["message"]
        monkeypatch.setattr(session, "logits", logits)
        assert client.post("/completions", json=asking(max_tokens=2)).status_code == 200


def test_a_model_that_cannot_be_opened_is_an_error_of_who_opens_it() -> None:
    def fails() -> OpenBundle:
        raise FileNotFoundError("model.onnx")

    with pytest.raises(FileNotFoundError, match=r"model\.onnx"):
        Engine(fails, 1)


@pytest.mark.parametrize("stop", ["def", "cde", "h", "ab", "hab"])
def test_stop_sequences_are_found_across_pieces(
    stop: str, session: Stepwise, tokenizer: SourceTokenizer
) -> None:
    session.let.release(1000)
    pieces = [
        step
        for step in write(opened(session, tokenizer), [5], Limits(100, stop=(stop, "never there")))
        if isinstance(step, Piece)
    ]
    whole = "abcdefgh" * 3
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish == "stop"


def test_what_was_held_back_for_a_stop_is_shown_at_the_end(
    session: Stepwise, tokenizer: SourceTokenizer
) -> None:
    session.let.release(1000)
    steps = write(opened(session, tokenizer), [5], Limits(len(session._ids), stop=("gh and more",)))
    assert "".join(step.text for step in steps if isinstance(step, Piece)) == "abcdefgh"


def test_what_several_prompts_are() -> None:
    def prompts(prompt: Any) -> Any:
        return CompletionRequest(model="m", prompt=prompt).prompts

    assert prompts("a") == ("a",)
    assert prompts(["a", "b"]) == ("a", "b")
    assert prompts([1, 2]) == ((1, 2),)
