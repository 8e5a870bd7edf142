"""How the next token is chosen, and when text ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from slm_export.errors import InputError
from slm_export.generation import Sampling, choose, generate
from slm_export.runtime import DecoderSession

GREEDY = Sampling()


class Counting:
    """A session whose likeliest next token is the last one plus 1; it writes down what it is fed."""

    prefill_chunk = 4
    stop_ids = ()
    bos_id = vocabulary = None

    def __init__(self, context: int = 100) -> None:
        self.context = context
        self.fed: list[tuple[list[int], int]] = []

    def logits(self, tokens: Sequence[int], start: int) -> Tensor:
        assert 0 < len(tokens) <= self.context - start, "beyond the context"
        self.fed.append((list(tokens), start))
        return torch.nn.functional.one_hot(torch.tensor(tokens[-1] + 1), 200).float()

    def metadata(self) -> Mapping[str, Any]:
        return {}

    def close(self) -> None:
        pass


def drawn(logits: Tensor, sampling: Sampling, count: int = 2000) -> Tensor:
    """Return how often each token is chosen."""
    generator = torch.Generator().manual_seed(sampling.seed)
    tokens = torch.tensor([choose(logits, sampling, generator) for _ in range(count)])
    return torch.bincount(tokens, minlength=len(logits)) / count


def test_it_counts_and_every_token_is_fed_once_at_its_place():
    session = Counting()
    assert isinstance(session, DecoderSession)
    assert list(generate(session, [5, 6], [], 4, GREEDY)) == [7, 8, 9, 10]
    assert session.fed == [([5, 6], 0), ([7], 2), ([8], 3), ([9], 4)]


def test_a_stop_token_ends_it_and_is_not_shown():
    assert list(generate(Counting(), [5], [3, 8], 100, GREEDY)) == [6, 7]
    assert list(generate(Counting(), [5], [6], 100, GREEDY)) == []


def test_it_ends_with_the_context():
    # The last token needs no room: nothing is asked of it.
    assert list(generate(Counting(context=6), [0, 1, 2], [], 100, GREEDY)) == [3, 4, 5, 6]


def test_tokens_come_as_they_are_made():
    session = Counting()
    stream = generate(session, [5], [], 100, GREEDY)
    assert session.fed == []
    assert next(stream) == 6
    assert len(session.fed) == 1


@pytest.mark.parametrize(("prompt", "problem"), [([], "the prompt is empty"), ([1] * 6, "has 6 tokens, but")])
def test_a_prompt_that_cannot_be_continued(prompt, problem):
    with pytest.raises(InputError, match=problem):
        list(generate(Counting(context=6), prompt, [], 10, GREEDY))


def test_temperature_0_takes_the_likeliest():
    assert drawn(torch.tensor([0.0, 2.0, 1.9]), GREEDY, 50).tolist() == [0, 1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_by_their_probabilities(temperature):
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    found = drawn(logits, Sampling(temperature))
    # Four standard deviations of a share of 2000 draws: 4 * sqrt(0.25 / 2000).
    assert torch.allclose(found, (logits / temperature).softmax(-1), atol=0.045)


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for top_p, kept in ((0.0, 1), (0.4, 1), (0.6, 2), (0.9, 3), (0.96, 4), (1.0, 4)):
        found = drawn(logits, Sampling(1.0, top_p), 400)
        assert (found > 0).tolist() == [True] * kept + [False] * (4 - kept), top_p


def test_what_top_p_keeps_keeps_its_proportions():
    found = drawn(torch.tensor([0.15, 0.5, 0.05, 0.3]).log(), Sampling(1.0, 0.8))
    assert torch.allclose(found, torch.tensor([0, 5 / 8, 0, 3 / 8]), atol=0.045)


def test_the_seed_decides():
    logits = torch.zeros(200)

    class Flat(Counting):
        def logits(self, tokens: Sequence[int], start: int) -> Tensor:
            return logits

    runs = [list(generate(Flat(), [1], [], 20, Sampling(1.0, seed=seed))) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("temperature", [1e-310, 1e-30, 1e30])
def test_no_temperature_breaks_the_arithmetic(temperature):
    logits = torch.tensor([5.0, 80.0, -80.0])
    chosen = choose(logits, Sampling(temperature, 0.9), torch.Generator().manual_seed(0))
    assert chosen == 1 or temperature > 1
