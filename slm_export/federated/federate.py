"""A federation from its file to its result, on one page."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from slm_export.bundles.staging import staged
from slm_export.federated.base import open_base, start
from slm_export.federated.flower import require_flower
from slm_export.federated.result import write_result
from slm_export.federated.rounds import begin, require_done
from slm_export.federated.settings import Federation
from slm_export.federated.state import State, load_state
from slm_export.learning.places import place
from slm_export.progress import Progress, Stage
from slm_export.source.provenance import source_sha256

_LOOK_S = 1.0
"""Between two looks at how far the engine is."""
Engine = Callable[[Federation, Path], None]
"""Runs the rounds that are left in the folder that holds the state."""


def federate(
    federation: Federation, engine: Engine, how: str, progress: Progress, force: bool = False
) -> tuple[State, Path]:
    """Teach what the settings say, and put it in its place; nothing is left there unless all went well.

    A server that was killed, or whose rounds failed, is gone on with by the same command.

    Given   how: name of the engine; work of the one is not gone on with by another

    Raises:
        SlmExportError: whatever a user can cause or mend.
    """
    require_flower()
    with progress.stage("read the base"):
        base = open_base(federation.model)
        sha256 = source_sha256(base.folder)
    began = federation.model.start and source_sha256(Path(federation.model.start))
    key = {
        "what": f"federate {how}",
        "base": sha256,
        "start": began,
        **federation.model_dump(mode="json", exclude={"server", "client"}),
    }
    with staged(Path(federation.out), force) as staging, place(key) as work:
        begun = begin(federation, start(base), work.folder, sha256)
        left = federation.rounds.number - len(begun.rounds)
        with (
            progress.stage("learn from clients", left) as stage,
            _followed(stage, work.folder, len(begun.rounds)),
        ):
            engine(federation, work.folder)
        state = load_state(work.folder)
        assert state is not None
        require_done(federation, state)
        write_result(base, sha256, federation, state, staging.path)
        out = staging.commit()
        work.done()
    return state, out


@contextmanager
def _followed(stage: Stage, folder: Path, before: int) -> Iterator[None]:
    """Let a stage count the rounds that the engine, in a process of its own, has stored."""
    ended = threading.Event()

    def follow() -> None:
        seen = before
        while not ended.wait(_LOOK_S):
            state = load_state(folder)
            if state is not None and len(state.rounds) > seen:
                stage.advance(len(state.rounds) - seen, f"{state.rounds[-1].good} good updates")
                seen = len(state.rounds)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
