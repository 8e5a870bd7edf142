"""Give the readers that are Python alone what atheris makes of a good file, led by the lines that it reaches.

    python benchmarks/fuzz_coverage.py                                  # a minute for each reader
    python benchmarks/fuzz_coverage.py --reader container --seconds 600

`benchmarks/fuzz.py` spoils files by what they are; libFuzzer knows nothing of that, and finds what nobody thought of.
What counts as a defect is the same. An input that breaks a reader is written to --keep, and ends that reader's turn.
Ends with exit code 1 where one did. Needs `pip install 'slm-export[fuzz]'`: Linux, Python 3.11 or later.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

HOSTILE = Path(__file__).resolve().parent.parent / "tests" / "hostile"
sys.path.insert(0, str(HOSTILE))
GOOD = HOSTILE / "good"
READERS = (
    "container", "executorch", "genai", "index", "litert", "lock", "manifest", "pooling", "profile", "recipe",
    "safetensors", "settings",
)  # fmt: skip
"""Those of tests/hostile/readers.py that take milliseconds and whose work is done in Python."""
_LONGEST = 1 << 16
_DEFECT = 77
"""What libFuzzer ends with."""


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--reader", action="append", choices=READERS)
    asked.add_argument("--seconds", type=int, default=60, help="for each reader")
    asked.add_argument("--seed", type=int, default=1)
    asked.add_argument("--keep", type=Path, default=Path("fuzz-coverage"), help="inputs that broke a reader")
    asked.add_argument("--serve", help=argparse.SUPPRESS)
    options, rest = asked.parse_known_args()
    if options.serve:
        _serve(options.serve, rest)
    broke = 0
    for name in options.reader or READERS:
        with TemporaryDirectory(prefix="fuzz-") as work:
            broke += _turn(name, options, Path(work))
    return 1 if broke else 0


def _turn(name: str, options: argparse.Namespace, work: Path) -> bool:
    """Run one reader in a process of its own; print what became of it."""
    from readers import READERS as KNOWN

    reader = KNOWN[name]
    seeds, found = work / "seeds", work / "found"
    for folder in (seeds, found):
        folder.mkdir()
    shutil.copy(GOOD / reader.good / reader.files[0], seeds)
    command = [
        sys.executable,
        __file__,
        "--serve",
        f"{name}:{work}",
        str(seeds),
        f"-artifact_prefix={found}/",
    ]
    command += [f"-max_total_time={options.seconds}", f"-seed={options.seed}", f"-max_len={_LONGEST}"]
    command += ["-timeout=0", "-rss_limit_mb=8192", "-print_final_stats=1"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    counted = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    kept = sorted(found.iterdir())
    print(f"{name:12} {int(counted[1]) if counted else 0:9,} inputs, {len(kept)} broke it", flush=True)
    if done.returncode not in (0, _DEFECT) or (done.returncode and not kept):
        print(done.stderr[-2000:])
        return True
    for file in kept:
        (options.keep / name).mkdir(parents=True, exist_ok=True)
        shutil.move(file, options.keep / name / file.name)
        print(next((line for line in done.stderr.splitlines() if "Defect: " in line), file.name))
    return bool(kept)


class Defect(Exception):
    """An input was neither accepted nor refused."""


def _serve(asked: str, arguments: list[str]) -> None:
    """Fuzz one reader; never returns."""
    import atheris

    with atheris.instrument_imports(include=["slm_export"]):
        for module in (
            "foreign",
            "jsonfile",
            "tomlfile",
            "bundles.manifest",
            "bundles.lock",
            "source.shards",
        ):
            importlib.import_module(f"slm_export.{module}")
        for module in ("litert_container", "litert_reader", "executorch_reader", "onnx_genai"):
            importlib.import_module(f"slm_export.exporters.{module}")
    from batch import prepare
    from readers import READERS as KNOWN
    from watch import Watch, judged

    name, _, place = asked.partition(":")
    reader = KNOWN[name]
    folder = prepare(reader, GOOD, Path(place))
    (Path(place) / "here").mkdir(exist_ok=True)
    os.chdir(Path(place) / "here")
    reader.read(folder)
    watch = Watch()
    watch.look_at(folder, reader.sealed, Path(place) / "good" / reader.good)

    def one(content: bytes) -> None:
        (folder / reader.files[0]).write_bytes(content)
        found = judged(reader.read, folder, watch)
        if found["outcome"] == "defect":
            raise Defect(found["what"])

    atheris.Setup([sys.argv[0], *arguments], one)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
