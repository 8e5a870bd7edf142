"""Give every reader files that are made to break it, and count what becomes of them.

    python benchmarks/fuzz.py                               # 100,000 inputs and more: some hours on two cores
    python benchmarks/fuzz.py --reader safetensors --reader plan --inputs 2000
    python benchmarks/fuzz.py --minutes 30 --json rows.json # what fits into half an hour

An input is accepted or refused with a message. Anything else is a defect: another exception, a crash, more than 10 s
of processor time or 400 MiB of memory, a file outside of the folder opened, a connection, a process, code of the input
that is executed.
An input is known by its number: `--seed S --first N --inputs 1` gives it again, `--keep FOLDER` writes its files.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import shutil
import sys
import time
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

HOSTILE = Path(__file__).resolve().parent.parent / "tests" / "hostile"
sys.path.insert(0, str(HOSTILE))

from batch import outcomes  # noqa: E402
from good_files import make_good  # noqa: E402
from mutations import spoil  # noqa: E402
from readers import READERS  # noqa: E402

CHEAP, DEAR, VENDOR = 8000, 1000, 300
"""Inputs of a reader that takes milliseconds, of another, and of one that opens a runtime."""
GOOD = HOSTILE / "good"


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--reader", action="append", choices=READERS)
    asked.add_argument("--inputs", type=int, help=f"of each reader [default: {CHEAP}, {DEAR} or {VENDOR}]")
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--first", type=int, default=0, help="number of the first input")
    asked.add_argument("--minutes", type=float, help="stop after so long")
    asked.add_argument("--json", type=Path, help="write counts and defects here")
    asked.add_argument("--keep", type=Path, help="write the files of failing inputs here")
    asked.add_argument("--good", type=Path, default=GOOD, help="the good files")
    asked.add_argument("--make-good", action="store_true", help="make the good files anew, and stop")
    options = asked.parse_args()
    if options.make_good:
        shutil.rmtree(options.good, ignore_errors=True)
        options.good.mkdir(parents=True)
        make_good(options.good)
        return 0
    until = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    rows = []
    print(f"{'reader':16}{'inputs':>8}{'accepted':>10}{'refused':>9}{'defects':>9}{'ms':>8}", flush=True)
    for name in options.reader or READERS:
        row = _campaign(name, options, until)
        rows.append(row)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
    total = {key: sum(row[key] for row in rows) for key in ("inputs", "defects")}
    print(f"{total['inputs']} inputs, {total['defects']} defects")
    return 1 if total["defects"] else 0


def _campaign(name: str, options: argparse.Namespace, until: float | None) -> dict[str, Any]:
    reader = READERS[name]
    count = options.inputs or (VENDOR if reader.vendor else CHEAP if reader.cheap else DEAR)
    numbers = [f"{options.seed}:{number}" for number in range(options.first, options.first + count)]
    found: collections.Counter[str] = collections.Counter()
    kinds: dict[str, list[str]] = {}
    seconds = 0.0
    for one in outcomes(name, options.good, numbers, until):
        found[one["outcome"]] += 1
        seconds += one.get("seconds", 0.0)
        if one["outcome"] == "defect":
            kind = _kind(one["what"])
            if kind not in kinds:
                print(f"  {one['input']}: {one['what'][:200]}", flush=True)
            kinds.setdefault(kind, []).append(one["input"])
            if options.keep and len(kinds[kind]) == 1:
                _write(name, one["input"], options.good, options.keep)
    inputs = sum(found.values())
    each = 1000 * seconds / max(1, inputs)
    print(
        f"{name:16}{inputs:8}{found['accepted']:10}{found['refused']:9}{found['defect']:9}{each:8.1f}",
        flush=True,
    )
    counts = {"accepted": found["accepted"], "refused": found["refused"], "defects": found["defect"]}
    return {"reader": name, "inputs": inputs, **counts, "milliseconds": round(each, 2), "kinds": kinds}


def _kind(what: str) -> str:
    """Return a defect without the figures of one input: the error and the line that it came from."""
    found = re.fullmatch(r"(\w+): .*(\(.*\))", what, re.DOTALL)
    return f"{found[1]} {found[2]}" if found else re.sub(r"/tmp/\S*/|\d+", "", what)


def _write(name: str, number: str, good: Path, keep: Path) -> None:
    """Write the files of an input that are not the good ones."""
    reader = READERS[name]
    place = keep / name / number.replace(":", "-")
    with TemporaryDirectory() as work:
        folder = Path(work) / reader.good
        shutil.copytree(good / reader.good, folder)
        spoil(folder, reader.files, Random(f"{name}:{number}"))
        for file in reader.files:
            made = folder / file
            changed = (
                made.is_symlink()
                or not made.is_file()
                or made.read_bytes() != (good / reader.good / file).read_bytes()
            )
            if changed and (made.is_symlink() or made.is_file()):
                (place / file).parent.mkdir(parents=True, exist_ok=True)
                (place / file).unlink(missing_ok=True)
                shutil.copy(made, place / file, follow_symlinks=False)


if __name__ == "__main__":
    sys.exit(main())
