"""Many exports from one file: what they are, what is kept, what fails alone, and what is told of it."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TOKENIZER_FILES

from slm_export.bundles.finished import CACHE_VARIABLE, KEEP_VARIABLE
from slm_export.cli import cli
from slm_export.errors import InputError
from slm_export.matrix import command
from slm_export.matrix.cells import EXCLUDED, Cell, cells_of
from slm_export.matrix.command import MatrixRequest, make
from slm_export.matrix.export_file import export_file
from slm_export.matrix.matrix_file import Matrix, load_matrix
from slm_export.matrix.needs import peak_of
from slm_export.matrix.results import Result, Summary
from slm_export.matrix.run import run, tasks_of
from slm_export.matrix.schedule import Room
from slm_export.matrix.summary import write
from slm_export.matrix.work import ANSWER, Ended, Work
from slm_export.progress import Progress
from slm_export.proof import FailedGateError
from slm_export.reports.report import to_json
from slm_export.settings import load_settings

PAGE = (ROOT / "docs" / "matrix.md").read_text(encoding="utf-8")
EXAMPLE = str(re.search(r"<!-- example -->\n```toml\n(.*?)```", PAGE, re.DOTALL)[1])  # type: ignore[index]
SILENT = Progress(silent=True)
MIB = 1 << 20


def save_model(folder: Path, width: int) -> None:
    """A Llama of one layer, with the tokenizer of the example model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(width)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(ROOT / "examples" / "pycode-5m" / name, folder / name)


class OneByOne:
    """An engine that runs every export at once and in this process, which has made the slow imports already."""

    def __init__(self) -> None:
        self._over: list[tuple[str, Ended]] = []
        self.began: list[str] = []
        self.stopped = False

    def start(self, name: str, work: Work, needed: int | None) -> None:
        printed, code = io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.chdir(work.folder)
            for variable, value in work.environment.items():
                patch.setenv(variable, value)
            try:
                cli.main([*work.arguments], standalone_mode=False)
            except FailedGateError as error:
                code = error.exit_code
                message = {"message": str(error), "exit_code": code}
                print(json.dumps({"error": message, "report": to_json(error.report)}))
        (work.folder / ANSWER).write_text(printed.getvalue())
        self.began.append(name)
        self._over.append((name, Ended(code, 1.0)))

    def ended(self, timeout_s: float) -> tuple[str, Ended] | None:
        return self._over.pop(0)

    def stop(self) -> None:
        self.stopped = True


class Twins(OneByOne):
    """Exports the cells of pycode-5m, and gives those of chat-5m what their twins came to: an export takes seconds."""

    def start(self, name: str, work: Work, needed: int | None) -> None:
        if name.startswith("pycode-5m"):
            super().start(name, work, needed)
            return
        twin, out = name.replace("chat-5m", "pycode-5m"), work.folder.parent.parent
        shutil.copy(out / "cells" / twin / ANSWER, work.folder)
        made = (out / "bundles" / twin).is_dir()
        if made:
            shutil.copytree(out / "bundles" / twin, out / "bundles" / name)
        self.began.append(name)
        self._over.append((name, Ended(0 if made else 1, 1.0)))


class Scripted(OneByOne):
    """An engine in which cells end as they are told to, with nothing run."""

    def __init__(self, endings: dict[str, Ended | BaseException]) -> None:
        super().__init__()
        self._endings = endings
        self.environment: dict[str, str] = {}

    def start(self, name: str, work: Work, needed: int | None) -> None:
        self.began.append(name)
        self.environment.update(work.environment)
        code = self._endings.get(name, Ended(0, 1.0))
        if isinstance(code, BaseException):
            raise code
        message = {"error": {"message": f"{name} is wrong\nquite wrong", "exit_code": code.code}}
        (work.folder / ANSWER).write_text(json.dumps(message if code.code > 0 else {"peak_rss_mb": 7.0}))
        self._over.append((name, code))


class Quiet:
    """A watch that remembers."""

    def __init__(self) -> None:
        self.results: list[Result] = []

    def started(self, cell: Cell, log: Path, predicted: int | None) -> None:
        pass

    def ended(self, result: Result) -> None:
        self.results.append(result)

    def beat(self, waiting: int) -> None:
        pass


# --- the example of the page, exported ---------------------------------------------------------------


class Exported:
    """The example of docs/matrix.md with models that take seconds, unverified; `test_matrix_whole` does all of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        save_model(folder / "pycode-5m", 32)
        save_model(folder / "chat-5m", 64)
        # As narrow for models of this size as the limit of the page is for its own.
        text = EXAMPLE.replace("6_000_000", "100_000")
        assert text != EXAMPLE
        (folder / "matrix.toml").write_text("verify = false\n" + text)

    def make(self, engine: OneByOne) -> Summary:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(command, "_engine", lambda *_: engine)
            return make(MatrixRequest(self.folder / "matrix.toml"), SILENT)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("matrix"))


@pytest.fixture(scope="module")
def first(example: Exported) -> Summary:
    return example.make(Twins())


def by_name(summary: Summary) -> dict[str, Result]:
    return {one.cell.name: one for one in summary.results}


def test_every_cell_is_made_or_says_why_not(first: Summary) -> None:
    assert {name: one.outcome for name, one in by_name(first).items()} == {
        "pycode-5m.int8.raspberry-pi-5": "made",
        "pycode-5m.int4.raspberry-pi-5": "failed",
        "chat-5m.int8.raspberry-pi-5": "made",
        "chat-5m.int4.raspberry-pi-5": "failed",
    }
    assert first.exit_code == 1
    for failed in first.failed:
        assert (failed.code, failed.bundle) == (1, None)
        assert failed.reason.startswith("onnx: bytes is ")
        assert "limit 1e+05" in failed.reason
    assert sorted(path.name for path in (first.out / "bundles").iterdir()) == sorted(
        name for name, one in by_name(first).items() if one.outcome == "made"
    )
    assert not (first.out / "cache").exists()


def test_what_cannot_be_is_named_with_its_reason(first: Summary) -> None:
    reasons = {(one.recipe, one.device): one.reason for one in first.skipped if one.model == "chat-5m"}
    assert reasons[("int4", "iphone-15-pro")] == EXCLUDED
    assert reasons[("int8", "iphone-15-pro")].startswith("device iphone-15-pro does not run format onnx")
    assert len(reasons) == 2


def test_failed_cells_stand_beside_the_others(first: Summary) -> None:
    document = json.loads(json.dumps(write(first)))
    assert document == json.loads((first.out / "matrix.json").read_text())
    failed = next(cell for cell in document["cells"] if cell["outcome"] == "failed")
    assert (failed["exit_code"], failed["bundle"]) == (1, None)
    columns = document["comparisons"]["chat-5m"]["columns"]
    assert [(column["bundle"], column["gate"]) for column in columns] == [
        ("chat-5m.int8.raspberry-pi-5", "not verified"),
        ("chat-5m.int4.raspberry-pi-5", "fail"),
    ]
    assert columns[1]["figures"]["bytes"] > 100_000
    markdown = (first.out / "matrix.md").read_text()
    page = (first.out / "matrix.html").read_text()
    assert markdown.startswith("## 4 cells: 2 made, 2 failed\n")
    for text in (markdown, page):
        assert "does not run format onnx" in text
        assert failed["reason"].split(":")[0] in text
        assert text.count("chat-5m.int4.raspberry-pi-5") >= 2
    assert "<script" not in page


def test_a_second_run_tries_again_what_failed_alone(example: Exported, first: Summary) -> None:
    failed = [one.cell.name for one in first.failed]
    engine = Scripted({failed[1]: Ended(-9, 1.0)})
    again = example.make(engine)
    assert engine.began == failed
    assert [one.outcome for one in again.results] == ["kept", "made", "kept", "failed"]
    assert again.exit_code == 4
    # What the first of them is said to have made is not there, so neither is complete.
    engine = Scripted({})
    example.make(engine)
    assert engine.began == failed


def test_other_inputs_or_a_damaged_bundle_are_made_again(
    example: Exported, first: Summary, tmp_path: Path
) -> None:
    def to_do(matrix: Matrix, force: bool = False) -> set[str]:
        tasks = tasks_of(cells_of(matrix)[0], first.out, force, SILENT)
        return {task.cell.name for task in tasks if task.record is None}

    matrix = load_matrix(example.folder / "matrix.toml")
    failed = {one.cell.name for one in first.failed}
    every = set(by_name(first))
    assert to_do(matrix) == failed
    assert to_do(matrix, force=True) == every
    assert to_do(matrix.model_copy(update={"verify": True})) == every
    shorter = {**matrix.recipes, "int8": matrix.recipes["int8"].model_copy(update={"context": 32})}
    assert to_do(matrix.model_copy(update={"recipes": shorter})) == failed | {n for n in every if "int8" in n}
    damaged = first.out / "bundles" / "pycode-5m.int8.raspberry-pi-5" / "onnx" / "model.onnx"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert to_do(matrix) == failed | {"pycode-5m.int8.raspberry-pi-5"}
    damaged.write_bytes(whole)
    config = example.folder / "pycode-5m" / "config.json"
    text = config.read_text()
    config.write_text(text + " ")
    assert to_do(matrix) == failed | {name for name in every if "pycode" in name}
    config.write_text(text)
    licence = example.folder / "pycode-5m" / "LICENSE"
    licence.write_text("Do as you like.")
    assert to_do(matrix) == failed | {name for name in every if "pycode" in name}
    licence.unlink()


def test_a_cells_own_file_asks_for_the_same(first: Summary) -> None:
    for name, one in by_name(first).items():
        assert load_settings(first.out / "cells" / name) == one.cell.settings


@pytest.mark.parametrize("scheduler", [None, "tcp://127.0.0.1:1"])
def test_exports_are_offline_where_the_command_is(
    scheduler: str | None, example: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, str]] = []
    monkeypatch.setattr(command, "_engine", lambda *_: None)
    monkeypatch.setattr(command, "run", lambda *_, environment, **__: given.append(dict(environment)) or ())
    request = MatrixRequest(example.folder / "matrix.toml", tmp_path / "out", scheduler=scheduler)
    for value in ("1", "0"):
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
        make(request, SILENT)
    assert [found.get("HF_HUB_OFFLINE") for found in given] == ["1", None]


# --- the file ----------------------------------------------------------------------------------------


def problem(folder: Path, text: str) -> str:
    (folder / "matrix.toml").write_text(text)
    with pytest.raises(InputError) as caught:
        cells_of(load_matrix(folder / "matrix.toml"))
    return str(caught.value).removeprefix(f"{folder / 'matrix.toml'}: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("modells = ['m']\ndevices = ['host']", "unknown key 'modells'; did you mean 'models'?"),
        ("{}\nrecipes.int8.bitz = 8", "unknown key 'recipes.int8.bitz'; did you mean 'bits'?"),
        (
            "{}\nrecipes.int8.gates.max_byte = 8",
            "unknown key 'recipes.int8.gates.max_byte'; did you mean 'max_bytes'?",
        ),
        ("{}\nexclude = [{ devise = 'host' }]", "unknown key 'exclude[0].devise'; did you mean 'device'?"),
        ("{}\nexclude = [{}]", "exclude[0]: names nothing, and would leave out everything"),
        (
            "{}\nexclude = [{ recipe = 'profil' }]",
            "exclude[0].recipe: the matrix has no recipe 'profil'; did you mean 'profile'?",
        ),
        ("{}\nexclude = [{ recipe = 'profile' }]", "nothing is left to export\n  host, onnx: excluded"),
        (
            "{}\ngates.max_latency_ms = 5",
            "gates.max_latency_ms needs the measurement of speed: write bench = true",
        ),
        ("{}\ncalibration = 'none.txt'", "{folder}/none.txt: no such file"),
        ("{}\n[[recipes.mine.passes]]\npass = 'gptqq'", "passes: unknown pass 'gptqq'; did you mean 'gptq'?"),
        ("models = ['m']\ndevices = ['hosst']", "unknown device 'hosst'; did you mean 'host'?"),
        ("models = ['m', 'm']\ndevices = ['host']", "models: 'm' is listed twice"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, text: str, expected: str) -> None:
    plain = "models = ['m']\ndevices = ['host']\nformats = ['onnx']"
    assert problem(tmp_path, text.replace("{}\n", plain + "\n")).startswith(
        expected.replace("{folder}", str(tmp_path))
    )


def cells(folder: Path, text: str) -> tuple[Cell, ...]:
    (folder / "matrix.toml").write_text(text)
    return cells_of(load_matrix(folder / "matrix.toml"))[0]


def test_without_recipes_the_devices_own_are_taken(tmp_path: Path) -> None:
    (cell,) = cells(tmp_path, "models = ['org/name@v2']\ndevices = ['host']")
    assert (cell.name, cell.formats) == ("name-v2.profile.host", (cell.plan.profile.default_format,))
    assert (cell.settings.model, cell.settings.revision) == ("org/name", "v2")


def test_models_of_one_name_are_told_apart(tmp_path: Path) -> None:
    made = cells(tmp_path, "models = ['a/m', 'b/m']\ndevices = ['host']")
    assert [cell.model for cell in made] == ["a-m", "b-m"]


def test_what_a_recipe_says_goes_before_the_matrix(tmp_path: Path) -> None:
    for name in ("ours.txt", "theirs.txt"):
        (tmp_path / name).touch()
    text = """
        models = ["m"]
        devices = ["host"]
        eval_text = "theirs.txt"
        gates = { max_bytes = 5, max_kl_mean = 0.5 }
        [recipes.a]
        eval_text = "ours.txt"
        gates = { max_bytes = 9 }
        [[recipes.a.passes]]
        pass = "group-quantize"
        bits_by_tensor = { "*.down_proj.*" = 8 }
        [recipes.b]
        max_size = "3MB"
    """
    a, b = cells(tmp_path, text)
    assert a.settings.eval_text == tmp_path / "ours.txt"
    assert b.settings.eval_text == tmp_path / "theirs.txt"
    assert (a.settings.gates.max_bytes, a.settings.gates.max_kl_mean) == (9, 0.5)
    assert [step.name for step in a.plan.recipe] == ["group-quantize"]
    assert b.plan.request.budget.max_size == 3_000_000
    for cell in (a, b):
        (tmp_path / "slm-export.toml").write_text(export_file(cell.settings))
        assert load_settings(tmp_path) == cell.settings


def test_cells_share_stages_as_far_as_their_passes_are_the_same(tmp_path: Path) -> None:
    text = """
        models = ["m"]
        devices = ["host", "x86-edge-8gb"]
        [recipes.a]
        passes = [{ pass = "rotate" }, { pass = "group-quantize", bits = 4 }]
        [recipes.b]
        passes = [{ pass = "rotate" }, { pass = "group-quantize", bits = 8, embedding_bits = 8 }]
        [recipes.c]
        max_size = "3MB"
    """
    stages = {cell.name: cell.stages() for cell in cells(tmp_path, text)}
    a, b = stages["m.a.host"], stages["m.b.host"]
    assert len(set(a)) == 2
    assert a == stages["m.a.x86-edge-8gb"]
    assert a[0] == b[0]
    assert a[1] != b[1]
    assert stages["m.c.host"] == ()


def test_more_memory_is_predicted_for_more_work(tmp_path: Path) -> None:
    save_model(tmp_path / "m", 32)

    def predicted(formats: list[str], verify: bool) -> int:
        text = f"models = ['m']\ndevices = ['host']\nformats = {formats}\nverify = {str(verify).lower()}"
        (cell,) = cells(tmp_path, text)
        made = peak_of(cell)
        assert made is not None
        return made

    one = predicted(["onnx"], False)
    assert predicted(["onnx", "litert"], False) == one + 250 * MIB
    source = 4 * (4096 * 32 + 4 * 32 * 32 + 3 * 32 * 64)
    assert predicted(["onnx"], True) == one + 400 * MIB + source
    (tmp_path / "none").mkdir()
    (cell,) = cells(tmp_path, "models = ['none']\ndevices = ['host']\nformats = ['onnx']")
    assert peak_of(cell) is None


# --- what fails alone --------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path: Path) -> Callable[..., tuple[Scripted, Quiet, tuple[Result, ...]]]:
    """Run three cells whose exports end as they are told."""
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    made = cells(tmp_path, "models = ['a', 'b', 'c']\ndevices = ['host']\nformats = ['onnx']")

    def run_three(endings: dict[str, Any], room: Room | None = None) -> Any:
        engine, watch = Scripted({f"{name}.profile.host": end for name, end in endings.items()}), Quiet()
        out = tmp_path / "out"
        for part in ("cells", "bundles"):
            (out / part).mkdir(parents=True, exist_ok=True)
        tasks = tasks_of(made, out, False, SILENT)
        try:
            results = run(tasks, out, engine, room or Room(2), watch, name="x", environment={})
        except KeyboardInterrupt:
            results = ()
        return engine, watch, results

    return run_three


@pytest.mark.parametrize(
    ("ended", "code", "reason"),
    [
        (Ended(1, 1.0), 1, "quite wrong"),
        (Ended(2, 1.0), 2, "b.profile.host is wrong; quite wrong"),
        (Ended(-9, 1.0), 4, "killed by SIGKILL, as systems do when memory runs out"),
        (Ended(4, 0.0), 4, "b.profile.host is wrong; quite wrong"),
    ],
)
def test_a_cell_that_fails_takes_no_other_with_it(
    three, tmp_path: Path, ended: Ended, code: int, reason: str
) -> None:
    _, watch, results = three({"b": ended})
    assert [one.outcome for one in results] == ["made", "failed", "made"]
    assert len(watch.results) == 3
    summary = Summary(tmp_path, results, ())
    assert summary.exit_code == code
    assert summary.failed[0].reason == reason


def test_exports_of_a_model_share_a_cache_that_is_removed_at_the_end(three, tmp_path: Path) -> None:
    cache = tmp_path / "out" / "cache"
    (cache / "c").mkdir(parents=True)
    engine, _, _ = three({})
    assert engine.environment == {CACHE_VARIABLE: str(cache / "c"), KEEP_VARIABLE: "1"}
    assert not cache.exists()


def test_what_is_larger_than_the_machine_is_not_begun(three, tmp_path: Path) -> None:
    save_model(tmp_path / "b", 32)
    engine, _, results = three({}, Room(2, 600 * MIB))
    assert engine.began == ["a.profile.host", "c.profile.host"]
    assert results[1].code == 4
    assert "GB of memory" in results[1].reason


def test_of_failures_a_gate_decides(three, tmp_path: Path) -> None:
    _, _, results = three({"a": Ended(4, 1.0), "b": Ended(1, 1.0), "c": Ended(-11, 1.0)})
    assert Summary(tmp_path, results, ()).exit_code == 1


def test_an_interrupt_stops_what_runs_and_keeps_what_is_done(three, tmp_path: Path) -> None:
    engine, watch, _ = three({"c": KeyboardInterrupt()}, Room(1))
    assert engine.stopped
    assert [one.cell.model for one in watch.results] == ["a", "b"]
    records = {path.parent.name for path in (tmp_path / "out" / "cells").rglob("cell.json")}
    assert records == {"a.profile.host", "b.profile.host"}


def test_a_cell_of_a_failed_run_leaves_no_bundle_of_older_inputs(
    three, tmp_path: Path, first: Summary
) -> None:
    old = tmp_path / "out" / "bundles" / "b.profile.host"
    shutil.copytree(first.out / "bundles" / "pycode-5m.int8.raspberry-pi-5", old)
    three({"b": Ended(1, 1.0)})
    assert not old.exists()
