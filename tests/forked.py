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
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

STAND_IN = "stand-in"


class Forked:
    """The process that waits with everything imported."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server

    def __call__(
        self, *args: str | Path, cwd: Path, largest_file: int | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run ``slm-export ARGS`` in a folder, where no file may grow beyond ``largest_file`` bytes."""
        with self.started(*args, cwd=cwd, largest_file=largest_file) as running:
            return running.wait()

    @contextmanager
    def started(self, *args: str | Path, cwd: Path, largest_file: int | None = None) -> Iterator[Running]:
        """Yield ``slm-export ARGS`` while it runs; one at a time, and waited for at the end."""
        assert self._server.stdin
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            request = {"args": [*map(str, args)], "cwd": str(cwd), "out": str(out), "err": str(err)}
            print(json.dumps({**request, "limit": largest_file}), file=self._server.stdin, flush=True)
            running = Running(self._number(), args, out, err, self._number)
            yield running
            running.wait()

    def _number(self) -> int:
        assert self._server.stdout
        return int(self._server.stdout.readline())


class Running:
    """A command that runs, leader of a process group of its own."""

    def __init__(
        self, pid: int, args: Sequence[str | Path], out: Path, err: Path, code: Callable[[], int]
    ) -> None:
        self.pid = pid
        self._args, self._out, self._err, self._code = args, out, err, code
        self._done: subprocess.CompletedProcess[str] | None = None

    def send(self, number: signal.Signals) -> None:
        """Signal the command and what it started; nothing where it has ended."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    @property
    def said(self) -> str:
        """What it has written to stderr so far."""
        return self._err.read_text() if self._err.exists() else ""

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Return what it printed, and how it ended."""
        if self._done is None:
            code = self._code()
            self._done = subprocess.CompletedProcess(
                self._args, code, self._out.read_text(), self._err.read_text()
            )
        return self._done


@contextmanager
def forked(environment: dict[str, str], warm: Sequence[str | Path] = ()) -> Iterator[Forked]:
    """Yield a server, ended afterwards.

    Given   warm: a model, a format and a folder; then the server has exported that once, and children trace sooner.
            Or STAND_IN: then nothing is traced, and the artifact is the bytes of the weights
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, __file__, *map(str, warm)],
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
    """Import what is slow, and return a request in each child."""
    if sys.argv[1:] == [STAND_IN]:
        _stand_in()
    elif len(sys.argv) > 1:
        _export_once(*sys.argv[1:])
    else:
        _import()
    _spare_the_miniature()
    return request_of_child()


def request_of_child() -> dict[str, Any]:
    """Fork for every request; return one in each child."""
    gc.freeze()  # collecting what is shared would copy it
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            os.setpgid(0, 0)
            return dict(json.loads(line))
        with suppress(OSError):  # whoever of the two is first
            os.setpgid(child, child)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    sys.exit()


def _spare_the_miniature() -> None:
    """Leave out what takes seconds of every export; it has tests of its own, and exports in new processes have it."""
    from slm_export import judge
    from slm_export.results import Check

    # By its name, because it is not the module's own to give away.
    setattr(judge, "judge_exact", lambda *_: Check("exact_graph", True, "left out in these tests"))  # noqa: B010


def _import() -> None:
    import executorch.exir  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    from slm_export.exporters.executorch import ExecuTorchExporter

    ExecuTorchExporter().ready()


def _export_once(model: str, format: str, folder: str) -> None:
    from slm_export.compilation import Request, make_plan
    from slm_export.driver import export
    from slm_export.progress import Progress

    request = Request(model, target="host", formats=(format,), out=Path(folder), verify=False, bench=False)
    export(make_plan(request), Progress(silent=True))


def _stand_in() -> None:
    """Let the onnx exporter write weights alone: in no time, and in bytes that follow from what every pass did."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import slm_export.budget.search
    import slm_export.keras.export  # noqa: F401
    from slm_export.exporters.onnx import OnnxExporter
    from slm_export.results import written

    def write(self: object, checkpoint: Any, options: object, path: Path) -> object:
        with open(path, "wb") as file:
            for weight in checkpoint.weights.values():
                loaded = weight.load()
                for part in loaded if isinstance(loaded, tuple) else (loaded,):
                    file.write(part.contiguous().view(torch.uint8).numpy().tobytes())
        return written(path, "onnx", checkpoint.parameters, ())

    OnnxExporter.write = write  # type: ignore[assignment]
    OnnxExporter.ready = OnnxExporter.check = lambda *_: None  # type: ignore[assignment]


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
    try:
        runpy.run_module("slm_export", run_name="__main__")
    except SystemExit as ending:
        # Not through the destructors of native libraries, which wait for threads that a fork does not have.
        sys.stdout.flush()
        os._exit(int(ending.code or 0))
