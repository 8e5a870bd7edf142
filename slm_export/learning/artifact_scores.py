"""Held-out problems solved by the artifacts of a bundle, each in its own runtime: what tuning is worth there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slm_export.bundles.bundle import read_manifest
from slm_export.generation import Sampling, generate
from slm_export.learning.chats import prompt_ids
from slm_export.learning.judging import Judge
from slm_export.learning.problems import Problem
from slm_export.learning.scoring import Score
from slm_export.progress import Progress
from slm_export.registry import exporter
from slm_export.runtime import DecoderSession
from slm_export.tokenization.tokenizer import SourceTokenizer


def score_bundle(
    bundle: Path, problems: Sequence[Problem], judge: Judge, most: int, progress: Progress
) -> dict[str, Score | None]:
    """Return format -> score, greedily and with at most ``most`` tokens; None where its runtime is not on this machine.

    A problem that does not fit the artifact's context is counted as rejected.
    """
    manifest = read_manifest(bundle)
    tokenizer = SourceTokenizer.load(bundle / "tokenizer")
    found: dict[str, Score | None] = {}
    for entry in manifest.artifacts:
        made = exporter(entry.format)
        if made.elsewhere is not None:
            found[entry.format] = None
            continue
        session = made.open(bundle / entry.path, manifest.model.task)
        try:
            assert isinstance(session, DecoderSession), "only a decoder is tuned on reasoning"
            with progress.stage(f"score {entry.format}", total=len(problems)) as stage:
                reasons: list[str] = []
                for problem in problems:
                    reason = judge(problem, _solution(session, tokenizer, problem, most))
                    reasons += [] if reason is None else [reason]
                    stage.advance(1)
        finally:
            session.close()
        counts = {reason: reasons.count(reason) for reason in reasons}
        found[entry.format] = Score(len(problems) - len(reasons), len(problems), counts)
    return found


def _solution(session: DecoderSession, tokenizer: SourceTokenizer, problem: Problem, most: int) -> str:
    prompt = prompt_ids(tokenizer, problem.text)
    if len(prompt) >= session.context:
        return ""
    ids = list(generate(session, prompt, tokenizer.stop_ids, most, Sampling()))
    text: str = tokenizer.backend.decode(ids, skip_special_tokens=True)
    return text
