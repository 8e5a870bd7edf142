"""What each width costs a decoder, and what searching for scales is worth: KL divergence and perplexity in torch.

    python benchmarks/quantization.py MODEL [--eval-text FILE] [--tokens 8192]

Weights only, no artifact is written: it compares schemes of quantization, min-max beside scale search, on the
same tokens in one run. The standard error is over windows.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from slm_export.checkpoint import Checkpoint
from slm_export.evaltext import load_documents, token_windows
from slm_export.load import load_checkpoint
from slm_export.model import build_reference
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.tokenizer import SourceTokenizer

WINDOW = 256
SCHEMES = {
    "int8": GroupQuantize(bits=8, embedding_bits=8),
    "int8, min-max": GroupQuantize(bits=8, embedding_bits=8, search=False),
    "int4 group 32, embedding int8": GroupQuantize(bits=4, group=32, embedding_bits=8),
    "int4 group 32, embedding int8, min-max": GroupQuantize(bits=4, group=32, embedding_bits=8, search=False),
    "int4 group 128, embedding int8": GroupQuantize(bits=4, group=128, embedding_bits=8),
    "int4 group 128, embedding int8, min-max": GroupQuantize(
        bits=4, group=128, embedding_bits=8, search=False
    ),
    "int4 group 32, embedding too": GroupQuantize(bits=4, group=32, embedding_bits=4),
    "int4 group 32, embedding too, min-max": GroupQuantize(bits=4, group=32, embedding_bits=4, search=False),
}


@dataclass(frozen=True)
class Reading:
    """Of every window: log probabilities (tokens, vocabulary)."""

    windows: tuple[Tensor, ...]


def read(checkpoint: Checkpoint, windows: tuple[tuple[int, ...], ...]) -> Reading:
    """Let torch read every window, one at a time."""
    model = build_reference(checkpoint)
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([window])).logits[0] for window in windows]
    return Reading(tuple(rows.log_softmax(-1) for rows in logits))


def compare(
    source: Reading, other: Reading, windows: tuple[tuple[int, ...], ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return KL mean, increase of the mean log perplexity and top-1 agreement, each (windows,)."""
    kl, increase, agree = [], [], []
    for p, q, window in zip(source.windows, other.windows, windows, strict=True):
        kl.append((p.exp() * (p - q)).sum(-1).mean())
        following = torch.tensor(window[1:]).unsqueeze(1)
        increase.append((p - q)[:-1].gather(1, following).mean())
        agree.append((p.argmax(-1) == q.argmax(-1)).float().mean())
    return torch.stack(kl), torch.stack(increase), torch.stack(agree)


def main() -> None:
    """Print a row per scheme."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--eval-text", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    arguments = parser.parse_args()
    source = load_checkpoint(arguments.model)
    tokenizer = SourceTokenizer.load(arguments.model)
    bos = tokenizer.bos_id if tokenizer.adds_bos else None
    documents = load_documents(arguments.eval_text)
    windows = token_windows(documents, tokenizer.encode, WINDOW, bos, arguments.tokens)
    expected = read(source, windows)
    table = Table("scheme", "MB", "KL mean", "ln ratio", "perplexity ratio", "top-1")
    for name, scheme in SCHEMES.items():
        made = scheme.run(source).checkpoint
        kl, increase, agree = compare(expected, read(made, windows), windows)
        error = increase.std() / len(windows) ** 0.5
        table.add_row(
            name,
            f"{made.bytes / 1e6:.2f}",
            f"{kl.mean():.5f}",
            f"{increase.mean():.5f} ± {error:.5f}",
            f"{increase.mean().exp():.5f}",
            f"{agree.mean():.2%}",
        )
    tokens = sum(len(window) for window in windows)
    Console(width=120).print(f"{source.name}: {tokens:,} tokens in {len(windows)} windows", table, sep="\n")


if __name__ == "__main__":
    main()
