"""An Arm machine for tests: Debian's Python for arm64 in QEMU's user emulation, with the runtimes' aarch64 wheels.

Nothing is installed: packages of another architecture are downloaded with a state folder of our own and unpacked, and
wheels are unpacked by pip. A folder that is complete is used again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
TOOLS = ("apt-get", "dpkg-deb", "apt-cache")

_LIBRARIES = (
    "libc6",
    "libstdc++6",
    "libgcc-s1",
    "zlib1g",
    "libexpat1",
    "libffi8",
    "libssl3",
    "libbz2-1.0",
    "liblzma5",
    "libuuid1",
    "libcrypt1",
)
_PLATFORMS = tuple(f"manylinux{version}_aarch64" for version in ("_2_28", "_2_27", "_2_17", "2014"))
_NUMPY = ("numpy==1.26.4", "ml_dtypes", "typing_extensions", "flatbuffers", "protobuf")
_TORCH = ("torch==2.10.0", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock", "fsspec")
WHEELS: dict[str, Sequence[str]] = {
    "litert": (*_NUMPY, "ai-edge-litert==2.3.0"),
    "onnx": (*_NUMPY, "onnxruntime==1.31.1"),
    # From torch 2.11 on, the registry's wheels for Arm need gigabytes of CUDA; 1.1 is ExecuTorch's last release before.
    "executorch": (*_NUMPY, *_TORCH, "executorch==1.1.0", "PyYAML"),
}
# QEMU shows this machine's own, which makes libraries that look for Arm's features read through a null pointer.
_CPUINFO = """processor\t: {number}
BogoMIPS\t: 50.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1

"""
_CPU = "neoverse-n1"
"""Armv8.2 with the dot product, as phones have since 2018."""


class ArmMachine:
    """Debian of this machine's release for arm64, in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._root = folder / "root"

    def prepare(self) -> None:
        """Download and unpack Python and its libraries."""
        if (self._folder / "complete").exists():
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        for part in ("root/proc", "state/lists/partial", "cache/archives/partial", "debs"):
            (self._folder / part).mkdir(parents=True)
        (self._folder / "status").touch()
        cpus = "".join(_CPUINFO.format(number=number) for number in range(2))
        (self._root / "proc" / "cpuinfo").write_text(cpus, encoding="utf-8")
        self._apt("apt-get", "update")
        depends = self._apt("apt-cache", "depends", "python3-minimal")
        version = next(word for word in depends.split() if word.startswith("python3."))
        version = version.removesuffix("-minimal")
        python = (f"{version}-minimal", f"lib{version}-minimal", f"lib{version}-stdlib")
        self._apt("apt-get", "download", *python, *_LIBRARIES)
        for package in (self._folder / "debs").glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(package), str(self._root)], check=True)
        (self._folder / "complete").write_text(version, encoding="utf-8")

    def wheels(self, format: str) -> Path:
        """Unpack the wheels of a format's runtime, and return their folder."""
        site = self._folder / f"site-{format}"
        if (site / "complete").exists():
            return site
        shutil.rmtree(site, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(site)]
        command += ["--only-binary", ":all:", "--no-deps", "--python-version", self._version]
        for platform in _PLATFORMS:
            command += ["--platform", platform]
        subprocess.run([*command, *WHEELS[format]], check=True, capture_output=True, timeout=1800)
        (site / "complete").touch()
        return site

    def run(self, format: str, arguments: Sequence[str | Path], timeout_s: float = 1800) -> None:
        """Run a script with Arm's Python and the wheels of a format."""
        assert QEMU
        site = self.wheels(format)
        python = self._root / "usr" / "bin" / f"python{self._version}"
        variables = {"PYTHONPATH": site, "PYTHONHOME": self._root / "usr", "OMP_NUM_THREADS": "1"}
        command = [QEMU, "-cpu", _CPU, "-L", str(self._root)]
        for name, value in variables.items():
            command += ["-E", f"{name}={value}"]
        done = subprocess.run(
            [*command, str(python), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    @property
    def _version(self) -> str:
        return (self._folder / "complete").read_text(encoding="utf-8").removeprefix("python")

    def _apt(self, tool: str, *arguments: str) -> str:
        folder = self._folder
        options = {
            "APT::Architecture": "arm64",
            "APT::Architectures::": "arm64",
            "Dir::State": str(folder / "state"),
            "Dir::State::status": str(folder / "status"),
            "Dir::Cache": str(folder / "cache"),
        }
        command = [tool, *(part for key, value in options.items() for part in ("-o", f"{key}={value}"))]
        done = subprocess.run(
            [*command, *arguments],
            cwd=folder / "debs",
            env={**os.environ, "LC_ALL": "C"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout
