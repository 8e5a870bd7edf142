"""Size against quality of the example model: what the solver makes of it, beside one recipe for all and llama.cpp.

    python benchmarks/quality/frontier.py examples/pycode-5m --plot docs/frontier.svg [--tokens 16384]

Every point is read on the held-out files (heldout.py), in torch, and llama.cpp's in its own kernels where
llama-cpp-python and gguf are installed. Costs and calibration are of modules of the standard library. Sizes are those
of a whole file: ONNX as the solver counts it, GGUF as it lies on disk. The line is what the solver predicts.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from calibrated import Decoder, calibration_of, compress
from torch import Tensor

from slm_export.budget.allocation import Limit, solve
from slm_export.budget.choices import INT8, Allocation, Choice, tables_of
from slm_export.budget.costs import total
from slm_export.budget.expectation import Expectation
from slm_export.budget.sensitivity import measure
from slm_export.checkpoint import Checkpoint
from slm_export.compression.calibration import Calibration
from slm_export.source.load import load_checkpoint
from slm_export.source.provenance import source_sha256
from slm_export.tokenization.tokenizer import SourceTokenizer

BITS = (4.6, 4.8, 5.15, 5.6, 6.6)
"""Per value, of the solver's points."""
_STYLES = {
    "mixed, gptq": "o-",
    "mixed, search": "s-",
    "int4/32, int8 embedding": "D",
    "llama.cpp": "^",
}


@dataclass(frozen=True)
class Row:
    """A point: KL divergence and increase of the log perplexity with their standard errors."""

    kind: str
    label: str
    bytes: float
    kl: tuple[float, float]
    increase: tuple[float, float]
    predicted: float | None = None

    @staticmethod
    def of(kind: str, label: str, size: float, figures: tuple[Tensor, ...], predicted: float | None) -> Row:
        """Return the point of figures by window."""
        kl, increase = ((f.mean().item(), f.std().item() / len(f) ** 0.5) for f in figures[:2])
        return Row(kind, label, size, kl, increase, predicted)

    def __str__(self) -> str:
        """Return a line of the table."""
        figures = "  ".join(f"{mean:.5f} ± {error:.5f}" for mean, error in (self.kl, self.increase))
        known = "" if self.predicted is None else f"  predicted {self.predicted:.5f}"
        return f"{self.kind:24} {self.label:20} {self.bytes / 1e6:.3f} MB  KL {figures} ln ratio{known}"


def ours(source: Checkpoint, judge: Decoder, text: Calibration) -> Iterator[Row]:
    """Yield the solver's points, and the same bits for all."""
    expected = Expectation.of(source, ("onnx",), None, 0)
    costs = measure(source, source_sha256(source.folder), text, lambda *_: None)
    takes = {
        n: {c: float(c.bytes(source.weights[n].shape)) for c in of} for n, of in expected.options.items()
    }
    values = sum(source.weights[name].count for name in takes)

    def row(kind: str, label: str, name: str, allocation: Allocation) -> Row:
        options = {**tables_of(allocation), **({"search": False} if label == "min-max" else {})}
        made = compress(source, ((name, options),), text)
        size = expected.size("onnx", allocation)
        return Row.of(kind, label, size, judge.measure(made), total(costs, allocation))

    plain = {name: Choice(4, 32) if source.roles[name] == "linear" else INT8 for name in takes}
    for label, name in (("min-max", "group-quantize"), ("search", "group-quantize"), ("gptq", "gptq")):
        yield row("int4/32, int8 embedding", label, name, plain)
    for bits in BITS:
        found = solve(expected.options, costs, [Limit("size", takes, 0.0, bits * values / 8)])
        assert found is not None
        for label, name in (("search", "group-quantize"), ("gptq", "gptq")):
            yield row(f"mixed, {label}", f"{bits:g} bits", name, found)


def llama_cpp(source: Checkpoint, judge: Decoder, text: Calibration) -> Iterator[Row]:
    """Yield llama.cpp's files."""
    from beside_llama_cpp import measure as read_all
    from beside_llama_cpp import readers

    with tempfile.TemporaryDirectory() as folder:
        for name, size, read in readers(source, text.windows, Path(folder)):
            figures = read_all(read, judge.expected, judge.windows)
            yield Row.of("llama.cpp", name.removeprefix("llama.cpp "), size, figures, None)


def plot(rows: list[Row], path: Path) -> None:
    """Draw KL divergence and perplexity ratio against size."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.fonttype"] = "none"
    mpl.rcParams["svg.hashsalt"] = "slm-export"
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2))
    shown = [row for row in rows if row.kl[0] < 0.05 and row.bytes < 6e6]
    for kind, style in _STYLES.items():
        of_kind = [row for row in shown if row.kind == kind]
        sizes = [row.bytes / 1e6 for row in of_kind]
        for axis, pick in zip(axes, ("kl", "increase"), strict=True):
            means, errors = (
                zip(*(getattr(row, pick) for row in of_kind), strict=True) if of_kind else ((), ())
            )
            axis.errorbar(sizes, means, yerr=errors, fmt=style, label=kind, markersize=5, linewidth=1)
            for row, size, mean in zip(of_kind, sizes, means, strict=True):
                if not kind.startswith("mixed") and mean > 0:
                    axis.annotate(row.label, (size, mean), (4, 4), textcoords="offset points", fontsize=7)
    predicted = [row for row in shown if row.kind == "mixed, search" and row.predicted]
    axes[0].plot(
        [row.bytes / 1e6 for row in predicted],
        [row.predicted for row in predicted],
        "k--",
        linewidth=1,
        label="predicted for search, on its own text",
    )
    axes[0].set(xlabel="file, MB", ylabel="KL divergence, nats per token", yscale="log")
    axes[1].set(xlabel="file, MB", ylabel="ln of the perplexity ratio", ylim=(0, None))
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Print a row per point, and draw them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    source, tokenizer = load_checkpoint(asked.model), SourceTokenizer.load(asked.model)
    judge, text = Decoder(source, tokenizer, asked.tokens), calibration_of(source, tokenizer, own_text=False)
    print(f"{source.name}: {judge.what}")
    rows = []
    sources = [ours, *([llama_cpp] if find_spec("llama_cpp") else [])]
    for each in sources:
        for row in each(source, judge, text):
            print(row, flush=True)
            rows.append(row)
    if asked.plot:
        plot(rows, asked.plot)


if __name__ == "__main__":
    main()
