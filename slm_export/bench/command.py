"""``slm-export bench``: the options in, the measurements out."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from slm_export.bench.figures import Measurement
from slm_export.bench.fleet import DeviceResult, measure_fleet
from slm_export.bench.host import measure_here
from slm_export.bench.places import Place, adb
from slm_export.bench.places.devicectl import Devicectl
from slm_export.bench.places.ssh import Ssh
from slm_export.bench.remote import measure_there
from slm_export.bench.subject import Subject, find_subject
from slm_export.bench.workload import Workload
from slm_export.errors import InputError
from slm_export.latency import usable_cores
from slm_export.progress import Progress

ALL = "all"
_DEVICE_THREADS = 4
"""Fast cores of a usual phone; the device's own count would take its slow ones too."""


@dataclass(frozen=True)
class BenchRequest:
    """What was asked on the command line."""

    artifact: Path
    format: str | None = None
    on: str = "host"
    devices: tuple[str, ...] = ()
    """Serial numbers, hosts or names; `ALL` alone is every one that is attached."""
    runs: int = 5
    threads: int | None = None
    prefill: tuple[int, ...] | None = None
    depth: tuple[int, ...] | None = None
    sustained_s: float = 0.0
    compare: Sequence[Path] = ()
    runner: str | None = None

    @property
    def of_a_fleet(self) -> bool:
        """Whether several devices may be meant: `bench_fleet` is for them."""
        return self.on != "host" and (len(self.devices) > 1 or ALL in self.devices)


def bench(request: BenchRequest, progress: Progress) -> tuple[Measurement, ...]:
    """Measure what was asked for, here or on one device."""
    subjects, workload = _asked(request)
    if request.on == "host":
        return measure_here(subjects, workload, progress)
    device = request.devices[0] if request.devices else None
    return measure_there(_place(request.on, device), subjects, request.runner, workload, progress)


def bench_fleet(request: BenchRequest, progress: Progress) -> tuple[DeviceResult, ...]:
    """Measure on several devices at once; those that fail are in the results with the reason."""
    subjects, workload = _asked(request)

    def measure(place: Place, told: Progress) -> tuple[Measurement, ...]:
        return measure_there(place, subjects, request.runner, workload, told)

    devices = _attached(request.on) if request.devices == (ALL,) else request.devices
    return measure_fleet({one: partial(_place, request.on, one) for one in devices}, measure, progress)


def _asked(request: BenchRequest) -> tuple[list[Subject], Workload]:
    """Return what is measured and how, once the options go together."""
    if request.on == "host" and (request.devices or request.runner):
        option = "--device" if request.devices else "--runner"
        raise InputError(f"{option}: belongs to a device; give --on adb, ssh or devicectl too")
    if ALL in request.devices and len(request.devices) > 1:
        raise InputError("--device all: is every device already; give no other beside it")
    if twice := next((one for one in request.devices if request.devices.count(one) > 1), None):
        raise InputError(f"--device {twice}: is given twice, and two jobs would disturb each other there")
    workload = Workload(
        threads=request.threads or (usable_cores() if request.on == "host" else _DEVICE_THREADS),
        runs=request.runs,
        prefill=request.prefill,
        depth=request.depth,
        sustained_s=request.sustained_s,
    )
    others = [find_subject(path) for path in request.compare]
    return [find_subject(request.artifact, request.format), *others], workload


def _attached(on: str) -> tuple[str, ...]:
    if on == "adb":
        return adb.serials()
    raise InputError(f"--device all: --on {on} cannot list devices; name each, as in --device A --device B")


def _place(on: str, device: str | None, stop: threading.Event | None = None) -> Place:
    places: dict[str, type[adb.Adb] | type[Ssh] | type[Devicectl]] = {
        "adb": adb.Adb,
        "ssh": Ssh,
        "devicectl": Devicectl,
    }
    return places[on](device, stop=stop)
