"""What a user may write as a budget, and the allocation of bits that keeps to it."""

from __future__ import annotations

import ctypes
import itertools
import random

import pytest

from slm_export.budget.allocation import Limit, solve
from slm_export.budget.budget import Budget, parse_bytes
from slm_export.budget.choices import FLOAT16, INT8, Choice
from slm_export.errors import InputError

FOUR = Choice(4, 32)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("600MB", 600_000_000),
        ("0.6 GB", 600_000_000),
        ("3.9mb", 3_900_000),
        (" 512KiB ", 512 << 10),
        (".5GiB", 1 << 29),
        ("1500000B", 1_500_000),
    ],
)
def test_sizes_are_read_with_their_units(text, expected):
    assert parse_bytes(text, "--max-size") == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("600", "'600' has no unit; write for example 600MB"),
        ("600 megs", "'600 megs' is no size; write for example 600MB, 0.6GB or 572MiB"),
        ("-1MB", "'-1MB' is no size"),
        ("1e3MB", "'1e3MB' is no size"),
        ("nanMB", "'nanMB' is no size"),
        ("", "'' is no size"),
        ("0MB", "'0MB' is no room at all"),
        ("0.1B", "'0.1B' is no room at all"),
    ],
)
def test_what_is_no_size_is_refused_with_an_example(text, words):
    with pytest.raises(InputError) as caught:
        parse_bytes(text, "--max-size")
    assert str(caught.value).startswith(f"--max-size: {words}")


@pytest.mark.parametrize(
    "budget",
    [
        Budget(max_perplexity_ratio=1.0),
        Budget(max_perplexity_ratio=float("nan")),
        Budget(min_cosine=1.0),
        Budget(min_tokens_per_s=0.0),
    ],
)
def test_what_no_model_can_meet_is_refused(budget):
    with pytest.raises(InputError):
        budget.check()


def test_limits_are_gates_in_the_end():
    budget = Budget(600_000_000, 1 << 30, 20.0, 1.02)
    gates = budget.gates(measured_here=True)
    assert (gates.max_bytes, gates.max_model_rss_mb) == (600_000_000, 1024)
    assert (gates.min_decode_tokens_per_s, gates.max_perplexity_ratio) == (20.0, 1.02)
    assert budget.gates(measured_here=False).min_decode_tokens_per_s is None  # a phone's speed is not ours


def test_what_the_command_line_leaves_open_is_the_files():
    assert Budget(max_size=5).over(Budget(max_size=7, max_memory=9)) == Budget(5, 9)
    assert not Budget().over(Budget())


def problem(seed: int, matrices: int = 5):
    """Return options, costs and sizes of some matrices: fewer bits take less and cost more."""
    rng = random.Random(seed)
    options = {f"w{n}": (FLOAT16, INT8, FOUR) for n in range(matrices)}
    sizes = {name: dict(zip(c, (200.0, 101.0, 56.0), strict=True)) for name, c in options.items()}
    costs = {name: {FLOAT16: 0.0, INT8: rng.random() / 100, FOUR: rng.random()} for name in options}
    return options, costs, sizes


def total(takes, chosen):
    return sum(takes[name][choice] for name, choice in chosen.items())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limit", [300.0, 420.0, 777.0])
def test_no_other_allocation_is_better(seed, limit):
    options, costs, sizes = problem(seed)
    found = solve(options, costs, [Limit("size", sizes, 10.0, limit)])
    all_of_them = [
        dict(zip(options, c, strict=True)) for c in itertools.product((FLOAT16, INT8, FOUR), repeat=5)
    ]
    best = min(total(costs, one) for one in all_of_them if total(sizes, one) + 10 <= limit)
    assert total(sizes, found) + 10 <= limit
    assert total(costs, found) == pytest.approx(best, rel=2e-4)


def test_several_limits_hold_together():
    options, costs, sizes = problem(1)
    reads = {name: {c: v if name != "w0" else 0.0 for c, v in of.items()} for name, of in sizes.items()}
    loose = solve(options, costs, [Limit("size", sizes, 0.0, 600.0)])
    tight = solve(options, costs, [Limit("size", sizes, 0.0, 600.0), Limit("speed", reads, 0.0, 300.0)])
    assert total(reads, loose) > 300 >= total(reads, tight)


def test_what_the_solver_prints_is_no_result(monkeypatch, capfd):
    """HiGHS writes to descriptor 1 through C's own buffer."""
    import scipy.optimize

    milp = scipy.optimize.milp

    def loud(*args, **kwargs):
        ctypes.CDLL(None).printf(b"HighsMipSolverData")
        return milp(*args, **kwargs)

    monkeypatch.setattr(scipy.optimize, "milp", loud)
    options, costs, sizes = problem(3)
    assert solve(options, costs, [Limit("size", sizes, 0.0, 600.0)])
    print("{}")
    captured = capfd.readouterr()
    assert captured.out == "{}\n"
    assert "HighsMipSolverData" in captured.err


def test_what_is_impossible_has_no_solution():
    options, costs, sizes = problem(2)
    limit = Limit("size", sizes, 10.0, 5 * 56 + 9.9)
    assert solve(options, costs, [limit]) is None
    assert limit.least(options) == 5 * 56 + 10
    assert solve({}, {}, [Limit("size", {}, 3.0, 4.0)]) == {}
    assert solve({}, {}, [Limit("size", {}, 5.0, 4.0)]) is None
