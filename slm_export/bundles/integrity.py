"""Whether a folder holds what its manifest says, no less and no more."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slm_export.bundles.checksums import FileEntry, scan, sha256_file
from slm_export.bundles.manifest import MANIFEST, AdapterEntry, entries_of, read_manifest, read_raw, total_of
from slm_export.errors import InputError
from slm_export.source.learned import LEARNING

# Left by file browsers that only looked at the folder.
_LITTER = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})


@dataclass(frozen=True)
class Problem:
    """One way in which a folder is not what its manifest says."""

    path: str
    kind: Literal["changed", "missing", "extra", "unreadable"]
    detail: str

    def __str__(self) -> str:
        return f"{self.path}: {self.kind}: {self.detail}"


def verify_files(folder: Path) -> tuple[Problem, ...]:
    """Compare every file of the folder with the manifest, and the manifest with itself."""
    manifest = read_manifest(folder)
    problems = [problem for entry in manifest.files if (problem := compare_file(folder, entry))]
    listed = {entry.path for entry in manifest.files} | {MANIFEST}
    plain, odd = scan(folder)
    for path in (*plain, *odd):
        if path not in listed and Path(path).name not in _LITTER:
            problems.append(Problem(path, "extra", "not in the manifest"))
    for artifact in manifest.artifacts:
        entries = entries_of(artifact, manifest.files)
        if (artifact.bytes, artifact.sha256) != total_of(artifact, entries):
            problems.append(
                Problem(artifact.path, "changed", "the manifest lists two different hashes or sizes")
            )
    return tuple(sorted(problems, key=lambda problem: problem.path))


def compare_file(folder: Path, entry: FileEntry | AdapterEntry) -> Problem | None:
    """Return in which way a file is not what the manifest says of it, if it is not."""
    path = folder / entry.path
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            return Problem(entry.path, "changed", "not a plain file")
        if found.st_size != entry.bytes:
            return Problem(
                entry.path, "changed", f"{found.st_size:,} bytes where {entry.bytes:,} were written"
            )
        if (sha256 := sha256_file(path)) != entry.sha256:
            return Problem(
                entry.path, "changed", f"sha256 {sha256[:12]}... where {entry.sha256[:12]}... was written"
            )
    except (FileNotFoundError, NotADirectoryError):
        return Problem(entry.path, "missing", "in the manifest, not in the folder")
    except OSError as error:
        return Problem(entry.path, "unreadable", error.strerror or str(error))
    return None


def strangers(folder: Path) -> str | None:
    """Say why ``folder`` must not be replaced, or return None: it is empty, or a bundle and nothing else.

    A model that was taught here counts as one. Any schema version will do. A file called manifest.json alone proves
    nothing (browser
    extensions have one too), and a file that the user put beside the model is the user's.
    """
    plain, odd = scan(folder)
    if not plain and not odd:
        return None
    listing, holds = (MANIFEST, "artifacts") if MANIFEST in plain else (LEARNING, "learned")
    if listing not in plain:
        return "it holds files, but no manifest.json of slm-export"
    try:
        data = read_raw(folder / listing)
        listed = {entry["path"] for entry in data["files"]} | {listing}
        known = "schema" in data and holds in data
    except (InputError, KeyError, TypeError):
        known = False
    if not known:
        return f"its {listing} is not one of slm-export"
    for path in (*plain, *odd):
        if path not in listed and Path(path).name not in _LITTER:
            return f"it also holds {path}, which is not of the bundle"
    return None
