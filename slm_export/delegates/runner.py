"""All delegates of a file, until a signal ends them, or once.

Every delegate has a thread that works off its triggers one after the other; sources have theirs. What they share is the
state, where everything is recorded before anything is done.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial

from slm_export.delegates import remote, sources
from slm_export.delegates.config import Delegate, Delegates
from slm_export.delegates.job import work_off
from slm_export.delegates.local import Bundles
from slm_export.delegates.routing import Ask
from slm_export.delegates.screening import Screen
from slm_export.delegates.state import State
from slm_export.errors import InputError, MachineError, MissingComponentError

_JOIN_S = 60.0
_LOOK_S = 0.2
_WATCH_MS = 500


def local_time() -> datetime:
    """Return the time of this machine, with its zone."""
    from tzlocal import get_localzone

    return datetime.now(get_localzone())


class Runner:
    """The delegates of a file at work."""

    def __init__(
        self,
        delegates: Delegates,
        state: State,
        say: sources.Say,
        *,
        bundles: Bundles | None = None,
        clock: sources.Clock = local_time,
        lines: Iterable[str] | None = None,
        ask: Ask = remote.ask,
        screen: Screen | None = None,
    ) -> None:
        self._all, self._webhook, self._state, self._say = delegates.delegates, delegates.webhook, state, say
        self._bundles = Bundles() if bundles is None else bundles
        self._clock, self._ask = clock, ask
        self._screen = Screen() if screen is None else screen
        if any(one.screened for one in self._all.values()):
            # A net that is not there is told before anything could fall.
            self._screen.ready()
        self._lines = sys.stdin if lines is None else lines
        self._stop = threading.Event()
        self._news = {name: threading.Event() for name in self._all}
        self._problems: list[BaseException] = []
        self.port: int | None = None
        """Where requests are taken."""
        for name in self._all:
            state.prune(name)

    def run(self) -> None:
        """Work until `stop`, or until nothing can come any more: standard input was all there was, and ended.

        Raises:
            InputError: a folder to watch or a token is not there.
            MissingComponentError: a package that a trigger needs is not installed.
            MachineError: the state cannot be written, or the port is taken.
        """
        with self._taking_requests():
            workers = [self._begin(self._work, name, one) for name, one in self._all.items()]
            looking = [self._begin(source) for source in self._sources()]
            try:
                while not self._stop.wait(_LOOK_S):
                    if self._webhook is None and not any(one.is_alive() for one in looking) and self._idle():
                        break
            finally:
                self.stop()
                for thread in workers:
                    thread.join(_JOIN_S)
                # One that is still at a step has its bundle; it is let go of with the process.
                if not any(thread.is_alive() for thread in workers):
                    self._bundles.close()
        if self._problems:
            raise self._problems[0]

    def run_once(self) -> None:
        """Look at clock and files, read standard input to its end, work everything off, and end."""
        now = self._clock()
        sources.look_at_clock(self._of("scheduled"), self._state, now, self._say)
        sources.look_at_files(self._of("watch"), self._state, now, self._say)
        for name in self._of("stdin"):
            self._read_lines(name)
        try:
            for name, delegate in self._all.items():
                while self._step(name, delegate):
                    pass
        finally:
            self._bundles.close()

    def stop(self) -> None:
        """End; what is at work ends its step."""
        self._stop.set()
        for news in self._news.values():
            news.set()

    def _of(self, kind: str) -> dict[str, Delegate]:
        return {n: one for n, one in self._all.items() if getattr(one.trigger, kind) not in (None, False)}

    def _idle(self) -> bool:
        return all(self._state.next(name) is None for name in self._all)

    def _begin(self, work: Callable[..., None], *arguments: object) -> threading.Thread:
        """Start a thread; what ends it unforeseen ends everything."""

        def guarded() -> None:
            try:
                work(*arguments)
            except BaseException as error:  # noqa: BLE001 - it is raised where `run` was called
                self._problems.append(error)
                self.stop()

        # A daemon: a runtime that hangs, or a standard input that never ends, must not keep the process.
        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        return thread

    def _work(self, name: str, delegate: Delegate) -> None:
        while not self._stop.is_set():
            self._news[name].clear()
            if not self._step(name, delegate):
                self._news[name].wait()

    def _step(self, name: str, delegate: Delegate) -> bool:
        trigger = self._state.next(name)
        if trigger is None:
            return False
        problem = work_off(
            delegate, trigger, self._state, self._bundles, self._stop.wait, self._ask, self._screen
        )
        if problem is not None:
            self._say(problem)
        return True

    def _sources(self) -> list[Callable[[], None]]:
        """Return what looks for events, each for a thread of its own."""
        of_kind: dict[str, Callable[[], None]] = {"scheduled": self._watch_clock, "watch": self._watch_files}
        found = [look for kind, look in of_kind.items() if self._of(kind)]
        return [*found, *(partial(self._read_lines, name) for name in self._of("stdin"))]

    def _watch_clock(self) -> None:
        chosen = self._of("scheduled")
        while not self._stop.is_set():
            again = sources.look_at_clock(chosen, self._state, self._clock(), self._say)
            self._tell(chosen)
            self._stop.wait(max(0.05, (again - self._clock()).total_seconds()))

    def _watch_files(self) -> None:
        chosen = self._of("watch")
        with _needed("watching files", "watchfiles"):
            from watchfiles import watch
        places = sources.watched(chosen.values())
        if missing := [place for place in places if not place.is_dir()]:
            raise InputError(f"{missing[0]}: no such folder to watch")
        looked = 0.0
        # The first, empty news come once the watcher is at work: nothing falls between that look and the next.
        for news in watch(
            *places, stop_event=self._stop, rust_timeout=_WATCH_MS, yield_on_timeout=True, recursive=False
        ):
            # Without news too, now and then: file systems of other machines send none.
            if news or time.monotonic() - looked > sources.LOOK.total_seconds() or not looked:
                looked = time.monotonic()
                sources.look_at_files(chosen, self._state, self._clock(), self._say)
                self._tell(chosen)

    def _read_lines(self, name: str) -> None:
        sources.read_lines(name, self._lines, self._state, self._clock, self._news[name].set)

    def _tell(self, names: Iterable[str]) -> None:
        for name in names:
            self._news[name].set()

    @contextmanager
    def _taking_requests(self) -> Iterator[None]:
        if self._webhook is None:
            yield
            return
        token = token_of(self._webhook.token_env)
        with _needed("webhooks", "starlette", "uvicorn"):
            from slm_export.delegates.webhook import answering, make_app
            from slm_export.serving.server import listen
        heard: Callable[[str], None] = lambda name: self._news[name].set()  # noqa: E731
        app = make_app(self._of("webhook"), self._state, token, self._clock, heard)
        with listen("127.0.0.1", self._webhook.port) as listening, answering(app, listening):
            self.port = listening.getsockname()[1]
            self._say(f"requests are taken at http://127.0.0.1:{self.port}/delegates/NAME")
            yield


def token_of(variable: str) -> str:
    """Return the token of webhooks; InputError where its variable is not set."""
    if token := os.environ.get(variable, "").strip():
        return token
    raise InputError(f"webhook.token_env: no variable {variable} is set, or it is empty")


@contextmanager
def _needed(what: str, *packages: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        if (error.name or "").split(".")[0] not in packages:
            raise
        raise MissingComponentError(
            f"{what} needs {' and '.join(packages)} ({error}); pip install 'slm-export[delegates]'"
        ) from error


def failed_since(state: State, names: Iterable[str], before: dict[str, int]) -> None:
    """Raise MachineError where more triggers failed than before."""
    failed = [name for name in names if state.counts(name).get("failed", 0) > before.get(name, 0)]
    if failed:
        reasons = [one.detail for name in failed for one in state.last(name, 100) if one.state == "failed"][
            :1
        ]
        raise MachineError(f"triggers of {', '.join(failed)} failed: {''.join(reasons)}")
