"""Teachers behind a URL, asked by the real client on the loopback interface, and answers that outlive a kill."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from reasoning import arithmetic, chat, endpoint, save_child, solved

from slm_export.bundles.finished import CACHE_VARIABLE
from slm_export.errors import InputError, MachineError, SlmExportError
from slm_export.learning.asked import Kept, ask
from slm_export.learning.endpoint import KEY_VARIABLE, Endpoint
from slm_export.learning.local_teacher import LocalTeacher
from slm_export.learning.problems import Problem
from slm_export.learning.teaching import Question, Solution
from slm_export.progress import Progress

QUIET = Progress(silent=True)
KEY = "sk-keyOfSomebody"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def problems(count: int) -> list[Problem]:
    rows = arithmetic().problems(count)
    return [Problem(row["problem"], row["answer"], f"p:{index}") for index, row in enumerate(rows)]


def question(number: int = 0) -> Question:
    problem = problems(number + 1)[number]
    return Question(problem.key, problem.text, 0, 7)


def test_a_question_reaches_the_endpoint_with_the_key_and_nothing_else_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.setenv("OPENAI_ORG_ID", "org-OfSomebody")
    with endpoint() as served:
        teacher = Endpoint(served.url, temperature=0.5, max_tokens=99)
        (solution,) = teacher.solve([question()])
    assert solution.finished
    assert solution.text.splitlines()[-1].startswith("Answer: ")
    (asked,) = served.asked
    assert (asked["model"], asked["temperature"], asked["max_tokens"], asked["seed"]) == ("m", 0.5, 99, 7)
    assert asked["messages"][-1] == {"role": "user", "content": question().problem}
    assert served.keys == [f"Bearer {KEY}"]
    assert served.organizations == [None]
    assert KEY not in str(dict(teacher.identity))


def test_a_failure_that_passes_is_tried_again() -> None:
    def answer(asked: dict[str, Any], number: int) -> Any:
        return (503, {"error": {"message": "busy"}}) if number < 2 else solved(asked, number)

    with endpoint(answer) as served:
        assert Endpoint(served.url).solve([question()])[0].finished
    assert len(served.asked) == 3


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (401, {"error": {"message": f"bad key {KEY}"}}, InputError, KEY_VARIABLE),
        (403, {"error": {"message": f"bad key {KEY}"}}, InputError, "the key was refused"),
        (404, {"error": {"message": f"no such model for {KEY}"}}, InputError, "no such model for ***"),
        (429, {"error": {"message": f"quota of {KEY}"}}, MachineError, "type the same command again"),
        (500, {"error": {"message": f"broken {KEY}"}}, MachineError, "broken ***"),
        (200, "<html>a page</html>", InputError, "OpenAI-compatible"),
        (200, {"choices": []}, InputError, "holds no text"),
        (200, chat(None), InputError, "holds no text"),
    ],
)
def test_what_an_endpoint_refuses_is_told_without_the_key(
    status: int, body: Any, kind: type[SlmExportError], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with endpoint(lambda asked, number: (status, body)) as served, pytest.raises(kind) as caught:
        Endpoint(served.url, retries=0).solve([question()])
    assert words in str(caught.value)
    assert served.url in str(caught.value)
    assert KEY not in str(caught.value)


def test_an_answer_that_is_cut_short_is_unfinished() -> None:
    with endpoint(lambda asked, number: (200, chat("1 + 1", "length"))) as served:
        assert not Endpoint(served.url).solve([question()])[0].finished


def test_nobody_there_is_the_machines_failure() -> None:
    with pytest.raises(MachineError, match="cannot be reached"):
        Endpoint("http://127.0.0.1:9/v1", retries=0)


def test_an_answer_that_does_not_come_is_the_machines_failure() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with pytest.raises(MachineError, match=r"no answer within 0\.2 s"):
            Endpoint(url, "m", timeout_s=0.2, retries=0).solve([question()])


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://127.0.0.1/v1", "not a URL of http"),
        ("http://", "not a URL of http"),
        ("http://a:99999/v1", "not a URL of http"),
        (f"http://me:{KEY}@127.0.0.1/v1", KEY_VARIABLE),
        (f"http://127.0.0.1/v1?key={KEY}", KEY_VARIABLE),
    ],
)
def test_a_url_that_is_none_or_holds_a_secret_is_refused(url: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        Endpoint(url, "m")
    assert KEY not in str(caught.value)


def test_of_several_models_one_is_named() -> None:
    with endpoint(models=("a", "b")) as served:
        with pytest.raises(InputError, match=r"--teacher-model.*a, b"):
            Endpoint(served.url)
        assert Endpoint(served.url, "b").solve([question()])
    assert served.asked[0]["model"] == "b"


def test_what_was_answered_before_a_failure_is_not_asked_again() -> None:
    def fails(asked: dict[str, Any], number: int) -> Any:
        return (500, {"error": {"message": "down"}}) if number == 5 else solved(asked, number)

    with endpoint(fails) as served:
        teacher = Endpoint(served.url, at_once=1, retries=0)
        with pytest.raises(MachineError, match="down"):
            ask(teacher, problems(4), 2, 0, QUIET)
        assert len(served.asked) == 6
        found = ask(teacher, problems(4), 2, 0, QUIET)
        assert len(served.asked) == 9
        assert ask(teacher, problems(4), 2, 0, QUIET) == found
        assert len(served.asked) == 9
    texts = [asked["messages"][-1]["content"] for asked in served.asked]
    assert {text: texts.count(text) for text in texts}[
        problems(3)[2].text
    ] == 3  # two samples, one of them twice
    assert len(found) == 8


def test_every_sample_has_a_seed_of_its_own_and_other_settings_ask_anew() -> None:
    with endpoint() as served:
        ask(Endpoint(served.url), problems(3), 2, 0, QUIET)
        assert len({asked["seed"] for asked in served.asked}) == 6
        ask(Endpoint(served.url, temperature=0.1), problems(3), 2, 0, QUIET)
        ask(Endpoint(served.url), problems(3), 2, 1, QUIET)
    assert len(served.asked) == 18


def test_the_order_of_answers_does_not_matter() -> None:
    with endpoint() as served:
        alone = ask(Endpoint(served.url, at_once=1), problems(6), 2, 0, QUIET)
        together = ask(Endpoint(served.url, temperature=0.1, at_once=8), problems(6), 2, 0, QUIET)
    assert list(alone.items()) == list(together.items())


def test_a_failure_among_several_ends_the_asking() -> None:
    def fails(asked: dict[str, Any], number: int) -> Any:
        return (400, {"error": {"message": "no"}}) if number >= 3 else solved(asked, number)

    with endpoint(fails) as served, pytest.raises(InputError, match="refuses"):
        ask(Endpoint(served.url, at_once=4), problems(30), 1, 0, QUIET)
    assert len(served.asked) < 30


def test_a_damaged_store_of_answers_is_named(tmp_path: Path) -> None:
    with endpoint() as served:
        teacher = Endpoint(served.url)
        ask(teacher, problems(2), 1, 0, QUIET)
        (store,) = (tmp_path / "cache" / "answers").glob("*.sqlite")
        assert sqlite3.connect(store).execute("SELECT count(*) FROM solutions").fetchone() == (2,)
        store.write_bytes(b"not a database, but long enough to be taken for one" * 40)
        with pytest.raises(MachineError, match=store.name):
            ask(teacher, problems(2), 1, 0, QUIET)


@pytest.mark.parametrize("at_once", [1, 4])
def test_a_full_disk_is_the_machines_failure(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(self: Kept, question: Question, solution: Solution) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(Kept, "keep", keep)
    with endpoint() as served, pytest.raises(MachineError, match=r"disk is full.*free some space"):
        ask(Endpoint(served.url, at_once=at_once), problems(6), 1, 0, QUIET)


def test_a_folder_teaches_the_same_each_time_however_it_is_interrupted(tmp_path: Path) -> None:
    teacher = LocalTeacher(save_child(tmp_path / "teacher"), temperature=1.0, max_tokens=12, chunk=4)
    whole = ask(teacher, problems(5), 2, 0, QUIET)
    assert len({solution.text for solution in whole.values()}) > 5
    (store,) = (tmp_path / "cache" / "answers").glob("*.sqlite")
    with sqlite3.connect(store) as database:
        database.execute("DELETE FROM solutions WHERE rowid % 3 = 0")
    assert ask(teacher, problems(5), 2, 0, QUIET) == whole
