"""The command line in a process of its own, forked from one that has made the slow imports already.

Importing torch, transformers and executorch takes longer than most refusals. Each run here has its own process,
folder, output and exit code, as ``python -m slm_export`` has; only the imports are shared.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Forked:
    """The process that waits with everything imported."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server

    def __call__(
        self, *args: str | Path, cwd: Path, largest_file: int | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run ``slm-export ARGS`` in a folder, where no file may grow beyond ``largest_file`` bytes."""
        assert self._server.stdin
        assert self._server.stdout
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            request = {"args": [*map(str, args)], "cwd": str(cwd), "out": str(out), "err": str(err)}
            print(json.dumps({**request, "limit": largest_file}), file=self._server.stdin, flush=True)
            code = int(self._server.stdout.readline())
            return subprocess.CompletedProcess(args, code, out.read_text(), err.read_text())


@contextmanager
def forked(environment: dict[str, str]) -> Iterator[Forked]:
    """Yield a server, ended afterwards."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, __file__],
        env=environment,
        stdin=pipe,
        stdout=pipe,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        yield Forked(server)
        assert server.stdin
        server.stdin.close()


def _serve() -> dict[str, Any]:
    """Fork for every request; return one in each child."""
    import executorch.exir  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    from slm_export.exporters.executorch import ExecuTorchExporter

    ExecuTorchExporter().ready()
    gc.freeze()  # collecting what is shared would copy it
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            return dict(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    sys.exit()


def _become(request: dict[str, Any]) -> None:
    os.chdir(request["cwd"])
    for number, path in ((1, request["out"]), (2, request["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if request["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
    sys.argv = ["slm-export", *request["args"]]


if __name__ == "__main__":
    _become(_serve())
    runpy.run_module("slm_export", run_name="__main__")
