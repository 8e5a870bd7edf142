"""Where a federation stands after each round: one file, replaced whole, so that a killed server goes on.

The tensors and everything about the rounds lie in the same file: there is no moment at which the one is of another
round than the other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slm_export.bundles.atomic import sync
from slm_export.errors import MachineError
from slm_export.federated.updates import Tensors
from slm_export.machine import machine_errors

FILE = "federation.safetensors"
_KEY = "federation"


@dataclass(frozen=True)
class Round:
    """What came of one round; nothing in it is a client's but its random number."""

    number: int
    drawn: int
    """Clients that were asked."""
    good: int
    """Updates that count."""
    refused: Mapping[str, int]
    """Reason -> how many."""
    named: tuple[tuple[int, str, str], ...] = ()
    """Who was refused: client, reason, detail."""
    changed: bool = False
    """False: too few good updates, and the tensors stayed as they were."""
    weighs_less: int = 0
    """Updates that count for fewer examples than they claim."""
    loss_before: float | None = None
    """Mean over the clients in nats, as they measured it; None: not told, for privacy or because none came."""
    loss_after: float | None = None
    epsilon: float | None = None
    """Spent by the end of this round."""


@dataclass(frozen=True)
class State:
    """Everything that decides how a federation goes on."""

    tensors: Tensors
    rounds: tuple[Round, ...] = ()
    """Those that were tried."""
    noise: float | None = None
    """Noise multiplier of all rounds; None: no noise at the server."""
    ledger: Any = None
    """What was spent, as `accounting.Ledger` writes it; None: nothing is counted at the server."""
    stopped: str | None = None
    """Why it ended before all rounds were done."""
    base: str = ""
    """sha256 of the model that learns, which clients hold theirs against."""

    def after(self, done: Round, tensors: Tensors | None) -> State:
        """Return the state one round later."""
        return replace(
            self, rounds=(*self.rounds, done), tensors=self.tensors if tensors is None else tensors
        )

    @property
    def failures(self) -> int:
        """Rounds in a row, up to the last, that changed nothing."""
        count = 0
        for done in reversed(self.rounds):
            if done.changed:
                break
            count += 1
        return count


def load_state(folder: Path) -> State | None:
    """Return where a federation stands; None: it has not begun.

    Raises:
        MachineError: the file is there and cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, "numpy") as file:
            told = json.loads(file.metadata()[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        rounds = tuple(
            Round(**one | {"named": tuple(map(tuple, one["named"]))}) for one in told.pop("rounds")
        )
        return State(tensors=tensors, rounds=rounds, **told)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise MachineError(
            f"{path}: where the federation stood cannot be read ({error}); remove it to begin anew"
        ) from error


def save_state(state: State, folder: Path) -> None:
    """Replace the file; after a power cut too it is the old one or the new one."""
    from safetensors.numpy import save

    told = {name: value for name, value in asdict(replace(state, tensors={})).items() if name != "tensors"}
    arrays: dict[str, NDArray[np.float32]] = {n: np.ascontiguousarray(v) for n, v in state.tensors.items()}
    with machine_errors("store the round", folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / FILE, save(arrays, {_KEY: json.dumps(told)}))


def write_whole(path: Path, data: bytes) -> None:
    """Put a file in place so that nobody, and no crash, ever sees half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(data)
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)
