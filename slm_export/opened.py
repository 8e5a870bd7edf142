"""A bundle opened again: to run it, and to verify it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from slm_export.adapters.build import read_adapters
from slm_export.adapters.low_rank import LowRank
from slm_export.adapters.verify import judge_kept
from slm_export.answers import answer
from slm_export.bundles.bundle import Manifest, read_manifest, verify_files
from slm_export.bundles.integrity import compare_file
from slm_export.bundles.manifest import AdapterEntry, ArtifactEntry
from slm_export.compilation import refuse_foreign_text
from slm_export.errors import GateError, InputError, suggestion
from slm_export.evaltext import load_documents
from slm_export.fidelity import References, judging
from slm_export.gates import Gates
from slm_export.generation import Sampling, generate
from slm_export.judge import Subject, judge_artifact, self_check
from slm_export.parity import Stored, Trace, compare, judge_pairs
from slm_export.probe import judge_opening
from slm_export.progress import Progress
from slm_export.registry import exporter
from slm_export.remade import made_from, subject_of
from slm_export.results import Artifact, Check, Pair
from slm_export.runtime import AdaptableSession, DecoderSession, EncoderSession, Session
from slm_export.tokenization.tokenizer import Detokenizer, SourceTokenizer


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
    folder: Path,
    source: str | None,
    eval_text: Path | None,
    calibration: Path | None,
    progress: Progress,
    adapters: Sequence[tuple[str, Path]] = (),
) -> Verification:
    """Repeat what can be repeated: checksums always, and with the source model the whole gate.

    Given   adapters: names and folders of adapters of the bundle, as they came: the gate with them on too

    Raises:
        InputError: not a bundle, or another source model than it was made from.
    """
    manifest = read_manifest(folder)
    if calibration is not None and source is None:
        raise InputError("--calibration is of use with --source alone: without it nothing is quantized again")
    if adapters and source is None:
        raise InputError(
            "--adapter is of use with --source alone: an adapter is compared with its source and itself"
        )
    with progress.stage("check files"):
        problems = verify_files(folder)
    detail = "; ".join(str(problem) for problem in problems) or f"{len(manifest.files)} files are as written"
    checks: dict[str, tuple[Check, ...]] = {"files": (Check("checksums", not problems, detail),)}
    if problems:
        return Verification(checks, ("artifacts were not opened: the files are not those that were written",))
    if source is not None:
        passes = [str(step["pass"]) for step in manifest.recipe]
        refuse_foreign_text(passes, calibration, eval_text, judged=True)
    opened = nullcontext() if source is None else made_from(folder, manifest, source, calibration, progress)
    with opened as models:
        more, notes, pairs = _judge_all(
            folder, manifest, models, adapters, load_documents(eval_text), progress
        )
    return Verification({**checks, **more}, notes, pairs)


def _judge_all(
    folder: Path,
    manifest: Manifest,
    models: References | None,
    adapters: Sequence[tuple[str, Path]],
    documents: Sequence[str],
    progress: Progress,
) -> tuple[dict[str, tuple[Check, ...]], tuple[str, ...], tuple[Pair, ...]]:
    """Judge every artifact, and the pairs of them; return checks by format, notes and pairs."""
    sources = _adapters_of(manifest, models, adapters, progress)
    several = len(manifest.artifacts) > 1
    checks: dict[str, tuple[Check, ...]] = {}
    notes: list[str] = []
    traces: dict[str, Trace] = {}
    stored: dict[str, Stored] = {}
    for entry in manifest.artifacts:
        subject = subject_of(folder, manifest, entry, documents, models)
        made, path = subject.exporter, subject.path
        opens: tuple[Check, ...] = ()
        if made.elsewhere is None:  # else no native code reads it
            with progress.stage(f"try {entry.format}"):
                opens = (judge_opening(entry.format, path, subject.task),)
            if not opens[0].passed:
                checks[entry.format] = opens
                continue
        if models is None:
            with progress.stage(f"open {entry.format}"):
                judged = self_check(subject, trace=several)
            notes.append("fidelity was not measured: give --source MODEL")
        else:
            judged = judge_artifact(subject, models, progress, trace=several)
        size = _size(entry, manifest.gates)
        kept = [each for each in manifest.adapters if each.format == entry.format]
        switched, more = judge_kept(subject, kept, models, sources, progress)
        checks[entry.format] = (*opens, *size, *judged.checks, *switched, *_accelerated(subject))
        notes += [*judged.notes, *more]
        if judged.trace is not None:
            traces[entry.format], stored[entry.format] = judged.trace, made.stored(path)
    pairs: tuple[Pair, ...] = ()
    if traces:
        with progress.stage("compare formats"):
            pairs = compare(traces, stored, manifest.model.task)
        checks["formats"] = judge_pairs(pairs)
    return checks, tuple(dict.fromkeys(notes)), pairs


def _adapters_of(
    manifest: Manifest, models: References | None, asked: Sequence[tuple[str, Path]], progress: Progress
) -> dict[str, LowRank]:
    """Return adapters as they came; of names that the bundle has."""
    if models is None or not asked:
        return {}
    for name, _ in asked:
        if name not in (known := {each.name for each in manifest.adapters}):
            raise InputError(f"--adapter {name}: the bundle has no such adapter{suggestion(name, known)}")
    read = read_adapters(asked, models.source, manifest.model.source_sha256, progress)
    return {adapter.name: adapter for adapter in read}


def _size(entry: ArtifactEntry, gates: Gates) -> tuple[Check, ...]:
    artifact = Artifact(Path(entry.path), entry.format, entry.bytes, entry.sha256, entry.bits_per_weight)
    return judging.checks_of(artifact, Gates(max_bytes=gates.max_bytes), {})


def _accelerated(subject: Subject) -> tuple[Check, ...]:
    if subject.gates.min_accelerated is None:
        return ()
    return judging.judge_acceleration(subject.exporter.delegation(subject.path), subject.gates)


@dataclass
class OpenBundle:
    """An artifact of a bundle, open in its runtime, with the tokenizer beside it."""

    manifest: Manifest
    session: Session
    tokenizer: SourceTokenizer
    adapters: Mapping[str, Callable[[], Path]] = field(default_factory=dict)
    """Those that can be turned on -> what holds a file against the manifest and returns it."""
    adapter: str | None = None
    """The one that is on; `adapt` changes it."""

    def close(self) -> None:
        """Let go of the artifact."""
        self.session.close()

    def adapt(self, name: str | None) -> None:
        """Turn an adapter of the bundle on, by its name, or with None whichever is on off.

        Raises:
            InputError: the bundle has none of that name for this format.
            GateError: its file is not what was written, or was written for another artifact.
        """
        if name == self.adapter:
            return
        if name is not None and name not in self.adapters:
            hint = (
                suggestion(name, self.adapters)
                or "; it has none: export the model with --adapter NAME=FOLDER"
            )
            raise InputError(f"the bundle has no adapter '{name}' for this format{hint}")
        assert isinstance(self.session, AdaptableSession)
        self.session.adapt(None if name is None else self.adapters[name]())
        self.adapter = name

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
    session = made.open(folder / entry.path, manifest.model.task)
    adapters = {
        each.name: partial(_unchanged, folder, each)
        for each in manifest.adapters
        if each.format == entry.format
    }
    return OpenBundle(manifest, session, tokenizer, adapters)


def _unchanged(folder: Path, entry: AdapterEntry) -> Path:
    if problem := compare_file(folder, entry):
        raise GateError(f"{folder}: {problem}; add the adapter again")
    return folder / entry.path


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
