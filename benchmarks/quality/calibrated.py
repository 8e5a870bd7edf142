"""What calibration is worth: recipes beside each other on text that none of them was calibrated on, in torch.

    python benchmarks/quality/calibrated.py examples/pycode-5m [--recipe NAME]... [--own-text] [--tokens 76800]
    python benchmarks/quality/calibrated.py MINILM [--recipe NAME]... [--texts 1000]

Decoders are read in windows of the held-out files (see heldout.py) and calibrated on modules of the standard library,
or with --own-text on what the model writes itself: KL divergence, increase of the log perplexity and top-1 agreement
against the float32 model, means over windows with their standard error. Encoders are calibrated on the shipped sample
and embed docstrings of the standard library: cosine with the float32 embedding, and how much of the ten nearest
texts of a query (other docstrings) stays the same. Weights only: no artifact is written.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from heldout import calibration_documents, heldout_documents
from torch import Tensor

from slm_export.checkpoint import Checkpoint
from slm_export.compression.calibration import (
    Calibration,
    own_calibration,
    read_calibration,
    shipped_calibration,
)
from slm_export.compression.workbench import Workbench
from slm_export.evaltext import token_windows
from slm_export.graph.model import build_reference
from slm_export.recipe import make_pass
from slm_export.source.load import load_checkpoint
from slm_export.source.tasks import GENERATION
from slm_export.tokenization.tokenizer import SourceTokenizer
from slm_export.weights import Dense

WINDOW = 256
QUERIES, NEAREST = 100, 10
Step = tuple[str, Mapping[str, Any]]
RECIPES: Mapping[str, tuple[Step, ...]] = {
    "min-max": (("group-quantize", {"search": False}),),
    "search": (("group-quantize", {}),),
    "search, group 128": (("group-quantize", {"group": 128}),),
    "gptq as published": (("gptq", {"rounds": 0}),),
    "gptq": (("gptq", {}),),
    "gptq, group 128": (("gptq", {"group": 128}),),
    "learned-rounding": (("learned-rounding", {}),),
    "awq, search": (("awq", {}), ("group-quantize", {})),
    "awq, gptq": (("awq", {}), ("gptq", {})),
    "rotate, search": (("rotate", {"stream": False}), ("group-quantize", {})),
    "rotate, gptq": (("rotate", {"stream": False}), ("gptq", {})),
    "rotate, gptq, untied": (("rotate", {"untie": True}), ("gptq", {})),
    "gptq, recover": (("gptq", {}), ("recover", {})),
}


def compress(source: Checkpoint, recipe: tuple[Step, ...], text: Calibration) -> Checkpoint:
    """Return what a recipe makes of a model."""
    for name, options in recipe:
        source = make_pass(name, options, "benchmark").run(source, Workbench(calibration=text)).checkpoint
    return source


def in_floats(checkpoint: Checkpoint) -> Checkpoint:
    """Return the same values in float32: the reference would make them of the codes at every call."""
    made = {name: weight.float32() for name, weight in checkpoint.weights.items()}
    return checkpoint.with_weights(
        {
            name: Dense(tuple(v.shape), v.dtype, partial(torch.Tensor.view_as, v, v))
            for name, v in made.items()
        }
    )


class Decoder:
    """Judges decoders on held-out windows."""

    def __init__(self, source: Checkpoint, tokenizer: SourceTokenizer, tokens: int) -> None:
        documents = heldout_documents(source.folder)
        bos = tokenizer.bos_id if tokenizer.adds_bos else None
        self.windows = token_windows(documents, tokenizer.encode, WINDOW, bos, tokens)
        self.expected = self._read(source)
        self.what = f"{sum(map(len, self.windows)):,} tokens in {len(self.windows)} windows"

    def _read(self, checkpoint: Checkpoint) -> list[Tensor]:
        """Return the log probabilities of every window, float32 (tokens, vocabulary)."""
        model = build_reference(checkpoint)
        with torch.no_grad():
            return [model(input_ids=torch.tensor([w])).logits[0].log_softmax(-1) for w in self.windows]

    def judge(self, checkpoint: Checkpoint) -> str:
        return described(*self.measure(checkpoint))

    def measure(self, checkpoint: Checkpoint) -> tuple[Tensor, Tensor, Tensor]:
        """Return KL divergence, increase of the log perplexity and agreement, each float32 (windows,)."""
        kl, increase, agree = [], [], []
        for p, q, window in zip(self.expected, self._read(checkpoint), self.windows, strict=True):
            kl.append((p.exp() * (p - q)).sum(-1).mean())
            increase.append((p - q)[:-1].gather(1, torch.tensor(window[1:]).unsqueeze(1)).mean())
            agree.append((p.argmax(-1) == q.argmax(-1)).float().mean())
        return torch.stack(kl), torch.stack(increase), torch.stack(agree)


def described(kl: Tensor, increase: Tensor, agree: Tensor) -> str:
    """Return what was measured of a decoder, in a line."""
    return f"KL {mean(kl)}  ln ratio {mean(increase)}  top-1 {agree.mean():.2%}"


class Encoder:
    """Judges encoders of sentences on docstrings: the first of them are queries, the others what is searched."""

    def __init__(self, source: Checkpoint, tokenizer: SourceTokenizer, texts: int) -> None:
        self.inputs = [tokenizer.encode_with_template(text)[:128] for text in docstrings(texts)]
        self.expected = self._embed(source)
        self.what = f"{len(self.inputs):,} docstrings, {QUERIES} of them queries"

    def _embed(self, checkpoint: Checkpoint) -> Tensor:
        model = build_reference(in_floats(checkpoint))
        with torch.no_grad():
            made = [
                model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64)) for ids in self.inputs
            ]
        return torch.nn.functional.normalize(torch.cat(made))

    def judge(self, checkpoint: Checkpoint) -> str:
        made = self._embed(checkpoint)
        cosines = (made * self.expected).sum(-1)
        same = [
            len(set(a.tolist()) & set(b.tolist())) / NEAREST
            for a, b in zip(_nearest(self.expected), _nearest(made), strict=True)
        ]
        overlap = mean(torch.tensor(same))
        return f"cosine {mean(cosines)}  least {cosines.min():.4f}  top-{NEAREST} overlap {overlap}"


def docstrings(count: int) -> list[str]:
    """Return first paragraphs of docstrings of the standard library, in the order of its files' names."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                first = " ".join(text.split("\n\n")[0].split())
                if len(first) > 30:
                    found[first] = None
    # Not the first ones: a stride over all of them reaches every module.
    return list(found)[:: max(1, len(found) // count)][:count]


def _nearest(embeddings: Tensor) -> Tensor:
    return (embeddings[:QUERIES] @ embeddings[QUERIES:].t()).topk(NEAREST).indices


def mean(values: Any) -> str:
    """Return the mean of measurements and its standard error."""
    values = torch.as_tensor(values) if not isinstance(values, list) else torch.stack(values)
    return f"{values.mean():.5f} ± {values.std() / len(values) ** 0.5:.5f}"


def calibration_of(source: Checkpoint, tokenizer: SourceTokenizer, own_text: bool) -> Calibration:
    """Return the text that recipes are calibrated on."""
    if source.task != GENERATION:
        return shipped_calibration(tokenizer, source.task, source.positions)
    if own_text:
        return own_calibration(build_reference(source), tokenizer, source.positions, lambda count, what: None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calibration.txt"
        path.write_text("\n\f\n".join(calibration_documents()), encoding="utf-8")
        return read_calibration(path, tokenizer, source.task, source.positions)


def main() -> None:
    """Print a row per recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--recipe", action="append", choices=RECIPES)
    parser.add_argument("--own-text", action="store_true")
    parser.add_argument("--tokens", type=int, default=76_800)
    parser.add_argument("--texts", type=int, default=1000)
    asked = parser.parse_args()
    source, tokenizer = load_checkpoint(asked.model), SourceTokenizer.load(asked.model)
    judge: Decoder | Encoder
    if source.task == GENERATION:
        judge = Decoder(source, tokenizer, asked.tokens)
    else:
        judge = Encoder(source, tokenizer, asked.texts)
    text = calibration_of(source, tokenizer, asked.own_text)
    origin = "its own text" if asked.own_text else "the standard library"
    print(f"{judge.what}; {text.tokens:,} tokens of {origin if source.task == GENERATION else text.origin}")
    for name in asked.recipe or RECIPES:
        began = time.monotonic()
        made = compress(source, RECIPES[name], text)
        seconds = time.monotonic() - began
        print(
            f"{name:24} {made.bytes / 1e6:6.2f} MB  {judge.judge(made)}  made in {seconds:.0f} s", flush=True
        )


if __name__ == "__main__":
    main()
