"""Sums without their summands: SecAgg+ (Bell et al., "Secure Single-Server Aggregation with (Poly)Logarithmic
Overhead", 2020), as Flower has it.

Every client adds masks to its update that cancel out in the sum; the server learns the sum, and of a client that drops
out in between nothing. It holds against a server that keeps to the protocol and looks, not against one that lies about
the clients' keys.

Three things are other than in Flower. Its masks are drawn from a Mersenne Twister with a seed of 32 bits, which is
found by trying them all; here they are a ChaCha20 key stream of the whole secret (`masks`). Its round ends where a
client leaves before its keys are shared; here it goes on without that one. And a client takes part only in the protocol
of its own settings, with as many others as they say, and tells of nobody both secrets.

What cannot be seen cannot be screened: every client clips its own update, a hostile one does not, and all that the
server can check is that the sum is one that honest clients could have.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common import Code, FitIns, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common import recorddict_compat as compat
from flwr.server.compat import LegacyContext
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.server.workflow.secure_aggregation import secaggplus_workflow as of_server
from numpy.typing import NDArray

from slm_export.federated.aggregation import clipped
from slm_export.federated.settings import Federation
from slm_export.federated.updates import Tensors, norm_of

if TYPE_CHECKING:
    from flwr.serverapp import Grid

# By its name, because its package has a function of the same name in its place.
of_client: Any = import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")

STEPS = 1 << 22
"""Of the grid that values are rounded to, over twice the clip; at random up or down, so that the mean stays."""
MODULUS = 1 << 32
_SHARES, _THRESHOLD = 1.0, 0.67
"""Everybody holds a share of everybody's secrets; two thirds of them open one."""
Train = Callable[[Sequence[NDArray[np.float32]], Mapping[str, Any]], Tensors]
"""Tensors that were sent, in the order of their names, and what was told beside them -> what changed."""


@dataclass(frozen=True)
class Sum:
    """What the server learned of a round."""

    mean: Tensors
    clients: int
    """Whose updates are in it."""


def masks(seed: bytes, modulus: int, shapes: Sequence[tuple[int, ...]]) -> list[NDArray[np.int64]]:
    """Return uniform numbers below ``modulus``, a power of 2 of at most 2^32, for each shape: a ChaCha20 key stream.

    Given   seed: a secret; two parties who hold the same get the same numbers
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    assert modulus & (modulus - 1) == 0
    key = hashlib.sha256(b"slm-export secure aggregation, masks" + seed).digest()
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    made = []
    for shape in shapes:
        data = stream.update(bytes(4 * math.prod(shape)))
        made.append((np.frombuffer(data, dtype="<u4").astype(np.int64) & (modulus - 1)).reshape(shape))
    return made


def put_masks_in_place() -> None:
    """Let both sides of Flower's protocol draw their masks by `masks`."""
    for module in (of_client, of_server):
        assert hasattr(module, "pseudo_rand_gen")
        module.pseudo_rand_gen = masks


def clip_of(federation: Federation) -> float:
    """Return the L2 norm that every client clips its update to."""
    return federation.privacy.clip if federation.privacy.unit == "user" else federation.aggregation.clip


# ------------------------------------------------------------------------------------------------------ the server's


class _Asked:
    """What Flower's workflow wants of a strategy: whom it asks what, and somebody to take the outcome."""

    def __init__(self, clients: Sequence[int], config: Mapping[str, Any]) -> None:
        self._clients, self._config = clients, dict(config)
        self.mean: list[NDArray[np.float64]] | None = None
        self.count = 0

    def configure_fit(self, number: int, parameters: Any, manager: Any) -> list[tuple[Any, FitIns]]:
        return [
            (SimpleNamespace(node_id=client), FitIns(parameters, dict(self._config)))
            for client in self._clients
        ]

    def aggregate_fit(
        self, number: int, results: Sequence[Any], failures: Any
    ) -> tuple[None, dict[str, Any]]:
        if results:
            self.mean, self.count = parameters_to_ndarrays(results[0][1].parameters), len(results)
        return None, {}

    def num_available(self) -> int:
        return len(self._clients)


class _Workflow(of_server.SecAggPlusWorkflow):  # type: ignore[misc]  # Flower is not checked
    """Whoever leaves before its masks are in any vector is no part of the round: there is nothing to take off."""

    def share_keys_stage(self, grid: Any, context: Any, state: Any) -> bool:
        """Hand on what the clients tell each other."""
        if not super().share_keys_stage(grid, context, state):
            return False
        left = set(state.active_node_ids)
        state.sampled_node_ids = left
        state.nid_to_neighbours = {client: state.nid_to_neighbours[client] & left for client in left}
        return True


def collect(
    grid: Grid,
    federation: Federation,
    clients: Sequence[int],
    number: int,
    tensors: Tensors,
    config: Mapping[str, str],
) -> Sum | str:
    """Return the sum over those who stayed to the end; or why there is none.

    Given   config: what every client is told of the server's settings
    """
    put_masks_in_place()
    names = sorted(tensors)
    asked = _Asked(clients, {**config, "server-round": number})
    state = RecordDict(
        {
            MAIN_CONFIGS_RECORD: ConfigRecord({WorkflowKey.CURRENT_ROUND: number}),
            MAIN_PARAMS_RECORD: compat.parameters_to_arrayrecord(
                ndarrays_to_parameters([tensors[name] for name in names]), keep_input=False
            ),
        }
    )
    outer = Context(run_id=0, node_id=0, node_config={}, state=state, run_config={})
    context = LegacyContext(outer, strategy=asked, client_manager=asked)  # type: ignore[arg-type,unused-ignore]
    workflow = _Workflow(
        _SHARES,
        _THRESHOLD,
        max_weight=1.0,
        clipping_range=clip_of(federation),
        quantization_range=STEPS,
        modulus_range=MODULUS,
        timeout=federation.rounds.deadline_s,
    )
    try:
        workflow(grid, context)
        if asked.mean is None:
            return "too few clients stayed to the end of the protocol"
        mean = {name: value.astype(np.float32) for name, value in zip(names, asked.mean, strict=True)}
    except Exception as error:  # noqa: BLE001
        # Flower reads the clients' answers without a guard: whatever one of them sends must not end the federation.
        return f"a client did not keep to the protocol ({type(error).__name__})"
    return _believable(Sum(mean, asked.count), tensors, federation)


def _believable(made: Sum, tensors: Tensors, federation: Federation) -> Sum | str:
    if any(made.mean[name].shape != value.shape for name, value in tensors.items()):
        return "the sum has other shapes than the tensors"
    norm, most = norm_of(made.mean), clip_of(federation) + rounding(tensors, clip_of(federation))
    if not norm <= most * (1 + 1e-5):
        return (
            f"the mean has a norm of {norm:.3g}, where no honest clients together have more than {most:.3g}"
        )
    return made


def rounding(tensors: Tensors, clip: float) -> float:
    """Return by how much the norm of an update can grow as its values are rounded to the grid."""
    return math.sqrt(sum(value.size for value in tensors.values())) * 2 * clip / STEPS


# ------------------------------------------------------------------------------------------------------ a client's


def answer(federation: Federation, message: Message, context: Context, train: Train) -> Message:
    """Take the protocol's next step; ValueError where the server asks for another protocol than the settings'."""
    put_masks_in_place()
    _refuse_another(federation, message.content.config_records[RECORD_KEY_CONFIGS])

    def learn(message: Message, context: Context) -> Message:
        asked = compat.recorddict_to_fitins(message.content, keep_input=True)
        change = train(parameters_to_ndarrays(asked.parameters), asked.config)
        made = clipped(change, clip_of(federation))
        result = FitRes(
            Status(Code.OK, ""), ndarrays_to_parameters([made[name] for name in sorted(made)]), 1, {}
        )
        return Message(compat.fitres_to_recorddict(result, keep_input=False), reply_to=message)

    reply: Message = of_client.secaggplus_mod(message, context, learn)
    return reply


def _refuse_another(federation: Federation, configs: Mapping[str, Any]) -> None:
    stage = configs.get(Key.STAGE)
    if stage == Stage.SETUP:
        count = configs.get(Key.SAMPLE_NUMBER)
        wanted = {
            Key.SHARE_NUMBER: count,
            Key.CLIPPING_RANGE: clip_of(federation),
            Key.TARGET_RANGE: STEPS,
            Key.MOD_RANGE: MODULUS,
            Key.MAX_WEIGHT: 1.0,
        }
        few = not isinstance(count, int) or count < max(3, federation.rounds.minimum)
        threshold = configs.get(Key.THRESHOLD)
        if few or any(configs.get(key) != value for key, value in wanted.items()):
            raise ValueError("the server asks for another protocol than this client's settings")
        if not isinstance(threshold, int) or not isinstance(count, int) or 2 * threshold <= count:
            raise ValueError("the server asks that half of the clients can open a secret")
    elif stage == Stage.UNMASK:
        both = set(configs.get(Key.ACTIVE_NODE_ID_LIST, ())) & set(configs.get(Key.DEAD_NODE_ID_LIST, ()))
        if both:
            raise ValueError("the server asks for both secrets of a client")
