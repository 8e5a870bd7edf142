"""The one open model, in a thread of its own, and the bounded queue before it.

A model has one KV cache, so requests are answered one after the other. Work is a generator over the model: between two
of its steps it can be given up, which is how a client that leaves frees the model. Results go to the event loop that
waits for them.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Generic, TypeVar

from slm_export.opened import OpenBundle

T = TypeVar("T")
Work = Callable[[OpenBundle], Iterator[T]]
_END = object()
_CLOSE_S = 30.0


class QueueFullError(Exception):
    """As many wait as may."""


class Ticket(Generic[T], AsyncIterator[T]):
    """One request's place in the queue, and what comes of it, step by step."""

    def __init__(self, work: Work[T], left: Callable[[Ticket[T]], None]) -> None:
        self.work = work
        self.given_up = threading.Event()
        self._left = left
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Any] = asyncio.Queue()

    def give_up(self) -> None:
        """Want nothing more; a work that waits is not begun, one that runs ends at its next step."""
        self.given_up.set()
        self._left(self)

    def put(self, item: Any) -> None:
        """Pass a step's result, an exception, or the end to the event loop; from any thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    async def __anext__(self) -> T:
        """Return the next step's result."""
        item = await self._items.get()
        if item is _END:
            raise StopAsyncIteration
        if isinstance(item, BaseException):
            raise item
        result: T = item
        return result


class Engine:
    """A model that is opened once, in the thread that uses it."""

    def __init__(self, open_model: Callable[[], OpenBundle], waiting: int) -> None:
        """Open the model; what that raises is raised here. ``waiting``: those that may wait beside the one at work."""
        self.waiting = waiting
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Ticket[Any] | None] = queue.SimpleQueue()
        self._queued: set[Ticket[Any]] = set()
        self._at_work: Ticket[Any] | None = None
        opened: Future[OpenBundle] = Future()
        # A daemon: a runtime that hangs must not keep the process.
        self._thread = threading.Thread(
            target=self._run, args=(open_model, opened), name="model", daemon=True
        )
        self._thread.start()
        self.model = opened.result()

    def submit(self, work: Work[T]) -> Ticket[T]:
        """Queue a work; to be called from an event loop.

        Raises:
            QueueFullError: as many wait already as may.
        """
        with self._lock:
            # Between two works the next one is still among those that wait.
            if self._load() > self.waiting:
                raise QueueFullError
            ticket = Ticket(work, self._leave)
            self._queued.add(ticket)
        self._jobs.put(ticket)
        return ticket

    @property
    def load(self) -> int:
        """How many works wait or are at work."""
        with self._lock:
            return self._load()

    def close(self) -> None:
        """Give up everything, and let go of the model."""
        with self._lock:
            everything = [*self._queued, *([self._at_work] if self._at_work else [])]
        for ticket in everything:
            ticket.give_up()
        self._jobs.put(None)
        self._thread.join(_CLOSE_S)

    def _load(self) -> int:
        return len(self._queued) + (self._at_work is not None)

    def _leave(self, ticket: Ticket[Any]) -> None:
        with self._lock:
            self._queued.discard(ticket)

    def _run(self, open_model: Callable[[], OpenBundle], opened: Future[OpenBundle]) -> None:
        try:
            model = open_model()
        except BaseException as error:  # noqa: BLE001 - it is raised where the engine is made
            opened.set_exception(error)
            return
        opened.set_result(model)
        while (ticket := self._jobs.get()) is not None:
            with self._lock:
                if ticket not in self._queued:
                    continue
                self._queued.remove(ticket)
                self._at_work = ticket
            outcome = _work(model, ticket)
            with self._lock:
                self._at_work = None
            # Only now: whoever hears of the end may ask again at once, and finds a free place.
            ticket.put(outcome)
        model.close()


def _work(model: OpenBundle, ticket: Ticket[Any]) -> object:
    """Do a work, step by step; return its end, or what it raised."""
    try:
        steps = ticket.work(model)
        for item in steps:
            if ticket.given_up.is_set():
                break
            ticket.put(item)
    except Exception as error:  # noqa: BLE001 - it is raised where the ticket is awaited
        return error
    return _END
