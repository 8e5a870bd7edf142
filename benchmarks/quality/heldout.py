"""Text for measurements of quality: what the example model has not seen, and what it has.

    python benchmarks/quality/heldout.py examples/pycode-5m --heldout FILE --calibration FILE

A model's ``heldout.tsv`` names files of installed packages that were kept out of its training. They are written one
after the other, a form feed between them, as `--eval-text` takes them; a file that is not the one of the list is named
and left out. Calibration text is another: modules of Python's standard library.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

CALIBRATION = (
    "argparse",
    "asyncio/base_events",
    "collections/__init__",
    "dataclasses",
    "difflib",
    "email/message",
)
CALIBRATION += (
    "fractions",
    "http/client",
    "inspect",
    "logging/__init__",
    "pathlib",
    "pdb",
    "shutil",
    "statistics",
)
CALIBRATION += (
    "subprocess",
    "tarfile",
    "tempfile",
    "threading",
    "typing",
    "unittest/case",
    "urllib/request",
    "zipfile",
)


def heldout_documents(model: Path) -> tuple[str, ...]:
    """Return the held-out files of a model, in the order of its list; those not installed are named on stderr."""
    documents = []
    with (model / "heldout.tsv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            text = _read(row["distribution"], row["path"])
            if text is None or hashlib.sha256(text.encode()).hexdigest() != row["sha256"]:
                why = "not installed" if text is None else "another text than the list's"
                print(f"{row['distribution']} {row['version']}: {row['path']}: {why}", file=sys.stderr)
            else:
                documents.append(text)
    return tuple(documents)


def calibration_documents() -> tuple[str, ...]:
    """Return modules of the standard library of this Python."""
    library = Path(sysconfig.get_path("stdlib"))
    return tuple((library / f"{name}.py").read_text("utf-8") for name in CALIBRATION)


def _read(name: str, path: str) -> str | None:
    try:
        file = Path(str(distribution(name).locate_file(path)))
    except PackageNotFoundError:
        return None
    return file.read_text("utf-8") if file.is_file() else None


def main() -> None:
    """Write both texts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    arguments = parser.parse_args()
    for path, documents in (
        (arguments.heldout, heldout_documents(arguments.model)),
        (arguments.calibration, calibration_documents()),
    ):
        path.write_text("\n\f\n".join(documents), encoding="utf-8")
        print(f"{path}: {len(documents)} files, {sum(map(len, documents)):,} characters")


if __name__ == "__main__":
    main()
