"""What the tests of delegates share: files of delegates, and bundles that answer without a model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from slm_export.delegates.config import Delegates, Nearest, Sampling, load_delegates
from slm_export.delegates.local import Answer, Bundles, Show

BUNDLE = "a-bundle"


class Echo(Bundles):
    """Bundles that answer with the prompt; ``tokens`` are words."""

    def __init__(
        self, confidence: float | None = 1.0, before: Callable[[str], None] = lambda _: None
    ) -> None:
        super().__init__()
        self.asked: list[str] = []
        self._confidence, self._before = confidence, before
        self._counting = threading.Lock()

    def tokens(self, bundle: str, format: str | None, prompt: str) -> int:
        return len(prompt.split())

    def answer(
        self,
        bundle: str,
        format: str | None,
        prompt: str,
        sampling: Sampling,
        nearest: Nearest | None = None,
        show: Show = lambda _: None,
        adapter: str | None = None,
    ) -> Answer:
        self._before(prompt)
        with self._counting:
            self.asked.append(prompt)
        for piece in ("echo ", prompt):
            show(piece)
        return Answer(f"echo {prompt}", "local", self._confidence)


def written(folder: Path, text: str) -> Path:
    """Write a file of delegates, and beside it what passes for a bundle until it is opened."""
    folder.mkdir(exist_ok=True)
    (folder / BUNDLE).mkdir(exist_ok=True)
    (folder / BUNDLE / "manifest.json").write_text("{}")
    file = folder / "delegates.toml"
    file.write_text(text, encoding="utf-8")
    return file


def delegates(folder: Path, text: str) -> Delegates:
    return load_delegates(written(folder, text))
