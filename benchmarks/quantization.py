"""What each width costs, in codes or in tables, and what searching for scales is worth: all in torch.

    python benchmarks/quantization.py MODEL [--only TEXT] [--eval-text FILE] [--tokens 8192]

Weights only, no artifact is written: it compares schemes of quantization, min-max beside scale search, in one run. A
decoder by KL divergence and perplexity on the same tokens, the standard error over windows; an encoder of embeddings by
their cosine to the source's, over varied sentences.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from slm_export.checkpoint import Checkpoint, Pass
from slm_export.evaltext import load_documents, load_sentences, token_windows
from slm_export.graph.model import build_reference
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.optimizers.palettize import Palettize
from slm_export.source.load import load_checkpoint
from slm_export.source.tasks import EMBEDDING
from slm_export.tokenization.tokenizer import SourceTokenizer

WINDOW = 256
SCHEMES: dict[str, Pass] = {
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
    "tables of 6 bits, 16 rows, embedding int8": Palettize(bits=6),
    "tables of 6 bits, whole matrix, embedding int8": Palettize(bits=6, group_channels=0),
    "tables of 6 bits, 16 rows, embedding too": Palettize(bits=6, embedding_bits=6),
    "tables of 4 bits, 16 rows, embedding int8": Palettize(bits=4),
    "tables of 4 bits, a row, embedding int8": Palettize(bits=4, group_channels=1),
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


def decoders(
    source: Checkpoint, schemes: Sequence[str], eval_text: Path | None, tokens: int
) -> tuple[str, Table]:
    """Return what was read, and a row per scheme."""
    tokenizer = SourceTokenizer.load(source.folder)
    bos = tokenizer.bos_id if tokenizer.adds_bos else None
    windows = token_windows(load_documents(eval_text), tokenizer.encode, WINDOW, bos, tokens)
    expected = read(source, windows)
    table = Table("scheme", "MB", "KL mean", "ln ratio", "perplexity ratio", "top-1")
    for name in schemes:
        made = SCHEMES[name].run(source).checkpoint
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
    return f"{sum(map(len, windows)):,} tokens in {len(windows)} windows", table


def encoders(source: Checkpoint, schemes: Sequence[str]) -> tuple[str, Table]:
    """Return what was read, and a row per scheme."""
    tokenizer = SourceTokenizer.load(source.folder)
    texts = [torch.tensor([tokenizer.encode_with_template(text)]) for text in load_sentences()]
    texts = [ids[:, : source.positions] for ids in texts]

    def embedded(checkpoint: Checkpoint) -> Tensor:
        model = build_reference(checkpoint)
        with torch.no_grad():
            return torch.cat([model(ids, torch.ones_like(ids)) for ids in texts])

    expected = embedded(source)
    table = Table("scheme", "MB", "cosine mean", "cosine min")
    for name in schemes:
        made = SCHEMES[name].run(source).checkpoint
        cosines = F.cosine_similarity(expected, embedded(made))
        table.add_row(name, f"{made.bytes / 1e6:.2f}", f"{cosines.mean():.5f}", f"{cosines.min():.5f}")
    return f"{len(texts)} sentences", table


def main() -> None:
    """Print a row per scheme."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--eval-text", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--only", default="", help="schemes whose names hold this")
    arguments = parser.parse_args()
    source = load_checkpoint(arguments.model)
    schemes = [name for name in SCHEMES if arguments.only in name]
    if source.task == EMBEDDING:
        what, table = encoders(source, schemes)
    else:
        what, table = decoders(source, schemes, arguments.eval_text, arguments.tokens)
    Console(width=120).print(f"{source.name}: {what}", table, sep="\n")


if __name__ == "__main__":
    main()
