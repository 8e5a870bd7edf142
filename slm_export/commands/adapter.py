"""What the commands for adapters do and print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from slm_export.bundles.bundle import read_manifest
from slm_export.bundles.integrity import compare_file
from slm_export.bundles.manifest import AdapterEntry
from slm_export.bundles.scratch import scratch
from slm_export.commands.terminal import print_json, stdout, working
from slm_export.errors import GateError
from slm_export.reports.words import figure, limit, megabytes, printable
from slm_export.results import Check
from slm_export.source.adapters import parse_adapters


def trainer_command(asked: dict[str, Any], as_json: bool) -> None:
    """Build the folder, and say how far the runtime is from torch."""
    from slm_export.learning.on_device.build import FACTS, PROGRAM, Request, build_trainer

    request = Request(**asked | {"bits": int(asked["bits"]), "targets": tuple(asked["targets"])})
    with scratch(), working() as progress:
        out, proof = build_trainer(request, progress)
    if as_json:
        print((out / FACTS).read_text(encoding="utf-8"), end="")
        return
    console = Console(highlight=False)
    size = (out / PROGRAM).stat().st_size / 1e6
    console.print(f"{out / PROGRAM}: {size:.1f} MB, {request.length} tokens a step", markup=False)
    losses = ", ".join(f"{loss:.4f}" for loss in proof.losses)
    console.print(f"{proof.steps} steps in the runtime: loss {losses}")
    console.print(
        f"beside torch's autograd: gradients differ by {proof.gradient_difference:.1g} of their size at most, "
        f"parameters by {proof.parameter_difference:.1g}"
    )


def add_command(
    folder: Path,
    adapters: Sequence[str],
    source: str,
    eval_text: Path | None,
    calibration: Path | None,
    as_json: bool,
) -> None:
    """Add adapters to a bundle, and print what the gate found."""
    asked = parse_adapters(adapters)
    with scratch(), working() as progress:
        from slm_export.adapters.manage import add_adapters

        added, checks = add_adapters(folder, asked, source, (eval_text, calibration), progress)
    if as_json:
        print_json(
            {"adapters": [_entry(each) for each in added], "checks": [_check(each) for each in checks]}
        )
        return
    console = stdout()
    for check in checks:
        value = "" if check.value is None else f" {figure(check.value)} {limit(check)}".rstrip()
        console.print(Text("pass", "green"), Text(printable(f"{check.name}{value}")))
    _print_entries(added, {})


def list_command(folder: Path, as_json: bool) -> None:
    """Print the adapters of a bundle; GateError where a file is not what was written."""
    entries = read_manifest(folder).adapters
    problems = {each.path: str(found) for each in entries if (found := compare_file(folder, each))}
    if as_json:
        print_json({"adapters": [{**_entry(each), "problem": problems.get(each.path)} for each in entries]})
    elif entries:
        _print_entries(entries, problems)
    else:
        stdout().print(Text("no adapters"))
    if problems:
        raise GateError(f"{folder}: {next(iter(problems.values()))}; add the adapter again")


def remove_command(folder: Path, name: str, as_json: bool) -> None:
    """Remove an adapter of a bundle, and print what is left."""
    from slm_export.adapters.manage import remove_adapter

    left = remove_adapter(folder, name)
    if as_json:
        print_json({"removed": name, "adapters": [_entry(each) for each in left]})
    else:
        stdout().print(Text(printable(f"removed {name}; {len(left)} left")))


def _entry(entry: AdapterEntry) -> dict[str, Any]:
    return entry.model_dump(mode="json")


def _check(check: Check) -> dict[str, Any]:
    return {
        "name": check.name,
        "passed": check.passed,
        "detail": check.detail,
        "value": check.value,
        "limit": check.limit,
    }


def _print_entries(entries: Sequence[AdapterEntry], problems: dict[str, str]) -> None:
    table = Table("name", "format", "rank", "size", "layers", "KL mean", "", box=None)
    for each in entries:
        kl = (each.quality or {}).get("kl_mean")
        table.add_row(
            printable(each.name),
            each.format,
            str(each.rank),
            megabytes(each.bytes),
            printable(", ".join(each.targets)),
            figure(kl) if isinstance(kl, float) else "not measured",
            Text(printable(problems.get(each.path, "")), "red"),
        )
    stdout().print(table)
