"""``federation.toml``: what learns, from whose texts, in how many rounds, and how private it is.

    out = "adapter"

    [model]
    base = "model"

    [data]
    texts = ["notes"]

    [rounds]
    number  = 10
    clients = 20

Server and clients read the same file; each needs the sections that it uses. Relative paths are relative to the folder
of the file. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from slm_export.errors import InputError
from slm_export.tomlfile import read_model

Text = Annotated[str, Field(min_length=1)]
_MOST_SECURE = 1000
"""Clients whose sum the numbers of secure aggregation hold."""
Unit = Literal["none", "user", "example"]


def _address(text: str) -> str:
    found = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):(\d{1,5})", text)
    if found is None or not 0 < int(found[2]) < 65536:
        raise ValueError(f"{text!r} is no address; write host:port, as in fleet.example.org:9092")
    return text


Address = Annotated[str, AfterValidator(_address)]


class Table(BaseModel):
    """A table of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)


class Model(Table):
    """What is taught."""

    base: Text
    """Checkpoint folder; frozen, and the same at the server and at every client."""
    learns: Literal["adapter", "head"] = "adapter"
    rank: int = Field(default=4, ge=1, le=256)
    """Of the adapter."""
    targets: tuple[Text, ...] = ()
    """Linear layers that get one; none: those that peft takes for the family."""
    bits: Literal[4, 8, 32] = 32
    """Of the frozen matrices, whose values are then those that an export ships: 4 in groups of 32 with embeddings of 8,
    or 8; 32: as the checkpoint has them."""
    start: Text | None = None
    """An adapter folder, or for a head a checkpoint, of an earlier federation to go on from."""
    seed: int = Field(default=0, ge=0)
    """Of the tensors to begin with."""


class Anonymise(Table):
    """How personal data is taken out of the texts before anything is learned (docs/privacy.md)."""

    how: Literal["replace", "drop"] = "replace"
    only: tuple[Text, ...] = ()
    entities: Text | None = None
    ner: Text | None = None


class Data(Table):
    """A client's own texts."""

    texts: tuple[Text, ...] = Field(min_length=1)
    """Files and folders."""
    anonymise: bool | Anonymise = False

    @property
    def anonymiser(self) -> Anonymise | None:
        """How to anonymise; None: not at all."""
        return (
            (Anonymise() if self.anonymise else None) if isinstance(self.anonymise, bool) else self.anonymise
        )


class Rounds(Table):
    """How often the clients learn together."""

    number: int = Field(default=3, ge=1, le=100_000)
    clients: int = Field(ge=1, le=100_000)
    """That belong to the federation, whether they are there or not."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """Share that takes part in a round; with ``privacy.unit = "user"`` the probability of each one, by itself."""
    minimum: int = Field(default=2, ge=1)
    """Good updates that a round needs; with fewer it changes nothing."""
    available: int | None = Field(default=None, ge=1)
    """Clients that a round waits for before it draws, up to ``deadline_s``; None: ``minimum``."""
    deadline_s: float = Field(default=600.0, ge=1)
    """Who answers later is left out of the round."""
    failures: int = Field(default=3, ge=0)
    """Rounds in a row that may fail before the federation is given up."""

    @model_validator(mode="after")
    def _can_be_met(self) -> Rounds:
        if self.minimum > self.cohort:
            raise ValueError(
                f"minimum = {self.minimum} can never be met: {self.fraction:g} of {self.clients} clients are "
                f"{self.cohort}"
            )
        return self

    @property
    def cohort(self) -> int:
        """Clients of a round; by user-level sampling, on average. At least 1."""
        return max(1, round(self.fraction * self.clients))


class Local(Table):
    """What a client does in a round."""

    steps: int = Field(default=10, ge=1, le=100_000)
    batch: int = Field(default=4, ge=1)
    """Examples of a step; with ``privacy.unit = "example"`` on average."""
    length: int = Field(default=128, ge=8)
    """Tokens of an example at most."""
    rate: float = Field(default=1e-3, gt=0)
    """Learning rate."""
    seed: int = Field(default=0, ge=0)


class Privacy(Table):
    """What nobody shall be able to tell from the result, and how surely."""

    unit: Unit = "none"
    """user: whether a client took part at all; the server clips and adds noise. example: whether a text was among a
    client's; the client does, by Opacus."""
    epsilon: float | None = Field(default=None, gt=0)
    """The budget. No round, and no step, is made that would exceed it."""
    delta: float | None = Field(default=None, gt=0, lt=1)
    clip: float = Field(default=1.0, gt=0)
    """L2 norm that an update (user), or the gradient of a text (example), is clipped to."""
    noise: float | None = Field(default=None, gt=0)
    """Standard deviation over ``clip``; None: the least that keeps all rounds within the budget."""
    accountant: Literal["rdp", "prv"] = "prv"

    @model_validator(mode="after")
    def _declared(self) -> Privacy:
        given = [name for name in ("epsilon", "delta") if getattr(self, name) is not None]
        fields = type(self).model_fields
        if self.unit == "none" and any(
            getattr(self, name) != field.default for name, field in fields.items()
        ):
            raise ValueError('says how private it is but not for whom; give unit = "user" or "example"')
        if self.unit != "none" and len(given) != 2:
            raise ValueError(f'unit = "{self.unit}" needs a budget: give epsilon and delta')
        return self


class Aggregation(Table):
    """How updates become one."""

    strategy: Literal["mean", "median", "trimmed-mean"] = "mean"
    """mean: weighted by examples (McMahan et al. 2017). The others, by value, bear some hostile clients (Yin et al.
    2018), but not with user-level privacy."""
    trim: float = Field(default=0.1, gt=0, lt=0.5)
    """Share that trimmed-mean leaves out at either end."""
    largest: float = Field(default=10.0, gt=1)
    """An update is refused whose norm is so many times the median one of its round; not with user-level privacy,
    where every one is clipped."""
    most_examples: int = Field(default=1_000_000, ge=1)
    """That a client can claim to have learned from."""
    secure: bool = False
    """Sum without seeing the single ones (SecAgg+, Bell et al. 2020); see docs/federated.md for what it costs."""
    clip: float = Field(default=1.0, gt=0)
    """With ``secure``: L2 norm that every client clips its own update to; with user-level privacy it is that one's."""


class Simulation(Table):
    """How ``federate simulate`` makes clients of [data]."""

    partition: Literal["dirichlet", "uniform"] = "dirichlet"
    alpha: float = Field(default=0.5, gt=0)
    """Of the Dirichlet distribution (Hsu et al. 2019): the smaller, the less alike the clients."""
    seed: int = Field(default=0, ge=0)
    workers: int = Field(default=1, ge=1, le=256)
    """Processes that train; each holds a base model."""


class Server(Table):
    """Where the server listens, and what it proves itself with."""

    listen: Address = "127.0.0.1:9092"
    certificate: Text
    """PEM, with those that lead to the CA which clients know."""
    key: Text
    """PEM."""
    clients: Text
    """A folder with a public key of each client that may take part: ``*.pub``, in OpenSSH's form."""


class Client(Table):
    """Where a client finds the server, and what it proves itself with."""

    server: Address
    ca: Text
    """PEM; no other is believed."""
    key: Text
    """Its private key: of a NIST curve, in OpenSSH's form, without a passphrase (``ssh-keygen -t ecdsa -b 384``)."""
    state: Text = "federation-client"
    """Folder in which it remembers what it has spent of its budget."""


class Federation(Table):
    """The whole file; paths are absolute once it was read."""

    out: Text = "federated"
    """Folder of the result."""
    model: Model
    data: Data | None = None
    rounds: Rounds
    local: Local = Local()
    privacy: Privacy = Privacy()
    aggregation: Aggregation = Aggregation()
    simulation: Simulation = Simulation()
    server: Server | None = None
    client: Client | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> Federation:
        if self.privacy.unit == "user" and self.aggregation.strategy != "mean":
            raise ValueError(
                f'aggregation.strategy = "{self.aggregation.strategy}" and privacy.unit = "user" do not go together: '
                'the noise is that of a mean; give "mean"'
            )
        if self.aggregation.secure and self.aggregation.strategy != "mean":
            raise ValueError('aggregation.secure sums, and goes with strategy = "mean" alone')
        if self.aggregation.secure and not 3 <= self.rounds.cohort <= _MOST_SECURE:
            raise ValueError(
                f"aggregation.secure hides one client among others: it goes with 3 to {_MOST_SECURE} in a round, and "
                f"these are {self.rounds.cohort}"
            )
        return self

    def agreed(self) -> dict[str, Any]:
        """Return what server and clients must have in common, as JSON values; no paths, nothing of one machine."""
        model = self.model.model_dump(mode="json", exclude={"base", "start"})
        parts = ("rounds", "local", "privacy", "aggregation")
        return {"model": model} | {part: getattr(self, part).model_dump(mode="json") for part in parts}

    @property
    def sha256(self) -> str:
        """Of what is agreed."""
        return hashlib.sha256(json.dumps(self.agreed(), sort_keys=True).encode()).hexdigest()


_PATHS = {
    "model": ("base", "start"),
    "server": ("certificate", "key", "clients"),
    "client": ("ca", "key", "state"),
}


def read_federation(path: Path) -> Federation:
    """Read the file.

    Raises:
        InputError: it is missing or wrong.
    """
    found = read_model(path, Federation)
    folder = path.absolute().parent
    changed: dict[str, Any] = {"out": str(folder / found.out)}
    for name, keys in _PATHS.items():
        if (table := getattr(found, name)) is not None:
            changed[name] = table.model_copy(update={key: _at(folder, getattr(table, key)) for key in keys})
    if found.data is not None:
        changed["data"] = found.data.model_copy(
            update={"texts": tuple(str(folder / text) for text in found.data.texts)}
        )
    made = found.model_copy(update=changed)
    if not os.path.isfile(os.path.join(made.model.base, "config.json")):
        raise InputError(
            f"{path}: model.base: {made.model.base} is no checkpoint folder (it has no config.json)"
        )
    return made


def _at(folder: Path, text: str | None) -> str | None:
    return None if text is None else str(folder / text)
