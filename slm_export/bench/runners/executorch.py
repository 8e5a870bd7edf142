"""ExecuTorch's programs: ``llama_main`` for decoders, ``executor_runner`` for the rest.

Flags and output: examples/models/llama/main.cpp, extension/llm/runner/stats.h and
examples/portable/executor_runner/executor_runner.cpp of release 1.4.1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from slm_export.bench.figures import Spoken
from slm_export.bench.runners.prompts import open_tokenizer, text_of
from slm_export.bench.subject import Subject
from slm_export.bench.workload import Turn, Workload
from slm_export.errors import InputError

_EXECUTIONS = 20
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


class LlamaMain:
    """Reads a prompt from a file and generates; a line of figures in JSON, in milliseconds, ends its output."""

    program: ClassVar[str] = "llama_main"
    get: ClassVar[str] = (
        "built from ExecuTorch's source, examples/models/llama (docs/bench.md has the commands)"
    )

    def turns(self, subject: Subject, workload: Workload) -> tuple[Turn, ...]:
        """See `VendorRunner`."""
        return workload.turns(_context(subject))

    def files(self, subject: Subject, turns: Sequence[Turn], scratch: Path) -> dict[str, Path]:
        """Return the tokenizer, and a text for every length of prompt."""
        if subject.tokenizer is None:
            raise InputError(
                f"{subject.name}: llama_main needs a tokenizer too; give the bundle that has both"
            )
        folder = subject.tokenizer.parent
        files = {name: folder / name for name in _TOKENIZER if (folder / name).is_file()}
        tokenizer = open_tokenizer(subject.tokenizer)
        for turn in turns:
            path = scratch / _prompt(turn)
            path.write_text(text_of(tokenizer, turn.prompt), encoding="utf-8")
            files[path.name] = path
        return files

    def arguments(self, subject: Subject, artifact: str, turn: Turn, threads: int) -> list[str]:
        """See `VendorRunner`; one token more, because the first costs no step of its own."""
        return [
            f"--model_path={artifact}",
            f"--tokenizer_path={_TOKENIZER[0]}",
            f"--prompt_file={_prompt(turn)}",
            f"--max_new_tokens={turn.generated + 1}",
            f"--cpu_threads={threads}",
            "--temperature=0",
            "--ignore_eos",
        ]

    def parse(self, output: str, turn: Turn) -> Spoken | None:
        """See `VendorRunner`. The line is read by pattern: some releases print a comma too many for JSON."""
        lines = re.findall(r"PyTorchObserver (\{.*\})", output)
        if not lines:
            return None
        told = {name: float(value) for name, value in re.findall(r'"(\w+)":(-?[\d.e+]+)', lines[-1])}
        return Spoken(
            turn,
            prefill_s=(told["prompt_eval_end_ms"] - told["inference_start_ms"]) / 1000,
            decode_s=(told["inference_end_ms"] - told["prompt_eval_end_ms"]) / 1000,
            load_ms=told["model_load_end_ms"] - told["model_load_start_ms"],
            read=int(told["prompt_tokens"]),
            wrote=int(told["generated_tokens"]),
        )


class ExecutorRunner:
    """Executes an encoder on an input of ones, of the greatest length, because that is what its plan is for."""

    program: ClassVar[str] = "executor_runner"
    get: ClassVar[str] = "built from ExecuTorch's source with logging on (docs/bench.md has the commands)"

    def turns(self, subject: Subject, workload: Workload) -> tuple[Turn, ...]:
        """See `VendorRunner`."""
        context = _context(subject)
        if workload.prefill not in (None, (context,)):
            raise InputError(
                f"--prefill: executor_runner takes the longest input alone; leave it out, or say {context}"
            )
        return (Turn(context, 0),)

    def files(self, subject: Subject, turns: Sequence[Turn], scratch: Path) -> dict[str, Path]:
        """Nothing more is needed."""
        return {}

    def arguments(self, subject: Subject, artifact: str, turn: Turn, threads: int) -> list[str]:
        """See `VendorRunner`."""
        counts = [f"--num_executions={_EXECUTIONS}", f"--cpu_threads={threads}"]
        return [f"--model_path={artifact}", *counts, "--print_output=none"]

    def parse(self, output: str, turn: Turn) -> Spoken | None:
        """See `VendorRunner`; the mean of one call."""
        found = re.search(r"Model executed successfully (\d+) time\(s\) in ([\d.]+) ms", output)
        return None if found is None else Spoken(turn, float(found[2]) / 1000 / int(found[1]), None)


def _prompt(turn: Turn) -> str:
    return f"prompt-{turn.prompt}.txt"


def _context(subject: Subject) -> int:
    if subject.context is None:
        raise InputError(f"{subject.name}: says nothing of its context; give the bundle that it is in")
    return subject.context
