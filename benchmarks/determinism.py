"""Export a model again under other circumstances, and compare what comes out byte for byte.

    python benchmarks/determinism.py                                # examples/pycode-5m, in onnx and executorch
    python benchmarks/determinism.py MODEL --format litert --bits 8

Every export is a process of its own. The first has its folder, PYTHONHASHSEED=0 and one thread; the others differ
in what their column says. A cache is warm where an export was killed after its passes and the next one found their
weights.

What an export says of itself differs in times and memory; TIMED names those keys, and nothing else is left out. The
page is made from report.json, and its bytes are not compared. Ends with exit code 1 where something else differs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from slm_export.bundles.finished import CACHE_VARIABLE

PYCODE = Path(__file__).resolve().parent.parent / "examples" / "pycode-5m"
TARGETS = {"coreml": "ios"}
TIMED = {
    "report.json": ("seconds", "stages", "peak_rss_mb", "passes[].seconds"),
    "manifest.json": ("files of report.json, report.html and sbom.cdx.json",),
    "sbom.cdx.json": ("its serial number", "hashes and sizes of report.json and report.html"),
}
_DOCUMENTS = frozenset({"report.json", "report.html", "sbom.cdx.json"})
_NOTE = "weights were finished by an"


@dataclass(frozen=True)
class Circumstances:
    """What may not matter."""

    name: str
    folder: str
    hash_seed: int = 0
    threads: int = 1
    warm: bool = False


FIRST = Circumstances("first", "one")
OTHERS = (
    Circumstances("another folder, hash seed", "a/longer name/two", hash_seed=4711),
    Circumstances("2 threads", "three", threads=2),
    Circumstances("warm cache", "four", warm=True),
)


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("model", nargs="?", type=Path, default=PYCODE)
    asked.add_argument("--format", action="append", help="[default: onnx and executorch]")
    asked.add_argument("--bits", default="4")
    asked.add_argument(
        "--no-verify", action="store_true", help="compare artifacts alone, no figures of fidelity"
    )
    options = asked.parse_args()
    differing = 0
    for format in options.format or ("onnx", "executorch"):
        with TemporaryDirectory(prefix="determinism-") as folder:
            arguments = [
                str(options.model.resolve()),
                "--target",
                TARGETS.get(format, "host"),
                "--format",
                format,
            ]
            arguments += ["--bits", options.bits, "--no-bench", *(["--no-verify"] * options.no_verify)]
            table = compare(arguments, Path(folder))
        print(f"\n{options.model.name}, {format}, {options.bits} bits\n\n{markdown(table)}", flush=True)
        differing += sum(verdict != "same" for row in table.values() for verdict in row.values())
    for name, keys in TIMED.items():
        print(f"left out of {name}: {', '.join(keys)}")
    print(f"{differing} files differ")
    return 1 if differing else 0


def compare(arguments: Sequence[str], folder: Path) -> dict[str, dict[str, str]]:
    """Return file of the bundle -> circumstances -> "same", or where it differs."""
    first = dict(contents(made(arguments, FIRST, folder)))
    table: dict[str, dict[str, str]] = {}
    for circumstances in OTHERS:
        other = dict(contents(made(arguments, circumstances, folder)))
        for name in sorted({*first, *other}):
            verdict = difference(first.get(name), other.get(name))
            table.setdefault(name, {})[circumstances.name] = verdict
    return table


def made(arguments: Sequence[str], circumstances: Circumstances, folder: Path) -> Path:
    """Export under these circumstances, and return the bundle."""
    out = folder / circumstances.folder
    out.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONHASHSEED": str(circumstances.hash_seed),
        "OMP_NUM_THREADS": str(circumstances.threads),
        CACHE_VARIABLE: str(folder / f"cache of {circumstances.name}"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "slm_export", *arguments, "--out", str(out)]
    if circumstances.warm:
        kill_after_passes(command, environment, folder / "log")
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the export failed ({circumstances.name}):\n{done.stderr}")
    notes = json.loads((out / "report.json").read_text())["notes"]
    if circumstances.warm and not any(_NOTE in note for note in notes):
        sys.exit("the killed export left no weights, so nothing is known of a warm cache")
    return out


def kill_after_passes(command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
    """Run an export until it writes its artifact, and kill it there."""
    with (
        open(log, "wb") as file,
        subprocess.Popen(command, env=environment, cwd=log.parent, stdout=file, stderr=file) as export,
    ):
        while b"\nwrite " not in log.read_bytes():
            if export.poll() is not None:
                sys.exit(f"the export ended before it could be killed:\n{log.read_text()}")
            time.sleep(0.02)
        export.send_signal(signal.SIGKILL)


def contents(bundle: Path) -> Iterator[tuple[str, Any]]:
    """Yield path and content of every file but the page, without what is timed."""
    for file in sorted(path for path in bundle.rglob("*") if path.is_file()):
        name = file.relative_to(bundle).as_posix()
        if name in TIMED:
            yield name, _untimed(name, json.loads(file.read_text(encoding="utf-8")))
        elif name != "report.html":
            yield name, file.read_bytes()


def _untimed(name: str, document: dict[str, Any]) -> dict[str, Any]:
    if name == "report.json":
        for key in ("seconds", "stages", "peak_rss_mb"):
            del document[key]
        for row in document["passes"]:
            del row["seconds"]
        document["notes"] = [note for note in document["notes"] if _NOTE not in note]
    elif name == "manifest.json":
        document["files"] = [entry for entry in document["files"] if entry["path"] not in _DOCUMENTS]
    else:
        del document["serialNumber"]
        del document["metadata"]["component"]["hashes"]
        document["components"] = [part for part in document["components"] if part["name"] not in _DOCUMENTS]
    return document


def difference(first: Any, other: Any) -> str:
    """Return "same", or where two contents differ."""
    if first == other:
        return "same"
    if isinstance(first, bytes) and isinstance(other, bytes):
        at = next((i for i, (a, b) in enumerate(zip(first, other, strict=False)) if a != b), None)
        return f"differs at byte {min(len(first), len(other)) if at is None else at:,}"
    if isinstance(first, dict) and isinstance(other, dict):
        return "differs in " + ", ".join(_keys(first, other, ""))
    return "only in one"


def _keys(first: Any, other: Any, where: str) -> Iterator[str]:
    if isinstance(first, dict) and isinstance(other, dict):
        for key in dict.fromkeys((*first, *other)):
            yield from _keys(first.get(key), other.get(key), f"{where}.{key}" if where else key)
    elif isinstance(first, list) and isinstance(other, list) and len(first) == len(other):
        for index, (one, two) in enumerate(zip(first, other, strict=True)):
            yield from _keys(one, two, f"{where}[{index}]")
    elif first != other:
        yield f"{where} ({_short(first)}, {_short(other)})"


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:40]


def markdown(table: Mapping[str, Mapping[str, str]]) -> str:
    """Return a line for each file, a column for the circumstances."""
    head = ["file", *next(iter(table.values()))]
    lines = [head, ["---"] * len(head), *([name, *row.values()] for name, row in table.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
