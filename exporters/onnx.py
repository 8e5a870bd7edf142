"""ONNX for ONNX Runtime: ``model.onnx``, for Android, iOS, Linux and Windows alike.

Given   a checkpoint on the integer grid, or in 16 or 32 bits
Result  a decoder takes input_ids, attention_mask and the keys and values of what came before, and returns the logits
        of the last token and all keys and values; with the configuration and the tokenizer beside it,
        onnxruntime-genai runs its folder as it is. An encoder takes ids and mask and returns an embedding or scores.
        Weights of more than 64 MB lie in ``model.onnx.data``.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError, needs
from slm_export.exporters.onnx_genai import GenaiTokenizer, generate, write_config
from slm_export.exporters.onnx_session import open_session
from slm_export.results import Artifact, Check, Signature, written
from slm_export.runtime import ExportOptions, Factors, Session
from slm_export.source.tasks import ENDINGS, GENERATION
from slm_export.tokenization.runtime_tokenizers import RuntimeTokenizer
from slm_export.tokenization.tokenizer import TOKENIZER_FILES

if TYPE_CHECKING:
    from torch import Tensor

    from slm_export.weights import Quantized, Weight

_PACKAGES = "onnx, onnxscript, onnxruntime and onnxruntime-genai"


class OnnxExporter:
    """Writes and opens ``.onnx`` files."""

    name: ClassVar[str] = "onnx"
    elsewhere: ClassVar[str | None] = None
    packages: ClassVar[tuple[str, ...]] = (
        "onnx",
        "onnx-ir",
        "onnxscript",
        "onnxruntime",
        "onnxruntime-genai",
    )
    tables: ClassVar[bool] = False
    adapter_suffix: ClassVar[str] = ".onnx_adapter"
    no_adapter_runner: ClassVar[str | None] = None
    dense_only: ClassVar[str | None] = (
        "ONNX Runtime has no sparse kernel for a quantized matrix (a sparse initializer is made dense as it is loaded)"
    )

    def __init__(self) -> None:
        self._threads = 0  # as many as there are cores

    def file(self, task: str) -> str:
        """Return where the model is in a bundle."""
        return "onnx/model.onnx"

    def ready(self) -> None:
        """Raise MissingComponentError unless the packages that write and run ONNX can be imported."""
        with needs(self.name, _PACKAGES):
            for package in ("onnx", "onnx_ir", "onnxscript", "onnxruntime", "onnxruntime_genai"):
                importlib.import_module(package)

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise InputError where this checkpoint cannot be written."""
        if checkpoint.task not in ENDINGS.values():
            raise InputError(f"{checkpoint.name}: task {checkpoint.task} cannot be exported to onnx")
        from slm_export.exporters.onnx_models import check_decoder, check_encoder

        (check_decoder if checkpoint.task == GENERATION else check_encoder)(checkpoint)

    def write(self, checkpoint: Checkpoint, options: ExportOptions, path: Path) -> Artifact:
        """Trace the model and write it; for a decoder onnxruntime-genai's configuration too."""
        from slm_export.exporters.onnx_file import data_file
        from slm_export.exporters.onnx_models import write_decoder, write_encoder

        write = write_decoder if checkpoint.task == GENERATION else write_encoder
        _, layers, inputs, outputs = write(checkpoint, options, path)
        if checkpoint.task == GENERATION:
            write_config(checkpoint, options, layers, path)
        data = tuple(file for file in (data_file(path),) if file.exists())
        return written(path, self.name, checkpoint.parameters, (Signature("main", inputs, outputs),), data)

    def open(self, path: Path, task: str) -> Session:
        """Open a model in plain ONNX Runtime."""
        with needs(self.name, _PACKAGES):
            importlib.import_module("onnxruntime")
        return open_session(path, task, self._threads)

    def stored(self, path: Path) -> Mapping[str, Quantized]:
        """Return every quantized matrix of the file."""
        from slm_export.exporters.onnx_file import read_stored

        with needs(self.name, _PACKAGES):
            importlib.import_module("onnx")
        return read_stored(path)

    def own_checks(self, path: Path, checkpoint: Checkpoint, tokens: Sequence[int]) -> tuple[Check, ...]:
        """Nothing that the other checks do not tell."""
        return ()

    def delegation(self, path: Path) -> None:
        """Nothing is handed over: ONNX Runtime's own kernels run the whole graph."""

    def rounding(self, x: Tensor, weight: Weight) -> Tensor:
        """Return activations as ONNX Runtime's kernels round them."""
        from slm_export.exporters.onnx_dialect import onnxruntime_rounding

        return onnxruntime_rounding(x, weight)

    def runner_tokenizer(self, bundle: Path) -> str:
        """Copy the tokenizer's files beside the model, where onnxruntime-genai looks for them."""
        folder = bundle / "onnx"
        folder.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            if (bundle / "tokenizer" / name).is_file():
                shutil.copyfile(bundle / "tokenizer" / name, folder / name)
        return "onnx/tokenizer.json"

    def open_tokenizer(self, path: Path, tokenizer: Path, task: str) -> RuntimeTokenizer | None:
        """Open onnxruntime-genai's tokenizer; an encoder has no runner with one."""
        if task != GENERATION:
            return None
        with needs(self.name, _PACKAGES):
            importlib.import_module("onnxruntime_genai")
        return GenaiTokenizer(path.parent)

    def write_adapter(self, factors: Mapping[str, Factors], base: Path, path: Path) -> None:
        """Write an ``.onnx_adapter`` for the model at ``base``."""
        from slm_export.exporters.onnx_places import write_adapter

        write_adapter(factors, base, path)

    def stored_factors(self, path: Path, base: Path) -> Mapping[str, Factors]:
        """Return what an ``.onnx_adapter`` for the model at ``base`` adds to each weight."""
        from slm_export.exporters.onnx_places import read_factors

        return read_factors(path, base)

    def generate_adapted(
        self, path: Path, tokenizer: Path, prompt: str, tokens: int, bos: int, adapter: Path
    ) -> str:
        """Return greedy text of onnxruntime-genai with an adapter on."""
        with needs(self.name, _PACKAGES):
            importlib.import_module("onnxruntime_genai")
        return generate(path.parent, prompt, tokens, bos, adapter)

    def set_threads(self, count: int) -> None:
        """Let sessions that are opened from now on use ``count`` threads."""
        self._threads = count

    def generate(self, path: Path, tokenizer: Path, prompt: str, tokens: int, bos: int) -> str:
        """Return greedy text of onnxruntime-genai, from the folder as it is."""
        with needs(self.name, _PACKAGES):
            importlib.import_module("onnxruntime_genai")
        return generate(path.parent, prompt, tokens, bos)
