"""A mistake that is made once in a prompt is seen, and a faithful artifact is not accused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slm_export import fidelity
from slm_export.evaltext import load_documents
from slm_export.fidelity.prompts import judge_prompts
from slm_export.fidelity.vocabularies import OneVocabulary, Passage
from slm_export.graph.model import build_reference
from slm_export.source.load import load_checkpoint
from slm_export.tokenization.tokenizer import SourceTokenizer

CONTEXT = 150
LIMIT = fidelity.default_gates("text-generation", 8).max_prompt_kl_max or 0

Place = Callable[[int, int], tuple[int, int]]
"""How many tokens of a turn are dropped at its beginning, and where the rest is put, by its length and its place."""


class Runtime:
    """A decoder with a cache of tokens, computed by a torch model."""

    def __init__(self, model: nn.Module, place: Place) -> None:
        self.context, self.prefill_chunk = CONTEXT, CONTEXT
        self.stop_ids, self.bos_id, self.vocabulary = (1,), 0, None
        self.turns: list[tuple[int, int]] = []
        self._model, self._place, self._cache = model, place, [5] * CONTEXT

    @torch.no_grad()
    def logits(self, tokens: Sequence[int], start: int) -> Tensor:
        self.turns.append((start, len(tokens)))
        dropped, at = self._place(len(tokens), start)
        kept = list(tokens)[dropped:]
        self._cache[at : at + len(kept)] = kept
        ids = torch.tensor([self._cache[: at + len(kept)]])
        logits: Tensor = self._model(input_ids=ids, use_cache=False).logits[0, -1]
        return logits

    def metadata(self) -> Mapping[str, Any]:
        return {}

    def close(self) -> None:
        pass


class Leftover:
    """Positions of the conversation before are kept as long as there is room."""

    def __init__(self) -> None:
        self._begins, self._end = 0, 0

    def __call__(self, length: int, start: int) -> tuple[int, int]:
        if start == 0:
            self._begins = self._end if self._end + 40 < CONTEXT else 0
        self._end = self._begins + start + length
        return 0, self._begins + start


@pytest.fixture(scope="module")
def model(pycode: Path) -> nn.Module:
    return build_reference(load_checkpoint(pycode))


@pytest.fixture(scope="module")
def tokenizer(pycode: Path) -> SourceTokenizer:
    return SourceTokenizer.load(pycode)


@pytest.fixture(scope="module")
def passages(tokenizer: SourceTokenizer) -> tuple[Passage, ...]:
    return OneVocabulary(tokenizer).passages(load_documents(None), 100, 400)


def test_a_faithful_artifact_is_not_accused(
    model: nn.Module, tokenizer: SourceTokenizer, passages: Sequence[Passage]
) -> None:
    session = Runtime(model, lambda length, start: (0, start))
    assert judge_prompts(model, session, passages, tokenizer, 4096).kl_max < 1e-5
    starts = [start for start, _ in session.turns]
    assert starts.count(0) == 7, "conversations begin anew"
    first = session.turns[: starts.index(0, 1)]
    assert sum(length for _, length in first) == CONTEXT, "every place of the cache is used"
    assert {length for _, length in first} > {1}


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(lambda length, start: (int(start == 0 and length > 8), start), id="first token lost"),
        pytest.param(
            lambda length, start: (length - 1, start + length - 1), id="only the last token is read"
        ),
        pytest.param(lambda length, start: (0, min(start, CONTEXT - 20 - length)), id="last places"),
        pytest.param(lambda length, start: (0, max(0, start - (start > 1))), id="one place early"),
        pytest.param(
            lambda length, start: (0, min(start + (start > 0), CONTEXT - length)), id="one place late"
        ),
    ],
)
def test_a_mistake_in_a_prompt_is_seen(
    place: Place, model: nn.Module, tokenizer: SourceTokenizer, passages: Sequence[Passage]
) -> None:
    found = judge_prompts(model, Runtime(model, place), passages, tokenizer, 4096)
    assert found.kl_max > LIMIT > 0, found


def test_what_a_conversation_leaves_behind_is_seen(
    model: nn.Module, tokenizer: SourceTokenizer, passages: Sequence[Passage]
) -> None:
    # As where the first conversation does not fill the cache.
    found = judge_prompts(model, Runtime(model, Leftover()), passages, tokenizer, 60)
    assert found.kl_max > LIMIT
    assert "a new one" in found.detail


def test_scores_that_are_no_numbers_are_the_worst(
    model: nn.Module, tokenizer: SourceTokenizer, passages: Sequence[Passage]
) -> None:
    class Broken(Runtime):
        def logits(self, tokens: Sequence[int], start: int) -> Tensor:
            return super().logits(tokens, start) * (float("nan") if start == 32 else 1)

    found = judge_prompts(model, Broken(model, lambda length, start: (0, start)), passages, tokenizer, 4096)
    assert found.kl_max != found.kl_max


def test_a_cache_of_few_places_is_enough(
    model: nn.Module, tokenizer: SourceTokenizer, passages: Sequence[Passage]
) -> None:
    session = Runtime(model, lambda length, start: (0, start))
    session.context = 6
    assert judge_prompts(model, session, passages, tokenizer, 4096).kl_max < 1e-5
    assert max(start + length for start, length in session.turns) == 6


def test_a_long_rope_is_asked_up_to_where_it_turns_otherwise(
    model: nn.Module, tokenizer: SourceTokenizer, passages: Sequence[Passage]
) -> None:
    class Long(nn.Module):
        config = SimpleNamespace(
            get_text_config=lambda: SimpleNamespace(
                rope_parameters={"rope_type": "longrope", "original_max_position_embeddings": 40}
            )
        )

        def forward(self, **given: Any) -> Any:
            return model(**given)

    session = Runtime(model, lambda length, start: (0, start))
    judge_prompts(Long(), session, passages, tokenizer, 4096)
    assert max(start + length for start, length in session.turns) == 40
