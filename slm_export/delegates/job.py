"""One trigger, from its record to its delivery."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from slm_export.delegates import outputs, remote, routing
from slm_export.delegates.config import PLACEHOLDERS, Delegate, Remote, Sampling
from slm_export.delegates.local import Answer, Bundles, Show
from slm_export.delegates.screening import Screen
from slm_export.delegates.state import State, Trigger
from slm_export.errors import InputError, MissingComponentError, SlmExportError

Wait = Callable[[float], bool]
"""Sleep for so many seconds; True where it is time to stop."""
_ANSWERS = 3
"""Attempts at an answer."""
_PAUSES_S = (1.0, 5.0, 30.0, 120.0)


def prompt_of(delegate: Delegate, trigger: Trigger) -> str:
    """Return what the model is given."""
    values = dict(zip(PLACEHOLDERS, (trigger.text, trigger.path, trigger.time), strict=True))
    # In one pass: an input that itself says {path} stays as it is.
    parts, rest = [], delegate.prompt
    while rest:
        found = [(at, name) for name in PLACEHOLDERS if (at := rest.find(f"{{{name}}}")) >= 0]
        if not found:
            break
        at, name = min(found)
        parts += [rest[:at], values[name]]
        rest = rest[at + len(name) + 2 :]
    return "".join([*parts, rest])


def work_off(
    delegate: Delegate,
    trigger: Trigger,
    state: State,
    bundles: Bundles,
    wait: Wait,
    ask: routing.Ask = remote.ask,
    screen: Screen | None = None,
) -> str | None:
    """Take a trigger one state further; return a line for people where something went wrong.

    A failure is tried again after a pause, and is one of this trigger alone in the end.
    """
    try:
        if trigger.answer is None:
            with outputs.shown(delegate.shown) as show:
                found = _answer(delegate, trigger, bundles, ask, screen or Screen(), show)
            state.answered(trigger.id, found.answer.text, found.answer.place, found.why)
            if delegate.shown:
                state.over(trigger.id, "done", found.why)
        else:
            outputs.deliver(delegate.output, trigger, trigger.place or "local")
            state.over(trigger.id, "done", trigger.detail)
    except SlmExportError as error:
        return _failed(delegate, trigger, state, error, wait)
    return None


def _answer(
    delegate: Delegate, trigger: Trigger, bundles: Bundles, ask: routing.Ask, screen: Screen, show: Show
) -> routing.Answered:
    """Answer a prompt; what is private, or found to hold personal data, is answered here."""
    prompt, private = prompt_of(delegate, trigger), delegate.private or trigger.private
    why = "private" if private else ""
    if delegate.screened and not private and delegate.personal_data == "replace":

        def replaced(to: Remote, text: str, sampling: Sampling, show: Show) -> Answer:
            return ask(to, screen.replaced(text), sampling, show)

        return routing.answer(delegate, prompt, False, bundles, replaced, show=show)
    if delegate.screened and not private and (kinds := screen.kinds(prompt)):
        private, why = True, f"it holds {', '.join(kinds)}"
    if private and delegate.bundle is None:
        raise InputError(f"it must not leave ({why}), and no bundle is named to answer it here")
    found = routing.answer(delegate, prompt, private, bundles, ask, show=show)
    return dataclasses.replace(found, why=why) if private and delegate.remote is not None else found


def _failed(delegate: Delegate, trigger: Trigger, state: State, error: SlmExportError, wait: Wait) -> str:
    most = _ANSWERS if trigger.answer is None else delegate.output.attempts
    # What is wrong with the input or with the installation stays wrong.
    for_good = isinstance(error, (InputError, MissingComponentError))
    if for_good or trigger.attempts + 1 >= most:
        state.over(trigger.id, "failed", str(error))
        return f"{trigger.delegate} {trigger.id}: failed: {error}"
    state.attempted(trigger.id, str(error))
    pause = _PAUSES_S[min(trigger.attempts, len(_PAUSES_S) - 1)]
    wait(pause)
    return f"{trigger.delegate} {trigger.id}: {error}; tried again after {pause:g} s"
