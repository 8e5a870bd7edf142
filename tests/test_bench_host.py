"""`slm-export bench` on this machine: what is measured, what a comparison is of, and what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import command, environment
from rich.console import Console

from slm_export.bench.command import BenchRequest, bench
from slm_export.bench.engines import open_engine
from slm_export.bench.figures import Measurement, Speed, Spoken, Spread, ratios, speeds
from slm_export.bench.file_cache import evict, resident_share
from slm_export.bench.runners.executorch import LlamaMain
from slm_export.bench.runners.prompts import open_tokenizer, text_of
from slm_export.bench.show import print_measurements
from slm_export.bench.workload import GENERATED, Turn, Workload
from slm_export.child import Child
from slm_export.cli import cli
from slm_export.errors import InputError, MachineError, MissingComponentError
from slm_export.exporters.executorch import ExecuTorchExporter
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.progress import Progress
from slm_export.runtime import ExportOptions
from slm_export.source.load import load_checkpoint

CONTEXT = 48


@pytest.fixture(scope="session")
def program(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    quantized = GroupQuantize(bits=8, embedding_bits=8).run(load_checkpoint(tiny_llama)).checkpoint
    path = tmp_path_factory.mktemp("bench") / "ours.pte"
    exporter = ExecuTorchExporter()
    exporter.ready()
    exporter.write(quantized, ExportOptions(CONTEXT, stop_ids=(1,), bos_id=0), path)
    return path


@pytest.fixture(scope="session")
def found(program: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A program beside a copy of itself."""
    folder = tmp_path_factory.mktemp("compare")
    other = folder / "other.pte"
    shutil.copy(program, other)
    options = ("--runs", "3", "--threads", "1", "--prefill", "8,16", "--depth", "0,16", "--sustained", "0.2")
    done = subprocess.run(
        command("bench", program, "--compare", other, *options, "--json"),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert isinstance(document, dict)
    return document


def spread(*values: float) -> Spread:
    made = Spread.of(values)
    assert made
    return made


def measurement(**changes: Any) -> Measurement:
    facts: dict[str, Any] = {"name": "a", "format": "executorch", "bytes": 10, "runtime": "r", "where": "w"}
    return Measurement(**{**facts, "threads": 1, "runs": 2, "context": 64, "generates": True, **changes})


def test_every_length_that_was_asked_for_is_measured_every_time(found: dict[str, Any]) -> None:
    assert len(found["measurements"]) == 2
    for measured in found["measurements"]:
        assert [speed["tokens"] for speed in measured["prefill"]] == [8, 16]
        assert [speed["tokens"] for speed in measured["decode"]] == [0, 16]
        for speed in (*measured["prefill"], *measured["decode"]):
            rate = speed["tokens_per_s"]
            assert len(rate["values"]) == 3
            assert 0 < rate["low"] <= rate["median"] <= rate["high"]
        assert 0 < measured["model_rss_mb"] < measured["peak_rss_mb"]
        assert len(measured["warm_load_ms"]["values"]) == 3
        assert measured["sustained"]
        assert (measured["threads"], measured["runs"], measured["context"]) == (1, 3, CONTEXT)
        assert measured["runtime"].startswith("executorch ")


def test_a_load_from_the_disk_is_measured_where_the_system_lets_go_of_the_file(
    found: dict[str, Any], program: Path
) -> None:
    possible = evict(program)
    for measured in found["measurements"]:
        assert (measured["cold_load_ms"] is not None) == possible
        assert any("did not let go" in note for note in measured["notes"]) != possible


def test_a_ratio_is_of_runs_that_followed_each_other(found: dict[str, Any]) -> None:
    (ratio,) = found["ratios"]
    first, second = found["measurements"]
    assert (ratio["of"], ratio["to"]) == (first["name"], second["name"])
    assert ratio["figures"]["bytes"]["median"] == 1
    pairs = zip(*(m["decode"][1]["tokens_per_s"]["values"] for m in (first, second)), strict=True)
    assert ratio["figures"]["decode 16"]["values"] == pytest.approx([a / b for a, b in pairs])


def test_a_narrow_terminal_loses_no_figure() -> None:
    every = tuple(
        measurement(name=name, prefill=(Speed(4, spread(10, 30), spread(1)),), peak_rss_mb=1234.5)
        for name in ("a", "b", "c", "d")
    )
    console = Console(width=40, file=io.StringIO())
    print_measurements(console, every)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "peak memory of the process, MiB" in shown
    assert shown.count("20.0 (10.0..30.0)") == 4
    assert "…" not in shown


def test_the_table_has_a_column_for_each_and_one_for_the_ratio() -> None:
    mine = measurement(prefill=(Speed(4, spread(10, 30), spread(1)),), notes=("a note",))
    other = measurement(name="b", prefill=(Speed(4, spread(20, 20), spread(2)),), peak_rss_mb=7.0)
    console = Console(width=120, file=io.StringIO())
    print_measurements(console, (mine, other))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    row = next(line for line in shown.splitlines() if line.startswith("prefill 4, tokens/s"))
    assert row.split() == [
        "prefill",
        "4,",
        "tokens/s",
        "20.0",
        "(10.0..30.0)",
        "20.0",
        "(20.0..20.0)",
        "1.000",
    ]
    assert "A / B" in shown
    assert "A  note: a note" in shown
    memory = next(line for line in shown.splitlines() if line.startswith("peak memory of the process"))
    assert memory.split()[-3:] == ["not", "measured", "7.0"]


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("missing.pte", {}, InputError, "no such file or folder"),
        ("model.bin", {}, InputError, "neither a bundle nor a file that ends in"),
        ("broken.pte", {}, InputError, "ExecuTorch cannot load it"),
        ("ours.pte", {"prefill": (48,)}, InputError, "--prefill 48: the artifact has room for 47 tokens"),
        ("ours.pte", {"format": "litert"}, InputError, "is executorch, not litert"),
        ("ours.pte", {"devices": ("phone",)}, InputError, "--device: belongs to a device"),
        ("ours.pte", {"runner": "llama_main"}, InputError, "--runner: belongs to a device"),
        ("Model.mlpackage", {}, MissingComponentError, "nothing can be timed on this machine"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    name: str, options: dict[str, Any], error: type[Exception], words: str, program: Path, tmp_path: Path
) -> None:
    shutil.copy(program, tmp_path)
    (tmp_path / "model.bin").write_bytes(b"weights")
    (tmp_path / "broken.pte").write_bytes(b"not a program" * 100)
    (tmp_path / "Model.mlpackage").mkdir()
    with pytest.raises(error, match=words):
        bench(BenchRequest(tmp_path / name, **options), Progress(silent=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [(("--prefill", "12,x"), "no list of token counts"), (("--runs", "0"), "0 is not in the range")],
)
def test_options_that_are_no_numbers_are_wrong_input(options: tuple[str, ...], words: str) -> None:
    done = CliRunner().invoke(cli, ["bench", "ours.pte", *options])
    assert done.exit_code == InputError.exit_code
    assert words in done.output


def test_a_gguf_file_needs_its_own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingComponentError, match="pip install llama-cpp-python"):
        open_engine("llama_cpp", file, "text-generation", 1, 64)


def test_what_fits_the_context_is_measured_unless_asked_otherwise() -> None:
    workload = Workload(threads=1)
    assert workload.turns(4096) == (Turn(1, 64), Turn(128, 64), Turn(512, 64))
    assert workload.turns(200) == (Turn(1, 64), Turn(128, 64))
    assert workload.turns(130) == (Turn(1, 64), Turn(128, 2))
    assert workload.turns(64) == (Turn(1, 63), Turn(31, 33))
    with pytest.raises(InputError, match="--depth 64: the artifact has room for 63 tokens"):
        Workload(threads=1, depth=(64,)).turns(64)
    assert workload.turns(300, generates=False) == (Turn(128, 0),)
    assert Workload(threads=1, prefill=(7,), depth=(0, 9)).turns(64) == (
        Turn(1, 63),
        Turn(7, 57),
        Turn(9, 55),
    )


def test_speeds_are_of_the_lengths_that_were_asked_for() -> None:
    workload = Workload(threads=1, prefill=(8,), depth=(0, 16))
    turns = workload.turns(1000)
    rounds = [[Spoken(turn, turn.prompt / 100, turn.generated / 10 / n) for turn in turns] for n in (1, 2)]
    prefill, decode = speeds(rounds, workload)
    assert [(speed.tokens, speed.tokens_per_s) for speed in prefill] == [(8, spread(100, 100))]
    assert [speed.tokens for speed in decode] == [0, 16]
    assert decode[0].tokens_per_s == spread(10, 20)
    assert decode[0].ms == spread(100, 50)
    assert GENERATED == 64


def test_a_time_that_is_too_short_to_be_told_is_no_figure() -> None:
    workload = Workload(threads=1, prefill=(8,), depth=(8,))
    prefill, decode = speeds([[Spoken(Turn(8, 4), 0.0, None)]], workload)
    assert prefill[0].tokens_per_s is None
    assert decode[0].ms is None


def test_there_is_no_ratio_of_what_one_side_lacks() -> None:
    mine = measurement(cold_load_ms=spread(1, 2), peak_rss_mb=5.0)
    found = ratios(mine, measurement(bytes=20, warm_load_ms=spread(1, 2)))
    assert found == {"bytes": spread(0.5)}


def test_a_file_that_was_read_is_in_memory_until_it_is_let_go_of(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("asks Linux for the pages that it keeps")
    file, other = tmp_path / "weights", tmp_path / "other"
    for path in (file, other):
        path.write_bytes(bytes(range(256)) * 4096)
        assert path.read_bytes()
        assert resident_share(path) == 1
    with open(other, "r+b") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    # A file system in memory has nowhere to put it, and then it must not count as gone.
    possible = resident_share(other) == 0
    assert evict(file) == possible
    assert (resident_share(file) == 0) == possible


REAL_RUNNER = """
import sys
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
from slm_export.exporters.executorch_session import load_runtime

load_runtime()
program, tokenizer, prompt = sys.argv[1:]
runner = TextLLMRunner(program, tokenizer)
runner.generate(open(prompt).read(), GenerationConfig(temperature=0.0, max_new_tokens=9), print)
"""


def test_what_the_installed_executorch_prints_is_understood(
    program: Path, pycode: Path, tmp_path: Path
) -> None:
    """Its LLM runner itself, whose figures llama_main prints."""
    tokenizer = pycode / "tokenizer.json"
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(text_of(open_tokenizer(tokenizer), 16), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", REAL_RUNNER, program, tokenizer, prompt],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    spoken = LlamaMain().parse(done.stdout, Turn(16, 8))
    assert spoken is not None
    assert spoken.read == 16
    assert spoken.wrote is not None
    assert 0 < spoken.wrote <= 8  # it may stop at the end of a text
    assert spoken.prefill_s is not None
    assert spoken.decode_s is not None
    assert spoken.load_ms is not None


CHILD = """
import os, signal, time
from slm_export.child import serve_all
from slm_export.errors import InputError

def answer(request):
    if request["do"] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if request["do"] == "refuse":
        raise InputError("not this")
    if request["do"] == "sleep":
        time.sleep(60)
    return {"same": request["do"]}

if __name__ == "__main__":
    serve_all(answer)
"""


@pytest.fixture
def child_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "talker.py").write_text(CHILD, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "talker"


def test_a_child_answers_until_it_is_left(child_module: str) -> None:
    with Child(child_module, "talk") as child:
        assert child.ask({"do": "this"}) == {"same": "this"}
        with pytest.raises(InputError, match="not this"):
            child.ask({"do": "refuse"})
        assert child.ask({"do": "that"}) == {"same": "that"}
        with pytest.raises(MachineError, match=r"should talk died \(SIGKILL\)"):
            child.ask({"do": "die"})
        with pytest.raises(MachineError, match="died"):
            child.ask({"do": "more"})


def test_a_child_that_does_not_answer_is_ended(child_module: str) -> None:
    with (
        Child(child_module, "talk", timeout_s=0.5) as child,
        pytest.raises(MachineError, match="took longer"),
    ):
        child.ask({"do": "sleep"})
