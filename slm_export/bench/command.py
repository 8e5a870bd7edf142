"""``slm-export bench``: the options in, the measurements out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slm_export.bench.figures import Measurement
from slm_export.bench.host import measure_here
from slm_export.bench.places import Place
from slm_export.bench.places.adb import Adb
from slm_export.bench.places.devicectl import Devicectl
from slm_export.bench.places.ssh import Ssh
from slm_export.bench.remote import measure_there
from slm_export.bench.subject import find_subject
from slm_export.bench.workload import Workload
from slm_export.errors import InputError
from slm_export.latency import usable_cores
from slm_export.progress import Progress

_DEVICE_THREADS = 4
"""Fast cores of a usual phone; the device's own count would take its slow ones too."""


@dataclass(frozen=True)
class BenchRequest:
    """What was asked on the command line."""

    artifact: Path
    format: str | None = None
    on: str = "host"
    device: str | None = None
    runs: int = 5
    threads: int | None = None
    prefill: tuple[int, ...] | None = None
    depth: tuple[int, ...] | None = None
    sustained_s: float = 0.0
    compare: Sequence[Path] = ()
    runner: str | None = None


def bench(request: BenchRequest, progress: Progress) -> tuple[Measurement, ...]:
    """Measure what was asked for, where it was asked for."""
    workload = Workload(
        threads=request.threads or (usable_cores() if request.on == "host" else _DEVICE_THREADS),
        runs=request.runs,
        prefill=request.prefill,
        depth=request.depth,
        sustained_s=request.sustained_s,
    )
    if request.on == "host" and (request.device or request.runner):
        option = "--device" if request.device else "--runner"
        raise InputError(f"{option}: belongs to a device; give --on adb, ssh or devicectl too")
    subjects = [
        find_subject(request.artifact, request.format),
        *(find_subject(path) for path in request.compare),
    ]
    if request.on == "host":
        return measure_here(subjects, workload, progress)
    return measure_there(_place(request), subjects, request.runner, workload, progress)


def _place(request: BenchRequest) -> Place:
    places: dict[str, Callable[[str | None], Place]] = {"adb": Adb, "ssh": Ssh, "devicectl": Devicectl}
    return places[request.on](request.device)
