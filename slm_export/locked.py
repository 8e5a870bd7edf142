"""An export held against ``slm-export.lock``: drift is named before any work, other bytes are refused after it."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slm_export.bundles.checksums import sha256_file
from slm_export.bundles.lock import (
    Device,
    Inputs,
    Lock,
    Platform,
    Source,
    Text,
    accept,
    differences,
    read_lock,
)
from slm_export.compilation import Plan
from slm_export.errors import GateError, InputError
from slm_export.progress import Progress
from slm_export.recipe import Recipe, options_of
from slm_export.results import Artifact
from slm_export.source.adapter_files import adapter_sha256


def inputs_of(plan: Plan, recipe: Recipe, toolchain: Mapping[str, str], source: Source) -> Inputs:
    """Return what an export follows from.

    Given   toolchain: package -> version, of all that takes part

    Raises:
        InputError: a text file cannot be read.
    """
    request, profile = plan.request, plan.profile
    steps = [{"pass": step.name, **options_of(step)} for step in recipe]
    return Inputs(
        toolchain={"python": ".".join(platform.python_version_tuple()[:2]), **toolchain},
        source=source,
        device=Device(
            target=profile.target, name=profile.name, sha256=_hash(profile.model_dump(mode="json"))
        ),
        formats=tuple(exporter.name for exporter in plan.exporters),
        context=request.context,
        # As JSON has them: tuples as lists.
        recipe=tuple(json.loads(json.dumps(steps))),
        text=Text(
            evaluation=_file_hash(request.eval_text) if request.verify else None,
            calibration=_file_hash(request.calibration),
        ),
        verified=request.verify,
        gates=request.gates.over(profile.gates),
        adapters={name: adapter_sha256(folder) for name, folder in request.adapters},
    )


def lock_of(inputs: Inputs, artifacts: Sequence[Artifact], folder: Path) -> Lock:
    """Return the lock of a bundle in ``folder``, with the artifacts that were written there."""
    return Lock(inputs=inputs, platform=_platform(), artifacts=_hashes(artifacts, folder))


def held_against(
    plan: Plan,
    recipe: Recipe,
    toolchain: Mapping[str, str],
    source: Callable[[], Source],
    progress: Progress,
) -> Accepted | None:
    """Return the lock file that an export is held against, if one was asked for.

    Raises:
        InputError: it cannot be read, or something is not what it was; all that is not is named.
    """
    path = plan.request.locked
    if path is None:
        return None
    lock = read_lock(path)
    with progress.stage("compare with the lock"):
        now = inputs_of(plan, recipe, toolchain, source())
    if drifted := differences(lock.inputs, now):
        lines = "\n".join(f"  {line}" for line in drifted)
        raise InputError(
            f"{path}: not what was locked\n{lines}\nbring back what was locked, or {accept(path)}"
        )
    return Accepted(path, lock)


@dataclass(frozen=True)
class Accepted:
    """A lock file whose inputs are those of this export."""

    path: Path
    lock: Lock

    def refuse_other_bytes(self, artifacts: Sequence[Artifact], folder: Path) -> tuple[str, ...]:
        """Hold against it what was written into ``folder``; return what is to be noted.

        Raises:
            GateError: the same inputs on the same platform gave other bytes.
        """
        if (here := _platform()) != self.lock.platform:
            return (
                f"{self.path}: locked on {self.lock.platform}, and this is {here}: the bytes of artifacts were not "
                "compared",
            )
        before, after = self.lock.artifacts, _hashes(artifacts, folder)
        lines = [
            f"  {name}: locked {_short(before.get(format, {}).get(name))}, made {_short(after[format].get(name))}"
            for format in after
            for name in dict.fromkeys((*before.get(format, {}), *after[format]))
            if before.get(format, {}).get(name) != after[format].get(name)
        ]
        if lines:
            raise GateError(
                f"{self.path}: the same model, recipe and tools gave other bytes, and nothing of it was kept\n"
                + "\n".join(lines)
                + f"\nfind out what differs (`pip freeze` there and here), or {accept(self.path)}"
            )
        return ()


def _short(sha256: str | None) -> str:
    return "none" if sha256 is None else sha256[:12]


def _hashes(artifacts: Sequence[Artifact], folder: Path) -> dict[str, dict[str, str]]:
    """Return format -> path in the bundle -> sha256, of every artifact and the data that belongs to it."""
    return {
        artifact.format: {
            artifact.path.relative_to(folder).as_posix(): artifact.sha256,
            **{path.relative_to(folder).as_posix(): sha256_file(path) for path in artifact.data},
        }
        for artifact in artifacts
    }


def _platform() -> Platform:
    import torch

    vectors = torch.backends.cpu.get_cpu_capability()
    return Platform(system=platform.system(), machine=platform.machine(), vectors=vectors)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _file_hash(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return sha256_file(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
