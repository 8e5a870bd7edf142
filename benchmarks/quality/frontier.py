"""Size against quality of the example model: what the solver makes of it, beside one recipe for all and llama.cpp.

    python benchmarks/quality/frontier.py examples/pycode-5m --rows docs/frontier.tsv [--tokens 76800] [--with PASS]...
    python benchmarks/quality/frontier.py --rows docs/frontier.tsv --plot docs/frontier.svg

The first measures the solver's allocations on the held-out files (heldout.py), weights in torch, and adds a row to the
file for each; the second draws the file. Costs and calibration are of modules of the standard library. The file has
rows of beside_llama_cpp.py and calibrated.py too, as those print them: means over windows with their standard error.
Sizes are codes and scales, and of artifacts (ONNX, GGUF) the whole file; "predicted" is the KL divergence that the
solver expects on its own text.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from calibrated import Decoder, calibration_of, compress

from slm_export.budget.allocation import Limit, solve
from slm_export.budget.choices import options_for, tables_of
from slm_export.budget.costs import total
from slm_export.budget.sensitivity import measure
from slm_export.source.load import load_checkpoint
from slm_export.source.provenance import source_sha256
from slm_export.tokenization.tokenizer import SourceTokenizer

BITS = (4.6, 4.75, 5.0, 5.25, 5.5, 6.0)
"""Per value, of the solver's points."""
COLUMNS = ("kind", "label", "bytes", "windows", "kl", "kl_error", "ln_ratio", "ln_ratio_error", "predicted")
Row = dict[str, str]


def solved(model: Path, passes: Sequence[str], tokens: int) -> Iterator[Row]:
    """Yield the solver's points, each in codes and scales of some passes."""
    source, tokenizer = load_checkpoint(model), SourceTokenizer.load(model)
    judge, text = Decoder(source, tokenizer, tokens), calibration_of(source, tokenizer, own_text=False)
    costs = measure(source, source_sha256(model), text, lambda *_: None)
    options = options_for(source)
    takes = {n: {c: float(c.bytes(source.weights[n].shape)) for c in of} for n, of in options.items()}
    values = sum(source.weights[name].count for name in options)
    for bits in BITS:
        found = solve(options, costs, [Limit("size", takes, 0.0, bits * values / 8)])
        assert found is not None
        for name in passes:
            kl, increase, _ = judge.measure(compress(source, ((name, tables_of(found)),), text))
            figures = [x for f in (kl, increase) for x in (f.mean().item(), f.std().item() / len(f) ** 0.5)]
            size = str(round(total(takes, found)))
            told = [f"{figure:.5f}" for figure in (*figures, total(costs, found))]
            row = (f"solver, {name}", f"{bits:g} bits", size, str(len(kl)), *told)
            yield dict(zip(COLUMNS, row, strict=True))


def read(path: Path) -> list[Row]:
    """Return the rows of a file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def write(rows: Sequence[Row], path: Path) -> None:
    """Write the file anew."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw KL divergence and perplexity ratio against size."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "slm-export"})
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4))
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of_kind = sorted((row for row in rows if row["kind"] == kind), key=lambda row: int(row["bytes"]))
        sizes = [int(row["bytes"]) / 1e6 for row in of_kind]
        line = "o-" if kind.startswith("solver") else "D"
        for axis, name in zip(axes, ("kl", "ln_ratio"), strict=True):
            means = [float(row[name]) for row in of_kind]
            errors = [float(row[f"{name}_error"]) for row in of_kind]
            axis.errorbar(sizes, means, yerr=errors, fmt=line, label=kind, markersize=5, linewidth=1)
            for row, size, mean in zip(of_kind, sizes, means, strict=True):
                if not kind.startswith("solver"):
                    axis.annotate(row["label"], (size, mean), (4, 4), textcoords="offset points", fontsize=7)
    told = sorted((int(row["bytes"]) / 1e6, float(row["predicted"])) for row in rows if row["predicted"])
    axes[0].plot(
        *zip(*dict(told).items(), strict=True), "k--", linewidth=1, label="predicted for group-quantize"
    )
    axes[0].set(xlabel="MB", ylabel="KL divergence, nats per token", yscale="log")
    axes[1].set(xlabel="MB", ylabel="ln of the perplexity ratio", ylim=(0, None))
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure, or draw what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=76_800)
    parser.add_argument("--with", dest="passes", action="append", help="[default: group-quantize]")
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    if asked.model:
        for row in solved(asked.model, asked.passes or ["group-quantize"], asked.tokens):
            print("\t".join(row.values()), flush=True)
            write([*read(asked.rows), row], asked.rows)
    if asked.plot:
        plot(read(asked.rows), asked.plot)


if __name__ == "__main__":
    main()
