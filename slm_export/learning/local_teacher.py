"""A teacher in a folder: transformers generates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from slm_export.errors import InputError
from slm_export.learning import models
from slm_export.learning.chats import prompt_ids
from slm_export.learning.generating import write
from slm_export.learning.teaching import INSTRUCTION, Question, Solution
from slm_export.source.provenance import source_sha256
from slm_export.source.tasks import GENERATION


class LocalTeacher:
    """A model folder that writes solutions; see `ReasoningTeacher`."""

    at_once = 1

    def __init__(
        self, folder: Path, *, temperature: float = 0.7, max_tokens: int = 1024, chunk: int = 16
    ) -> None:
        """Load the model; InputError where it does not generate text, or as of `models.load`."""
        self._model = models.load(folder)
        if self._model.task != GENERATION:
            raise InputError(
                f"{folder}: a model for {self._model.task}; a teacher of reasoning generates text"
            )
        self._temperature, self._max_tokens, self.chunk = temperature, max_tokens, chunk
        self.identity: Mapping[str, object] = {
            "folder": folder.resolve().name,
            "sha256": source_sha256(folder),
            "temperature": temperature,
            "max_tokens": max_tokens,
            "chunk": chunk,
            "instruction": INSTRUCTION,
        }

    def solve(self, questions: Sequence[Question]) -> list[Solution]:
        """Return a solution for each question; see `ReasoningTeacher`."""
        tokenizer = self._model.tokenizer
        prompts = [prompt_ids(tokenizer, question.problem, INSTRUCTION) for question in questions]
        made = write(
            self._model, prompts, self._max_tokens, temperature=self._temperature, seed=questions[0].seed
        )
        return [Solution(each.text, each.finished) for each in made]
