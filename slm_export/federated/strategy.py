"""Flower's strategy: who is asked, which answers count, and what they make together.

Flower's own wrappers for privacy are not used: they sample a fixed number, weigh clients by what they claim, divide by
the number that came, and draw their noise from a generator that is not made for it; none of it is what an accountant
of the sampled Gaussian mechanism counts. What Flower's `FedAvg` does without privacy is what this does, to the last
rounding (tests hold the two against each other), behind a screen.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy

from slm_export.errors import InputError
from slm_export.federated import aggregation
from slm_export.federated.noise import gaussian
from slm_export.federated.settings import Federation
from slm_export.federated.state import Round
from slm_export.federated.updates import (
    ARRAYS,
    CONFIG,
    Screened,
    Sent,
    Tensors,
    Update,
    from_record,
    refuse_huge,
    screen,
    to_record,
)

if TYPE_CHECKING:
    from flwr.app import ArrayRecord
    from flwr.serverapp import Grid

    from slm_export.federated.secure import Sum

_LOOK_S = 1.0
"""Between two looks at who is there."""


class Screening(Strategy):  # type: ignore[misc]  # Flower is not checked
    """One federation's strategy; holds what the round under way has asked for."""

    def __init__(
        self, federation: Federation, noise: float | None, draw: aggregation.Noise | None = None
    ) -> None:
        """Prepare.

        Given   noise: the noise multiplier of user-level privacy; None: there is none at the server
                draw: where noise comes from; None: `noise.gaussian`
        """
        self._federation = federation
        self._noise = noise
        self._draw = draw or gaussian
        self._asked: tuple[int, Sent, Tensors] | None = None
        self.done: Round | None = None
        """What came of the round that was aggregated last."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw clients and return a message for each, with a nonce of its own."""
        tensors = from_record(arrays)
        nonces = {client: secrets.token_hex(16) for client in self._drawn(grid)}
        shapes = {name: value.shape for name, value in tensors.items()}
        sent = Sent(nonces, shapes, self._federation.aggregation.most_examples)
        self._asked = (server_round, sent, tensors)
        return [
            Message(
                RecordDict(
                    {
                        ARRAYS: arrays,
                        CONFIG: ConfigRecord({**config, "server-round": server_round, "nonce": nonce}),
                    }
                ),
                dst_node_id=client,
                message_type=MessageType.TRAIN,
                group_id=str(server_round),
            )
            for client, nonce in nonces.items()
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new tensors; None where too few answers were good."""
        assert self._asked is not None, "a round is asked before it is aggregated"
        asked, sent, tensors = self._asked
        assert asked == server_round
        self._asked = None
        screened = screen(replies, sent)
        if self._noise is None:
            screened = refuse_huge(screened, self._federation.aggregation.largest)
        enough = len(screened.good) >= self._federation.rounds.minimum
        made = self._changed(tensors, screened.good) if enough else None
        self.done = self._told(server_round, sent, screened, changed=made is not None)
        return (None if made is None else to_record(made)), None

    def sum_securely(
        self, grid: Grid, number: int, tensors: Tensors, config: Mapping[str, str]
    ) -> Tensors | None:
        """Return the tensors after a round in which only the sum of the updates was seen; None where it failed."""
        from slm_export.federated import secure

        drawn = self._drawn(grid)
        made = secure.collect(grid, self._federation, drawn, number, tensors, config)
        count = 0 if isinstance(made, str) else made.clients
        after = None
        if not isinstance(made, str) and count >= self._federation.rounds.minimum:
            after = self._after_sum(tensors, made)
        left = len(drawn) - count
        self.done = Round(
            number=number,
            drawn=len(drawn),
            good=count,
            refused={"silent" if count else "failed": left} if left else {},
            named=((0, "failed", made),) if isinstance(made, str) else (),
            changed=after is not None,
        )
        return after

    def _after_sum(self, tensors: Tensors, made: Sum) -> Tensors | None:
        change = made.mean
        if self._noise is not None:
            from slm_export.federated.secure import rounding

            clip = self._federation.privacy.clip
            most = clip + rounding(tensors, clip)
            expected = self._federation.rounds.fraction * self._federation.rounds.clients
            change = aggregation.noised_sum(
                {name: value.astype(np.float64) * made.clients for name, value in made.mean.items()},
                most * self._noise,
                expected,
                self._draw,
            )
        return _finite({name: value + change[name] for name, value in tensors.items()})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody: clients measure as they train, and a further measurement would be a further release."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return nothing, as nothing was asked."""
        return None

    def summary(self) -> None:
        """Say nothing: the report does."""

    def _drawn(self, grid: Grid) -> list[int]:
        """Return who takes part, by the system's random numbers."""
        rounds = self._federation.rounds
        chance = secrets.SystemRandom()
        there = self._there(grid)
        if self._noise is not None:
            return [client for client in there if chance.random() < rounds.fraction]
        return chance.sample(there, min(rounds.cohort, len(there)))

    def _there(self, grid: Grid) -> list[int]:
        """Wait until enough clients are there, and no longer than a round may take."""
        rounds = self._federation.rounds
        until = time.monotonic() + rounds.deadline_s
        wanted = rounds.available or rounds.minimum
        while len(there := sorted(grid.get_node_ids())) < wanted and time.monotonic() < until:
            time.sleep(_LOOK_S)
        if len(there) > rounds.clients:
            raise InputError(
                f"{len(there)} clients are there, and rounds.clients = {rounds.clients} belong to the federation; "
                "privacy and means count on that number: correct it, or take keys away"
            )
        return there

    def _changed(self, tensors: Tensors, good: tuple[Update, ...]) -> Tensors | None:
        """Return the tensors after the round; None where they would leave what float32 can hold."""
        change = self._together(good, tensors)
        with np.errstate(over="ignore"):
            return _finite({name: value + change[name] for name, value in tensors.items()})

    def _together(self, good: tuple[Update, ...], tensors: Tensors) -> Tensors:
        settings, rounds = self._federation.aggregation, self._federation.rounds
        if self._noise is not None:
            expected = rounds.fraction * rounds.clients
            return aggregation.private_mean(
                good, tensors, self._federation.privacy.clip, self._noise, expected, self._draw
            )
        if settings.strategy == "median":
            return aggregation.median(good)
        if settings.strategy == "trimmed-mean":
            return aggregation.trimmed_mean(good, settings.trim)
        return aggregation.mean(good, aggregation.weights_of(good, self._largest))

    @property
    def _largest(self) -> float | None:
        # With privacy of either kind a number of examples is what is to be hidden.
        return self._federation.aggregation.largest if self._federation.privacy.unit == "none" else None

    def _told(self, number: int, sent: Sent, screened: Screened, changed: bool) -> Round:
        good = screened.good
        open_figures = good if self._federation.privacy.unit == "none" else ()
        spent = [update.figures["epsilon"] for update in good if "epsilon" in update.figures]
        return Round(
            number=number,
            drawn=len(sent.nonces),
            good=len(good),
            refused=screened.counts(),
            named=tuple((one.client, one.reason, one.detail) for one in screened.refused),
            changed=changed,
            weighs_less=self._weighs_less(good),
            loss_before=_mean([u.figures["loss_before"] for u in open_figures if "loss_before" in u.figures]),
            loss_after=_mean([u.figures["loss_after"] for u in open_figures if "loss_after" in u.figures]),
            epsilon=max(spent, default=None) if self._federation.privacy.unit == "example" else None,
        )

    def _weighs_less(self, good: tuple[Update, ...]) -> int:
        if self._largest is None or not good or self._federation.aggregation.strategy != "mean":
            return 0
        bound = self._largest * sorted(update.examples for update in good)[(len(good) - 1) // 2]
        return sum(update.examples > bound for update in good)


def _finite(tensors: Tensors) -> Tensors | None:
    return tensors if all(np.isfinite(value).all() for value in tensors.values()) else None


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None
