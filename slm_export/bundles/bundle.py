"""A bundle: the folder that an export leaves behind, whole or not at all.

    with staged(out, force) as staging:
        ... write artifacts and tokenizer below staging.path ...
        report = write_documents(staging.path, report, runtime=..., gates=...)
        staging.commit()

`write_documents` comes last: the manifest lists every other file with its hash.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slm_export.bundles.build import build_manifest
from slm_export.bundles.checksums import FileEntry, sha256_entries, sha256_file, size_of, tree_files
from slm_export.bundles.integrity import Problem, verify_files
from slm_export.bundles.manifest import Manifest, read_manifest, write_manifest
from slm_export.bundles.sbom import write_sbom
from slm_export.bundles.staging import Staging, staged
from slm_export.gates import Gates
from slm_export.machine import machine_errors
from slm_export.reports.report import bundled, to_html, to_json
from slm_export.results import Report

__all__ = [
    "FileEntry",
    "Manifest",
    "Problem",
    "Staging",
    "build_manifest",
    "machine_errors",
    "read_manifest",
    "sha256_entries",
    "sha256_file",
    "size_of",
    "staged",
    "tree_files",
    "verify_files",
    "write_documents",
    "write_manifest",
]


def write_documents(
    folder: Path,
    report: Report,
    *,
    recipe: Sequence[Mapping[str, Any]] | None = None,
    gates: Gates | None = None,
    runtime: Mapping[str, Any] | None = None,
) -> Report:
    """Write report.json, report.html, sbom.cdx.json and, over all of them, manifest.json.

    Returns the report with the artifacts' paths relative to the bundle.
    """
    report = bundled(report, folder)
    text = json.dumps(to_json(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8", newline="\n")
    (folder / "report.html").write_text(to_html(report), encoding="utf-8", newline="\n")
    files = tree_files(folder)
    sbom = write_sbom(folder, report, files)
    files += (FileEntry(path=sbom.name, bytes=size_of(sbom), sha256=sha256_file(sbom)),)
    files = tuple(sorted(files, key=lambda entry: entry.path))
    write_manifest(folder, build_manifest(report, files=files, recipe=recipe, gates=gates, runtime=runtime))
    return report
