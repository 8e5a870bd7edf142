"""Which recipe a device profile begins with: one precision for all linear layers, one for embeddings.

    python benchmarks/quality/default_recipe.py examples/pycode-5m MINILM

A profile's recipe is for models that nobody has seen, so it cannot name matrices. Every pair of precisions is held
against what the solver makes of the same bytes by choosing for each matrix: "above" is how many times as much is lost.
A recipe that another one beats in both size and loss is marked. Sizes are codes and scales.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from calibrated import calibration_of

from slm_export.budget.allocation import Limit, solve
from slm_export.budget.choices import FLOAT16, INT8, Choice, options_for
from slm_export.budget.costs import total
from slm_export.budget.sensitivity import measure
from slm_export.source.load import load_checkpoint
from slm_export.source.provenance import source_sha256
from slm_export.tokenization.tokenizer import SourceTokenizer

BODIES = (Choice(4, 128), Choice(4, 64), Choice(4, 32), INT8)
EMBEDDINGS = (Choice(4, 32), INT8, FLOAT16)


def rows(model: Path) -> list[tuple[str, float, float, float]]:
    """Return of every pair its name, megabytes, expected loss, and that of the solver at the same size."""
    source, tokenizer = load_checkpoint(model), SourceTokenizer.load(model)
    text = calibration_of(source, tokenizer, own_text=False)
    costs = measure(source, source_sha256(model), text, lambda *_: None)
    options = options_for(source)
    takes = {n: {c: float(c.bytes(source.weights[n].shape)) for c in of} for n, of in options.items()}
    found = []
    for body in BODIES:
        for embedding in EMBEDDINGS:
            wanted = {n: body if source.roles[n] == "linear" else embedding for n in options}
            # What a matrix cannot be stored in, it is stored in more: a table of positions in 4 bits.
            chosen = {n: c if c in options[n] else INT8 for n, c in wanted.items()}
            size, loss = total(takes, chosen), total(costs, chosen)
            best = solve(options, costs, [Limit("size", takes, 0.0, size)])
            assert best is not None
            found.append((f"{body}, embedding {embedding}", size / 1e6, loss, total(costs, best)))
    return sorted(found, key=lambda row: row[1])


def main() -> None:
    """Print a row per recipe and model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path)
    for model in parser.parse_args().models:
        print(model.name)
        table = rows(model)
        for name, size, loss, best in table:
            beaten = any(s <= size and other < loss for _, s, other, _ in table)
            print(
                f"  {name:32} {size:7.2f} MB  expected loss {loss:.5f}  above {loss / best:5.2f}"
                f"{'  beaten by another' if beaten else ''}",
                flush=True,
            )


if __name__ == "__main__":
    main()
