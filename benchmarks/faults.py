"""Plant every fault in every format, and print what the default gate says.

    python benchmarks/faults.py                         # everything: hours on two cores
    python benchmarks/faults.py --format onnx           # one format
    python benchmarks/faults.py --kind attention

A row names the checks that failed; "missed" where none did. Ends with exit code 1 where something was missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "faults")]

from every_fault import FAULTS  # noqa: E402
from fault import FORMATS  # noqa: E402
from workshop import Workshop  # noqa: E402


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--format", action="append", choices=FORMATS)
    asked.add_argument("--kind", action="append")
    asked.add_argument("--name", action="append", help="only faults whose name holds this")
    asked.add_argument("--model", action="append")
    asked.add_argument("--json", type=Path, help="write the rows here too")
    asked.add_argument("--markdown", type=Path, help="write a table of them here")
    options = asked.parse_args()
    rows = []
    with TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        for fault in FAULTS:
            if options.kind and fault.kind not in options.kind:
                continue
            if options.name and not any(part in fault.name for part in options.name):
                continue
            if options.model and fault.model not in options.model:
                continue
            for format in fault.formats:
                if options.format and format not in options.format:
                    continue
                began = time.monotonic()
                caught = workshop.gate(fault, format)
                row = {"kind": fault.kind, "fault": fault.name, "model": fault.model, "format": format}
                row |= {"caught": caught.by, "said": caught.refused or _said(caught)}
                rows.append(row)
                print(
                    f"{fault.kind:18} {fault.name:52} {format:11} {caught.by or 'MISSED':60} "
                    f"{time.monotonic() - began:5.0f} s",
                    flush=True,
                )
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1))
    if options.markdown:
        options.markdown.write_text(_table(rows), encoding="utf-8")
    missed = [row for row in rows if not row["caught"]]
    print(f"{len(rows)} artifacts with a fault, {len(missed)} missed")
    return 1 if missed else 0


def _table(rows: list[dict[str, str]]) -> str:
    """Return a line for each fault, a column for each format with the first check that failed."""
    formats = [name for name in FORMATS if any(row["format"] == name for row in rows)]
    lines = [["kind", "fault", "model", *formats], ["---"] * (3 + len(formats))]
    for fault in dict.fromkeys((row["kind"], row["fault"], row["model"]) for row in rows):
        by = {row["format"]: row for row in rows if (row["kind"], row["fault"], row["model"]) == fault}
        lines.append([*fault, *(_first(by.get(name)) for name in formats)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _first(row: dict[str, str] | None) -> str:
    if row is None:
        return ""
    return f"`{row['caught'].split(', ')[0]}`" if row["caught"] else "**missed**"


def _said(caught: object) -> str:
    failed = getattr(caught, "failed", ())
    return failed[0].detail if failed else ""


if __name__ == "__main__":
    sys.exit(main())
