"""Clients and a grid in this process, for tests of the server's part: Flower's own messages, without its network."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# flwr reads these as it is imported
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from slm_export.federated.settings import Federation
from slm_export.federated.updates import ARRAYS, CONFIG, METRICS, from_record, to_record

# Flower's processes learn it of their server; messages carry it.
TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1

Client = Callable[[Message], "Message | list[Message] | None"]
SHAPES = {"a": (2, 3), "b": (4,)}


def begun() -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}


def update(value: float) -> dict[str, np.ndarray]:
    return {name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()}


def reply_to(
    message: Message,
    tensors: Mapping[str, Any],
    examples: Any = 10,
    nonce: str | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Message:
    own = message.content.config_records[CONFIG]["nonce"]
    content = RecordDict(
        {
            ARRAYS: tensors if isinstance(tensors, ArrayRecord) else to_record(tensors),
            METRICS: MetricRecord({"num-examples": examples, **(metrics or {})}),
            CONFIG: ConfigRecord({"nonce": own if nonce is None else nonce}),
        }
    )
    return Message(content, reply_to=message)


def honest(value: float, examples: int = 10, **metrics: float) -> Client:
    """Sends a change of ``value`` everywhere."""
    told = {name.replace("_", "-"): figure for name, figure in metrics.items()}
    return lambda message: reply_to(message, update(value), examples, metrics=told)


@dataclass
class Grid:
    """What a strategy asks of Flower's: who is there, and their answers."""

    clients: dict[int, Client]
    sent: list[Message] = field(default_factory=list)

    def get_node_ids(self) -> list[int]:
        return list(self.clients)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        made: list[Message] = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"m{len(self.sent)}"
            self.sent.append(message)
            answer = self.clients[message.metadata.dst_node_id](message)
            made += answer if isinstance(answer, list) else [] if answer is None else [answer]
        return made

    def tensors(self, index: int) -> dict[str, np.ndarray]:
        return from_record(self.sent[index].content.array_records[ARRAYS])


def federation(folder: Path, **tables: Any) -> Federation:
    rounds = {"clients": 5, "number": 1, "minimum": 2, "deadline_s": 1.0} | tables.pop("rounds", {})
    return Federation.model_validate(
        {"out": str(folder / "out"), "model": {"base": str(folder)}, "rounds": rounds, **tables}
    )


def free_port() -> int:
    """A port below those that the system gives to whoever asks for any: nobody takes it until it is listened at."""
    chance = random.SystemRandom()
    while True:
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port := chance.randrange(20_000, 30_000)))
            return port
