"""What is known of the source model: who it is, what it hashes to, what an app needs to run it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slm_export.bundles.checksums import FileEntry, sha256_entries, sha256_file
from slm_export.bundles.lock import Source
from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError
from slm_export.results import ModelFacts
from slm_export.runtime import ExportOptions
from slm_export.source.adapters import merged_from
from slm_export.source.card import front_matter, listed
from slm_export.source.learned import learned_of
from slm_export.source.licences import licence_of, licence_texts, licences_sha256
from slm_export.source.tasks import CLASSIFICATION, GENERATION, TOKENS
from slm_export.tokenization.tokenizer import SourceTokenizer

_READ = (".json", ".safetensors", ".txt", ".model", ".jinja")


def facts_of(source: Checkpoint, context: int) -> ModelFacts:
    """Return the facts for manifest and report."""
    learned, adapter = learned_of(source.folder), merged_from(source.folder)
    return ModelFacts(
        name=source.name,
        architecture=source.architecture,
        task=source.task,
        parameters=source.parameters,
        source_sha256=source_sha256(source.folder),
        source_bytes=source.bytes,
        licence=licence_of(source.folder),
        licence_texts=licence_texts(source.folder),
        context=context,
        learned=None if learned is None else learned.model_dump(mode="json"),
        adapter=None if adapter is None else adapter.model_dump(mode="json"),
    )


def source_sha256(folder: Path) -> str:
    """Return the hash of the model: of the names and contents of its weights, configuration and tokenizer."""
    files = [file for file in sorted(folder.rglob("*")) if file.suffix in _READ and file.is_file()]
    # Two levels: modules of sentence-transformers have a folder each; bundles made here lie deeper.
    near = [file for file in files if len(file.relative_to(folder).parts) <= 2]
    ours = {file.parent for file in near if file.name == "manifest.json"}
    return sha256_entries(
        FileEntry(
            path=file.relative_to(folder).as_posix(), bytes=file.stat().st_size, sha256=sha256_file(file)
        )
        for file in near
        if file.parent not in ours
    )


def source_of(folder: Path, revision: str | None, sha256: str | None = None) -> Source:
    """Return what a lock says of a model's folder; ``sha256`` is that of `source_sha256`, where it is known already."""
    return Source(sha256=sha256 or source_sha256(folder), revision=revision, licences=licences_sha256(folder))


def refuse_large_vocabulary(source: Checkpoint, tokenizer: SourceTokenizer) -> None:
    """Raise InputError where the tokenizer can produce ids that the embedding has no row for."""
    for name, role in source.roles.items():
        rows = source.weights[name].shape[0]
        if role == "embedding" and tokenizer.vocab_size > rows:
            raise InputError(
                f"{source.folder}: the tokenizer has {tokenizer.vocab_size} tokens, but the embedding only "
                f"{rows} rows; resize the embedding (resize_token_embeddings), or use the model's own tokenizer"
            )


def runtime_facts(
    source: Checkpoint, tokenizer: SourceTokenizer, options: ExportOptions, runners: Mapping[str, str]
) -> dict[str, Any]:
    """Return what an app must know to run the bundle, for the manifest's ``runtime``.

    Given   runners: format -> the tokenizer file that its runner is given
    """
    facts: dict[str, Any] = {"task": source.task, "context": options.context}
    if source.task == GENERATION:
        facts |= {
            "bos_id": tokenizer.bos_id,
            "adds_bos": tokenizer.adds_bos,
            "stop_ids": list(tokenizer.stop_ids),
            "chat_template": tokenizer.render_chat("hello") is not None,
            "tokenizer": dict(runners),
        }
    if source.task in (CLASSIFICATION, TOKENS):
        facts["labels"] = [str(source.config.id2label[i]) for i in range(source.config.num_labels)]
    return facts


def author_of(source: Checkpoint) -> str | None:
    """Return who made the model, as its configuration or its card's front matter says: a name, or several in a list."""
    for key in ("authors", "author"):
        if said := getattr(source.config, key, None):
            return ", ".join(map(str, said)) if isinstance(said, list | tuple) else str(said)
    return ", ".join(listed("authors?", front_matter(source.folder))) or None
