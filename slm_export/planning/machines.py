"""A device profile, or the machine at hand, as the roofline sees it."""

from __future__ import annotations

import os
import threading
import time
from functools import lru_cache
from pathlib import Path

from slm_export.planning.roofline import Machine
from slm_export.profile import DeviceProfile

THREADS = 4
"""Cores that a runtime uses on a phone: the fastest ones."""
_SWEEP = (
    128 << 20
)  # bytes of all threads together: beyond the caches, and done in a few hundredths of a second
_KERNELS = ("i8mm",)
"""The instruction set that the fitted rates of multiply-adds are of; of cores without it nothing was published."""


def machine_of(profile: DeviceProfile) -> Machine:
    """Return what the model needs of a device; for the host it is measured now."""
    if profile.target == "host" and profile.memory is None:
        return this_machine()
    memory = profile.memory
    bandwidth = memory.bandwidth_gb_s if memory else None
    return Machine(
        profile.title,
        bandwidth.value * 1e9 if bandwidth else None,
        _cycles(profile),
        bandwidth.source if bandwidth else "",
    )


def _cycles(profile: DeviceProfile) -> float | None:
    cpu = profile.cpu
    if cpu is None or cpu.cores is None or cpu.isa is None or not set(_KERNELS) <= set(cpu.isa.features):
        return None
    clocks = [cluster.ghz for cluster in cpu.cores.clusters for _ in range(cluster.count)][:THREADS]
    return None if None in clocks else 1e9 * sum(clock for clock in clocks if clock is not None)


@lru_cache(maxsize=1)
def this_machine() -> Machine:
    """Return the machine at hand: the bandwidth that its cores read with now, and their clock."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    hertz = _hertz()
    return Machine(
        "this machine",
        _read_bandwidth(cores),
        None if hertz is None else cores * hertz,
        "bandwidth measured just now, while other programs ran",
    )


def _read_bandwidth(cores: int) -> float:
    import numpy as np

    blocks = [np.ones((_SWEEP >> 3) // cores) for _ in range(cores)]
    seconds = []
    for _ in range(3):
        threads = [threading.Thread(target=block.sum) for block in blocks]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds.append(time.perf_counter() - began)
    return sum(block.nbytes for block in blocks) / min(seconds)


def _hertz() -> float | None:
    """Return the clock of a processor with the instructions that the host's rates are of; None of any other."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    facts = {name.strip(): value for name, _, value in (line.partition(":") for line in lines)}
    if "avx512_vnni" not in facts.get("flags", "").split():
        return None
    return float(facts["cpu MHz"]) * 1e6 if "cpu MHz" in facts else None


def host_memory() -> int:
    """Return the memory of the machine at hand, bytes."""
    import psutil

    return int(psutil.virtual_memory().total)
