"""The vendors' programs: how they are called, and what is read from what they print, as their source writes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from slm_export.bench.runners import runner_for
from slm_export.bench.runners.executorch import LlamaMain
from slm_export.bench.runners.litert import BenchmarkModel, LiteRTLMMain
from slm_export.bench.runners.prompts import open_tokenizer, text_of
from slm_export.bench.subject import Subject
from slm_export.bench.workload import Turn, Workload
from slm_export.errors import InputError
from slm_export.source.tasks import EMBEDDING, GENERATION

LITERT_LM = """I0000 00:00:1 litert_lm_lib.cc:100] BenchmarkInfo:
  Init Phases (2):
    - Executor initialization: 400.50 ms
    - Session creation: 1.50 ms
--------------------------------------------------
  Time to first token: 0.14 s
--------------------------------------------------
  Prefill Turns (Total 1 turns):
    Prefill Turn 1: Processed 128 tokens in 103.2ms duration.
      Prefill Speed: 1240.31 tokens/sec.
--------------------------------------------------
  Decode Turns (Total 1 turns):
    Decode Turn 1: Processed 64 tokens in 1m2.5s duration.
      Decode Speed: 1.02 tokens/sec.
"""
BENCHMARK_MODEL = """INFO: count=20 first=2600 curr=2500 min=2400 max=2700 avg=2500.5 std=50 p5=2400 median=2500
INFO: Inference timings in us: Init: 12345, First inference: 9876, Warmup (avg): 8000, Inference (avg): 2.5005e+03
"""
EXECUTOR_RUNNER = (
    "I 00:00:01.2 executorch:executor_runner.cpp:790] Model executed successfully 20 time(s) in 50.0 ms."
)


def subject(suffix: str, task: str, functions: tuple[str, ...] = ("forward",)) -> Subject:
    path = Path(f"model{suffix}")
    return Subject(path.name, path, "any", task, 1, None, 256, functions)


def test_litert_lms_figures_are_read() -> None:
    runner = runner_for(subject(".litertlm", GENERATION))
    spoken = runner.parse(LITERT_LM, Turn(128, 64))
    assert spoken is not None
    assert spoken.prefill_s == pytest.approx(0.1032)
    assert spoken.decode_s == pytest.approx(62.5)
    assert spoken.load_ms == pytest.approx(402)
    assert (spoken.read, spoken.wrote) == (128, 64)
    assert runner.parse("No decode turns recorded.", Turn(128, 64)) is None


def test_litert_lm_is_told_how_many_tokens() -> None:
    flags = LiteRTLMMain().arguments(subject(".litertlm", GENERATION), "model-0.litertlm", Turn(128, 64), 4)
    assert {
        "--model_path=model-0.litertlm",
        "--benchmark",
        "--benchmark_prefill_tokens=128",
        "--benchmark_decode_tokens=64",
        "--num_cpu_threads=4",
        "--max_num_tokens=256",
    } <= set(flags)


def test_a_file_of_functions_is_called_function_by_function() -> None:
    encoder = subject(".tflite", EMBEDDING, ("encode_32", "encode_128"))
    runner = BenchmarkModel()
    assert runner.turns(encoder, Workload(4)) == (Turn(32, 0), Turn(128, 0))
    assert runner.turns(encoder, Workload(4, prefill=(128,))) == (Turn(128, 0),)
    with pytest.raises(InputError, match="--prefill 64: the file has functions for 32, 128 tokens"):
        runner.turns(encoder, Workload(4, prefill=(64,)))
    assert "--signature_to_run_for=encode_128" in runner.arguments(encoder, "model-0.tflite", Turn(128, 0), 4)
    spoken = runner.parse(BENCHMARK_MODEL, Turn(128, 0))
    assert spoken is not None
    assert (spoken.prefill_s, spoken.decode_s) == (pytest.approx(0.0025005), None)
    assert spoken.load_ms == pytest.approx(12.345)


def test_an_encoder_of_executorch_takes_its_longest_input() -> None:
    encoder = subject(".pte", EMBEDDING)
    runner = runner_for(encoder)
    assert runner.turns(encoder, Workload(4)) == (Turn(256, 0),)
    with pytest.raises(InputError, match="takes the longest input alone; leave it out, or say 256"):
        runner.turns(encoder, Workload(4, prefill=(8,)))
    spoken = runner.parse(EXECUTOR_RUNNER, Turn(256, 0))
    assert spoken is not None
    assert spoken.prefill_s == pytest.approx(0.0025)


def test_llama_main_generates_as_many_steps_as_were_asked_for() -> None:
    flags = LlamaMain().arguments(subject(".pte", GENERATION), "model-0.pte", Turn(32, 64), 4)
    # The first token comes from reading the prompt.
    assert {"--max_new_tokens=65", "--prompt_file=prompt-32.txt", "--cpu_threads=4", "--ignore_eos"} <= set(
        flags
    )


def test_a_line_that_is_no_json_is_read() -> None:
    line = (
        'PyTorchObserver {"prompt_tokens":7,"generated_tokens":8,"model_load_start_ms":1,"model_load_end_ms":3,'
        '"inference_start_ms":10,"inference_end_ms":50,"prompt_eval_end_ms":20,"first_token_ms":20,}'
    )
    spoken = LlamaMain().parse(f"text\n{line}\nmore", Turn(7, 8))
    assert spoken is not None
    assert (spoken.prefill_s, spoken.decode_s, spoken.load_ms) == (0.01, 0.03, 2)


@pytest.mark.parametrize("suffix", [".onnx", ".gguf"])
def test_what_no_program_runs_is_refused(suffix: str) -> None:
    with pytest.raises(InputError, match=f"no vendor's program for {suffix} is driven on a device"):
        runner_for(subject(suffix, GENERATION))


@pytest.mark.parametrize("tokens", [1, 2, 33, 700])
def test_a_prompt_has_the_tokens_that_were_asked_for(tokens: int, pycode: Path) -> None:
    tokenizer = open_tokenizer(pycode / "tokenizer.json")
    assert len(tokenizer.encode(text_of(tokenizer, tokens), add_special_tokens=False).ids) == tokens
