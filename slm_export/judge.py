"""One artifact through every check that its task calls for: by the driver after writing, by ``verify`` later."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slm_export import fidelity
from slm_export.checkpoint import Checkpoint
from slm_export.evaltext import load_sentences
from slm_export.fidelity.tokens import TOKENS
from slm_export.gates import Gates
from slm_export.progress import Progress
from slm_export.results import Check, Quality
from slm_export.runtime import DecoderSession, EncoderSession, Exporter
from slm_export.tokenizer import SourceTokenizer
from slm_export.vendor_text import judge_vendor_text

_LONG_TEXTS = 2

Judgement = tuple[Quality | None, tuple[Check, ...], tuple[str, ...]]


def judge_artifact(
    exporter: Exporter,
    path: Path,
    source: Checkpoint,
    quantized: Checkpoint,
    tokenizer: SourceTokenizer,
    runner_tokenizer: Path,
    documents: Sequence[str],
    gates: Gates,
    progress: Progress,
) -> Judgement:
    """Return figures, checks and notes of an artifact, compared with the model it was made from.

    ``runner_tokenizer``: the tokenizer file that the runner is given.
    """
    session = exporter.open(path, source.task)
    try:
        with progress.stage("compare tokenizers"):
            verdict = _judge_tokenizer(exporter, path, tokenizer, runner_tokenizer, source.task, gates)
        if isinstance(session, DecoderSession):
            checks = _self_checks(exporter, path, session, tokenizer, runner_tokenizer, documents)
            with progress.stage(f"verify {exporter.name}", total=TOKENS) as stage:
                quality: Quality
                quality, more = fidelity.judge_decoder(
                    source, quantized, session, exporter.rounding, tokenizer, documents, gates, stage.advance
                )
        else:
            assert isinstance(session, EncoderSession)
            checks = ()
            # Whole documents too: they fill the longest input.
            texts = (*load_sentences(), *sorted(documents, key=len)[-_LONG_TEXTS:])
            with progress.stage(f"verify {exporter.name}", total=len(texts)) as stage:
                quality, more = fidelity.judge_encoder(
                    source, quantized, session, exporter.rounding, tokenizer, texts, gates, stage.advance
                )
        return quality, (*more, *checks, *verdict.checks), verdict.notes
    finally:
        session.close()


def self_check(
    exporter: Exporter,
    path: Path,
    task: str,
    tokenizer: SourceTokenizer,
    runner_tokenizer: Path,
    documents: Sequence[str],
    gates: Gates,
) -> tuple[tuple[Check, ...], tuple[str, ...]]:
    """Return what can be checked of an artifact without its source: it opens, stops, and reads text alike."""
    session = exporter.open(path, task)
    try:
        verdict = _judge_tokenizer(exporter, path, tokenizer, runner_tokenizer, task, gates)
        checks: tuple[Check, ...] = ()
        if isinstance(session, DecoderSession):
            checks = _self_checks(exporter, path, session, tokenizer, runner_tokenizer, documents)
        return (*checks, *verdict.checks), verdict.notes
    finally:
        session.close()


def _self_checks(
    exporter: Exporter,
    path: Path,
    session: DecoderSession,
    tokenizer: SourceTokenizer,
    runner_tokenizer: Path,
    documents: Sequence[str],
) -> tuple[Check, ...]:
    prompt = " ".join(documents[0].split()[:12])
    return (
        fidelity.judge_stop_tokens(session.stop_ids, tokenizer.stop_ids),
        judge_vendor_text(exporter, path, runner_tokenizer, tokenizer, session, prompt),
    )


def _judge_tokenizer(
    exporter: Exporter,
    path: Path,
    tokenizer: SourceTokenizer,
    runner_tokenizer: Path,
    task: str,
    gates: Gates,
) -> fidelity.TokenizerVerdict:
    return fidelity.judge_tokenizer(
        tokenizer, lambda: exporter.open_tokenizer(path, runner_tokenizer, task), task, gates
    )
