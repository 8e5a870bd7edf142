"""``delegates.toml``: the delegates of a machine.

    [delegates.sorter]
    bundle  = "mail-sorter"
    trigger = { watch = "inbox" }
    output  = { file = "sorted.jsonl" }

Relative paths are relative to the folder of the file. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from slm_export.delegates.triggers import Duration, Table, Text, Trigger, exactly_one
from slm_export.errors import InputError
from slm_export.network import is_loopback
from slm_export.tomlfile import read_model

PLACEHOLDERS = ("text", "path", "time")
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{text!r} is no http or https address")
    return text


Url = Annotated[str, AfterValidator(_url)]


class Sampling(Table):
    """How the answer's tokens are chosen, and whether they are shown as they come."""

    temperature: float = Field(default=0.0, ge=0, le=2)
    top_p: float = Field(default=1.0, ge=0, le=1)
    max_tokens: int = Field(default=256, ge=1)
    seed: int = 0
    stream: bool = False
    """Standard output gets the answer as it is written, and an endpoint sends it in pieces."""


class Nearest(Table):
    """How an embedding model answers: with the answer of the nearest entry."""

    file: Text
    least: float = Field(default=0.0, ge=-1, le=1)
    """The least cosine of an entry that is near enough."""
    otherwise: str = ""
    """The answer where none is."""


class Remote(Table):
    """An OpenAI-compatible endpoint."""

    url: Url
    model: Text
    token_env: Text | None = None
    """The variable with its key."""
    timeout: Duration = "60s"
    retries: int = Field(default=2, ge=0, le=10)


class Rule(Table):
    """When a delegate that is ``local-then-remote`` asks the endpoint; any one of them is enough."""

    longer_than: int | None = Field(default=None, ge=1)
    """Tokens of the input."""
    confidence_below: float | None = Field(default=None, gt=0, le=1)
    """Of the local answer: the best label's score, the nearest entry's cosine, or the mean probability of the likeliest
    token at each step."""
    busy_above: float | None = Field(default=None, gt=0)
    """Load average for each core."""
    hotter_than: float | None = Field(default=None, gt=0)
    """Degrees Celsius of the hottest sensor."""

    @model_validator(mode="after")
    def _says_something(self) -> Rule:
        if not self.model_fields_set:
            raise ValueError("says nothing; give longer_than, confidence_below, busy_above or hotter_than")
        return self


class Output(Table):
    """Where the answer goes; exactly one of the first four."""

    file: Text | None = None
    """A line of JSON for each answer."""
    stdout: bool = False
    webhook: Url | None = None
    command: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    """A program and its arguments, without a shell; the answer is its standard input."""
    timeout: Duration = "30s"
    attempts: int = Field(default=3, ge=1, le=20)

    @model_validator(mode="after")
    def _one_kind(self) -> Output:
        exactly_one(self, ("file", "stdout", "webhook", "command"))
        return self


class Delegate(Table):
    """One standing job."""

    bundle: Text | None = None
    format: Text | None = None
    adapter: Text | None = None
    """One of the bundle's, which is on for this delegate's answers; none: the base answers."""
    prompt: Text = "{text}"
    """What the model is given; {text} is the input, {path} a file's name, {time} when it was set off."""
    trigger: Trigger
    where: Literal["local", "remote", "local-then-remote"] = "local"
    private: bool = False
    """Inputs and answers never leave this machine."""
    nearest: Nearest | None = None
    """Of an embedding model."""
    personal_data: Literal["stay", "replace", "send"] | None = None
    """What becomes of an input that could leave and is found to hold personal data; by default it stays."""
    sampling: Sampling = Field(default_factory=Sampling)
    remote: Remote | None = None
    rule: Rule | None = None
    output: Output

    @property
    def screened(self) -> bool:
        """Whether its inputs are looked through for personal data."""
        return self.remote is not None and not self.private and self.personal_data != "send"

    @model_validator(mode="after")
    def _goes_together(self) -> Delegate:
        if self.where != "remote" and self.bundle is None:
            raise ValueError(f"where = '{self.where}' needs a bundle")
        if (self.where != "local") != (self.remote is not None):
            raise ValueError("[remote] and where = 'remote' or 'local-then-remote' belong together")
        if (self.where == "local-then-remote") != (self.rule is not None):
            raise ValueError("[rule] and where = 'local-then-remote' belong together")
        if self.adapter is not None and self.bundle is None:
            raise ValueError("adapter needs a bundle, which has one of that name")
        if self.nearest is not None and self.bundle is None:
            raise ValueError("nearest needs a bundle, of an embedding model")
        if self.personal_data is not None and (self.remote is None or self.private):
            raise ValueError("personal_data is of use where inputs could leave alone")
        odd = set(re.findall(r"\{([a-z_]+)\}", self.prompt)) - set(PLACEHOLDERS)
        if odd:
            raise ValueError(
                f"prompt: unknown {{{sorted(odd)[0]}}}; there are {{text}}, {{path}} and {{time}}"
            )
        return self

    @property
    def shown(self) -> bool:
        """Whether its answers are shown as they are written."""
        return self.sampling.stream and self.output.stdout

    @model_validator(mode="after")
    def _streams(self) -> Delegate:
        if self.sampling.stream and not self.output.stdout and self.remote is None:
            raise ValueError("sampling.stream is of use with output = { stdout = true } or an endpoint alone")
        if self.shown and self.nearest is not None:
            raise ValueError("sampling.stream: the answer of the nearest entry is there at once")
        if self.shown and self.rule is not None and self.rule.confidence_below is not None:
            raise ValueError("sampling.stream: an answer that may be doubted cannot be shown before its end")
        return self

    @model_validator(mode="after")
    def _private_stays_here(self) -> Delegate:
        if not self.private:
            return self
        if self.where == "remote":
            raise ValueError("private = true and where = 'remote' contradict each other")
        host = urlsplit(self.output.webhook).hostname if self.output.webhook else None
        if host is not None and not is_loopback(host):
            raise ValueError(f"private = true, but the answers would go to {host}")
        return self


class Webhook(Table):
    """Where requests come in."""

    port: int = Field(default=8081, ge=0, le=65535)
    token_env: Text
    """The variable with the token that they bring."""


class Delegates(Table):
    """The whole file; paths are absolute here."""

    state: Text = "delegates.sqlite"
    webhook: Webhook | None = None
    delegates: dict[Name, Delegate] = Field(min_length=1)

    @model_validator(mode="after")
    def _inputs_there(self) -> Delegates:
        triggers = {name: one.trigger for name, one in self.delegates.items()}
        hooked = [name for name, one in triggers.items() if one.webhook]
        if bool(hooked) != (self.webhook is not None):
            raise ValueError("[webhook] and a delegate with trigger = { webhook = true } belong together")
        lines = [name for name, one in triggers.items() if one.stdin]
        if len(lines) > 1:
            raise ValueError(f"{lines[0]} and {lines[1]} both read standard input; one can")
        return self


def load_delegates(path: Path) -> Delegates:
    """Read a file of delegates.

    Raises:
        InputError: the file is missing or wrong.
    """
    if not _has_apscheduler():
        from slm_export.errors import MissingComponentError

        raise MissingComponentError("delegates need apscheduler; pip install 'slm-export[delegates]'")
    found = read_model(path, Delegates)
    folder = path.absolute().parent

    def at(text: str | None) -> str | None:
        return None if text is None else str(folder / text)

    def with_paths(one: Delegate) -> Delegate:
        trigger = one.trigger.model_copy(
            update={key: at(getattr(one.trigger, key)) for key in ("watch", "read")}
        )
        output = one.output.model_copy(update={"file": at(one.output.file)})
        nearest = one.nearest and one.nearest.model_copy(update={"file": at(one.nearest.file)})
        return one.model_copy(
            update={"nearest": nearest, "bundle": at(one.bundle), "trigger": trigger, "output": output}
        )

    delegates = {name: with_paths(one) for name, one in found.delegates.items()}
    for name, one in delegates.items():
        if one.bundle is not None and not os.path.isfile(os.path.join(one.bundle, "manifest.json")):
            raise InputError(
                f"{path}: delegates.{name}.bundle: {one.bundle} is no bundle; export a model to it"
            )
    return found.model_copy(update={"state": at(found.state), "delegates": delegates})


def _has_apscheduler() -> bool:
    from importlib.util import find_spec

    return find_spec("apscheduler") is not None
