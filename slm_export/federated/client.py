"""A client: it is sent tensors, learns from its own texts, and sends back what changed.

Flower calls it with a message and a context. It answers nothing but training, and only a server whose settings are
word for word its own: what it gives away is what its own file says. Of what goes wrong here the server hears a number
alone, since an error's words could be those of a text.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from slm_export.errors import InputError, SlmExportError
from slm_export.federated.settings import Anonymise, Data, Federation, Model, Privacy, Simulation
from slm_export.federated.state import write_whole
from slm_export.federated.updates import ARRAYS, CONFIG, METRICS, Tensors, from_record, to_record

if TYPE_CHECKING:
    from slm_export.federated.accounting import Ledger
    from slm_export.federated.base import Base
    from slm_export.federated.examples import Examples
    from slm_export.federated.local import Learned

OTHER_SETTINGS, CANNOT_LEARN, BUDGET_SPENT = 1001, 1002, 1003
"""What a client's error says, in numbers: its settings are others; it could not learn; it has spent its budget."""
LEDGER = "ledger.json"


@dataclass(frozen=True)
class Station:
    """Where clients live."""

    federation: Federation
    state: Path
    """Folder of what they remember."""
    parts: int | None = None
    """Clients that the texts are dealt out to, in a simulation; None: one has them all."""


def answer(station: Station, message: Message, context: Context) -> Message:
    """Learn, and return the reply; an error reply where that is impossible."""
    part = _part(station, context)
    if station.federation.aggregation.secure:
        return _answer_in_sums(station, message, context, part)
    config = message.content.config_records.get(CONFIG, {})
    try:
        _refuse_another(station.federation, config)
        tensors = from_record(message.content.array_records[ARRAYS])
        learned, change = _learn(station, tensors, int(config["server-round"]), part)
    except _SpentError as error:
        return _error(message, BUDGET_SPENT, str(error))
    except _AnotherError as error:
        return _error(message, OTHER_SETTINGS, str(error))
    except SlmExportError as error:
        return _error(message, CANNOT_LEARN, str(error))
    content = RecordDict(
        {
            ARRAYS: to_record(change),
            METRICS: MetricRecord(_figures(learned, station.federation.privacy)),
            CONFIG: ConfigRecord({"nonce": config["nonce"]}),
        }
    )
    return Message(content, reply_to=message)


def _answer_in_sums(station: Station, message: Message, context: Context, part: int | None) -> Message:
    from slm_export.federated import secure

    def train(sent: Sequence[NDArray[np.float32]], config: Mapping[str, Any]) -> Tensors:
        _refuse_another(station.federation, config)
        names = sorted(_base(station.federation.model.model_dump_json()).begun)
        return _learn(station, dict(zip(names, sent, strict=True)), int(config["server-round"]), part)[1]

    try:
        return secure.answer(station.federation, message, context, train)
    except Exception as error:  # noqa: BLE001
        # Flower would send the server the words of whatever is raised.
        return _error(message, CANNOT_LEARN, f"{type(error).__name__}: {error}")


def _refuse_another(federation: Federation, config: Mapping[str, Any]) -> None:
    if config.get("settings") != federation.sha256:
        raise _AnotherError("the server's settings are not those of this client's file")
    if config.get("base") != _sha256(federation.model.base):
        raise _AnotherError(f"the server's base is another model than {federation.model.base}")


class _AnotherError(SlmExportError):
    """The server's federation is not this client's."""


class _SpentError(SlmExportError):
    """The client's own budget allows nothing more."""


def _learn(
    station: Station, tensors: Tensors, number: int, part: int | None
) -> tuple[Learned, dict[str, NDArray[np.float32]]]:
    """Return what was learned, and what changed by it."""
    from slm_export.federated.local import difference, train

    federation = station.federation
    base = _base(federation.model.model_dump_json())
    examples = _examples(base, federation, station.parts, part)
    place = station.state if part is None else station.state / f"client-{part}"
    _say(f"round {number}: learns from {len(examples)} examples")
    learned = train(
        base,
        tensors,
        examples,
        federation.local,
        federation.privacy,
        _seed(federation.local.seed, number, part),
        _read_ledger(place),
        rounds=federation.rounds.number,
    )
    if learned.ledger is not None and federation.privacy.unit == "example":
        # On the disk before anything leaves: a client that is killed now has spent it all the same.
        _write_ledger(learned.ledger, place)
    if learned.exhausted and not learned.steps:
        raise _SpentError("its privacy budget allows no further step")
    return learned, difference(learned.tensors, tensors)


def _figures(learned: Learned, privacy: Privacy) -> dict[str, int | float]:
    """Return what the server is told: with privacy of either kind no number that texts decide."""
    if privacy.unit == "none":
        assert learned.loss_before is not None
        assert learned.loss_after is not None
        return {
            "num-examples": learned.examples,
            "loss-before": learned.loss_before,
            "loss-after": learned.loss_after,
        }
    if privacy.unit == "user":
        return {"num-examples": 1}
    assert learned.ledger is not None
    assert privacy.delta is not None
    return {"num-examples": 1, "epsilon": learned.ledger.epsilon(privacy.delta, privacy.accountant)}


def _error(message: Message, code: int, why: str) -> Message:
    _say(f"takes no part in the round: {why}")
    return Message(Error(code, "see the client's own log"), reply_to=message)


def _say(what: str) -> None:
    """Tell whoever runs the client, on stderr; the server hears nothing of it."""
    print(f"slm-export federate client (process {os.getpid()}): {what}", file=sys.stderr, flush=True)


def _part(station: Station, context: Context) -> int | None:
    return None if station.parts is None else int(context.node_config["partition-id"])


def _seed(seed: int, number: int, part: int | None) -> int:
    digest = hashlib.sha256(json.dumps([seed, number, part]).encode()).digest()
    return int.from_bytes(digest[:4], "big")


@lru_cache(maxsize=1)
def _base(model: str) -> Base:
    """Return the base: read once in a process, used for every message."""
    from slm_export.federated.base import open_base

    return open_base(Model.model_validate_json(model))


@lru_cache(maxsize=1)
def _sha256(folder: str) -> str:
    from slm_export.source.provenance import source_sha256

    return source_sha256(Path(folder))


def _examples(base: Base, federation: Federation, parts: int | None, part: int | None) -> Examples:
    if federation.data is None:
        raise InputError("[data] is missing: a client needs texts of its own")
    every = _read(base, federation.data, federation.local.length)
    if parts is None or part is None:
        return every
    return every.take(_dealt(every, parts, federation.simulation)[part])


_READ: dict[tuple[Data, int], Examples] = {}
"""The texts that were read last: the same for each message."""


def _read(base: Base, data: Data, length: int) -> Examples:
    from slm_export.federated.examples import read_examples

    if (data, length) not in _READ:
        made = read_examples(base, [Path(text) for text in data.texts], length, rewriter(data.anonymiser))
        _READ.clear()
        _READ[data, length] = made
    return _READ[data, length]


def _dealt(examples: Examples, parts: int, how: Simulation) -> tuple[tuple[int, ...], ...]:
    from slm_export.federated import partition

    if how.partition == "uniform":
        return partition.uniform(len(examples), parts, how.seed)
    return partition.dirichlet(examples.topics, parts, how.alpha, how.seed)


def rewriter(asked: Anonymise | None) -> Callable[[str], str] | None:
    """Return what takes personal data out of a text; None: nothing does."""
    if asked is None:
        return None
    from slm_export.privacy.anonymise import Anonymiser
    from slm_export.privacy.entities import read_entities
    from slm_export.privacy.finder import Finder

    own = read_entities(Path(asked.entities)) if asked.entities else ()
    return Anonymiser(Finder(asked.only or None, own, asked.ner), asked.how).text


def _read_ledger(place: Path) -> Ledger:
    from slm_export.federated.accounting import Ledger

    path = place / LEDGER
    if not path.exists():
        return Ledger()
    try:
        return Ledger.of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: what was spent of the budget cannot be read ({error}); restore it from a copy"
        ) from error


def _write_ledger(ledger: Ledger, place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    write_whole(place / LEDGER, (json.dumps(ledger.recorded()) + "\n").encode())
