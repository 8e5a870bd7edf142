"""``slm-export reason``, from problems to a model folder: what it leaves and refuses, how it goes on after a kill."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reasoning import Served, arithmetic, chat, endpoint, jsonl, save_child, save_problems

from slm_export.bundles.finished import CACHE_VARIABLE
from slm_export.cli import cli as command
from slm_export.errors import InputError, MachineError
from slm_export.learning import reason as module
from slm_export.learning.distil_settings import Grid
from slm_export.learning.endpoint import KEY_VARIABLE
from slm_export.learning.measures import share
from slm_export.learning.models import load
from slm_export.learning.reason import Request, reason
from slm_export.learning.reason_settings import Reasoning
from slm_export.learning.settings import Training
from slm_export.optimizers.group_quantize import quantize
from slm_export.progress import Progress
from slm_export.source.load import load_checkpoint

QUIET = Progress(silent=True)
LOOP = Training(steps=6, batch=4, together=4, length=128, rate=1e-3, checkpoint_every=2)
SETTINGS = Reasoning(training=LOOP, samples=2, answer_tokens=8)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_child(tmp_path_factory.mktemp("children") / "child")


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with endpoint() as running:
        yield running


@pytest.fixture
def request_(tmp_path: Path, child: Path, served: Served) -> Request:
    problems = save_problems(tmp_path / "problems.jsonl")
    return Request(
        teacher=served.url,
        model=str(child),
        problems=problems,
        out=tmp_path / "out",
        held_out_count=10,
        settings=SETTINGS,
    )


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_child_is_tuned_and_its_folder_tells_how(request_: Request, child: Path) -> None:
    outcome, out = reason(replace(request_, data_licence="CC0-1.0"), QUIET)
    assert [row.name for row in outcome.rows] == ["teacher", "child before", "child after"]
    assert outcome.rows[0].figures["accuracy"] == share(10, 10)
    record = json.loads((out / "learning.json").read_text())["learned"]
    assert record["by"] == "reason"
    assert record["data_licence"] == "CC0-1.0"
    assert record["data"] == {
        "solutions": 60,
        "kept": 30,
        "rejected": {"duplicate": 30},
        "problems_without": 0,
        "too_long": 0,
        "examples": 30,
    }
    traces = [json.loads(line) for line in (out / "traces.jsonl").read_text().splitlines()]
    assert traces[0]["solution"] == arithmetic().solve(traces[0]["problem"])
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in rejected] == ["duplicate"] * 3
    held_out = [json.loads(line)["problem"] for line in (out / "held_out.jsonl").read_text().splitlines()]
    assert len(held_out) == 10
    assert not {row["problem"] for row in traces} & set(held_out)
    assert held_out[0] in (out / "held_out.txt").read_text()
    assert weights(out) != weights(child)
    assert not list((request_.out.parent / "cache" / "learning").iterdir())


def test_only_the_solution_is_learned(request_: Request) -> None:
    from slm_export.learning.problems import Problem
    from slm_export.learning.traces import Trace
    from slm_export.learning.trainer import IGNORED
    from slm_export.learning.tuning import lessons

    tokenizer = load(Path(request_.model)).tokenizer
    trace = Trace(Problem("1 + 1 =", "2", "p:1"), "Answer: 2")
    (example,) = lessons([trace], tokenizer, 128).examples
    learned = [token for token, label in zip(*example.values(), strict=True) if label != IGNORED]
    assert tokenizer.decode(learned) == "Answer: 2</s>"
    assert tokenizer.decode(example["input_ids"]) == "Problem: 1 + 1 =\nSolution:\nAnswer: 2</s>"
    with pytest.raises(InputError, match="all 1 solutions are longer than 20 tokens"):
        lessons([trace], tokenizer, 20)


@pytest.mark.parametrize(
    "stops_at",
    [
        pytest.param("score", marks=pytest.mark.slow),
        "train",
        pytest.param("save", marks=pytest.mark.slow),
        "commit",
    ],
)
def test_a_run_that_was_interrupted_goes_on_to_the_same_bytes(
    request_: Request, stops_at: str, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = reason(replace(request_, out=request_.out.with_name("whole")), QUIET)
    shutil.rmtree(request_.out.parent / "cache")

    class Hit(BaseException):
        """As a kill, it is caught by nobody."""

    def interrupt(*_: Any, **__: Any) -> Any:
        raise Hit

    from slm_export.bundles.staging import Staging
    from slm_export.learning import trainer

    places = {
        "score": (module, "tune"),
        "train": (trainer.Teaching, "stepped"),
        "save": (module, "save"),
        "commit": (Staging, "commit"),
    }
    if stops_at == "train":
        stepped = trainer.Teaching.stepped
        at_five = lambda self, step: interrupt() if step == 5 else stepped(self, step)  # noqa: E731
        monkeypatch.setattr(trainer.Teaching, "stepped", at_five)
    else:
        monkeypatch.setattr(*places[stops_at], interrupt)
    with pytest.raises(Hit):
        reason(request_, QUIET)
    assert not request_.out.exists()
    monkeypatch.undo()
    monkeypatch.setenv(CACHE_VARIABLE, str(request_.out.parent / "cache"))
    asked = len(served.asked)
    outcome, again = reason(request_, QUIET)
    assert len(served.asked) == asked
    assert weights(again) == weights(out)
    assert outcome.rows == whole.rows
    assert (again / "traces.jsonl").read_bytes() == (out / "traces.jsonl").read_bytes()
    if stops_at == "train":
        assert outcome.curves["reason"].resumed_at == 4


def test_adapters_are_merged_and_change_what_they_adapt_alone(request_: Request, child: Path) -> None:
    settings = SETTINGS.model_copy(update={"low_rank": 2})
    _, out = reason(replace(request_, settings=settings), QUIET)
    before, after = load(child).module.state_dict(), load(out).module.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("_proj" in name for name in changed)
    for name in changed:
        assert int(torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3)) <= 2


def test_what_is_trained_for_the_grid_is_on_it(request_: Request) -> None:
    settings = SETTINGS.model_copy(update={"grid": Grid(bits=4)})
    _, out = reason(replace(request_, settings=settings), QUIET)
    for folder, on_it in ((out, True), (Path(request_.model), False)):
        values = load_checkpoint(folder).weights["model.layers.0.mlp.up_proj.weight"].float32()
        assert torch.equal(quantize(values, 4, 32).float32(), values) is on_it


def test_adapters_and_a_grid_are_refused_together(request_: Request) -> None:
    settings = SETTINGS.model_copy(update={"low_rank": 2, "grid": Grid(bits=4)})
    with pytest.raises(InputError, match="--low-rank and --for-bits"):
        reason(replace(request_, settings=settings), QUIET)


def test_several_processes_are_refused(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="without torchrun"):
        reason(request_, QUIET)


def test_a_teacher_who_is_never_right_teaches_nobody(request_: Request) -> None:
    with (
        endpoint(lambda asked, number: (200, chat("Answer: none"))) as wrong,
        pytest.raises(InputError, match=r"none of the teacher's 60 solutions .*30 duplicate, 30 wrong"),
    ):
        reason(replace(request_, teacher=wrong.url), QUIET)
    assert not request_.out.exists()


def test_a_folder_can_be_the_teacher_and_a_command_the_judge(request_: Request, tmp_path: Path) -> None:
    teacher = save_child(tmp_path / "teacher")
    check = tmp_path / "check.py"
    check.write_text("import json, sys\nsys.exit(len(json.load(sys.stdin)['solution']) < 3)")
    problems = jsonl(tmp_path / "bare.jsonl", [{"problem": f"say {number}"} for number in range(14)])
    asked = replace(
        request_,
        teacher=str(teacher),
        problems=problems,
        checker=f"'{sys.executable}' -I -S '{check}'",
        temperature=1.0,
        max_tokens=24,
        # A random model does not end by itself within 24 tokens but for some.
        settings=SETTINGS.model_copy(update={"samples": 8}),
    )
    asked = replace(asked, checker_limits=replace(asked.checker_limits, seconds=120))
    outcome, out = reason(asked, QUIET)
    assert outcome.lineage["teacher"]["folder"] == "teacher"
    assert outcome.settings["checker"]["command"].endswith("check.py'")
    assert set(outcome.data["rejected"]) >= {"unfinished"}
    assert outcome.data["kept"] == len((out / "traces.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "encoder"}, "only one that generates text"),
        ({"teacher_model": "x", "teacher": "child"}, "--teacher-model names a model behind an endpoint"),
        ({"settings": Reasoning(training=Training(length=256))}, "longer than the 128 positions"),
        ({"held_out": "problems.jsonl"}, "not both"),
    ],
)
def test_what_does_not_fit_is_refused(
    request_: Request, minilm: Path, child: Path, change: dict[str, Any], words: str
) -> None:
    folders = {"encoder": str(minilm), "child": str(child), "problems.jsonl": request_.problems}
    made = {
        name: folders.get(value, value) if isinstance(value, str) else value for name, value in change.items()
    }
    with pytest.raises(InputError, match=words):
        reason(replace(request_, **made), QUIET)
    assert not request_.out.exists()


def typed(request: Request, teacher: str, *more: str) -> None:
    command.main(
        [
            *(
                "reason",
                teacher,
                request.model,
                "--problems",
                str(request.problems),
                "--out",
                str(request.out),
            ),
            *(
                "--length",
                "128",
                "--answer-tokens",
                "8",
                "--held-out-problems",
                "10",
                "--samples",
                "1",
                *more,
            ),
        ],
        standalone_mode=False,
    )


def test_the_command_prints_one_document(
    request_: Request, served: Served, capfd: pytest.CaptureFixture[str]
) -> None:
    typed(request_, served.url, "--steps", "2", "--batch", "4", "--json")
    document = json.loads(capfd.readouterr().out)
    assert document["out"] == str(request_.out)
    assert document["learned"]["held_out"]["scores"]["teacher"]["right"] == 10
    assert document["learned"]["settings"]["samples"] == 1


def test_an_endpoint_that_is_not_there_is_the_machines_failure(request_: Request) -> None:
    with pytest.raises(MachineError, match="cannot be reached") as caught:
        typed(request_, "http://127.0.0.1:9/v1")
    assert caught.value.exit_code == 4
    assert not request_.out.exists()
