"""A bundle opened again: to run it, and to verify it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_export.answers import answer
from slm_export.bundles.bundle import Manifest, read_manifest, verify_files
from slm_export.bundles.manifest import ArtifactEntry
from slm_export.compilation import refuse_foreign_text
from slm_export.errors import GateError, InputError
from slm_export.evaltext import load_documents
from slm_export.fidelity import References, judging, references
from slm_export.gates import Gates
from slm_export.generation import Sampling, generate
from slm_export.judge import Subject, judge_artifact, self_check
from slm_export.optimize import calibration_for, optimize, refuse_other_text
from slm_export.parity import Stored, Trace, compare, judge_pairs
from slm_export.probe import judge_opening
from slm_export.progress import Progress
from slm_export.recipe import make_pass
from slm_export.registry import exporter
from slm_export.results import Artifact, CalibrationFacts, Check, Pair
from slm_export.runtime import DecoderSession, EncoderSession, Session
from slm_export.source.hub import find_model
from slm_export.source.load import load_checkpoint
from slm_export.source.provenance import source_sha256
from slm_export.tokenization.tokenizer import OWN_TOKENIZER, Detokenizer, SourceTokenizer


@dataclass(frozen=True)
class Verification:
    """What ``verify`` found of one bundle."""

    checks: dict[str, tuple[Check, ...]]
    """By format; "files" for the bundle itself."""
    notes: tuple[str, ...]
    parity: tuple[Pair, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for group in self.checks.values() for check in group)


def verify(
    folder: Path, source: str | None, eval_text: Path | None, calibration: Path | None, progress: Progress
) -> Verification:
    """Repeat what can be repeated: checksums always, and with the source model the whole gate.

    Raises:
        InputError: not a bundle, or another source model than it was made from.
    """
    manifest = read_manifest(folder)
    if calibration is not None and source is None:
        raise InputError("--calibration is of use with --source alone: without it nothing is quantized again")
    with progress.stage("check files"):
        problems = verify_files(folder)
    detail = "; ".join(str(problem) for problem in problems) or f"{len(manifest.files)} files are as written"
    checks: dict[str, tuple[Check, ...]] = {"files": (Check("checksums", not problems, detail),)}
    if problems:
        return Verification(checks, ("artifacts were not opened: the files are not those that were written",))
    if source is not None:
        passes = [str(step["pass"]) for step in manifest.recipe]
        refuse_foreign_text(passes, calibration, eval_text, judged=True)
    opened = nullcontext() if source is None else _made_from(folder, manifest, source, calibration, progress)
    with opened as made_from:
        more, notes, pairs = _judge_all(folder, manifest, made_from, load_documents(eval_text), progress)
    return Verification({**checks, **more}, notes, pairs)


def _judge_all(
    folder: Path,
    manifest: Manifest,
    made_from: References | None,
    documents: Sequence[str],
    progress: Progress,
) -> tuple[dict[str, tuple[Check, ...]], tuple[str, ...], tuple[Pair, ...]]:
    """Judge every artifact, and the pairs of them; return checks by format, notes and pairs."""
    fewer = made_from is not None and made_from.quantized.vocabulary is not None
    own = folder / "tokenizer"
    tokenizer = SourceTokenizer.load(own if made_from is None or fewer else made_from.source.folder)
    several = len(manifest.artifacts) > 1
    checks: dict[str, tuple[Check, ...]] = {}
    notes: list[str] = []
    traces: dict[str, Trace] = {}
    stored: dict[str, Stored] = {}
    for entry in manifest.artifacts:
        runner = _runner_tokenizer(folder, manifest, entry.format)
        made, path = exporter(entry.format), folder / entry.path
        task, context = manifest.model.task, _context(folder, manifest)
        subject = Subject(made, path, task, tokenizer, runner, documents, manifest.gates, context)
        opens: tuple[Check, ...] = ()
        if made.elsewhere is None:  # else no native code reads it
            with progress.stage(f"try {entry.format}"):
                opens = (judge_opening(entry.format, path, task),)
            if not opens[0].passed:
                checks[entry.format] = opens
                continue
        if made_from is None:
            with progress.stage(f"open {entry.format}"):
                judged = self_check(subject, trace=several)
            notes.append("fidelity was not measured: give --source MODEL")
        else:
            judged = judge_artifact(subject, made_from, progress, trace=several)
        size = _size(entry, manifest.gates)
        checks[entry.format] = (*opens, *size, *judged.checks, *_accelerated(subject))
        notes += judged.notes
        if judged.trace is not None:
            traces[entry.format], stored[entry.format] = judged.trace, made.stored(path)
    pairs: tuple[Pair, ...] = ()
    if traces:
        with progress.stage("compare formats"):
            pairs = compare(traces, stored, manifest.model.task)
        checks["formats"] = judge_pairs(pairs)
    return checks, tuple(dict.fromkeys(notes)), pairs


def _context(folder: Path, manifest: Manifest) -> int:
    context = manifest.runtime.get("context")
    if context is None:
        raise InputError(f"{folder}/manifest.json: runtime names no context; export the model again")
    return int(context)


@contextmanager
def _made_from(
    folder: Path, manifest: Manifest, source: str, calibration: Path | None, progress: Progress
) -> Iterator[References | None]:
    """Make the quantized checkpoint again, which is deterministic on one machine."""
    model = find_model(source)
    if source_sha256(model) != manifest.model.source_sha256:
        raise InputError(f"{source}: not the model that {folder} was made from (another sha256)")
    with progress.stage("read the model"):
        original = load_checkpoint(model)
    where = f"{folder}/manifest.json"
    recipe = tuple(
        make_pass(str(step["pass"]), {key: value for key, value in step.items() if key != "pass"}, where)
        for step in manifest.recipe
    )
    tokenizer = SourceTokenizer.load(original.folder)
    text = calibration_for(recipe, calibration, original, tokenizer, progress)
    recorded = None if manifest.calibration is None else CalibrationFacts(**manifest.calibration.model_dump())
    refuse_other_text(text, recorded, where)
    optimized = optimize(recipe, original, manifest.model.source_sha256, text, None, progress)
    with references(original, optimized.checkpoint, optimized.steps, len(manifest.artifacts)) as found:
        yield found


def _size(entry: ArtifactEntry, gates: Gates) -> tuple[Check, ...]:
    artifact = Artifact(Path(entry.path), entry.format, entry.bytes, entry.sha256, entry.bits_per_weight)
    return judging.checks_of(artifact, Gates(max_bytes=gates.max_bytes), {})


def _accelerated(subject: Subject) -> tuple[Check, ...]:
    if subject.gates.min_accelerated is None:
        return ()
    return judging.judge_acceleration(subject.exporter.delegation(subject.path), subject.gates)


def _runner_tokenizer(folder: Path, manifest: Manifest, format: str) -> Path:
    """Return the tokenizer file that a format's runner is given."""
    named = str(dict(manifest.runtime.get("tokenizer") or {}).get(format, OWN_TOKENIZER))
    if named not in {entry.path for entry in manifest.files}:
        raise InputError(
            f"{folder}/manifest.json: runtime.tokenizer names {named!r}, which is not in the bundle"
        )
    return folder / named


@dataclass(frozen=True)
class OpenBundle:
    """An artifact of a bundle, open in its runtime, with the tokenizer beside it."""

    manifest: Manifest
    session: Session
    tokenizer: SourceTokenizer

    def close(self) -> None:
        """Let go of the artifact."""
        self.session.close()

    def text(self, prompt: str, max_tokens: int, sampling: Sampling, *, chat: bool = True) -> Iterator[str]:
        """Yield the answer to a prompt, piece by piece; the chat template is applied where there is one."""
        assert isinstance(self.session, DecoderSession)
        rendered = self.tokenizer.render_chat(prompt) if chat else None
        encode = self.tokenizer.encode_with_template if rendered is None else self.tokenizer.encode
        ids = encode(prompt if rendered is None else rendered)
        stops = [int(token) for token in self.manifest.runtime.get("stop_ids", [])]
        detokenizer = Detokenizer(self.tokenizer.decode)
        for token in generate(self.session, ids, stops, max_tokens, sampling):
            yield detokenizer.add(token)
        yield detokenizer.flush()

    def answer(self, text: str) -> dict[str, Any]:
        """Return what an encoder says of a text, as JSON values."""
        assert isinstance(self.session, EncoderSession)
        ids = self.tokenizer.encode_with_template(text)
        if len(ids) > self.session.context:
            raise InputError(
                f"the text has {len(ids)} tokens, but the model takes at most {self.session.context}"
            )
        output = self.session.outputs(ids, [1] * len(ids))
        labels = [str(label) for label in self.manifest.runtime.get("labels", [])]
        return answer(self.manifest.model.task, output, ids, labels, self.tokenizer)


def open_bundle(folder: Path, format: str | None = None) -> OpenBundle:
    """Open one artifact of a bundle, the first by default, after checking that it is what was written.

    Raises:
        InputError: not a bundle, or no such format in it.
        GateError: the artifact or its tokenizer is not what was written.
    """
    manifest = read_manifest(folder)
    entry = manifest.artifact(format) if format else manifest.artifacts[0]
    needed = (entry.path, "tokenizer/")
    if problems := [problem for problem in verify_files(folder) if problem.path.startswith(needed)]:
        raise GateError(f"{folder}: {problems[0]}; export the model again")
    made = exporter(entry.format)
    tokenizer = SourceTokenizer.load(folder / "tokenizer")
    return OpenBundle(manifest, made.open(folder / entry.path, manifest.model.task), tokenizer)


def to_json(verification: Verification) -> dict[str, object]:
    """Return the verification as JSON values."""
    return {
        "passed": verification.passed,
        "checks": {
            name: [dataclasses.asdict(c) for c in group] for name, group in verification.checks.items()
        },
        "parity": [dataclasses.asdict(pair) for pair in verification.parity],
        "notes": list(verification.notes),
    }
