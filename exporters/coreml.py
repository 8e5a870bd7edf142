"""Core ML: ``Model.mlpackage``, an ML Program for iOS 18 and macOS 15 or later.

Given   a checkpoint on the integer grid, or in 16 or 32 bits
Result  a decoder is two functions over one KV cache in states, ``prefill`` (the default) and ``decode``, which share
        every weight: int32 inputIds (1, tokens), float16 causalMask (1, 1, tokens, end) -> float16 logits (1, tokens,
        vocabulary). An encoder takes int32 ids and mask (1, n) of a few lengths n and returns an embedding or scores.

Activations are float16, in float32 where the checkpoint keeps 32 bits; a Core ML state is float16 always. Core ML runs
on Apple's systems alone: what was written is read back from disk and executed by `coreml_evaluator`, operator by
operator as the format's specification says.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError, needs
from slm_export.results import Artifact, Check, Signature, written
from slm_export.runtime import ExportOptions, Session
from slm_export.tasks import CLASSIFICATION, ENDINGS, GENERATION, TOKENS, output_shape
from slm_export.tokenizer import OWN_TOKENIZER

if TYPE_CHECKING:
    from torch import Tensor

    from slm_export.runtime_tokenizers import RuntimeTokenizer
    from slm_export.weights import Quantized, Weight

_PACKAGES = "coremltools"
_LONGEST = 256
"""Tokens of one call that our sessions and apps use: it returns the logits of all of them."""
_LENGTHS = (32, 128, 512)


class CoreMLExporter:
    """Writes ``.mlpackage`` folders, and opens them without Core ML."""

    name: ClassVar[str] = "coreml"
    elsewhere: ClassVar[str | None] = "Core ML runs on Apple's systems alone"
    packages: ClassVar[tuple[str, ...]] = ("coremltools",)

    def file(self, task: str) -> str:
        """Return where the package is in a bundle."""
        return "coreml/Model.mlpackage"

    def ready(self) -> None:
        """Raise MissingComponentError unless coremltools can be imported."""
        with needs(self.name, _PACKAGES), _quiet_import():
            importlib.import_module("coremltools")

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise InputError where this checkpoint cannot be written in this format."""
        if checkpoint.task not in ENDINGS.values():
            raise InputError(f"{checkpoint.name}: task {checkpoint.task} cannot be exported to coreml")
        if checkpoint.task == GENERATION:
            from slm_export.exporters.coreml_graph import check_decoder

            check_decoder(checkpoint)

    def write(self, checkpoint: Checkpoint, options: ExportOptions, path: Path) -> Artifact:
        """Convert the graph without weights, and write the package with them."""
        self.ready()
        write = _write_decoder if checkpoint.task == GENERATION else _write_encoder
        signatures = write(checkpoint, options, path)
        return written(path, self.name, checkpoint.parameters, signatures)

    def open(self, path: Path, task: str) -> Session:
        """Open a package in the evaluator of saved programs."""
        with needs(self.name, _PACKAGES), _quiet_import():
            from slm_export.exporters.coreml_session import open_session

            return open_session(path, task)

    def stored(self, path: Path) -> Mapping[str, Quantized]:
        """Return every quantized matrix under its name in the checkpoint, read from the package alone."""
        with needs(self.name, _PACKAGES), _quiet_import():
            from slm_export.exporters.coreml_stored import read_weights

            return read_weights(path)

    def own_checks(self, path: Path, checkpoint: Checkpoint, tokens: Sequence[int]) -> tuple[Check, ...]:
        """Return whether the program is the model where nothing is rounded."""
        from slm_export.exporters.coreml_exact import judge_exact

        return (judge_exact(path, checkpoint, tokens),)

    def delegation(self, path: Path) -> None:
        """Which unit runs an operator is decided on the device."""

    def rounding(self, x: Tensor, weight: Weight) -> Tensor:
        """Return activations as the program holds them: in float16, or as they are where it keeps 32 bits."""
        from slm_export.exporters.coreml_graph import is_half

        return x.half().float() if is_half(weight) else x

    def runner_tokenizer(self, bundle: Path) -> str:
        """Return the source's own tokenizer, which swift-transformers reads."""
        return OWN_TOKENIZER

    def open_tokenizer(self, path: Path, tokenizer: Path, task: str) -> RuntimeTokenizer | None:
        """Return None: the tokenizer of an app is written in Swift, and does not run here."""
        return None

    def set_threads(self, count: int) -> None:
        """Let torch use ``count`` threads."""
        import torch

        torch.set_num_threads(count)

    def generate(self, path: Path, tokenizer: Path, prompt: str, tokens: int, bos: int) -> str:
        """Not to be called: see `elsewhere`."""
        raise AssertionError(self.elsewhere)


@contextmanager
def _quiet_import() -> Iterator[None]:
    """Coremltools says at every import what it has not been tested with; our own checks are what counts."""
    log = logging.getLogger("coremltools")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _write_decoder(checkpoint: Checkpoint, options: ExportOptions, path: Path) -> tuple[Signature, ...]:
    import coremltools as ct
    import numpy as np

    from slm_export.exporters import coreml_graph as graph
    from slm_export.exporters import coreml_metadata as keys
    from slm_export.exporters.coreml_writer import PackageWriter

    dtype = graph.program_dtype(checkpoint)
    traced = graph.trace_decoder(checkpoint, options.context)
    functions = {}
    for name, tokens in ((graph.PREFILL, ct.RangeDim(1, options.context)), (graph.DECODE, 1)):
        end = ct.RangeDim(1, options.context)
        inputs = [
            ct.TensorType(name=graph.IDS, shape=(1, tokens), dtype=np.int32),
            ct.TensorType(name=graph.MASK, shape=(1, 1, tokens, end), dtype=np.float16),
        ]
        functions[name] = graph.convert(traced, inputs, graph.LOGITS, dtype, ct.target.iOS18)
    metadata = _metadata(checkpoint, options) | {
        keys.PREFILL: str(min(_LONGEST, options.context)),
        keys.STOP_IDS: json.dumps(options.stop_ids),
    }
    if options.bos_id is not None:
        metadata[keys.BOS_ID] = str(options.bos_id)
    PackageWriter(checkpoint, dtype, path).write(functions, graph.PREFILL, metadata, **_facts(checkpoint))
    vocabulary = checkpoint.config.get_text_config().vocab_size
    full = "float16" if dtype == "fp16" else "float32"
    return tuple(
        Signature(
            name,
            {graph.IDS: f"int32[1, {tokens}]", graph.MASK: f"float16[1, 1, {tokens}, end]"},
            {graph.LOGITS: f"{full}[1, {tokens}, {vocabulary}]"},
        )
        for name, tokens in ((graph.PREFILL, "tokens"), (graph.DECODE, "1"))
    )


def _write_encoder(checkpoint: Checkpoint, options: ExportOptions, path: Path) -> tuple[Signature, ...]:
    import coremltools as ct
    import numpy as np

    from slm_export.exporters import coreml_graph as graph
    from slm_export.exporters import coreml_metadata as keys
    from slm_export.exporters.coreml_writer import PackageWriter

    dtype = graph.program_dtype(checkpoint)
    traced, names = graph.trace_encoder(checkpoint, options.context)
    lengths = (*(length for length in _LENGTHS if length < options.context), options.context)
    shape = ct.EnumeratedShapes([(1, length) for length in lengths])
    inputs = [ct.TensorType(name=name, shape=shape, dtype=np.int32) for name in names]
    output, described = output_shape(checkpoint.task, checkpoint.config)
    function = graph.convert(traced, inputs, output, dtype, ct.target.iOS18)
    metadata = _metadata(checkpoint, options) | {keys.LENGTHS: json.dumps(lengths)}
    PackageWriter(checkpoint, dtype, path).write({"main": function}, "main", metadata, **_facts(checkpoint))
    described = described.replace("float32", "float16" if dtype == "fp16" else "float32")
    takes = dict.fromkeys(names, f"int32[1, {'|'.join(map(str, lengths))}]")
    return (Signature("main", takes, {output: described}),)


def _metadata(checkpoint: Checkpoint, options: ExportOptions) -> dict[str, str]:
    """Return what every package says of itself to an app."""
    from slm_export.checksums import sha256_file
    from slm_export.exporters import coreml_metadata as keys

    labels = getattr(checkpoint.config, "id2label", None) or {}
    said: dict[str, Any] = {keys.TASK: checkpoint.task, keys.CONTEXT: str(options.context)}
    if checkpoint.task in (CLASSIFICATION, TOKENS):
        said[keys.LABELS] = json.dumps([labels[index] for index in sorted(labels)])
    if options.tokenizer is not None:
        said[keys.TOKENIZER] = sha256_file(options.tokenizer)
    return said


def _facts(checkpoint: Checkpoint) -> dict[str, str]:
    """Return what Xcode shows of a model."""
    from slm_export.provenance import licence_of

    facts = {"shortDescription": f"{checkpoint.name} ({checkpoint.task})", "versionString": "1"}
    licence = licence_of(checkpoint)
    return facts | ({"license": licence} if licence else {})
