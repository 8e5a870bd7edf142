"""Fit the constants of `slm-export plan` on measurements, and hold the model against those that the fit has not seen.

    python benchmarks/calibrate.py [--write]

The measurements and their split are calibration.toml; the constants go to slm_export/data/roofline.json. For each
runtime, on devices and on the host: the share of the bandwidth that each class of operator reaches, and an overhead
per layer, by least squares of the logarithm of predicted over measured; then multiply-adds per cycle, from prefill. A
device with no more measurements than classes takes the host's overhead. On the host the classes have one share in
common: its few measurements cannot tell them apart.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from calibration_rows import (
    HERE,
    Row,
    decode_of,
    machine_of,
    prefill_of,
    shape_of,
    size_of,
    work_for,
)
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from scipy.optimize import least_squares

from slm_export.planning.conversion import line
from slm_export.planning.memory import memory_of
from slm_export.planning.roofline import KINDS, Constants

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OUT = HERE.parent / "slm_export" / "data" / "roofline.json"
_OVERHEAD = (0.0, 2e-3)  # seconds per layer
_MOST_SHARE = {False: 1.0, True: 1.25}
"""No device moves more than its interface does; the host's bandwidth is measured, and kernels can better it."""


def main() -> None:
    """Fit, print what is predicted beside what was measured, and write the constants."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="put the constants in their place")
    arguments = parser.parse_args()
    data = tomllib.loads((HERE / "calibration.toml").read_text(encoding="utf-8"))
    constants = fit(data)
    conversion = fit_conversion(data)
    console = Console(width=150)
    print_speed(console, data, constants)
    print_load(console, data, constants["host"])
    print_sizes(console, data)
    print_memory(console, data)
    print_conversion(console, data, conversion)
    if arguments.write:
        OUT.write_text(json.dumps(document(constants, conversion), indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {OUT.relative_to(HERE.parent)}")


def fit(data: Mapping[str, Any]) -> dict[str, dict[str, Constants]]:
    """Return "device" or "host" -> runtime -> constants, fitted on the rows that may be fitted on."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in data["speed"]:
        if row["split"] == "fit":
            groups.setdefault((data["devices"][row["device"]]["where"], row["runtime"]), []).append(row)
    found: dict[str, dict[str, Constants]] = {"device": {}, "host": {}}
    # The host first: its overhead stands in where a device's rows cannot tell one.
    for (where, runtime), rows in sorted(groups.items(), reverse=True):
        own = found["host"].get(runtime)
        decode = _fit_decode(data, rows, own.layer_s if own else 0.0, pooled=where == "host")
        found[where][runtime] = _fit_prefill(data, rows, decode)
    for row in data["load"]:
        if row["split"] == "fit":
            share = row["mb"] * 1e6 / (row["seconds"] * row["gb_s"] * 1e9)
            found["host"][row["runtime"]] = replace(found["host"][row["runtime"]], load_share=share)
    return found


def _fit_decode(data: Mapping[str, Any], rows: Sequence[Row], layer_s: float, *, pooled: bool) -> Constants:
    seen = [kind for kind in KINDS if any(work_for(data, row, 1, 0).bytes[kind] for row in rows)]
    kinds = ["all"] if pooled else seen
    overhead = len(rows) > len(kinds)

    def constants(values: Sequence[float]) -> Constants:
        shares = dict(zip(kinds, map(math.exp, values), strict=False))
        share = dict.fromkeys(KINDS, shares["all"]) if pooled else shares
        return Constants(share, {}, values[-1] if overhead else layer_s)

    def residuals(values: Sequence[float]) -> list[float]:
        return [math.log((decode_of(data, row, constants(values)) or 1e-9) / row["decode"]) for row in rows]

    start = [math.log(0.5)] * len(kinds) + [1e-4] * overhead
    low = [-6.0] * len(kinds) + [_OVERHEAD[0]] * overhead
    high = [math.log(_MOST_SHARE[pooled])] * len(kinds) + [_OVERHEAD[1]] * overhead
    scale = [1.0] * len(kinds) + [1e-4] * overhead
    return constants(list(least_squares(residuals, start, bounds=(low, high), x_scale=scale).x))


def _fit_prefill(data: Mapping[str, Any], rows: Sequence[Row], constants: Constants) -> Constants:
    """Return the constants with the multiply-adds per cycle that prefill shows, by the class of the linear layers."""
    rates: dict[str, list[float]] = {}
    for row in rows:
        machine = machine_of(data, row)
        if "prefill" not in row or machine.cycles_per_s is None:
            continue
        kind = "float" if row["bits"][0] >= 16 else f"int{row['bits'][0]}"
        work = work_for(data, row, row["prompt"], 0)
        spent = row["prompt"] / row["prefill"] - constants.layer_s * work.layers
        rates.setdefault(kind, []).append(sum(work.multiply_adds.values()) / spent / machine.cycles_per_s)
    per_cycle = {kind: math.exp(float(np.mean(np.log(values)))) for kind, values in rates.items()}
    # Both integer classes run the same instruction: what one shows holds for the other where that has no row.
    for kind, other in (("int4", "int8"), ("int8", "int4")):
        if kind not in per_cycle and other in per_cycle:
            per_cycle[kind] = per_cycle[other]
    return replace(constants, per_cycle=per_cycle)


def fit_conversion(data: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return format -> the line of time and of memory; where a format has one row, the slopes of the first format."""
    found: dict[str, dict[str, float]] = {}
    for format in dict.fromkeys(row["format"] for row in data["conversion"]):
        rows = [r for r in data["conversion"] if r["format"] == format and r["split"] == "fit"]
        shapes = [shape_of(data, row) for row in rows]
        if len(rows) > 2:
            times = _line([[1, s.source_bytes] for s in shapes], [r["seconds"] for r in rows])
            peaks = _line(
                [[1, s.largest_table, s.source_bytes] for s in shapes], [r["mib"] * 2**20 for r in rows]
            )
        else:
            (row,), (shape,), (first, *_) = rows, shapes, found.values()
            slope = (row["seconds"] - first["seconds"]) / shape.source_bytes
            share = row["mib"] * 2**20 - first["bytes"]
            times, peaks = [first["seconds"], slope], [first["bytes"], share / shape.largest_table, 0.0]
        names = ("seconds", "seconds_per_byte", "bytes", "bytes_per_table_value", "share")
        found[format] = dict(zip(names, (*times, *peaks), strict=True))
    return found


def _line(columns: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Return least squares of the relative error, no coefficient below zero."""
    from scipy.optimize import nnls

    matrix, target = np.array(columns, float), np.array(values, float)
    scale = matrix.max(axis=0)
    solved, _ = nnls(matrix / scale / target[:, None], np.ones(len(target)))
    return [float(value) for value in solved / scale]


def document(constants: Mapping[str, Mapping[str, Constants]], conversion: Any) -> dict[str, Any]:
    """Return the constants as they are shipped, four digits of each."""

    def plain(of: Constants) -> dict[str, Any]:
        return {
            "share": {kind: _short(value) for kind, value in of.share.items()},
            "per_cycle": {kind: _short(value) for kind, value in of.per_cycle.items()},
            "layer_s": _short(of.layer_s),
            "load_share": None if of.load_share is None else _short(of.load_share),
        }

    return {
        "about": "written by benchmarks/calibrate.py --write; the measurements are benchmarks/calibration.toml",
        **{where: {name: plain(of) for name, of in formats.items()} for where, formats in constants.items()},
        "conversion": {
            name: {key: _short(value) for key, value in of.items()} for name, of in conversion.items()
        },
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def print_speed(
    console: Console, data: Mapping[str, Any], constants: Mapping[str, Mapping[str, Constants]]
) -> None:
    """Print every row, and the share of rows within a fifth of what was published."""
    heads = ("split", "runtime", "device", "model", "bits", "decode", "predicted", "off")
    table = Table(*heads, "prefill", "predicted", "off", box=MARKDOWN)
    within: dict[tuple[str, str], list[bool]] = {}
    for row in data["speed"]:
        where = data["devices"][row["device"]]["where"]
        of = constants[where].get(row["runtime"], Constants({}, {}, 0.0))
        decode, prefill = decode_of(data, row, of), prefill_of(data, row, of)
        off = None if decode is None else decode / row["decode"] - 1
        for group in (row["runtime"], "all"):
            within.setdefault((row["split"], f"{group}, {where}"), []).append(
                off is not None and abs(off) <= 0.2
            )
        bits = "/".join(map(str, row["bits"])) + (f" g{row['group']}" if "group" in row else "")
        table.add_row(
            row["split"], row["runtime"], row["device"], row["model"], bits,
            *_beside(row["decode"], decode), *_beside(row.get("prefill"), prefill),
        )  # fmt: skip
    console.print(table)
    for (split, group), good in sorted(within.items()):
        console.print(f"{split}, {group}: decode within 20% in {sum(good)} of {len(good)} rows")


def _beside(measured: float | None, predicted: float | None) -> tuple[str, str, str]:
    if measured is None:
        return "", "", ""
    if predicted is None:
        return f"{measured:g}", "-", "-"
    return f"{measured:g}", f"{predicted:.1f}", f"{predicted / measured - 1:+.0%}"


def print_load(console: Console, data: Mapping[str, Any], constants: Mapping[str, Constants]) -> None:
    """Print predicted and measured time of opening a file."""
    table = Table("split", "opened in", "s", "predicted", "off", "source", box=MARKDOWN)
    for row in data["load"]:
        share = constants[row["runtime"]].load_share
        took = None if share is None else row["mb"] * 1e6 / (share * row["gb_s"] * 1e9)
        table.add_row(row["split"], row["runtime"], *_beside(row["seconds"], took), row["source"])
    console.print(table)


def print_sizes(console: Console, data: Mapping[str, Any]) -> None:
    """Print predicted and real bytes of files."""
    table = Table("file", "bits", "MB", "predicted", "off", box=MARKDOWN)
    for row in data["size"]:
        predicted = size_of(data, row)
        bits = "/".join(map(str, row["bits"]))
        off = f"{predicted / row['bytes'] - 1:+.2%}"
        table.add_row(
            f"{row['model']} {row['runtime']}",
            bits,
            f"{row['bytes'] / 1e6:,.1f}",
            f"{predicted / 1e6:,.1f}",
            off,
        )
    console.print(table)


def print_memory(console: Console, data: Mapping[str, Any]) -> None:
    """Print predicted and measured memory of processes."""
    table = Table("split", "process", "MiB", "predicted", "off", "source", box=MARKDOWN)
    for row in data["memory"]:
        memory = memory_of(shape_of(data, row), size_of(data, row), row["tokens"], row["runtime"])
        mib = memory.total / 2**20
        name = f"{row['model']} {row['runtime']}"
        figures = (f"{row['mib']:,}", f"{mib:,.0f}", f"{mib / row['mib'] - 1:+.0%}")
        table.add_row(row["split"], name, *figures, row["source"])
    console.print(table)


def print_conversion(console: Console, data: Mapping[str, Any], lines: Mapping[str, Any]) -> None:
    """Print predicted and measured time and memory of conversions."""
    table = Table("split", "conversion", "s", "predicted", "off", "MiB", "predicted", "off", box=MARKDOWN)
    for row in data["conversion"]:
        cost = line(lines[row["format"]], shape_of(data, row))
        name = f"{row['model']} {row['format']}"
        times = _beside(row["seconds"], cost.seconds)
        table.add_row(row["split"], name, *times, *_beside(row["mib"], cost.peak_bytes / 2**20))
    console.print(table)


if __name__ == "__main__":
    main()
