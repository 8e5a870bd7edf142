"""Presidio's engine with recognizers of patterns and checksums, told never to ask the network and never to skip.

Left to itself, Presidio fetches a list of domains where an e-mail address is checked, downloads a language model that
is not there, and goes on with a warning where a pattern takes too long. Here the first two cannot happen, and the third
is an error: text that was not searched whole must not pass for clean.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_export.errors import InputError, MissingComponentError, suggestion
from slm_export.privacy.entities import KINDS, NER_ALONE, Entity

THRESHOLD = 0.4
"""Surer than this counts as found."""
_LANGUAGE = "xx"
_REGIONS = ("US", "GB", "DE", "FR", "ES", "IT", "NL", "PL", "SE", "CH", "AT", "IN", "BR", "CA", "AU")
_PHONE_WORDS = ["phone", "call", "mobile", "cell", "tel", "telefon", "telefono", "teléfono", "téléphone"]
_PHONE_WORDS += ["portable", "handy", "móvil", "cellulare", "anrufen", "appeler", "llamar", "chiamare"]
_RENAMED = {"CRYPTO": "CRYPTO_WALLET"}
_STATES = (
    "EsNifRecognizer",
    "EsNieRecognizer",
    "FiPersonalIdentityCodeRecognizer",
    "InAadhaarRecognizer",
    "ItFiscalCodeRecognizer",
    "NhsRecognizer",
    "UsSsnRecognizer",
)


@dataclass(frozen=True)
class Span:
    """Something that was found: text[start:end]."""

    start: int
    end: int
    kind: str
    score: float


class Finder:
    """Finds personal data in texts."""

    def __init__(
        self, kinds: Sequence[str] | None = None, own: Sequence[Entity] = (), ner: str | None = None
    ) -> None:
        """Prepare the recognizers; seconds, because Presidio and spaCy are imported.

        Given   kinds: names of `KINDS`; None: all
                own: kinds of the user's, looked for beside those
                ner: a spaCy pipeline that finds names: an installed package or a folder. It is never downloaded

        Raises:
            InputError: an unknown kind, or no such pipeline.
            MissingComponentError: Presidio or spaCy is not installed.
        """
        wanted = tuple(KINDS if kinds is None else kinds)
        for kind in wanted:
            if kind not in KINDS:
                raise InputError(f"unknown entity '{kind}'{suggestion(kind, KINDS)}")
        for one in own:
            if one.name in KINDS:
                raise InputError(f"entity '{one.name}' is one of the built-in ones; give yours another name")
        self.kinds = (*wanted, *(one.name for one in own))
        self.ner = ner
        self._engine = _engine(wanted, own, ner)

    @property
    def blind_to(self) -> tuple[str, ...]:
        """What this finder cannot see, in words; empty with a NER model, which has limits of its own."""
        if self.ner is not None:
            return ()
        said = [
            "names of people, unless a word before says that one comes (Mr, my name is)"
            if "PERSON" in self.kinds
            else ""
        ]
        said += [KINDS[kind].split(";")[0] for kind in sorted(NER_ALONE & set(self.kinds))]
        return tuple(one for one in said if one)

    def find(self, text: str) -> tuple[Span, ...]:
        """Return what was found, in order, no two overlapping: of those that do the longest, then the surest, counts.

        Raises:
            InputError: a pattern took too long, and so the text was not searched whole.
        """
        with _nothing_skipped():
            results = self._engine.analyze(text, language=_LANGUAGE, score_threshold=THRESHOLD)
        spans = [
            Span(r.start, r.end, _RENAMED.get(r.entity_type, r.entity_type), float(r.score)) for r in results
        ]
        chosen: list[Span] = []
        for span in sorted(spans, key=lambda s: (s.start - s.end, -s.score, s.start, s.kind)):
            if span.kind in self.kinds and all(
                span.end <= other.start or other.end <= span.start for other in chosen
            ):
                chosen.append(span)
        return tuple(sorted(chosen, key=lambda span: span.start))


def _engine(kinds: Sequence[str], own: Sequence[Entity], ner: str | None) -> Any:
    try:
        import presidio_analyzer as presidio
        import spacy
        import tldextract
        from presidio_analyzer import predefined_recognizers as known
        from presidio_analyzer.nlp_engine import SpacyNlpEngine
    except ImportError as error:
        raise MissingComponentError(
            f"finding personal data needs presidio-analyzer and spacy ({error}); pip install 'slm-export[privacy]'"
        ) from error
    from slm_export.privacy import patterns

    # The list of domains that comes with the package is enough to tell whether an address ends in one.
    tldextract.extract = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)
    registry = presidio.RecognizerRegistry(supported_languages=[_LANGUAGE])
    registry.recognizers = []
    common: dict[str, Any] = {"supported_language": _LANGUAGE}
    theirs: dict[str, list[Any]] = {
        "EMAIL_ADDRESS": [known.EmailRecognizer(**common)],
        "PHONE_NUMBER": [known.PhoneRecognizer(supported_regions=_REGIONS, context=_PHONE_WORDS, **common)],
        "IBAN_CODE": [known.IbanRecognizer(**common)],
        "CREDIT_CARD": [known.CreditCardRecognizer(**common)],
        "CRYPTO_WALLET": [known.CryptoRecognizer(**common)],
        "IP_ADDRESS": [known.IpRecognizer(**common)],
        "MAC_ADDRESS": [known.MacAddressRecognizer(**common)],
        "NATIONAL_ID": [getattr(known, name)(supported_entity="NATIONAL_ID", **common) for name in _STATES],
    }
    for kind in kinds:
        registry.recognizers += theirs.get(kind, [])
    registry.recognizers += patterns.of_ours(kinds)
    for one in own:
        registry.add_recognizer(
            patterns.of_words(one.name, one.words)
            if one.pattern is None
            else patterns.of_pattern(one.name, one.pattern, one.score, one.context)
        )
    if ner is not None:
        registry.add_recognizer(known.SpacyRecognizer(**common))
    nlp = SpacyNlpEngine(models=[{"lang_code": _LANGUAGE, "model_name": ner or "blank"}])
    nlp.nlp = {_LANGUAGE: spacy.blank(_LANGUAGE) if ner is None else _pipeline(spacy, ner)}
    return presidio.AnalyzerEngine(registry=registry, nlp_engine=nlp, supported_languages=[_LANGUAGE])


def _pipeline(spacy: Any, ner: str) -> Any:
    try:
        made = spacy.load(Path(ner) if Path(ner).is_dir() else ner)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--ner {ner}: spaCy has no such pipeline here ({_first_line(error)}); install it as a package, or "
            "give its folder"
        ) from error
    if not {"ner", "entity_ruler"} & set(made.pipe_names):
        raise InputError(
            f"--ner {ner}: has no part that finds names (it has {', '.join(made.pipe_names) or 'none'})"
        )
    return made


@contextmanager
def _nothing_skipped() -> Iterator[None]:
    """Turn Presidio's warning about a pattern that it gave up into an error, and keep its log to itself."""
    gave_up = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING and "timed out" in str(record.msg):
                gave_up.append(record)

    logger, listening = logging.getLogger("presidio-analyzer"), Listening()
    passed_on, level = logger.propagate, logger.level
    logger.addHandler(listening)
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(listening)
        logger.propagate = passed_on
        logger.setLevel(level)
    if gave_up:
        raise InputError(
            "a pattern took too long on a text, which was not searched whole; "
            "make the pattern simpler, or the text shorter"
        )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
