"""Examples dealt out to clients: each once, everybody some, and as unlike as alpha says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_export.errors import InputError
from slm_export.federated.partition import Parts, dirichlet, uniform


@st.composite
def deals(draw: st.DrawFn) -> tuple[list[int], int, float, int]:
    topics = draw(st.lists(st.integers(-3, 40), min_size=1, max_size=120))
    clients = draw(st.integers(1, len(topics)))
    return topics, clients, draw(st.floats(1e-3, 1e3)), draw(st.integers(0, 2**32))


@given(deals())
def test_every_example_goes_to_one_client_and_each_gets_its_share(
    deal: tuple[list[int], int, float, int],
) -> None:
    topics, clients, alpha, seed = deal
    for parts in (dirichlet(topics, clients, alpha, seed), uniform(len(topics), clients, seed)):
        assert sorted(index for part in parts for index in part) == list(range(len(topics)))
        sizes = {len(part) for part in parts}
        assert len(parts) == clients
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1


@given(deals())
def test_the_same_seed_deals_the_same(deal: tuple[list[int], int, float, int]) -> None:
    topics, clients, alpha, seed = deal
    assert dirichlet(topics, clients, alpha, seed) == dirichlet(topics, clients, alpha, seed)
    assert uniform(len(topics), clients, seed) == uniform(len(topics), clients, seed)


def largest_share(parts: Parts, topics: list[int]) -> float:
    """Return the mean over clients of the share that a client's commonest topic has."""
    return float(
        np.mean([Counter(topics[i] for i in part).most_common(1)[0][1] / len(part) for part in parts])
    )


def test_alpha_is_what_makes_clients_unlike() -> None:
    topics = [number % 10 for number in range(2000)]
    shares = [largest_share(dirichlet(topics, 20, alpha, 0), topics) for alpha in (0.1, 1.0, 10.0, 1e4)]
    assert shares == sorted(shares, reverse=True)
    # Of 100 draws of ten topics alike, the commonest has 17 on average; of one topic alone, as long as it lasts, all.
    assert shares[0] > 0.6
    assert shares[-1] < 0.22
    assert abs(shares[-1] - largest_share(uniform(2000, 20, 0), topics)) < 0.03


def test_other_seeds_deal_otherwise() -> None:
    topics = [number % 3 for number in range(60)]
    assert dirichlet(topics, 6, 0.5, 0) != dirichlet(topics, 6, 0.5, 1)
    assert uniform(60, 6, 0) != uniform(60, 6, 1)


@pytest.mark.parametrize(
    ("clients", "alpha", "said"), [(4, 1.0, "3 examples for 4"), (0, 1.0, "at least one"), (2, 0.0, "alpha")]
)
def test_what_cannot_be_dealt_out_is_refused(clients: int, alpha: float, said: str) -> None:
    with pytest.raises(InputError, match=said):
        dirichlet([0, 1, 1], clients, alpha, 0)
