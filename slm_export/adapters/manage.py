"""The adapters of a finished bundle: added, removed. The base is not exported again, and its file not touched.

A bundle is replaced as a whole: a copy beside it, of links to the same files, gets the change and takes its place.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from slm_export.adapters.build import FOLDER, build_adapters, read_adapters
from slm_export.adapters.formats import refuse_adapters
from slm_export.adapters.low_rank import LowRank
from slm_export.bundles.build import adapter_entry
from slm_export.bundles.bundle import Manifest, read_manifest, verify_files, write_manifest
from slm_export.bundles.checksums import tree_files
from slm_export.bundles.manifest import MANIFEST, AdapterEntry, ArtifactEntry
from slm_export.bundles.sbom import SBOM, update_sbom
from slm_export.bundles.staging import staged
from slm_export.errors import GateError, InputError, suggestion
from slm_export.evaltext import load_documents
from slm_export.machine import machine_errors
from slm_export.progress import Progress
from slm_export.registry import exporter
from slm_export.remade import made_from, subject_of
from slm_export.results import AdapterResult, Artifact, Check
from slm_export.runtime import AdaptableSession, AdapterExporter


def add_adapters(
    folder: Path,
    asked: Sequence[tuple[str, Path]],
    source: str,
    texts: tuple[Path | None, Path | None],
    progress: Progress,
) -> tuple[tuple[AdapterEntry, ...], tuple[Check, ...]]:
    """Add adapters, by name and folder, to a bundle that has places for them; return what the manifest says of them.

    Given   source: the model that the bundle was made from
            texts: held-out text, and text that calibrated passes of the bundle's recipe were given; None: the defaults

    Raises:
        GateError: one of them is not good enough; the bundle is as it was.
        InputError: not a bundle, another source, a name that is taken, or an adapter that does not fit.
    """
    manifest = _whole(folder)
    for name, _ in asked:
        if name in {each.name for each in manifest.adapters}:
            raise InputError(
                f"{folder}: has an adapter '{name}' already; remove it first, or give another name"
            )
    passes = [str(step["pass"]) for step in manifest.recipe]
    apart = [entry for entry in manifest.artifacts if _keeps_apart(entry)]
    refuse_adapters(
        asked, passes, [exporter(entry.format) for entry in apart or manifest.artifacts], searched=False
    )
    documents = load_documents(texts[0])
    with (
        staged(folder, force=True) as staging,
        made_from(folder, manifest, source, texts[1], progress) as references,
    ):
        assert references is not None
        adapters = read_adapters(asked, references.source, manifest.model.source_sha256, progress)
        _link(folder, staging.path)
        results: list[AdapterEntry] = []
        checks: list[Check] = []
        for entry in apart:
            subject = subject_of(staging.path, manifest, entry, documents, references)
            _refuse_without_places(entry, subject.path, manifest.model.task, adapters)
            others = {a.name: staging.path / a.path for a in manifest.adapters if a.format == entry.format}
            made, found = build_adapters(
                adapters, subject, _artifact(entry, staging.path), references, progress, others
            )
            checks += found
            results += [adapter_entry(_relative(each, staging.path), entry.format) for each in made]
        if failed := [check for check in checks if not check.passed]:
            lines = "\n".join(f"  {check.name}: {check.detail}" for check in failed)
            raise GateError(f"{folder}: not good enough with the adapter on, and nothing was added\n{lines}")
        _write(staging.path, manifest, (*manifest.adapters, *results))
        staging.commit()
    return tuple(results), tuple(checks)


def remove_adapter(folder: Path, name: str) -> tuple[AdapterEntry, ...]:
    """Remove an adapter, of every format; return what is left.

    Raises:
        InputError: not a bundle, or no such adapter in it.
    """
    manifest = _whole(folder)
    gone = [each for each in manifest.adapters if each.name == name]
    if not gone:
        known = {each.name for each in manifest.adapters}
        raise InputError(f"{folder}: has no adapter '{name}'{suggestion(name, known) or '; it has none'}")
    left = tuple(each for each in manifest.adapters if each.name != name)
    with staged(folder, force=True) as staging:
        _link(folder, staging.path)
        for each in gone:
            (staging.path / each.path).unlink()
        if not left:
            (staging.path / FOLDER).rmdir()
        _write(staging.path, manifest, left)
        staging.commit()
    return left


def _whole(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    if problems := verify_files(folder):
        raise GateError(f"{folder}: {problems[0]}; export the model again")
    return manifest


def _keeps_apart(entry: ArtifactEntry) -> bool:
    return isinstance(exporter(entry.format), AdapterExporter)


def _refuse_without_places(entry: ArtifactEntry, path: Path, task: str, adapters: Sequence[LowRank]) -> None:
    session = exporter(entry.format).open(path, task)
    places = session.places if isinstance(session, AdaptableSession) else frozenset()
    session.close()
    for adapter in adapters:
        if missing := [name for name in adapter.factors if name not in places]:
            there = ", ".join(sorted({name.split(".")[-2] for name in places})) or "none"
            raise InputError(
                f"adapter '{adapter.name}' adds to {missing[0]} ({len(missing)} such), for which {entry.path} has no "
                f"place (it has: {there}); export the model again with --adapter {adapter.name}=FOLDER"
            )


def _artifact(entry: ArtifactEntry, folder: Path) -> Artifact:
    return Artifact(folder / entry.path, entry.format, entry.bytes, entry.sha256, entry.bits_per_weight)


def _relative(made: AdapterResult, folder: Path) -> AdapterResult:
    return replace(made, path=made.path.relative_to(folder))


def _link(folder: Path, to: Path) -> None:
    """Put every file of a bundle into another folder, as a link where the file system has them.

    What is written anew is no link: the bundle that is there stays whole until it is replaced.
    """
    with machine_errors("copy the bundle", to):
        for entry in tree_files(folder):
            place = to / entry.path
            place.parent.mkdir(parents=True, exist_ok=True)
            if entry.path in (MANIFEST, SBOM):
                shutil.copyfile(folder / entry.path, place)
                continue
            try:
                os.link(folder / entry.path, place)
            except OSError:
                shutil.copy2(folder / entry.path, place)


def _write(folder: Path, manifest: Manifest, adapters: Sequence[AdapterEntry]) -> None:
    if (folder / SBOM).is_file():
        own = (MANIFEST, SBOM)
        update_sbom(folder, [entry for entry in tree_files(folder) if entry.path not in own])
    files = tuple(entry for entry in tree_files(folder) if entry.path != MANIFEST)
    write_manifest(folder, manifest.model_copy(update={"adapters": tuple(adapters), "files": files}))
