"""Recognizers of ours, beside Presidio's: keys and tokens, wallets, street addresses, names that are introduced.

Presidio reads every pattern without regard to case; where case matters a pattern says so itself, ``(?-i:...)``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from presidio_analyzer import Pattern, PatternRecognizer

LANGUAGE = "xx"
"""Of everything: what is looked for depends on no language, and texts mix them."""

_KEYS = (
    r"AKIA[0-9A-Z]{16}",  # Amazon
    r"gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,}",
    r"glpat-[A-Za-z0-9_-]{20,}",
    r"sk-[A-Za-z0-9_-]{20,}",  # OpenAI, Anthropic
    r"[sr]k_(?:live|test)_[0-9A-Za-z]{16,}",  # Stripe
    r"xox[abprs]-[A-Za-z0-9-]{10,}",  # Slack
    r"AIza[0-9A-Za-z_-]{35}",  # Google
    r"hf_[A-Za-z0-9]{30,}",
    r"npm_[A-Za-z0-9]{36}",
    r"eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",  # JSON Web Token
)
_PRIVATE_KEY = r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----[\s\S]{1,8000}?-----END [A-Z ]{0,20}PRIVATE KEY-----"
_ASSIGNED = (
    r"(?<=(?:api[_ -]?key|access[_ -]?key|secret(?:[_ -]?key)?|auth[_ -]?token|token|passwor[dt]|passwd|"
    r"mot de passe|contraseña)\s{0,2}(?:[:=]|=>|is|ist|est)\s{0,2}[\"']?)[^\s\"',;]{8,200}"
)

_WORD = r"[\p{Lu}][\p{L}'’.-]+"
_STREETS = (
    rf"\b\d{{1,5}}[A-Za-z]?,?\s(?:{_WORD}\s){{1,4}}"
    r"(?:Street|St|Road|Rd|Avenue|Ave|Lane|Ln|Drive|Dr|Boulevard|Blvd|Court|Ct|Square|Place|Way|Terrace|Close)\b\.?",
    r"\b[\p{Lu}][\p{L}-]*(?:straße|strasse|str\.|weg|platz|allee|gasse|ring|ufer|damm)\s\d{1,4}\s?[a-z]?\b",
    rf"\b(?:{_WORD}\s){{1,3}}(?:Straße|Strasse|Weg|Platz|Allee|Ring|Ufer|Damm)\s\d{{1,4}}\s?[a-z]?\b",
    r"\b(?:Am|An der|Auf dem|Im|Zum|Zur|Unter den)\s[\p{Lu}][\p{L}-]+\s\d{1,4}\s?[a-z]?\b",
    r"\b\d{1,4}(?:\s?(?:bis|ter))?,?\s(?:[Rr]ue|[Aa]venue|[Bb]oulevard|[Pp]lace|[Cc]hemin|[Aa]llée|[Ii]mpasse|[Qq]uai|[Cc]ours)"
    r"\s(?:de\s(?:la\s|l['’])?|du\s|des\s|d['’])?[\p{L}'’-]+(?:\s[\p{Lu}][\p{L}'’-]+){0,3}",
    r"\b(?:Calle|C/|Avenida|Avda\.|Plaza|Paseo|Camino|Via|Viale|Piazza|Corso|Largo|Vicolo)\s?"
    r"(?:(?:de|del|de la|de los|di|della|dei)\s)?[\p{L}'’.-]+(?:\s[\p{L}'’.-]+){0,4}?,?\s(?:n[.º°]?\s?)?\d{1,4}\b",
)
_NAME = rf"{_WORD}(?:\s(?:(?:van|von|de|der|da|di|del|la|le)\s){{0,2}}{_WORD}){{0,2}}"
_INTRODUCED = (
    r"(?<=\b(?:Mr|Mrs|Ms|Mx|Dr|Prof|Sr|Sra|Srta|Mme|Mlle|Sig|Dott)\.?\s)" + _NAME,
    r"(?<=\b(?:Herrn?|Frau|[Mm]adame|[Mm]onsieur|[Ss]eñora?|[Ss]ignora?|Don|Doña)\s)" + _NAME,
    r"(?<=\b(?:[Mm]y name is|I am called|[Ii]ch heiße|[Mm]ein Name ist|[Jj]e m['’]appelle|[Mm]on nom est|"
    r"[Mm]e llamo|[Mm]i nombre es|[Mm]i chiamo|[Ii]l mio nome è)\s)" + _NAME,
    r"(?<=\b(?:[Rr]egards|[Ss]incerely|[Cc]heers|Grüße|Grüßen|Gruß|[Cc]ordialement|[Ss]aludos|[Ss]aluti),?\n)"
    + _NAME,
)

_VERSIONS = {0x30: "L", 0x32: "M", 0x1E: "D", 0x16: "9A"}
"""First byte of what base58check encodes -> first letters: Litecoin, Dogecoin."""
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def of_ours(kinds: Sequence[str]) -> list[PatternRecognizer]:
    """Return our recognizers of these kinds."""
    keys = [Pattern("key of a service", _exactly(rf"\b(?:{'|'.join(_KEYS)})"), 0.95)]
    keys += [Pattern("private key", _exactly(_PRIVATE_KEY), 1.0), Pattern("assigned", _ASSIGNED, 0.7)]
    made = [
        _recognizer("API_KEY", keys),
        _recognizer("STREET_ADDRESS", [Pattern("street", _exactly(one), 0.6) for one in _STREETS]),
        _recognizer("PERSON", [Pattern("introduced", _exactly(one), 0.6) for one in _INTRODUCED]),
        _recognizer(
            "CRYPTO_WALLET",
            [
                Pattern("Ethereum", _exactly(r"\b0x[0-9a-fA-F]{40}\b"), 0.9),
                Pattern("Monero", _exactly(r"\b[48][0-9AB][1-9A-HJ-NP-Za-km-z]{93}\b"), 0.9),
            ],
        ),
        Base58Check(),
        Pesel(),
    ]
    return [one for one in made if one.supported_entities[0] in kinds]


def of_words(name: str, words: Sequence[str]) -> PatternRecognizer:
    """Return a recognizer of whole words as they are written."""
    return PatternRecognizer(name, supported_language=LANGUAGE, deny_list=list(words))


def of_pattern(name: str, pattern: str, score: float, context: Sequence[str]) -> PatternRecognizer:
    """Return a recognizer of a user's pattern, which minds case as it is written."""
    return PatternRecognizer(
        name,
        supported_language=LANGUAGE,
        patterns=[Pattern(name, _exactly(pattern), score)],
        context=list(context),
    )


class Base58Check(PatternRecognizer):  # type: ignore[misc]
    """Addresses of Litecoin and Dogecoin: 25 bytes in base 58, of which the last four are a checksum."""

    def __init__(self) -> None:
        pattern = Pattern("base58check", _exactly(r"\b[LMD9A][1-9A-HJ-NP-Za-km-z]{25,34}\b"), 0.1)
        super().__init__("CRYPTO_WALLET", supported_language=LANGUAGE, patterns=[pattern])

    def validate_result(self, pattern_text: str) -> bool:
        """Return whether the checksum holds."""
        number = 0
        for letter in pattern_text:
            number = number * 58 + _BASE58.index(letter)
        if number >= 1 << 200:
            return False
        content = number.to_bytes(25, "big")
        checksum = hashlib.sha256(hashlib.sha256(content[:-4]).digest()).digest()[:4]
        return content[0] in _VERSIONS and content[-4:] == checksum


class Pesel(PatternRecognizer):  # type: ignore[misc]
    """Polish identity numbers: a date of birth, five digits, the last of them a checksum.

    In place of Presidio's, which (in 2.2.362) compares with the sum itself, not with what is missing to a full ten, and
    so refuses four in five numbers that are valid.
    """

    def __init__(self) -> None:
        pattern = Pattern("PESEL", r"\b\d{2}(?:[02468][1-9]|[13579][012])(?:0[1-9]|[12]\d|3[01])\d{5}\b", 0.1)
        super().__init__("NATIONAL_ID", supported_language=LANGUAGE, patterns=[pattern])

    def validate_result(self, pattern_text: str) -> bool:
        """Return whether the checksum holds."""
        digits = [int(digit) for digit in pattern_text]
        total = sum(
            digit * weight for digit, weight in zip(digits, (1, 3, 7, 9, 1, 3, 7, 9, 1, 3), strict=False)
        )
        return digits[10] == -total % 10


def _recognizer(kind: str, patterns: list[Pattern]) -> PatternRecognizer:
    return PatternRecognizer(kind, supported_language=LANGUAGE, patterns=patterns)


def _exactly(pattern: str) -> str:
    return f"(?-i:{pattern})"
