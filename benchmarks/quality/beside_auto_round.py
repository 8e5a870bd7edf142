"""Our passes beside AutoRound (Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent", 2023), in torch.

    pip install auto-round
    python benchmarks/quality/beside_auto_round.py examples/pycode-5m [--iterations 200] [--tokens 25600]

AutoRound learns roundings and clips of the linear layers at int4, symmetric, groups of 32, from the very windows that
our calibrated passes learn from; the embedding is int8 as ours is. It hands back floats: how many of them lie on the
grid that artifacts store (codes from -8 to 7 times a positive scale) is printed, and both are judged on the
same held-out windows as `calibrated.py` judges.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from calibrated import RECIPES, Decoder, calibration_of, compress
from torch import Tensor

from slm_export.checkpoint import Checkpoint
from slm_export.compression.calibration import Calibration
from slm_export.source.load import load_checkpoint
from slm_export.tokenization.tokenizer import SourceTokenizer
from slm_export.weights import CODE_RANGE, Dense, grid_scale

GROUP = 32


def main() -> None:
    """Print a row per tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--iterations", type=int, default=200, help="of AutoRound, for each block [200]")
    parser.add_argument("--tokens", type=int, default=25_600)
    asked = parser.parse_args()
    source, tokenizer = load_checkpoint(asked.model), SourceTokenizer.load(asked.model)
    judge = Decoder(source, tokenizer, asked.tokens)
    text = calibration_of(source, tokenizer, own_text=False)
    print(f"{judge.what}; {text.tokens:,} tokens of the standard library")

    began = time.monotonic()
    tuned = auto_round(asked.model, text, asked.iterations)
    seconds = time.monotonic() - began
    on_grid = sum(int(lies_on_grid(values, scale).sum()) for values, scale in tuned.values())
    print(
        f"AutoRound: {on_grid / sum(v.numel() for v, _ in tuned.values()):.2%} of its values are on our grid"
    )
    theirs = with_matrices(compress(source, RECIPES["search"], text), {n: v for n, (v, _) in tuned.items()})
    print(f"{'AutoRound':24} {judge.judge(theirs)}  made in {seconds:.0f} s", flush=True)
    for name in ("search", "gptq", "learned-rounding"):
        began = time.monotonic()
        made = compress(source, RECIPES[name], text)
        seconds = time.monotonic() - began
        print(f"{name:24} {judge.judge(made)}  made in {seconds:.0f} s", flush=True)


def auto_round(folder: Path, text: Calibration, iterations: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the values (out, in) of every matrix that AutoRound quantized, and its scales (out, groups)."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    length = max(map(len, text.learning))
    windows = [torch.tensor(window) for window in text.learning if len(window) == length]
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows]
    tuner = AutoRound(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
        scheme={"bits": 4, "group_size": GROUP, "sym": True, "data_type": "int"},
        dataset=torch.utils.data.DataLoader(data, batch_size=8),  # type: ignore[arg-type]
        iters=iterations,
        seqlen=length,
        nsamples=len(windows),
        device_map="cpu",
        enable_torch_compile=False,
    )
    model, layers = tuner.quantize()
    modules: dict[str, Any] = dict(model.named_modules())
    return {
        f"{name}.weight": (modules[name].weight.detach().float(), modules[name].scale.float())
        for name in layers
        if hasattr(modules[name], "scale")
    }


def lies_on_grid(values: Tensor, scales: Tensor) -> Tensor:
    """Return which values, (out, in), are a code times a positive scale of the precision that artifacts store."""
    step = grid_scale(scales.abs()).view(values.shape[0], -1, 1)
    groups = values.view(*step.shape[:2], -1)
    codes = (groups / step).round().clamp(*CODE_RANGE[4])
    # It computes values in bfloat16: 8 steps are told to a 32nd of one.
    return (groups - codes * step).abs() <= step / 16


def with_matrices(checkpoint: Checkpoint, matrices: dict[str, Tensor]) -> Checkpoint:
    """Return the checkpoint with floats in the place of its quantized matrices."""
    assert matrices.keys() <= checkpoint.weights.keys()
    return checkpoint.with_weights(
        {
            name: Dense(tuple(v.shape), v.dtype, partial(torch.Tensor.view_as, v, v))
            for name, v in matrices.items()
        }
    )


if __name__ == "__main__":
    main()
