"""Bits for every matrix beside the same bits for all: what is predicted, and what held-out text measures.

    python benchmarks/quality/mixed_precision.py examples/pycode-5m [--tokens 8192] [--with group-quantize]...

Costs are measured on modules of the standard library, the allocations on the held-out files (heldout.py), weights in
torch. "predicted" adds costs up; "same text" is the whole
allocation on the text that the costs were measured on, so what adding up gets wrong is the difference of those two.
The standard error is over windows. Sizes are codes and scales.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from calibrated import Decoder, calibration_of, compress

from slm_export.budget.allocation import Limit, solve
from slm_export.budget.choices import INT8, Allocation, Choice, options_for, tables_of
from slm_export.budget.sensitivity import TOKENS, Text, measure
from slm_export.compression.distance import Distance
from slm_export.source.load import load_checkpoint
from slm_export.source.provenance import source_sha256
from slm_export.tokenization.tokenizer import SourceTokenizer

BITS_PER_WEIGHT = (4.75, 5.0, 5.25, 5.5, 6.0, 7.0)


def main() -> None:
    """Print a row per allocation and pass."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument(
        "--bits", type=float, action="append", help="Of a value on average. [default: several]"
    )
    parser.add_argument(
        "--with", dest="passes", action="append", help="Passes that quantize. [default: group-quantize]"
    )
    arguments = parser.parse_args()
    source = load_checkpoint(arguments.model)
    tokenizer = SourceTokenizer.load(arguments.model)
    text = calibration_of(source, tokenizer, own_text=False)
    costs = measure(source, source_sha256(arguments.model), text, lambda *_: None)
    options = options_for(source)
    takes = {
        name: {c: float(c.bytes(source.weights[name].shape)) for c in of} for name, of in options.items()
    }
    values = sum(source.weights[name].count for name in options)

    def all_in(body: Choice, embedding: Choice) -> Allocation:
        return {name: body if source.roles[name] == "linear" else embedding for name in options}

    rows = (
        {}
        if arguments.bits
        else {
            "int4/32, embedding too": all_in(Choice(4, 32), Choice(4, 32)),
            "int4/128, embedding int8": all_in(Choice(4, 128), INT8),
            "int4/32, embedding int8": all_in(Choice(4, 32), INT8),
            "int8": all_in(INT8, INT8),
        }
    )
    for bits in arguments.bits or BITS_PER_WEIGHT:
        found = solve(options, costs, [Limit("size", takes, 0.0, bits * values / 8)])
        assert found is not None
        rows[f"mixed, {bits:.2f} bits per weight"] = found
    judge = Decoder(source, tokenizer, arguments.tokens)
    read = text.learning[: len(Text.of(source, text.learning).ids)]
    same_text = Distance(source, read, 2 * TOKENS)
    print(f"{source.name}: {judge.what}")
    for label, allocation in rows.items():
        size = sum(takes[name][choice] for name, choice in allocation.items())
        predicted = sum(costs[name][choice] for name, choice in allocation.items())
        whole = same_text.to(compress(source, (("group-quantize", tables_of(allocation)),), text))
        print(
            f"{label:30s} {size / 1e6:.3f} MB  {8 * size / values:.3f} bits  "
            f"predicted {predicted:.5f}  same text {whole:.5f}",
            flush=True,
        )
        for name in arguments.passes or ["group-quantize"]:
            made = compress(source, ((name, tables_of(allocation)),), text)
            print(f"{'':4s}{name:26s} {judge.judge(made)}", flush=True)


if __name__ == "__main__":
    main()
