"""The server's loop: round by round, each stored before the next, none beyond the budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord

from slm_export.errors import GateError, MachineError
from slm_export.federated.accounting import Budget, Ledger, noise_for
from slm_export.federated.settings import Federation, Privacy
from slm_export.federated.state import State, load_state, save_state
from slm_export.federated.strategy import Screening
from slm_export.federated.updates import Tensors, from_record, to_record

if TYPE_CHECKING:
    from flwr.serverapp import Grid

SPENT = "the privacy budget allows no further round"
_ENDED = (
    "the server ended before its rounds were done; type the command again to go on with the round it was at"
)


def begin(federation: Federation, tensors: Tensors, folder: Path, base: str = "") -> State:
    """Return where the federation stands; if it has not begun, begin it with these tensors.

    Given   base: sha256 of the model, which clients hold theirs against

    Raises:
        InputError: no noise keeps the declared budget.
    """
    state = load_state(folder)
    if state is None:
        noise = _noise(federation)
        state = State(tensors=dict(tensors), noise=noise, ledger=None if noise is None else [], base=base)
        save_state(state, folder)
    return state


def run_rounds(grid: Grid, federation: Federation, folder: Path, strategy: Screening | None = None) -> State:
    """Go on until all rounds are done, the budget is spent, or too many fail in a row; return where it ended.

    Given   folder: with the state that `begin` stored
            strategy: None: the one of the settings
    Result  fewer rounds than were asked, and not stopped: too many failed in a row since it was called
    """
    state = load_state(folder)
    assert state is not None, "a federation is begun before its rounds"
    strategy = strategy or Screening(federation, state.noise)
    failures = 0
    while len(state.rounds) < federation.rounds.number and state.stopped is None:
        state = _round(grid, federation, strategy, state)
        save_state(state, folder)
        failures = min(failures + 1, state.failures)
        if 0 < federation.rounds.failures <= failures:
            break
    return state


def require_done(federation: Federation, state: State) -> None:
    """Raise unless a federation came to its end.

    Raises:
        GateError: too many rounds in a row had too few good updates, or none ever had enough.
        MachineError: the server ended before.
    """
    rounds = federation.rounds
    if not any(done.changed for done in state.rounds):
        if state.rounds:
            raise GateError(_too_few(federation, state))
        raise GateError(state.stopped) if state.stopped else MachineError(_ENDED)
    if state.stopped is None and len(state.rounds) < rounds.number:
        raise GateError(_too_few(federation, state)) if state.failures else MachineError(_ENDED)


def _round(grid: Grid, federation: Federation, strategy: Screening, state: State) -> State:
    number = len(state.rounds) + 1
    ledger = Ledger.of(state.ledger) if state.noise is not None else None
    budget = budget_of(federation.privacy)
    if ledger is not None and state.noise is not None:
        # Counted before anything is asked: a round that fails has told that it failed.
        ledger = ledger.plus(state.noise, federation.rounds.fraction)
        assert budget is not None
        if not budget.allows(ledger):
            return replace(state, stopped=SPENT)
    after = _asked(grid, federation, strategy, state)
    done = strategy.done
    assert done is not None
    assert done.number == number
    if ledger is not None and budget is not None:
        done = replace(done, epsilon=ledger.epsilon(budget.delta, budget.accountant))
        state = replace(state, ledger=ledger.recorded())
    return state.after(done, after)


def _asked(grid: Grid, federation: Federation, strategy: Screening, state: State) -> Tensors | None:
    number, config = len(state.rounds) + 1, {"settings": federation.sha256, "base": state.base}
    if federation.aggregation.secure:
        return strategy.sum_securely(grid, number, state.tensors, config)
    messages = strategy.configure_train(number, to_record(state.tensors), ConfigRecord(config), grid)
    replies = grid.send_and_receive(messages, timeout=federation.rounds.deadline_s) if messages else []
    arrays, _ = strategy.aggregate_train(number, replies)
    return None if arrays is None else from_record(arrays)


def budget_of(privacy: Privacy) -> Budget | None:
    """Return what was declared; None: nothing was."""
    if privacy.epsilon is None or privacy.delta is None:
        return None
    return Budget(privacy.epsilon, privacy.delta, privacy.accountant)


def _noise(federation: Federation) -> float | None:
    privacy, rounds = federation.privacy, federation.rounds
    if privacy.unit != "user":
        return None
    if privacy.noise is not None:
        return privacy.noise
    assert privacy.epsilon is not None
    assert privacy.delta is not None
    return noise_for(privacy.epsilon, privacy.delta, rounds.fraction, rounds.number, privacy.accountant)


def _too_few(federation: Federation, state: State) -> str:
    last = state.rounds[-1]
    why = ", ".join(f"{count} {reason}" for reason, count in last.refused.items()) or "nobody was drawn"
    return (
        f"round {last.number}: {last.good} good updates, of at least {federation.rounds.minimum} ({why}); so it was "
        f"{state.failures} times in a row, and the federation was stopped. Nothing of these rounds was learned; type "
        "the command again to go on after them"
    )
