r"""What is looked for: kinds of personal data by name, and a user's own kinds.

[[entity]]
name    = "CUSTOMER_NUMBER"
pattern = 'K-\d{6}'            # a regular expression; Python's, with the `regex` package's additions
score   = 0.6                  # how sure a match is, from 0 to 1
context = ["customer", "Kunde"]    # words nearby that make it surer

[[entity]]
name  = "PROJECT"
words = ["Bluebird", "Nightjar"]   # found as they are written, in whole words
"""

from __future__ import annotations

from pathlib import Path

import regex
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from slm_export.tomlfile import read_model

KINDS = {
    "PERSON": "names of people: where a word before says so (Mr, my name is), and all that a NER model finds",
    "EMAIL_ADDRESS": "e-mail addresses",
    "PHONE_NUMBER": "telephone numbers that are valid somewhere",
    "STREET_ADDRESS": "a street with a house number, in English, German, French, Spanish or Italian",
    "IBAN_CODE": "bank accounts, by length and checksum",
    "CREDIT_CARD": "payment cards, by checksum",
    "CRYPTO_WALLET": "addresses of Bitcoin, Litecoin and Dogecoin by checksum, of Ethereum and Monero by form",
    "API_KEY": "keys and tokens of well-known services, private keys, and what is assigned to a name like password",
    "IP_ADDRESS": "addresses of computers",
    "MAC_ADDRESS": "addresses of network interfaces",
    "NATIONAL_ID": "identity numbers with a checksum: ES, FI, IN, IT, PL, UK (NHS); US by form",
    "LOCATION": "places; a NER model alone",
    "ORGANIZATION": "names of organisations; a NER model alone",
}
"""What each kind is."""
NER_ALONE = frozenset({"LOCATION", "ORGANIZATION"})
"""Kinds that no pattern finds."""


class Entity(BaseModel):
    """A kind of a user's own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Z][A-Z0-9_]*$")
    pattern: str | None = None
    words: tuple[str, ...] = ()
    score: float = Field(default=0.6, gt=0, le=1)
    context: tuple[str, ...] = ()

    @field_validator("pattern")
    @classmethod
    def _a_pattern(cls, text: str | None) -> str | None:
        if text is not None:
            try:
                found = regex.compile(text)
            except regex.error as error:
                raise ValueError(f"is no regular expression: {error}") from error
            if found.fullmatch("") is not None:
                raise ValueError("matches the empty text, and so everywhere")
        return text

    @model_validator(mode="after")
    def _something(self) -> Entity:
        if (self.pattern is None) == (not self.words):
            raise ValueError("an entity needs either 'pattern' or 'words'")
        if any(not word.strip() for word in self.words):
            raise ValueError("'words' holds a blank one")
        return self


class Entities(BaseModel):
    """A file of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    entity: tuple[Entity, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> Entities:
        names = [one.name for one in self.entity]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two entities are called {min(twice)}")
        return self


def read_entities(path: Path) -> tuple[Entity, ...]:
    """Return the kinds of a TOML file; InputError where it is wrong."""
    return read_model(path, Entities).entity
