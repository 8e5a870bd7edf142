"""The server's rounds through Flower's messages and the real strategy: who counts, what is made of it, when it ends."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr")

from federating import SHAPES, Client, Grid, begun, federation, honest, reply_to, update
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from slm_export.errors import GateError, InputError, MachineError
from slm_export.federated.accounting import Budget, Ledger
from slm_export.federated.aggregation import clipped, private_mean
from slm_export.federated.rounds import SPENT, begin, require_done, run_rounds
from slm_export.federated.settings import Federation
from slm_export.federated.state import FILE, State, load_state
from slm_export.federated.strategy import Screening
from slm_export.federated.updates import Update, from_record, norm_of, to_record


def private(noise: float | None = 1.0, epsilon: float = 1e6, clip: float = 1.0) -> dict[str, Any]:
    return {"unit": "user", "epsilon": epsilon, "delta": 1e-5, "clip": clip, "accountant": "rdp"} | (
        {} if noise is None else {"noise": noise}
    )


NO_CHANGE = dict.fromkeys(SHAPES, 0.0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def run(folder: Path, clients: dict[int, Client], **tables: Any) -> State:
    settings = federation(folder, **tables)
    begin(settings, begun(), folder)
    return run_rounds(Grid(clients), settings, folder)


def values(state: State) -> dict[str, float]:
    """The one value that each tensor is full of."""
    for tensor in state.tensors.values():
        assert np.all(tensor == tensor.flat[0])
    return {name: float(tensor.flat[0]) for name, tensor in state.tensors.items()}


def test_the_mean_is_weighted_by_examples(tmp_path: Path) -> None:
    state = run(tmp_path, {1: honest(1.0, 10), 2: honest(4.0, 30)})
    assert values(state) == pytest.approx(dict.fromkeys(SHAPES, 3.25))
    assert [(done.drawn, done.good, done.changed) for done in state.rounds] == [(2, 2, True)]


def test_the_mean_is_that_of_flowers_own_fedavg(tmp_path: Path, rng: np.random.Generator) -> None:
    sent = {
        client: ({name: rng.normal(size=s).astype(np.float32) for name, s in SHAPES.items()}, int(n))
        for client, n in zip((1, 2, 3), rng.integers(5, 40, 3), strict=True)
    }
    clients = {c: (lambda message, t=t, n=n: reply_to(message, t, n)) for c, (t, n) in sent.items()}
    state = run(tmp_path, clients)
    theirs = from_record(
        aggregate_arrayrecords(
            [RecordDict({"a": to_record(t), "m": MetricRecord({"n": n})}) for t, n in sent.values()], "n"
        )
    )
    for name, value in theirs.items():
        np.testing.assert_allclose(state.tensors[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("strategy", "expected"), [("median", 2.0), ("trimmed-mean", 2.0)])
def test_robust_ways_of_aggregation(tmp_path: Path, strategy: str, expected: float) -> None:
    clients = {1: honest(1.0), 2: honest(2.0, 1000), 3: honest(9.0)}
    state = run(tmp_path, clients, aggregation={"strategy": strategy})
    assert values(state) == dict.fromkeys(SHAPES, expected)


def with_tensors(**changed: Any) -> Client:
    def client(message: Message) -> Message:
        return reply_to(message, {k: v for k, v in (update(1.0) | changed).items() if v is not None})

    return client


def poisoned(value: float) -> np.ndarray:
    made = np.zeros(SHAPES["a"], np.float32)
    made[1, 2] = value
    return made


def lying_array() -> ArrayRecord:
    """Its own words of its shape are right; its bytes are those of something else."""
    good = Array(np.zeros(SHAPES["a"], np.float32))
    lie = Array(dtype=good.dtype, shape=good.shape, stype=good.stype, data=b"\x93NUMPY and no more")
    return ArrayRecord({"a": lie, "b": Array(np.zeros(SHAPES["b"], np.float32))})


HOSTILE: dict[str, tuple[str, Client]] = {
    "wrong shape": ("shape", with_tensors(a=np.ones((3, 2), np.float32))),
    "one value for all": ("shape", with_tensors(a=np.ones((1, 1), np.float32))),
    "wrong dtype": ("shape", with_tensors(a=np.ones((2, 3), np.float16))),
    "an array of a gigabyte": ("shape", with_tensors(a=np.ones((64, 64), np.float32))),
    "NaN": ("not finite", with_tensors(a=poisoned(math.nan))),
    "infinity": ("not finite", with_tensors(a=poisoned(-math.inf))),
    "huge": ("huge", with_tensors(a=np.full((2, 3), 1e30, np.float32))),
    "missing tensor": ("names", with_tensors(b=None)),
    "extra tensor": ("names", with_tensors(embedding=np.ones(4, np.float32))),
    "no examples": ("examples", honest(1.0, 0)),
    "absurd number of examples": ("examples", honest(1.0, 10**12)),
    "fraction of an example": ("examples", lambda message: reply_to(message, update(1.0), 0.5)),
    "bytes that are no array": ("malformed", lambda message: reply_to(message, lying_array())),
    "no records": ("malformed", lambda message: Message(RecordDict(), reply_to=message)),
    "wrong nonce": ("replayed", lambda message: reply_to(message, update(1.0), nonce="0" * 32)),
    "nonce that is not ASCII": ("replayed", lambda message: reply_to(message, update(1.0), nonce="ü")),
    "its own error": ("failed", lambda message: Message(Error(2, "my own words"), reply_to=message)),
    "silence": ("silent", lambda message: None),
}


# With user-level privacy every update is clipped, and none refused for its norm.
CASES = [(unit, kind) for unit in ("none", "user") for kind in HOSTILE if (unit, kind) != ("user", "huge")]


@pytest.mark.parametrize(("unit", "kind"), CASES)
def test_a_hostile_client_changes_nothing_and_is_named(tmp_path: Path, kind: str, unit: str) -> None:
    reason, client = HOSTILE[kind]
    tables = {"privacy": private(clip=100.0)} if unit == "user" else {}
    settings = federation(tmp_path, rounds={"clients": 3}, **tables)
    noise = begin(settings, begun(), tmp_path).noise
    grid = Grid({1: honest(1.0), 2: honest(3.0), 666: client})
    state = run_rounds(grid, settings, tmp_path, Screening(settings, noise, draw=np.zeros))
    done = state.rounds[0]
    assert (done.drawn, done.good, done.changed) == (3, 2, True)
    assert done.refused == {reason: 1}
    assert [(name, why) for name, why, _ in done.named] == [(666, reason)]
    assert "my own words" not in str(done.named)
    # of three expected, with the fixed divisor of private means; of two that came, without
    assert values_near(state, 4.0 / 3 if unit == "user" else 2.0)


def values_near(state: State, expected: float) -> bool:
    return all(np.allclose(tensor, expected, atol=1e-5) for tensor in state.tensors.values())


def test_an_honest_round_of_before_that_is_sent_again_is_refused(tmp_path: Path) -> None:
    kept: list[Message] = []

    def replays(message: Message) -> Message:
        if kept:
            return Message(kept[0].content, reply_to=message)
        kept.append(reply_to(message, update(1.0)))
        return kept[0]

    clients = {1: honest(1.0), 2: honest(1.0), 666: replays}
    state = run(tmp_path, clients, rounds={"number": 3})
    assert [done.refused for done in state.rounds] == [{}, {"replayed": 1}, {"replayed": 1}]
    assert values(state) == dict.fromkeys(SHAPES, 3.0)


def test_a_second_answer_to_the_same_message_is_refused(tmp_path: Path) -> None:
    def twice(message: Message) -> list[Message]:
        return [reply_to(message, update(1.0)), reply_to(message, update(1.0))]

    state = run(tmp_path, {1: honest(3.0), 666: twice})
    assert state.rounds[0].refused == {"replayed": 1}
    assert values(state) == dict.fromkeys(SHAPES, 2.0)


def test_an_answer_of_somebody_who_was_not_asked_is_refused(tmp_path: Path) -> None:
    def for_another(message: Message) -> list[Message]:
        forged = reply_to(message, update(50.0))
        forged.metadata.__dict__["_src_node_id"] = 777
        return [reply_to(message, update(1.0)), forged]

    state = run(tmp_path, {1: honest(1.0), 2: for_another})
    assert state.rounds[0].refused == {"foreign": 1}
    assert values(state) == dict.fromkeys(SHAPES, 1.0)


def test_flowers_word_that_a_client_is_gone_is_silence(tmp_path: Path) -> None:
    def gone(message: Message) -> Message:
        message.metadata.__dict__["_dst_node_id"] = SUPERLINK_NODE_ID
        return Message(Error(5, "node unavailable"), reply_to=message)

    state = run(tmp_path, {2: honest(1.0), 3: honest(3.0), 4: gone})
    assert (state.rounds[0].good, state.rounds[0].refused) == (2, {"silent": 1})
    assert [name for name, _, _ in state.rounds[0].named] == [4]


def test_one_client_cannot_outweigh_the_rest_by_its_number_of_examples(tmp_path: Path) -> None:
    state = run(tmp_path, {1: honest(0.1), 2: honest(0.1), 3: honest(0.4, 900_000)})
    assert state.rounds[0].weighs_less == 1
    # ten times the median number, of 10 + 10 + 100
    assert values_near(state, (0.1 * 20 + 0.4 * 100) / 120)


def test_a_majority_decides_what_is_huge(tmp_path: Path) -> None:
    huge = {1: honest(1.0), 2: honest(11.0), 3: honest(1.2)}
    assert run(tmp_path, huge, aggregation={"largest": 10.0}).rounds[0].refused == {}
    other = tmp_path / "other"
    assert run(other, huge, aggregation={"largest": 9.0}).rounds[0].refused == {"huge": 1}


def test_a_round_with_too_few_good_updates_changes_nothing(tmp_path: Path) -> None:
    bad = HOSTILE["NaN"][1]
    settings = federation(tmp_path, rounds={"number": 9, "minimum": 2, "failures": 2})
    begin(settings, begun(), tmp_path)
    state = run_rounds(Grid({1: honest(1.0), 2: bad, 3: bad}), settings, tmp_path)
    assert [(done.good, done.changed) for done in state.rounds] == [(1, False), (1, False)]
    assert values(state) == NO_CHANGE
    with pytest.raises(GateError, match=r"round 2: 1 good updates, of at least 2 \(2 not finite\)"):
        require_done(settings, state)


def test_tensors_that_float32_could_not_hold_are_not_taken(tmp_path: Path) -> None:
    settings = federation(tmp_path)
    begin(settings, {name: np.full(s, 3e38, np.float32) for name, s in SHAPES.items()}, tmp_path)
    state = run_rounds(Grid({1: honest(3e38), 2: honest(3e38)}), settings, tmp_path)
    assert not state.rounds[0].changed
    assert values_near(state, 3e38)


def test_more_clients_than_belong_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"6 clients are there, and rounds.clients = 5"):
        run(tmp_path, {number: honest(1.0) for number in range(6)})


def test_every_message_has_a_nonce_of_its_own_and_goes_to_few(tmp_path: Path) -> None:
    settings = federation(tmp_path, rounds={"clients": 40, "number": 3, "fraction": 0.25})
    begin(settings, begun(), tmp_path)
    grid = Grid({number: honest(1.0) for number in range(40)})
    run_rounds(grid, settings, tmp_path)
    assert len(grid.sent) == 30
    assert len({message.content.config_records["config"]["nonce"] for message in grid.sent}) == 30


# ---------------------------------------------------------------- user-level privacy


def test_every_update_is_clipped_over_all_its_tensors_together(rng: np.random.Generator) -> None:
    tensors = {name: rng.normal(size=s).astype(np.float32) * 50 for name, s in SHAPES.items()}
    made = clipped(tensors, 2.0)
    flat = np.concatenate([value.ravel() for value in made.values()])
    assert np.linalg.norm(flat) == pytest.approx(2.0)
    assert np.linalg.norm(flat) <= 2.0
    direction = np.concatenate([value.ravel() for value in tensors.values()])
    assert flat @ direction == pytest.approx(2.0 * np.linalg.norm(direction))
    for name, value in clipped(tensors, 1e9).items():
        np.testing.assert_array_equal(value, tensors[name])


def test_the_private_mean_is_sum_of_clipped_plus_noise_over_a_fixed_number(rng: np.random.Generator) -> None:
    updates = [
        Update(c, {name: rng.normal(size=s).astype(np.float32) for name, s in SHAPES.items()}, 1 + 99 * c, {})
        for c in range(3)
    ]
    drawn: list[np.ndarray] = []

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        drawn.append(rng.normal(size=shape))
        return drawn[-1]

    made = private_mean(updates, begun(), 0.5, 1.5, 8.0, draw)
    for (name, value), noise in zip(made.items(), drawn, strict=True):
        scale = [min(1.0, 0.5 / norm_of(one.tensors)) for one in updates]
        summed = sum(one.tensors[name].astype(float) * s for one, s in zip(updates, scale, strict=True))
        np.testing.assert_allclose(value, (summed + 1.5 * 0.5 * noise) / 8.0, rtol=1e-6)


def test_no_client_can_move_the_sum_by_more_than_the_clip(rng: np.random.Generator) -> None:
    """The bound that the accountant counts on, whatever is sent."""
    quiet = np.zeros
    others = [Update(c, update(float(rng.normal())), 10, {}) for c in range(4)]
    for size in (1e-6, 1.0, 1e30, 3e38):
        one = Update(9, update(size), 1_000_000, {})
        with_it = private_mean([*others, one], begun(), 1.0, 0.0, 1.0, quiet)
        without = private_mean(others, begun(), 1.0, 0.0, 1.0, quiet)
        moved = {name: with_it[name].astype(float) - without[name] for name in SHAPES}
        assert norm_of({k: v.astype(np.float32) for k, v in moved.items()}) <= 1.0 + 1e-6


def test_an_empty_round_of_a_private_federation_changes_nothing_but_is_counted(tmp_path: Path) -> None:
    settings = federation(
        tmp_path, rounds={"number": 2, "clients": 4, "fraction": 0.5, "failures": 0}, privacy=private()
    )
    begin(settings, begun(), tmp_path)
    silent: Client = lambda message: None  # noqa: E731
    state = run_rounds(Grid({1: silent, 2: silent, 3: silent}), settings, tmp_path)
    assert values(state) == NO_CHANGE
    assert Ledger.of(state.ledger).releases == 2


def test_each_client_is_drawn_by_itself_with_the_accountants_probability(tmp_path: Path) -> None:
    """Poisson, not a fixed number: over many rounds both the mean and the spread are those of a binomial."""
    settings = federation(tmp_path, rounds={"clients": 100, "fraction": 0.3, "number": 1}, privacy=private())
    strategy = Screening(settings, 1.0)
    grid = Grid({number: honest(1.0) for number in range(100)})
    counts = np.array([len(strategy._drawn(grid)) for _ in range(2000)])  # type: ignore[arg-type]
    # mean 30, variance 21: five standard errors of each
    assert abs(counts.mean() - 30) < 5 * math.sqrt(21 / 2000)
    assert abs(counts.var() / 21 - 1) < 5 * math.sqrt(2 / 2000)


def test_the_budget_stops_the_rounds_before_it_is_exceeded(tmp_path: Path) -> None:
    epsilon = Ledger().plus(2.0, 1.0, 3).epsilon(1e-5, "rdp") + 1e-9
    settings = federation(
        tmp_path, rounds={"number": 10, "clients": 4}, privacy=private(noise=2.0, epsilon=epsilon)
    )
    begin(settings, begun(), tmp_path)
    grid = Grid({number: honest(1.0) for number in range(4)})
    state = run_rounds(grid, settings, tmp_path)
    assert len(state.rounds) == 3
    assert state.stopped == SPENT
    assert len(grid.sent) == 12, "nobody is asked in a round that is not allowed"
    spent = Ledger.of(state.ledger)
    budget = Budget(epsilon, 1e-5, "rdp")
    assert budget.allows(spent)
    assert not budget.allows(spent.plus(2.0, 1.0))
    assert state.rounds[-1].epsilon == pytest.approx(epsilon, abs=1e-6)
    require_done(settings, state)
    again = run_rounds(grid, settings, tmp_path)
    assert len(again.rounds) == 3
    assert len(grid.sent) == 12, "nor when the command is typed again"


def test_noise_is_found_that_lets_all_rounds_be_made(tmp_path: Path) -> None:
    settings = federation(
        tmp_path, rounds={"number": 4, "clients": 4}, privacy=private(noise=None, epsilon=3.0)
    )
    state = begin(settings, begun(), tmp_path)
    assert state.noise is not None
    state = run_rounds(Grid({number: honest(1.0) for number in range(4)}), settings, tmp_path)
    assert len(state.rounds) == 4
    assert state.stopped is None
    spent = Ledger.of(state.ledger).epsilon(1e-5, "rdp")
    assert 2.5 < spent <= 3.0


def test_with_privacy_no_figure_of_a_client_is_kept(tmp_path: Path) -> None:
    client = honest(1.0, loss_before=5.0, loss_after=4.0)
    open_state = run(tmp_path / "open", {1: client, 2: client})
    assert (open_state.rounds[0].loss_before, open_state.rounds[0].loss_after) == (5.0, 4.0)
    closed = run(tmp_path / "closed", {1: client, 2: client}, privacy=private(noise=1.0))
    assert (closed.rounds[0].loss_before, closed.rounds[0].loss_after) == (None, None)


# ---------------------------------------------------------------- going on


def test_a_killed_server_goes_on_with_the_same_round(tmp_path: Path) -> None:
    """The kill comes in the midst of round 2; what was complete stays, and the result is that of one run."""

    class Killed(BaseException):
        pass

    def fatal(message: Message) -> Message:
        if message.content.config_records["config"]["server-round"] == 2:
            raise Killed
        return reply_to(message, update(2.0))

    settings: Federation = federation(tmp_path, rounds={"number": 3})
    begin(settings, begun(), tmp_path)
    with pytest.raises(Killed):
        run_rounds(Grid({1: honest(1.0), 2: fatal}), settings, tmp_path)
    kept = load_state(tmp_path)
    assert kept is not None
    assert len(kept.rounds) == 1
    with pytest.raises(MachineError, match="type the command again"):
        require_done(settings, kept)
    begin(settings, update(9.0), tmp_path)  # begins nothing anew
    grid = Grid({1: honest(1.0), 2: honest(2.0)})
    state = run_rounds(grid, settings, tmp_path)
    assert [done.number for done in state.rounds] == [1, 2, 3]
    assert grid.sent[0].content.config_records["config"]["server-round"] == 2
    assert values(state) == dict.fromkeys(SHAPES, 4.5)


def test_a_state_that_is_cut_short_is_not_taken_for_one(tmp_path: Path) -> None:
    begin(federation(tmp_path), begun(), tmp_path)
    data = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(data[:-5])
    with pytest.raises(MachineError, match="cannot be read"):
        load_state(tmp_path)
