"""Core ML: ``Model.mlpackage``, an ML Program for iOS 18 and macOS 15 or later.

Given   a checkpoint on the integer grid or in tables, or in 16 or 32 bits
Result  a decoder is two functions over one KV cache in states, ``prefill`` (the default) and ``decode``, which share
        every weight: int32 inputIds (1, tokens), float16 causalMask (1, 1, tokens, end) -> float16 logits (1, tokens,
        vocabulary). An encoder takes int32 ids and mask (1, n) of a few lengths n and returns an embedding or scores.

Activations are float16, in float32 where the checkpoint keeps 32 bits; a Core ML state is float16 always. Core ML runs
on Apple's systems alone: what was written is read back from disk and executed by `mil.evaluator`, operator by
operator as the format's specification says.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError, needs
from slm_export.results import Artifact, Check, written
from slm_export.runtime import ExportOptions, Session
from slm_export.source.tasks import ENDINGS, GENERATION
from slm_export.tokenization.tokenizer import OWN_TOKENIZER

if TYPE_CHECKING:
    from torch import Tensor

    from slm_export.delegation import Delegation
    from slm_export.tokenization.runtime_tokenizers import RuntimeTokenizer
    from slm_export.weights import Coded, Weight

_PACKAGES = "coremltools"


class CoreMLExporter:
    """Writes ``.mlpackage`` folders, and opens them without Core ML."""

    name: ClassVar[str] = "coreml"
    elsewhere: ClassVar[str | None] = "Core ML runs on Apple's systems alone"
    packages: ClassVar[tuple[str, ...]] = ("coremltools",)
    tables: ClassVar[bool] = True
    dense_only: ClassVar[str | None] = None

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
        from slm_export.exporters.coreml_models import write_decoder, write_encoder

        with _quiet_import():
            importlib.import_module("coremltools")
        write = write_decoder if checkpoint.task == GENERATION else write_encoder
        signatures = write(checkpoint, options, path)
        return written(path, self.name, checkpoint.parameters, signatures)

    def open(self, path: Path, task: str) -> Session:
        """Open a package in the evaluator of saved programs."""
        with needs(self.name, _PACKAGES), _quiet_import():
            from slm_export.exporters.coreml_session import open_session

            return open_session(path, task)

    def stored(self, path: Path) -> Mapping[str, Coded]:
        """Return every quantized or palettized matrix under its name in the checkpoint, read from the package alone."""
        with needs(self.name, _PACKAGES), _quiet_import():
            from slm_export.exporters.coreml_stored import read_weights

            return read_weights(path)

    def own_checks(self, path: Path, checkpoint: Checkpoint, tokens: Sequence[int]) -> tuple[Check, ...]:
        """Return whether the program is the model where nothing is rounded."""
        from slm_export.exporters.coreml_exact import judge_exact

        return (judge_exact(path, checkpoint, tokens),)

    def delegation(self, path: Path) -> Delegation:
        """Return a prediction: which unit runs an operator is decided on the device."""
        with needs(self.name, _PACKAGES), _quiet_import():
            from slm_export.exporters.coreml_accelerators import delegation

            return delegation(path)

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
