"""Where commands say what they do and what came out: progress on stderr, outcomes on stdout."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from slm_export.bundles.scratch import scratch
from slm_export.native_log import kept_from_terminal
from slm_export.progress import Progress, StderrConsole


@contextmanager
def working() -> Iterator[Progress]:
    """Show progress on the real stderr, and keep the compilers' own words away from it."""
    # Set before transformers is imported: neither notes on other frameworks nor network calls are wanted.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with kept_from_terminal() as stderr, scratch():
        yield Progress(StderrConsole(stderr))


def stdout() -> Console:
    """Return where outcomes are printed."""
    return Console(soft_wrap=False, highlight=False)


def print_json(document: object) -> None:
    """Print the one JSON document of a command."""
    print(json.dumps(document, ensure_ascii=False, indent=2))
