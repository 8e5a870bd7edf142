"""Draw what structure.py printed: how much log perplexity each choice costs, before and after recovery.

    python benchmarks/quality/structure.py examples/pycode-5m --recover 80 | tee rows.txt
    python benchmarks/quality/structure_plot.py rows.txt docs/structure.svg

The share in brackets is of the parameters of the layers.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path

_ROW = re.compile(
    r"(?P<name>.+?) +body -(?P<gone>[\d. ]+)% .*ln ratio (?P<mean>-?[\d.]+) ± (?P<error>[\d.]+)  top-1"
)
Bar = tuple[str, float, float]
"""What it is, mean and standard error."""


def read(lines: Iterable[str]) -> tuple[list[Bar], list[Bar]]:
    """Return the rows, and what recovery made of each that it was tried on, under the name of the row."""
    before: list[Bar] = []
    after: list[Bar] = []
    for line in lines:
        found = _ROW.match(line)
        if found is None:
            continue
        name = f"{found['name']} (-{found['gone'].strip()}%)"
        recovered = found["name"].strip() == "recovered"
        bar = (before[-1][0] if recovered else name, float(found["mean"]), float(found["error"]))
        (after if recovered else before).append(bar)
    return before, after


def draw(before: list[Bar], after: list[Bar], path: Path) -> None:
    """Write the plot."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "structure", "svg.fonttype": "none", "font.size": 9})
    import matplotlib.pyplot as plt

    names = [name for name, _, _ in before]
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(names) + 1))
    for bars, shift, color, label in (
        (before, -0.19, "#888888", "pruned"),
        (after, 0.19, "#1f77b4", "recovered"),
    ):
        places = [names.index(name) + shift for name, _, _ in bars]
        axes.barh(
            places, [m for _, m, _ in bars], 0.36, xerr=[e for _, _, e in bars], color=color, label=label
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("increase of log perplexity on held-out files, with standard error")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Read, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument("plot", type=Path)
    asked = parser.parse_args()
    before, after = read(asked.rows.read_text(encoding="utf-8").splitlines())
    draw(before, after, asked.plot)


if __name__ == "__main__":
    main()
