"""What the tests of devices share: an artifact to bring, and runners that print what the vendors' do."""

from __future__ import annotations

from pathlib import Path

from slm_export.bench.figures import Measurement
from slm_export.bench.places import Place
from slm_export.bench.remote import measure_there
from slm_export.bench.subject import Subject
from slm_export.bench.workload import Workload
from slm_export.progress import Progress

CONTEXT = 256
WORKLOAD = Workload(threads=3, runs=2, prefill=(32,), depth=(0, 32))

LLAMA_MAIN = r"""#!/bin/sh
# Prints what ExecuTorch's llama_main prints, of a prompt read at 1000 tokens/s and tokens written at 100.
for flag in "$@"; do
    case $flag in
        --model_path=*) model=${flag#*=} ;;
        --tokenizer_path=*) tokenizer=${flag#*=} ;;
        --prompt_file=*) prompt=${flag#*=} ;;
        --max_new_tokens=*) new=${flag#*=} ;;
        --cpu_threads=3 | --temperature=0 | --ignore_eos) ;;
        *) echo "unknown flag $flag"; exit 1 ;;
    esac
done
test -s "$model" && test -s "$tokenizer" && test -s "$prompt" || exit 1
BEFORE
tokens=${prompt#prompt-}; tokens=${tokens%.txt}
generated=$((new - 1))
read=$((5000 + tokens)); wrote=$((read + 10 * generated))
echo "the text that it wrote"
echo "PyTorchObserver {\"prefill_token_per_sec\":1,\"prompt_tokens\":$tokens,\"generated_tokens\":$generated,\
\"model_load_start_ms\":1000,\"model_load_end_ms\":1250,\"inference_start_ms\":5000,\"inference_end_ms\":$wrote,\
\"prompt_eval_end_ms\":$read,\"first_token_ms\":$read,\"aggregate_sampling_time_ms\":3,\
\"SCALING_FACTOR_UNITS_PER_SECOND\":1000}"
AFTER
"""


def runner(folder: Path, before: str = "sleep 0.3", after: str = "") -> Path:
    """Return a runner that does something before it prints its figures, and after."""
    path = folder / "llama_main"
    path.write_text(LLAMA_MAIN.replace("BEFORE", before).replace("AFTER", after), encoding="utf-8")
    return path


def artifact(folder: Path, pycode: Path, name: str = "model.pte", size: int = 300_000) -> Subject:
    """Return a decoder of a bundle; only its size and its tokenizer matter to a device of the tests."""
    path = folder / name
    path.write_bytes(b"\0" * size)
    tokenizer = pycode / "tokenizer.json"
    return Subject(name, path, "executorch", "text-generation", size, tokenizer, CONTEXT, ("forward",))


def measured(
    place: Place, subject: Subject, program: Path | str | None, workload: Workload = WORKLOAD
) -> Measurement:
    (found,) = measure_there(
        place, [subject], None if program is None else str(program), workload, Progress(silent=True)
    )
    return found
