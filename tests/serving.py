"""What the tests of serving and of delegates share: small bundles, and `slm-export serve` as a process."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from conftest import ROOT, TOKENIZER_FILES, command, environment, save_tiny_llama

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
UNQUANTIZED = ("--target", "host", "--bits", "32", "--no-verify", "--no-bench")


def save_chat_model(folder: Path) -> None:
    """Write a Llama of one layer with random weights, a real tokenizer and a chat template."""
    save_tiny_llama(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(ROOT / "examples" / "pycode-5m" / name, folder / name)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


@dataclass(frozen=True)
class Served:
    """An endpoint that answers."""

    url: str
    model: str
    process: subprocess.Popen[str]


@contextmanager
def serving(bundle: Path, *options: str, extra: Mapping[str, str] | None = None) -> Iterator[Served]:
    """Run ``slm-export serve`` on a free port until the block ends; it must then end well by itself."""
    arguments = command("serve", bundle, "--port", "0", "--json", *options)
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            arguments, env=environment(extra), stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        assert process.stdout
        said = process.stdout.readline()
        try:
            assert said, _all_of(log)
            yield Served(**json.loads(said), process=process)
        finally:
            process.terminate()
            process.wait(120)
        assert process.returncode == 0, _all_of(log)


def _all_of(log: IO[str]) -> str:
    log.seek(0)
    return log.read()
