"""One artifact through every check that its task calls for: by the driver after writing, by ``verify`` later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slm_export import fidelity
from slm_export.evaltext import load_sentences, paragraphs
from slm_export.fidelity.exactness import judge_exact
from slm_export.fidelity.steps import judge_steps
from slm_export.fidelity.tokens import TOKENS
from slm_export.fidelity.vocabularies import FewerTokens
from slm_export.gates import Gates
from slm_export.parity import Trace, judge_codes, quantized_weights, trace_of
from slm_export.progress import Progress
from slm_export.results import Check, Quality, TokenQuality
from slm_export.runtime import DecoderSession, EncoderSession, Exporter
from slm_export.tokenization.tokenizer import OWN_TOKENIZER, SourceTokenizer
from slm_export.vendor_text import judge_vendor_text

_LONG_TEXTS = 2


@dataclass(frozen=True)
class Subject:
    """An artifact, and what it is judged with."""

    exporter: Exporter
    path: Path
    task: str
    tokenizer: SourceTokenizer
    """The artifact's: the source's own, unless a pass took tokens away."""
    runner_tokenizer: Path
    """The tokenizer file that the vendor's runner is given, in a folder of the bundle."""
    documents: Sequence[str]
    gates: Gates
    context: int
    """What the bundle says of the artifact: positions of a decoder's cache, the longest input of an encoder."""

    @property
    def bundle(self) -> Path:
        """The folder that the artifact is in, with tokenizer and all."""
        return self.path.parents[len(Path(self.exporter.file(self.task)).parts) - 1]

    @property
    def prompt(self) -> str:
        """The beginning of the held-out text."""
        return " ".join(self.documents[0].split()[:12])


@dataclass(frozen=True)
class Judgement:
    """What was found. ``trace`` is there where formats are to be compared with each other."""

    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    quality: Quality | None = None
    trace: Trace | None = None


def judge_artifact(
    subject: Subject, references: fidelity.References, progress: Progress, *, trace: bool = False
) -> Judgement:
    """Return figures, checks and notes of an artifact, compared with the models it was made from."""
    exporter, name = subject.exporter, subject.exporter.name
    session = exporter.open(subject.path, subject.task)
    try:
        with progress.stage(f"read back {name}"):
            codes = judge_codes(exporter.stored(subject.path), quantized_weights(references.quantized))
            sample = subject.tokenizer.encode_with_template(subject.documents[0])
            own = exporter.own_checks(subject.path, references.quantized, sample)
            steps = judge_steps(references.steps, subject.gates)
        if exporter.elsewhere is None:  # else executed in float32 by its own checks
            with progress.stage(f"write {name} in 32 bits"):
                own = (*own, judge_exact(exporter, references.quantized, subject.bundle / "tokenizer"))
        with progress.stage("compare tokenizers"):
            verdict = _judge_tokenizer(subject)
            both = references.vocabularies(subject.tokenizer)
            fewer = isinstance(both, FewerTokens)
            kept = (
                (fidelity.judge_vocabulary(both, subject.documents),) if isinstance(both, FewerTokens) else ()
            )
        quality: Quality
        if isinstance(session, DecoderSession):
            checks, notes = _self_checks(subject, session)
            with progress.stage(f"verify {name}", total=TOKENS) as stage:
                quality, more = fidelity.judge_decoder(
                    references,
                    session,
                    exporter.rounding,
                    subject.tokenizer,
                    subject.documents,
                    subject.gates,
                    stage.advance,
                )
        else:
            assert isinstance(session, EncoderSession)
            checks, notes = (), _elsewhere(subject)
            texts = _texts(subject, own=fewer)
            with progress.stage(f"verify {name}", total=len(texts)) as stage:
                quality, more = fidelity.judge_encoder(
                    references,
                    session,
                    exporter.rounding,
                    subject.tokenizer,
                    texts,
                    subject.gates,
                    stage.advance,
                )
        traced = _trace(subject, session) if trace else None
        return Judgement(
            (*more, codes, *steps, *own, _judge_context(subject, session), *checks, *verdict.checks, *kept),
            (*notes, *verdict.notes, *_words(quality)),
            quality,
            traced,
        )
    finally:
        session.close()


def _texts(subject: Subject, *, own: bool) -> tuple[str, ...]:
    """Return sentences, and whole documents, which fill the longest input.

    Given   own: whether the sentences are to be of the documents too, as where a model is fit to a domain
    """
    sentences = load_sentences()
    if own:
        parts = tuple(paragraphs(subject.documents))
        sentences = parts[:: max(1, len(parts) // len(sentences))][: len(sentences)]
    return (*sentences, *sorted(subject.documents, key=len)[-_LONG_TEXTS:])


def _words(quality: Quality) -> tuple[str, ...]:
    """Say how a text is compared that source and artifact read in other tokens."""
    if not isinstance(quality, TokenQuality) or quality.same_tokens is None:
        return ()
    return (
        f"the artifact reads {quality.same_tokens:.1%} of the source's tokens of the text as they are, and all of it "
        f"in {quality.tokens_ratio:.3f} times as many; the source gives {quality.lacking_mass:.2%} to tokens that the "
        "artifact lacks. Perplexities are of the text in the tokens of each, over the source's tokens; next tokens are "
        "compared on the artifact's tokens, among those that both have",
    )


def self_check(subject: Subject, *, trace: bool = False) -> Judgement:
    """Return what can be checked of an artifact without its source: it opens, stops, and reads text alike."""
    session = subject.exporter.open(subject.path, subject.task)
    try:
        verdict = _judge_tokenizer(subject)
        checks: tuple[Check, ...] = ()
        notes = _elsewhere(subject)
        if isinstance(session, DecoderSession):
            checks, notes = _self_checks(subject, session)
        traced = _trace(subject, session) if trace else None
        found = (_judge_context(subject, session), *checks, *verdict.checks)
        return Judgement(found, (*notes, *verdict.notes), trace=traced)
    finally:
        session.close()


def _self_checks(subject: Subject, session: DecoderSession) -> tuple[tuple[Check, ...], tuple[str, ...]]:
    """Return checks of a decoder that need no source, and notes on those that cannot be made here."""
    stops = fidelity.judge_stop_tokens(session.stop_ids, subject.tokenizer.stop_ids)
    opening = fidelity.judge_opening_token(session.bos_id, subject.tokenizer)
    said = (stops, opening, *_judge_vocabulary(session))
    if subject.exporter.elsewhere:
        return said, _elsewhere(subject)
    text = judge_vendor_text(
        subject.exporter, subject.path, subject.runner_tokenizer, subject.tokenizer, session, subject.prompt
    )
    return (*said, text), ()


def _judge_context(subject: Subject, session: DecoderSession | EncoderSession) -> Check:
    """Hold what the file has room for against what an app is told."""
    same = session.context == subject.context
    detail = f"room for {session.context} tokens" + (
        "" if same else f", where the bundle says {subject.context}"
    )
    return Check("context", same, detail)


def _judge_vocabulary(session: DecoderSession) -> tuple[Check, ...]:
    """Hold the number of tokens that a file names against the scores that it gives; some formats name none."""
    if session.vocabulary is None:
        return ()
    given = session.logits([0], 0).numel()
    detail = f"{session.vocabulary} tokens are named, {given} have a score"
    return (Check("vocabulary", session.vocabulary == given, detail),)


def _elsewhere(subject: Subject) -> tuple[str, ...]:
    if not (reason := subject.exporter.elsewhere):
        return ()
    return (
        f"{reason}: the file was executed operator by operator as its specification says; the vendor's runtime was "
        "not asked, and no speed was measured",
    )


def _judge_tokenizer(subject: Subject) -> fidelity.TokenizerVerdict:
    verdict = fidelity.judge_tokenizer(
        subject.tokenizer,
        lambda: subject.exporter.open_tokenizer(subject.path, subject.runner_tokenizer, subject.task),
        subject.task,
        subject.gates,
    )
    # A runner's own file may be in other words than the source's (`phone_tokenizer`); the bundle's is the source's.
    file = fidelity.judge_tokenizer_file(subject.tokenizer, subject.bundle / OWN_TOKENIZER)
    return replace(verdict, checks=(*verdict.checks, file))


def _trace(subject: Subject, session: DecoderSession | EncoderSession) -> Trace:
    return trace_of(session, subject.task, subject.tokenizer, subject.documents)
