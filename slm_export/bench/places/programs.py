"""Programs for a processor: which one a file is for, from its ELF header (specification: System V ABI, chapter 4)."""

from __future__ import annotations

from pathlib import Path

from slm_export.errors import InputError

_MACHINES = {3: "x86", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv"}
_LITTLE_ENDIAN = 1


def machine_of(path: Path) -> str | None:
    """Return the processor that a program is for; None for a script.

    Raises:
        InputError: it is no program of Linux or Android.
    """
    with open(path, "rb") as file:
        header = file.read(20)
    if header.startswith(b"#!"):
        return None
    if len(header) < 20 or not header.startswith(b"\x7fELF") or header[5] != _LITTLE_ENDIAN:
        raise InputError(
            f"{path}: no program of Android or Linux (an ELF file); see docs/bench.md for the vendors' own"
        )
    number = int.from_bytes(header[18:20], "little")
    return _MACHINES.get(number, f"machine {number}")


def check_machine(path: Path, machines: tuple[str, ...], device: str) -> None:
    """Raise InputError unless a device runs a program."""
    machine = machine_of(path)
    if machine is not None and machine not in machines:
        raise InputError(
            f"{path}: is for {machine}, but {device} runs {', '.join(machines)}; build it for the device's ABI"
        )
