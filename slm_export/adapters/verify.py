"""The adapters of a finished bundle judged again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from slm_export.adapters.gate import judge_adapter, judge_places, judge_switching
from slm_export.adapters.low_rank import LowRank
from slm_export.bundles.manifest import AdapterEntry
from slm_export.errors import InputError
from slm_export.fidelity import References
from slm_export.judge import Subject
from slm_export.progress import Progress
from slm_export.results import Check
from slm_export.runtime import AdapterExporter


def judge_kept(
    subject: Subject,
    entries: Sequence[AdapterEntry],
    references: References | None,
    sources: Mapping[str, LowRank],
    progress: Progress,
) -> tuple[tuple[Check, ...], tuple[str, ...]]:
    """Return checks and notes: switching always, the whole gate of those whose source is there.

    Given   entries: what the manifest says of those for this artifact
            references: what the artifact is compared with, None without its source model
            sources: adapters as they came, by name

    Raises:
        InputError: a source is not the one that the bundle's adapter was made from.
    """
    if not entries:
        return (), ()
    files = {each.name: subject.bundle / each.path for each in entries}
    with progress.stage(f"switch adapters of {subject.exporter.name}"):
        checks = list(judge_switching(subject, files))
    notes = []
    for each in entries:
        source = sources.get(each.name)
        if references is None or source is None:
            notes.append(
                f"adapter {each.name} was not compared with its source: give --source MODEL and --adapter "
                f"{each.name}=FOLDER"
            )
            continue
        if source.sha256 != each.source_sha256:
            raise InputError(f"--adapter {each.name}: not the adapter that the bundle has (another sha256)")
        _, found = judge_adapter(subject, references, source, files[each.name], progress)
        checks += [replace(check, name=f"{each.name}: {check.name}") for check in found]
    if references is not None and sources:
        assert isinstance(subject.exporter, AdapterExporter)
        places = tuple(dict.fromkeys(name for each in sources.values() for name in each.factors))
        checks.append(
            judge_places(subject.exporter, references.quantized, places, subject.bundle / "tokenizer")
        )
    return tuple(checks), tuple(notes)
