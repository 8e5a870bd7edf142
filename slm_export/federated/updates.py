"""What travels, and what the server lets in: differences of the tensors that learn, and nothing else of a model.

Every reply is read as a stranger's. It counts if it answers this round's message to this client and nothing before it,
carries every tensor that learns and no other, each float32 and of the right shape, without a NaN or an infinity, and
claims a believable number of examples. What does not is refused, with the reason, and never reaches the mean.
"""

from __future__ import annotations

import hmac
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Message, RecordDict

Tensors = Mapping[str, NDArray[np.float32]]
ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
"""Names of a message's records."""
Reason = Literal[
    "failed", "silent", "foreign", "replayed", "malformed", "names", "shape", "not finite", "examples", "huge"
]
_HEADER = 1024
"""Bytes that NumPy's format may take beside the values."""


@dataclass(frozen=True)
class Update:
    """A client's part of a round."""

    client: int
    tensors: Tensors
    """New values less those that were sent."""
    examples: int
    figures: Mapping[str, float]
    """What it measured: loss_before, loss_after, epsilon; those of them that it sent."""

    @property
    def norm(self) -> float:
        """L2 norm over all tensors together."""
        return norm_of(self.tensors)


@dataclass(frozen=True)
class Refused:
    """An answer that does not count, or one that did not come."""

    client: int
    reason: Reason
    detail: str = ""


@dataclass(frozen=True)
class Screened:
    """A round's answers."""

    good: tuple[Update, ...]
    refused: tuple[Refused, ...]

    def counts(self) -> dict[str, int]:
        """Return how many were refused, by reason."""
        reasons = [one.reason for one in self.refused]
        return {reason: reasons.count(reason) for reason in sorted(set(reasons))}


@dataclass(frozen=True)
class Sent:
    """What a round asked for."""

    nonces: Mapping[int, str]
    """Client -> the secret that its answer must bring back, drawn for this message alone."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of the tensors that learn."""
    most_examples: int


class _RefusedError(Exception):
    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason: Reason = reason


def norm_of(tensors: Tensors) -> float:
    """Return the L2 norm over all tensors together."""
    return math.sqrt(sum(float(np.sum(np.square(one, dtype=np.float64))) for one in tensors.values()))


def to_record(tensors: Tensors) -> ArrayRecord:
    """Return tensors as Flower sends them."""
    from flwr.app import Array, ArrayRecord

    return ArrayRecord({name: Array(np.ascontiguousarray(value)) for name, value in tensors.items()})


def from_record(record: ArrayRecord) -> dict[str, NDArray[np.float32]]:
    """Return the tensors of a record that this program made itself."""
    return {name: array.numpy() for name, array in record.items()}


def screen(replies: Iterable[Message], sent: Sent) -> Screened:
    """Read a round's replies.

    Given   replies: in the order in which they came; of two by the same client the second is a replay
    """
    from flwr.common.constant import SUPERLINK_NODE_ID

    good: dict[int, Update] = {}
    refused: list[Refused] = []
    answered: set[int] = set()
    for reply in replies:
        client = reply.metadata.src_node_id
        if client == SUPERLINK_NODE_ID and reply.has_error():
            continue  # Flower's own word that a client is gone: it stays silent, as counted below
        try:
            update = _read(reply, client, sent, client in answered)
            good[client] = update
        except _RefusedError as error:
            refused.append(Refused(client, error.reason, str(error)))
        answered.add(client)
    refused += [Refused(client, "silent") for client in sent.nonces if client not in answered]
    return Screened(tuple(good.values()), tuple(refused))


def refuse_huge(screened: Screened, largest: float) -> Screened:
    """Refuse updates whose norm is more than ``largest`` times the median one; of two in the middle the smaller counts.

    A majority of honest clients decides what is usual; this holds against a few that are not, and against one's own
    mistakes, but not against a majority.
    """
    if not screened.good:
        return screened
    norms = sorted(update.norm for update in screened.good)
    bound = largest * norms[(len(norms) - 1) // 2]
    huge = [
        Refused(update.client, "huge", f"norm {update.norm:.3g}, of at most {bound:.3g}")
        for update in screened.good
        if update.norm > bound
    ]
    left = {one.client for one in huge}
    good = tuple(update for update in screened.good if update.client not in left)
    return Screened(good, (*screened.refused, *huge))


def _read(reply: Message, client: int, sent: Sent, again: bool) -> Update:
    if client not in sent.nonces:
        raise _RefusedError("foreign", "was not asked in this round")
    if reply.has_error():
        # Of the reason only the number: its text is the client's, and may say what it likes.
        raise _RefusedError("failed", f"error {reply.error.code}")
    content = reply.content
    nonce = _only(content, CONFIG, "config_records").get("nonce")
    if (
        again
        or not isinstance(nonce, str)
        or not hmac.compare_digest(nonce.encode(), sent.nonces[client].encode())
    ):
        raise _RefusedError("replayed", "answers another message than the one it was sent, or a second time")
    metrics = _only(content, METRICS, "metric_records")
    examples = metrics.get("num-examples")
    if isinstance(examples, bool) or not isinstance(examples, int) or not 1 <= examples <= sent.most_examples:
        raise _RefusedError("examples", f"claims {examples!r:.40} examples, of 1 to {sent.most_examples}")
    tensors = _tensors(_only(content, ARRAYS, "array_records"), sent.shapes)
    return Update(client, tensors, examples, _figures(metrics))


def _only(content: RecordDict, name: str, kind: str) -> Any:
    records = getattr(content, kind)
    if list(records) != [name]:
        raise _RefusedError("malformed", f"has {len(records)} {kind}, and not the one named '{name}'")
    return records[name]


def _figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    made = {}
    for name in ("loss-before", "loss-after", "epsilon"):
        value = metrics.get(name)
        if isinstance(value, int | float) and math.isfinite(value):
            made[name.replace("-", "_")] = float(value)
    return made


def _tensors(
    record: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> dict[str, NDArray[np.float32]]:
    names = set(record)
    if missing := sorted(set(shapes) - names):
        raise _RefusedError("names", f"lacks {len(missing)} tensors, {missing[0]} first")
    if extra := sorted(names - set(shapes)):
        raise _RefusedError("names", f"brings {len(extra)} tensors that do not learn")
    return {name: _tensor(name, record[name], tuple(shapes[name])) for name in shapes}


def _tensor(name: str, array: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    values = math.prod(shape)
    if len(array.data) > 4 * values + _HEADER:
        raise _RefusedError("shape", f"{name}: {len(array.data)} bytes for {values} values")
    try:
        value = array.numpy()
    except Exception as error:
        # Whatever NumPy's reader makes of a stranger's bytes: it must not end the round.
        raise _RefusedError("malformed", f"{name}: cannot be read ({type(error).__name__})") from error
    if value.dtype != np.float32 or value.shape != shape:
        raise _RefusedError("shape", f"{name}: {value.dtype} {value.shape}, and not float32 {shape}")
    if not np.isfinite(value).all():
        raise _RefusedError("not finite", f"{name}: holds NaN or infinity")
    return np.asarray(value, dtype=np.float32)
