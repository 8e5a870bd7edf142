"""Where a prompt is answered. What is private is answered here, whatever the rule says."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from slm_export.bench.temperature import host_temperature
from slm_export.delegates.config import Delegate, Remote, Rule, Sampling
from slm_export.delegates.local import Answer, Bundles, Show
from slm_export.errors import SlmExportError

Ask = Callable[[Remote, str, Sampling, Show], Answer]


@dataclass(frozen=True)
class Machine:
    """How busy and how hot this machine is; None where the system does not say."""

    load_per_core: float
    temperature_c: float | None

    @classmethod
    def now(cls) -> Machine:
        """Look."""
        return cls(os.getloadavg()[0] / (os.cpu_count() or 1), host_temperature())


@dataclass(frozen=True)
class Answered:
    """An answer, and why it was had there."""

    answer: Answer
    why: str = ""


def answer(
    delegate: Delegate,
    prompt: str,
    private: bool,
    bundles: Bundles,
    ask: Ask,
    machine: Callable[[], Machine] = Machine.now,
    show: Show = lambda _: None,
) -> Answered:
    """Return the answer of one of the places that a delegate may ask; it is shown as it comes.

    Raises:
        SlmExportError: none of them answers.
    """
    if delegate.where == "remote" and not private:
        assert delegate.remote is not None
        return Answered(ask(delegate.remote, prompt, delegate.sampling, show))
    assert delegate.bundle is not None, "checked when the file is read, and for private inputs when they come"
    if delegate.rule is None or delegate.remote is None or private:
        return Answered(_here(delegate, prompt, bundles, show))
    return _by_rule(delegate, delegate.rule, delegate.remote, prompt, bundles, ask, machine, show)


def _by_rule(
    delegate: Delegate,
    rule: Rule,
    remote: Remote,
    prompt: str,
    bundles: Bundles,
    ask: Ask,
    machine: Callable[[], Machine],
    show: Show,
) -> Answered:
    assert delegate.bundle is not None
    tokens = bundles.tokens(delegate.bundle, delegate.format, prompt) if rule.longer_than else 0
    why, local = _before(rule, tokens, machine()), None
    if why is None:
        local = _here(delegate, prompt, bundles, show)
        why = _after(rule, local)
        if why is None:
            return Answered(local)
    try:
        return Answered(ask(remote, prompt, delegate.sampling, show), why)
    except SlmExportError as error:
        # A doubtful answer is more than none.
        if local is None:
            local = _here(delegate, prompt, bundles, show)
        return Answered(local, f"{why}, but {error}")


def _before(rule: Rule, tokens: int, machine: Machine) -> str | None:
    """Return why this machine is not to answer; None: it is."""
    if rule.longer_than is not None and tokens > rule.longer_than:
        return f"{tokens} tokens are more than {rule.longer_than}"
    if rule.busy_above is not None and machine.load_per_core > rule.busy_above:
        return f"the load of {machine.load_per_core:.2f} for each core is above {rule.busy_above:g}"
    if rule.hotter_than is not None and (machine.temperature_c or 0) > rule.hotter_than:
        return f"{machine.temperature_c:.0f} °C are above {rule.hotter_than:g}"
    return None


def _after(rule: Rule, local: Answer) -> str | None:
    """Return why a local answer is not enough; None: it is."""
    least, found = rule.confidence_below, local.confidence
    if least is None or found is None or found >= least:
        return None
    return f"a confidence of {found:.2f} is below {least:g}"


def _here(delegate: Delegate, prompt: str, bundles: Bundles, show: Show) -> Answer:
    assert delegate.bundle is not None
    return bundles.answer(
        delegate.bundle,
        delegate.format,
        prompt,
        delegate.sampling,
        nearest=delegate.nearest,
        show=show,
        adapter=delegate.adapter,
    )
