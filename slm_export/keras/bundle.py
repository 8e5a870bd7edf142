"""A bundle that was made of a TensorFlow model, opened again; TensorFlow itself is needed only with the source."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from slm_export.bundles.bundle import Manifest, read_manifest, verify_files
from slm_export.errors import GateError, InputError
from slm_export.fidelity.judging import checks_of
from slm_export.gates import Gates
from slm_export.keras.inputs import Ids, parse_ids
from slm_export.opened import Verification
from slm_export.progress import Progress
from slm_export.recipe import make_pass
from slm_export.registry import exporter
from slm_export.results import Artifact, Check
from slm_export.runtime import EncoderSession
from slm_export.source.tasks import EMBEDDING
from slm_export.tokenization.tokenizer import SourceTokenizer
from slm_export.weights import CODE_RANGE, Coded, Quantized, grid_scale

_TOKENIZER = "tokenizer"


def is_one(folder: Path) -> bool:
    """Return whether a bundle was made of a TensorFlow model; InputError where it is no bundle."""
    return read_manifest(folder).runtime.get("source") == "tensorflow"


def verify(folder: Path, source: str | None, eval_text: Path | None, progress: Progress) -> Verification:
    """Repeat what can be repeated: checksums and stored codes always, and with the source the whole gate."""
    manifest = read_manifest(folder)
    with progress.stage("check files"):
        problems = verify_files(folder)
    detail = "; ".join(str(problem) for problem in problems) or f"{len(manifest.files)} files are as written"
    checks: dict[str, tuple[Check, ...]] = {"files": (Check("checksums", not problems, detail),)}
    if problems:
        return Verification(checks, ("artifacts were not opened: the files are not those that were written",))
    notes: tuple[str, ...] = ()
    for entry in manifest.artifacts:
        path = folder / entry.path
        if source is None:
            with progress.stage(f"open {entry.format}"):
                checks[entry.format] = (_on_the_grid(entry.format, path), _runs(entry.format, path, manifest))
            notes = ("fidelity was not measured: give --source MODEL",)
        else:
            checks[entry.format], notes = _with_source(folder, manifest, source, eval_text, progress)
    return Verification(checks, notes)


def run(folder: Path, prompt: str, format: str | None) -> dict[str, Any]:
    """Return what the artifact says of a prompt (of ids, where the bundle has no tokenizer) as JSON values."""
    manifest = read_manifest(folder)
    entry = manifest.artifact(format) if format else manifest.artifacts[0]
    if problems := [p for p in verify_files(folder) if p.path.startswith((entry.path, f"{_TOKENIZER}/"))]:
        raise GateError(f"{folder}: {problems[0]}; export the model again")
    ids = _ids(folder, manifest, prompt)
    session = exporter(entry.format).open(folder / entry.path, manifest.model.task)
    try:
        assert isinstance(session, EncoderSession)
        if len(ids) > session.context:
            raise InputError(
                f"the prompt has {len(ids)} tokens, but the model takes at most {session.context}"
            )
        values = session.outputs(ids, [1] * len(ids)).tolist()
    finally:
        session.close()
    if manifest.model.task == EMBEDDING:
        return {"embedding": values}
    return _label(values, [str(label) for label in manifest.runtime.get("labels", [])], manifest)


def _ids(folder: Path, manifest: Manifest, prompt: str) -> Ids:
    if (folder / _TOKENIZER).is_dir():
        return tuple(SourceTokenizer.load(folder / _TOKENIZER).encode_with_template(prompt))
    rows = manifest.runtime.get("vocabulary")
    return parse_ids(prompt, None if rows is None else int(rows), f"{folder} has no tokenizer, and --prompt")


def _label(values: list[float], labels: list[str], manifest: Manifest) -> dict[str, Any]:
    """Return the class and all scores, as the model gives them: whether they are probabilities is its own matter."""
    if len(values) == 1:
        yes = values[0] >= float(manifest.runtime.get("threshold", 0.5))
        return {"label": (labels or ["no", "yes"])[yes], "scores": {(labels or ["no", "yes"])[1]: values[0]}}
    scores = dict(zip(labels or [str(index) for index in range(len(values))], values, strict=True))
    return {"label": max(scores, key=scores.__getitem__), "scores": scores}


def _on_the_grid(format: str, path: Path) -> Check:
    """Read every code and scale back from the file."""
    stored = exporter(format).stored(path)
    wrong = [name for name, weight in stored.items() if not _is_on_the_grid(weight)]
    detail = f"{len(stored)} matrices are on the grid"
    if not stored or wrong:
        detail = f"not on the grid: {', '.join(wrong)}" if wrong else "the file holds no quantized matrix"
    return Check("stored_weights", bool(stored) and not wrong, detail)


def _is_on_the_grid(weight: Coded) -> bool:
    if not isinstance(weight, Quantized):
        return False
    low, high = CODE_RANGE[weight.bits]
    codes, scales = weight.codes(), weight.scales
    return bool((codes >= low).all() and (codes <= high).all()) and torch.equal(grid_scale(scales), scales)


def _runs(format: str, path: Path, manifest: Manifest) -> Check:
    session = exporter(format).open(path, manifest.model.task)
    try:
        assert isinstance(session, EncoderSession)
        output = session.outputs([1], [1])
    finally:
        session.close()
    finite = bool(output.isfinite().all())
    return Check("runs", finite, "the artifact opens and gives " + ("numbers" if finite else "no numbers"))


def _with_source(
    folder: Path, manifest: Manifest, source: str, eval_text: Path | None, progress: Progress
) -> tuple[tuple[Check, ...], tuple[str, ...]]:
    """Quantize the model again, which is deterministic, and judge the artifact by it."""
    from slm_export.keras.export import quantize
    from slm_export.keras.judge import judge
    from slm_export.keras.read import read_model, ready, source_sha256
    from slm_export.optimizers.group_quantize import GroupQuantize

    path = Path(os.path.expanduser(source))
    if not os.path.exists(path) or source_sha256(path) != manifest.model.source_sha256:
        raise InputError(f"{source}: not the model that {folder} was made from (another sha256)")
    ready()
    read = read_model(path, manifest.model.context, eval_text, progress)
    (row,) = manifest.recipe
    step = make_pass(
        str(row["pass"]),
        {key: value for key, value in row.items() if key != "pass"},
        f"{folder}/manifest.json",
    )
    assert isinstance(step, GroupQuantize)
    checkpoint, _ = quantize(read.converted, step, progress)
    (entry,) = manifest.artifacts
    made = exporter(entry.format)
    artifact = Artifact(folder / entry.path, entry.format, entry.bytes, entry.sha256, entry.bits_per_weight)
    size = checks_of(artifact, Gates(max_bytes=manifest.gates.max_bytes), {})
    _, checks = judge(
        read.model, read.converted, checkpoint, made, artifact.path, read.held, manifest.gates, progress
    )
    return (*size, *checks), read.notes
