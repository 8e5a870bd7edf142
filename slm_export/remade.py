"""What the artifacts of a finished bundle are judged with: the bundle's own word, and the models it was made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from slm_export.bundles.bundle import Manifest
from slm_export.bundles.manifest import ArtifactEntry
from slm_export.errors import InputError
from slm_export.fidelity import References, references
from slm_export.judge import Subject
from slm_export.optimize import calibration_for, optimize, refuse_other_text
from slm_export.progress import Progress
from slm_export.recipe import make_pass
from slm_export.registry import exporter
from slm_export.results import CalibrationFacts
from slm_export.source.hub import find_model
from slm_export.source.load import load_checkpoint
from slm_export.source.provenance import source_sha256
from slm_export.tokenization.tokenizer import OWN_TOKENIZER, SourceTokenizer


def subject_of(
    folder: Path,
    manifest: Manifest,
    entry: ArtifactEntry,
    documents: Sequence[str],
    models: References | None,
) -> Subject:
    """Return an artifact of a bundle, and what it is judged with.

    Given   models: what it is compared with, None without its source model
    """
    fewer = models is not None and models.quantized.vocabulary is not None
    tokenizer = SourceTokenizer.load(
        folder / "tokenizer" if models is None or fewer else models.source.folder
    )
    runner = _runner_tokenizer(folder, manifest, entry.format)
    return Subject(
        exporter(entry.format),
        folder / entry.path,
        manifest.model.task,
        tokenizer,
        runner,
        documents,
        manifest.gates,
        _context(folder, manifest),
    )


def _context(folder: Path, manifest: Manifest) -> int:
    context = manifest.runtime.get("context")
    if context is None:
        raise InputError(f"{folder}/manifest.json: runtime names no context; export the model again")
    return int(context)


@contextmanager
def made_from(
    folder: Path, manifest: Manifest, source: str, calibration: Path | None, progress: Progress
) -> Iterator[References]:
    """Make the quantized checkpoint of a bundle again, which is deterministic on one machine.

    Raises:
        InputError: another source model than it was made from, or another text for its calibration.
    """
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


def _runner_tokenizer(folder: Path, manifest: Manifest, format: str) -> Path:
    """Return the tokenizer file that a format's runner is given."""
    named = str(dict(manifest.runtime.get("tokenizer") or {}).get(format, OWN_TOKENIZER))
    if named not in {entry.path for entry in manifest.files}:
        raise InputError(
            f"{folder}/manifest.json: runtime.tokenizer names {named!r}, which is not in the bundle"
        )
    return folder / named
