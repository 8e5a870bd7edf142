"""How much step-by-step solutions teach a small child, beside the answers alone.

    python benchmarks/distil/reasoning.py --out FOLDER

Sums and differences of numbers of two and three digits with exact answers (examples/arithmetic/teacher.py). A Llama of
random weights that reads single digits is tuned twice, from the same start, with the same settings, on the same
problems and for as many tokens: once on the solutions that the teacher wrote behind an endpoint on the loopback
interface, judged and selected as `slm-export reason` does it, once on the answers alone. Both then solve held-out
problems greedily. Writes reasoning.json and a plot.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "examples" / "arithmetic"))

import teacher as arithmetic  # noqa: E402

from slm_export.learning.endpoint import Endpoint  # noqa: E402
from slm_export.learning.judging import MARK, known_answers  # noqa: E402
from slm_export.learning.places import place  # noqa: E402
from slm_export.learning.problems import Problems, part, read_problems  # noqa: E402
from slm_export.learning.reason_settings import Reasoning  # noqa: E402
from slm_export.learning.scoring import Score, score  # noqa: E402
from slm_export.learning.settings import Training  # noqa: E402
from slm_export.learning.traces import Trace  # noqa: E402
from slm_export.learning.tuning import Lessons, child_of, collect, lessons, tune  # noqa: E402
from slm_export.progress import Progress  # noqa: E402

LENGTH, MOST = 96, 80
"""Tokens of an example, and of an answer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--problems", type=int, default=8000)
    parser.add_argument("--held-out", type=int, default=500)
    parser.add_argument("--steps", type=int, default=700, help="of the child that learns from traces")
    parser.add_argument("--plot", type=Path, help="where the plot goes [default: OUT/reasoning.svg]")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    began, progress = time.monotonic(), Progress()
    child, file = given.out / "child", given.out / "problems.jsonl"
    save_child(child)
    file.write_text(
        "".join(json.dumps(row) + "\n" for row in arithmetic.problems(given.problems)), encoding="utf-8"
    )
    problems = part(read_problems(file, answers_needed=True), given.held_out)
    training = Training(steps=given.steps, batch=64, together=64, length=LENGTH, rate=2e-3)
    settings = Reasoning(training=training, samples=1, answer_tokens=MOST)
    found: dict[str, Any] = {"settings": settings.recorded(), "problems": len(problems.training), "arms": {}}
    taught, teacher = traces_of(problems, child, settings, progress)
    found["teacher"] = teacher.as_json()
    answers = [Trace(problem, f"{MARK} {problem.answer}") for problem in (t.problem for t in taught.traces)]
    arms = {"traces": taught, "answers": lessons(answers, child_of(child).tokenizer, LENGTH)}
    found["arms"]["before"] = {
        "score": score(child_of(child), problems.held_out, known_answers, 120, progress, "before").as_json()
    }
    budget = settings.training.steps * tokens_per_step(taught, settings)
    for name, arm in arms.items():
        steps = round(budget / tokens_per_step(arm, settings))
        found["arms"][name] = tuned(name, child, arm, with_steps(settings, steps), problems, progress)
        (given.out / "reasoning.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    found["seconds"] = time.monotonic() - began
    (given.out / "reasoning.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    plot(found, given.plot or given.out / "reasoning.svg")
    for name, arm in found["arms"].items():
        figures = arm["score"]
        print(
            f"{name:8} {figures['value']:.1%} ({figures['low']:.1%} to {figures['high']:.1%}) "
            f"of {figures['problems']}, {arm.get('tokens', 0):,} tokens"
        )


def save_child(folder: Path) -> None:
    """Write a Llama of random weights, about 0.8 M parameters, that reads characters and some words."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["Problem: ", "\nSolution:\n", "Answer: ", " carry ", " + ", " - ", " : ", " ="]
    signs = ["<s>", "</s>", "<pad>", "<unk>", *words, *map(chr, range(32, 127)), "\n"]
    backend = Tokenizer(
        models.WordLevel({sign: index for index, sign in enumerate(signs)}, unk_token="<unk>")
    )
    pattern = "|".join(map(re.escape, words)) + r"|[\s\S]"
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=len(signs),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def traces_of(
    problems: Problems, child: Path, settings: Reasoning, progress: Progress
) -> tuple[Lessons, Score]:
    """Return what the teacher wrote that can be learned from, and how good the teacher is."""
    with arithmetic.server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        teacher = Endpoint(f"http://127.0.0.1:{running.server_address[1]}/v1", temperature=0.0)
        # Ports differ from run to run.
        teacher.identity = {**teacher.identity, "endpoint": "loopback"}
        tokenizer = child_of(child).tokenizer
        made = collect(teacher, problems, known_answers, settings, tokenizer, progress)
        running.shutdown()
    return lessons(made.selection.traces, tokenizer, LENGTH), made.score


def tuned(
    name: str, child: Path, taught: Lessons, settings: Reasoning, problems: Problems, progress: Progress
) -> dict[str, Any]:
    """Tune a fresh child and return its score with what it cost."""
    model = child_of(child)
    key = {"what": "benchmark", "arm": name, "examples": taught.sha256, "settings": settings.recorded()}
    with place(key) as work:
        curve = tune(model, taught, settings, work, progress)
        work.done()
    figures = score(
        model, problems.held_out, known_answers, settings.answer_tokens, progress, f"score {name}"
    )
    points = [(point.step, point.loss) for point in curve.points if point.loss is not None]
    return {
        "score": figures.as_json(),
        "steps": settings.training.steps,
        "tokens": curve.tokens,
        "seconds": curve.seconds,
        "losses": points,
    }


def tokens_per_step(taught: Lessons, settings: Reasoning) -> float:
    return settings.training.batch * sum(len(e["input_ids"]) for e in taught.examples) / len(taught.examples)


def with_steps(settings: Reasoning, steps: int) -> Reasoning:
    return settings.model_copy(update={"training": settings.training.model_copy(update={"steps": steps})})


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw the held-out accuracies with their intervals."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "slm-export"
    from matplotlib import pyplot

    names = {"before": "before", "answers": "answers alone", "traces": "step by step"}
    shown = [(label, found["arms"][name]["score"]) for name, label in names.items()]
    figure, axes = pyplot.subplots(figsize=(5.5, 2.6), layout="constrained")
    for row, (_, one) in enumerate(shown):
        reach = [[one["value"] - one["low"]], [one["high"] - one["value"]]]
        axes.barh(row, one["value"], xerr=reach, color=("#9aa5b1", "#c77f3b", "#2f6f9f")[row], capsize=4)
        axes.text(max(one["high"], 0.0) + 0.015, row, f"{one['value']:.1%}", va="center")
    axes.set_yticks(range(len(shown)), [label for label, _ in shown])
    axes.set_xlim(0, 1.15)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    axes.set_xlabel(f"of {shown[0][1]['problems']} held-out problems, 95% interval (Wilson)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
