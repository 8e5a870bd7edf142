"""Sums without their summands: Flower's SecAgg+ from end to end in this process, with our masks."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr")

from federating import SHAPES, Client, Grid, begun, federation, update
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

from slm_export.federated.accounting import Ledger
from slm_export.federated.rounds import begin, run_rounds
from slm_export.federated.secure import MODULUS, STEPS, answer, masks, of_client
from slm_export.federated.settings import Federation
from slm_export.federated.state import State
from slm_export.federated.strategy import Screening


def member(
    settings: Federation, value: float, watch: Callable[[Message, Message], Any] | None = None
) -> Client:
    """A client that keeps to the protocol; ``watch`` may replace its answer."""
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})

    def client(message: Message) -> Any:
        # Over a network each has a message of its own; the protocol changes what it is given.
        own = deepcopy(message)
        reply = answer(settings, own, context, lambda sent, number: update(value))
        return reply if watch is None else watch(message, reply)

    return client


def stage(message: Message) -> str:
    return str(message.content.config_records[RECORD_KEY_CONFIGS][Key.STAGE])


def run(folder: Path, values: list[float], watches: dict[int, Any] | None = None, **tables: Any) -> State:
    tables.setdefault("aggregation", {"secure": True, "clip": 100.0})
    settings = federation(folder, rounds={"minimum": 2, "clients": len(values), "failures": 1}, **tables)
    noise = begin(settings, begun(), folder).noise
    clients = {n: member(settings, value, (watches or {}).get(n)) for n, value in enumerate(values, 1)}
    return run_rounds(Grid(clients), settings, folder, Screening(settings, noise, draw=np.zeros))


def near(state: State, expected: float, bound: float) -> bool:
    return all(np.all(np.abs(tensor - expected) <= bound) for tensor in state.tensors.values())


def test_the_sum_is_that_of_all_to_a_step_of_the_grid(tmp_path: Path) -> None:
    state = run(tmp_path, [1.0, 2.0, 6.0, -1.0])
    assert (state.rounds[0].drawn, state.rounds[0].good, state.rounds[0].refused) == (4, 4, {})
    assert near(state, 2.0, 2 * 100.0 / STEPS)


def test_a_client_that_drops_out_in_between_is_not_in_the_sum(tmp_path: Path) -> None:
    """It has shared its keys, and masks that the others hold for it must come off."""

    def leaves(message: Message, reply: Message) -> Any:
        return None if stage(message) == Stage.COLLECT_MASKED_VECTORS else reply

    state = run(tmp_path, [1.0, 2.0, 3.0, 50.0], {4: leaves})
    assert (state.rounds[0].good, state.rounds[0].refused) == (3, {"silent": 1})
    assert near(state, 2.0, 2 * 100.0 / STEPS)


def test_the_server_sees_nothing_but_noise_of_one_client(tmp_path: Path) -> None:
    seen: list[np.ndarray] = []

    def watch(message: Message, reply: Message) -> Message:
        if stage(message) == Stage.COLLECT_MASKED_VECTORS:
            assert not any(len(arrays) for arrays in reply.content.array_records.values())
            data = reply.content.config_records[RECORD_KEY_CONFIGS][Key.MASKED_PARAMETERS]
            seen.append(np.concatenate([of_client_array(one).ravel() for one in data]))
        return reply

    shapes = {"a": (200, 100)}
    settings = federation(
        tmp_path, rounds={"clients": 3, "failures": 1}, aggregation={"secure": True, "clip": 500.0}
    )
    begin(settings, {name: np.zeros(s, np.float32) for name, s in shapes.items()}, tmp_path)
    context = {
        n: Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={}) for n in (1, 2, 3)
    }

    def client(n: int) -> Client:
        return lambda message: watch(
            message,
            answer(
                settings,
                deepcopy(message),
                context[n],
                lambda sent, number: {"a": np.ones(shapes["a"], np.float32)},
            ),
        )

    state = run_rounds(Grid({n: client(n) for n in (1, 2, 3)}), settings, tmp_path)
    assert state.rounds[0].good == 3
    for one in seen:
        # All values are the same, and what is sent of them is uniform over the whole modulus: five standard errors
        # of the mean and of the spread.
        share = one / MODULUS
        assert abs(share.mean() - 0.5) < 5 * (1 / 12 / share.size) ** 0.5
        assert abs(share.var() * 12 - 1) < 5 * (0.8 / share.size) ** 0.5
        assert abs(np.corrcoef(seen[0], seen[1])[0, 1]) < 5 / share.size**0.5


def of_client_array(data: bytes) -> np.ndarray:
    from flwr.common import bytes_to_ndarray

    return bytes_to_ndarray(data)


def test_masks_need_the_whole_secret_and_flowers_do_not() -> None:
    """Its generator folds a secret into 32 bits by exclusive or; two secrets with the same fold are the same to it."""
    one = bytes(range(32))
    other = bytes(4) + one[:4] + one[8:32]
    folded = [int.from_bytes(one[i : i + 4], "little") for i in range(0, 32, 4)]
    assert folded[1] != 0
    swapped = one[4:8] + one[:4] + one[8:]
    shapes = [(3, 5), ()]
    theirs = [pseudo_rand_gen(seed, MODULUS, [(50,)])[0] for seed in (one, swapped)]
    np.testing.assert_array_equal(theirs[0], theirs[1])
    ours = [masks(seed, MODULUS, shapes) for seed in (one, swapped, other)]
    assert not np.array_equal(ours[0][0], ours[1][0])
    assert [value.shape for value in ours[0]] == shapes
    np.testing.assert_array_equal(ours[0][0], masks(one, MODULUS, shapes)[0])


def test_the_masks_of_both_sides_are_ours(tmp_path: Path) -> None:
    from flwr.server.workflow.secure_aggregation import secaggplus_workflow as of_server

    run(tmp_path, [1.0, 2.0, 3.0])
    assert of_client.pseudo_rand_gen is masks
    assert of_server.pseudo_rand_gen is masks


def test_an_update_is_clipped_before_it_is_hidden(tmp_path: Path) -> None:
    size = sum(int(np.prod(shape)) for shape in SHAPES.values())
    state = run(tmp_path, [1e6, 0.0, 0.0], aggregation={"secure": True, "clip": 3.0})
    assert near(state, 3.0 / size**0.5 / 3, 2 * 3.0 / STEPS)


def test_user_level_noise_is_that_of_the_clip_and_the_grid(tmp_path: Path) -> None:
    drawn: list[float] = []

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        drawn.append(1.0)
        return np.ones(shape)

    privacy = {
        "unit": "user",
        "epsilon": 1e6,
        "delta": 1e-5,
        "clip": 100.0,
        "noise": 2.0,
        "accountant": "rdp",
    }
    settings = federation(
        tmp_path, rounds={"clients": 4, "failures": 1}, aggregation={"secure": True}, privacy=privacy
    )
    noise = begin(settings, begun(), tmp_path).noise
    clients = {n: member(settings, float(n)) for n in range(1, 5)}
    state = run_rounds(Grid(clients), settings, tmp_path, Screening(settings, noise, draw=draw))
    expected = (1 + 2 + 3 + 4 + 2.0 * 100.0) / 4
    assert near(state, expected, 0.01)
    assert drawn
    assert Ledger.of(state.ledger).releases == 1


def garbage(message: Message, reply: Message) -> Message:
    if stage(message) != Stage.COLLECT_MASKED_VECTORS:
        return reply
    record = reply.content.config_records[RECORD_KEY_CONFIGS]
    data = of_client_array(record[Key.MASKED_PARAMETERS][1])
    from flwr.common import ndarray_to_bytes

    spoilt = [record[Key.MASKED_PARAMETERS][0], ndarray_to_bytes(data + MODULUS // 2)]
    record[Key.MASKED_PARAMETERS] = [*spoilt, *record[Key.MASKED_PARAMETERS][2:]]
    return reply


def wrong_kind(message: Message, reply: Message) -> Message:
    if stage(message) == Stage.SHARE_KEYS:
        reply.content.config_records[RECORD_KEY_CONFIGS] = ConfigRecord({"nothing": 1})
    return reply


def refuses(when: str) -> Any:
    return lambda message, reply: (
        Message(Error(2, "no"), reply_to=message) if stage(message) == when else reply
    )


@pytest.mark.parametrize(
    ("hostile", "told"),
    [
        (garbage, "no honest clients together have more"),
        (wrong_kind, "did not keep to the protocol"),
    ],
)
def test_what_spoils_the_sum_is_noticed_and_changes_nothing(tmp_path: Path, hostile: Any, told: str) -> None:
    state = run(tmp_path, [1.0, 2.0, 3.0, 4.0], {4: hostile})
    assert (state.rounds[0].changed, state.rounds[0].refused) == (False, {"failed": 4})
    assert told in state.rounds[0].named[0][2]
    assert near(state, 0.0, 0.0)


@pytest.mark.parametrize("when", Stage.all())
def test_one_who_leaves_at_any_step_does_not_end_the_round(tmp_path: Path, when: str) -> None:
    state = run(tmp_path, [1.0, 2.0, 3.0, 4.0, 20.0], {5: refuses(when)})
    in_the_sum = when == Stage.UNMASK
    assert (state.rounds[0].good, state.rounds[0].changed) == (5 if in_the_sum else 4, True)
    assert near(state, 6.0 if in_the_sum else 2.5, 2 * 100.0 / STEPS)


def test_two_who_leave_at_different_steps_do_not_end_it_either(tmp_path: Path) -> None:
    watches = {
        5: refuses(Stage.SETUP),
        6: refuses(Stage.COLLECT_MASKED_VECTORS),
        7: refuses(Stage.SHARE_KEYS),
    }
    values = [1.0, 2.0, 3.0, 4.0, 50.0, 60.0, 70.0, 5.0, 6.0, 7.0]
    state = run(tmp_path, values, watches)
    assert (state.rounds[0].good, state.rounds[0].changed) == (7, True)
    assert near(state, 4.0, 2 * 100.0 / STEPS)


def setup_message(**changed: Any) -> Message:
    asked = {
        Key.STAGE: Stage.SETUP,
        Key.SAMPLE_NUMBER: 4,
        Key.SHARE_NUMBER: 4,
        Key.THRESHOLD: 3,
        Key.CLIPPING_RANGE: 1.0,
        Key.TARGET_RANGE: STEPS,
        Key.MOD_RANGE: MODULUS,
        Key.MAX_WEIGHT: 1.0,
    }
    content = RecordDict({RECORD_KEY_CONFIGS: ConfigRecord(asked | changed)})
    message = Message(content, dst_node_id=1, message_type="train")
    message.metadata.__dict__["_message_id"] = "m"
    return message


@pytest.mark.parametrize(
    "changed",
    [
        {Key.SAMPLE_NUMBER: 1, Key.SHARE_NUMBER: 1},
        {Key.SAMPLE_NUMBER: 2, Key.SHARE_NUMBER: 2},
        {Key.THRESHOLD: 2},
        {Key.SHARE_NUMBER: 3},
        {Key.CLIPPING_RANGE: 1e9},
        {Key.MOD_RANGE: STEPS},
    ],
)
def test_a_client_takes_part_in_no_weaker_protocol(tmp_path: Path, changed: dict[str, Any]) -> None:
    settings = federation(tmp_path, aggregation={"secure": True})
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
    assert not answer(settings, setup_message(), context, lambda sent, number: {}).has_error()
    with pytest.raises(ValueError, match="the server asks"):
        answer(settings, setup_message(**changed), context, lambda sent, number: {})


def test_a_client_never_tells_both_secrets_of_another(tmp_path: Path) -> None:
    settings = federation(tmp_path, aggregation={"secure": True})
    content = RecordDict(
        {
            RECORD_KEY_CONFIGS: ConfigRecord(
                {Key.STAGE: Stage.UNMASK, Key.ACTIVE_NODE_ID_LIST: [1, 2, 3], Key.DEAD_NODE_ID_LIST: [3]}
            )
        }
    )
    message = Message(content, dst_node_id=1, message_type="train")
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
    with pytest.raises(ValueError, match="both secrets"):
        answer(settings, message, context, lambda sent, number: {})
