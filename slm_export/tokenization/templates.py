"""Chat templates are programs that came with a model: rendered in a sandbox, and within bounds.

transformers renders them in Jinja's `ImmutableSandboxedEnvironment` (jinja2 3.1.6 or newer), which reaches no file, no
process and no private attribute. It bounds neither time nor memory: two nested loops, or one product of a text and a
number, would take the machine along. Both are bounded here, memory on Linux alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from slm_export.errors import InputError

SECONDS = 5.0
"""Of processor time of this thread; a template of the hub takes some milliseconds."""
MEMORY = 512 << 20
"""Bytes of address space that rendering may add."""


def render_chat(backend: Any, messages: Any, where: str, *, answer: bool) -> str:
    """Return a chat as the template of a transformers tokenizer writes it.

    Given   where: what errors begin with
            answer: whether the text ends where the answer begins

    Raises:
        InputError: the template fails, takes too long, or makes too much.
    """
    try:
        with _bounded_time(), _bounded_memory():
            text = backend.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    except _TooLong:
        raise InputError(f"{where}: the chat template takes longer than {SECONDS:g} s; correct it") from None
    except (MemoryError, RecursionError) as error:
        raise InputError(f"{where}: the chat template makes too much ({type(error).__name__})") from None
    except Exception as error:  # a template is the model's own program: it can fail in any way
        lines = str(error).strip().splitlines() or [""]
        raise InputError(f"{where}: the chat template fails: {type(error).__name__}: {lines[0]}") from error
    return str(text)


class _TooLong(BaseException):
    """No handler of a template's may swallow it."""


@contextmanager
def _bounded_time() -> Iterator[None]:
    """Look at the clock at every line of a template; another tracer, such as a debugger, comes back afterwards."""
    end = time.thread_time() + SECONDS

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if time.thread_time() > end:
            raise _TooLong
        return trace if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """Let an allocation far beyond what is taken now fail, instead of the machine."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():  # only Linux tells what is taken
        yield
        return
    import resource

    taken = int(statm.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = taken + MEMORY
    if soft != resource.RLIM_INFINITY:
        bound = min(bound, soft)
    resource.setrlimit(resource.RLIMIT_AS, (bound, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
