"""What ``adapt`` refuses, and how it says so: data of another shape, contradictions, models of another kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reasoning import jsonl, save_child, save_encoder

from slm_export.errors import InputError
from slm_export.learning.adapt import Request, adapt
from slm_export.learning.adapt_settings import AdaptSettings, Task
from slm_export.learning.examples import read_labelled
from slm_export.learning.settings import Training
from slm_export.progress import Progress


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"encoder": save_encoder(folder / "encoder"), "decoder": save_child(folder / "decoder")}


GIVEN: dict[Task, dict[str, Any]] = {
    "classify": {"text": "a", "label": "x"},
    "tag": {"tokens": ["a", "b"], "labels": ["x", "y"]},
    "embed": {"text": "a", "positive": "b"},
    "generate": {"prompt": "a", "answer": "b"},
}


@pytest.mark.parametrize(
    ("task", "line", "words"),
    [
        ("classify", {"text": "b"}, "'label' is missing"),
        ("classify", {"text": "b", "lable": "x"}, "unknown key 'lable'; did you mean 'label'?"),
        ("classify", {"text": "b", "label": 1}, "'label' must be a text"),
        ("classify", {"text": " A ", "label": "y"}, "another label than"),
        ("tag", {"tokens": ["a"], "labels": ["x", "y"]}, "1 tokens with 2 labels"),
        ("tag", {"tokens": "a b", "labels": ["x", "y"]}, "'tokens' must be a list"),
        ("tag", {"tokens": ["A", "b"], "labels": ["y", "y"]}, "another label than"),
        ("embed", {"text": "b"}, "'positive' is missing"),
        (
            "embed",
            {"text": "b", "positive": "c", "negative": ""},
            "'negative' must be a text that is not blank",
        ),
        ("generate", {"prompt": "", "answer": "b"}, "'prompt' must be a text that is not blank"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path: Path, task: Task, line: dict[str, Any], words: str) -> None:
    file = jsonl(tmp_path / "l.jsonl", [GIVEN[task], line])
    with pytest.raises(InputError) as caught:
        read_labelled(task, [file])
    assert words in str(caught.value)
    assert "l.jsonl:2" in str(caught.value)


def test_examples_of_one_text_stay_on_one_side_and_repeated_ones_are_left_out(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "positive": f"p{n}.{k}"} for n in range(20) for k in (1, 2, 2)]
    made = read_labelled("embed", [jsonl(tmp_path / "l.jsonl", rows)])
    assert made.duplicates == 20
    assert len(made.training) + len(made.held_out) == 40
    assert len(made.held_out) == 4
    assert not {row.given for row in made.training} & {row.given for row in made.held_out}
    turned = read_labelled("embed", [jsonl(tmp_path / "t.jsonl", rows[::-1])])
    assert {row.given for row in turned.held_out} == {row.given for row in made.held_out}


def test_held_out_examples_that_are_taught_or_of_another_label_are_refused(tmp_path: Path) -> None:
    taught = jsonl(tmp_path / "l.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    leaked = jsonl(tmp_path / "h.jsonl", [{"text": "c", "label": "x"}, {"text": "B", "label": "y"}])
    with pytest.raises(InputError, match=r"h\.jsonl:2: held out, but .*l\.jsonl:2 teaches the same text"):
        read_labelled("classify", [taught], [leaked])
    strange = jsonl(tmp_path / "s.jsonl", [{"text": "c", "label": "z"}])
    with pytest.raises(InputError, match=r"s\.jsonl:1: .*no example that teaches has the label 'z'"):
        read_labelled("classify", [taught], [strange])


def test_one_label_alone_teaches_nothing(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "label": "x"} for n in range(12)]
    with pytest.raises(InputError, match="only one label, 'x'"):
        read_labelled("classify", [jsonl(tmp_path / "l.jsonl", rows)])


@pytest.mark.parametrize(
    ("model", "task", "words"),
    [
        ("decoder", "classify", "heads go on encoders"),
        ("decoder", "tag", "heads go on encoders"),
        ("decoder", "embed", "heads go on encoders"),
        ("encoder", "generate", "takes one that generates text"),
    ],
)
def test_a_model_of_another_kind_is_refused(
    tmp_path: Path, models: dict[str, Path], model: str, task: Task, words: str
) -> None:
    rows: dict[Task, list[dict[str, Any]]] = {
        "classify": [{"text": f"a{n}", "label": f"x{n % 2}"} for n in range(12)],
        "tag": [{"tokens": [f"a{n}", "b"], "labels": ["x", "y"]} for n in range(12)],
        "embed": [{"text": f"a{n}", "positive": "b"} for n in range(12)],
        "generate": [{"prompt": f"a{n}", "answer": "b"} for n in range(12)],
    }
    file = jsonl(tmp_path / "l.jsonl", rows[task])
    settings = AdaptSettings(task=task, training=Training(length=48))
    with pytest.raises(InputError, match=words):
        adapt(
            Request(str(models[model]), tmp_path / "out", labels=(file,), settings=settings),
            Progress(silent=True),
        )
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = Request("model", tmp_path / "out", data=(tmp_path,))
    with pytest.raises(InputError, match="without torchrun"):
        adapt(asked, Progress(silent=True))


def test_what_contradicts_itself_is_refused(tmp_path: Path, models: dict[str, Path]) -> None:
    plain = Request(
        str(models["decoder"]), tmp_path / "out", settings=AdaptSettings(training=Training(length=48))
    )
    task = replace(plain, settings=AdaptSettings(task="generate", training=Training(length=48)))
    file = tmp_path / "x"
    for asked, words in (
        (plain, "nothing to learn from"),
        (replace(plain, labels=(file,)), "--labels are for a --task"),
        (task, "learns from --labels"),
        (replace(task, labels=(file,), data=(file,)), "from no --data"),
        (replace(plain, data=(file,), settings=AdaptSettings()), "longer than the 128 positions"),
    ):
        with pytest.raises(InputError, match=words):
            adapt(asked, Progress(silent=True))
