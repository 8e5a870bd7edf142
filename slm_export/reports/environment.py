"""The machine that exported and measured, in a few words: figures of speed mean nothing without it."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def environment() -> dict[str, str]:
    """Return processor, cores that this process may use, memory and system; what cannot be told is left out."""
    import psutil

    from slm_export.latency import usable_cores

    found = {
        "processor": _processor(),
        "cores": str(usable_cores()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    return {name: value for name, value in found.items() if value}


def _processor() -> str:
    """Return the processor's name; what ``platform`` says of it on Linux is its architecture at best."""
    if os.name == "posix" and Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        for key in ("model name", "Model"):
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() == key:
                    return value.strip()
    return platform.processor()
