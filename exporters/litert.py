"""LiteRT through XNNPACK: ``model.litertlm`` for decoders, as LiteRT-LM opens it, ``model.tflite`` for encoders.

Given   a checkpoint on the integer grid, or in 16 or 32 bits
Result  decoder: functions ``prefill_<n>`` and ``decode`` over one KV cache that the runner holds, packed with the
        tokenizer, stop tokens, chat template and sampler
        encoder: functions ``encode_<n>`` from int32 ids and mask (1, n) to an embedding or scores

Nothing of the file is quantized by the converter: it sees a graph without weights, and the checkpoint's own codes and
scales are put in behind it (`litert_file`).
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, ClassVar

from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError, needs
from slm_export.exporters.adapter_inputs import AdaptersAsInputs
from slm_export.results import Artifact, Check, Signature, written
from slm_export.runtime import ExportOptions, Factors, Session
from slm_export.source.tasks import ENDINGS, GENERATION, output_shape
from slm_export.tokenization.tokenizer import OWN_TOKENIZER

if TYPE_CHECKING:
    from torch import Tensor

    from slm_export.delegation import Delegation
    from slm_export.tokenization.runtime_tokenizers import RuntimeTokenizer
    from slm_export.weights import Quantized, Weight

PREFILLS = (16, 128, 512)
"""Tokens of one call. A prompt is fed in the longest that it fills, and its rest in the shortest that holds it."""

_THREADS = 2

_PACKAGES = "litert-torch and litert-lm"


class LiteRTExporter(AdaptersAsInputs):
    """Writes and opens ``.litertlm`` and ``.tflite`` files."""

    name: ClassVar[str] = "litert"
    elsewhere: ClassVar[str | None] = None
    packages: ClassVar[tuple[str, ...]] = (
        "litert-torch",
        "litert-converter",
        "ai-edge-litert",
        "litert-lm",
        "litert-lm-builder",
    )
    tables: ClassVar[bool] = False
    adapter_suffix: ClassVar[str] = ".litert.safetensors"
    no_adapter_runner: ClassVar[str | None] = (
        "LiteRT-LM runs the functions without an adapter: an app turns one on with LiteRT's CompiledModel"
    )
    dense_only: ClassVar[str | None] = (
        "XNNPACK, which computes for it, has no sparse int8 or int4 kernel "
        "(its sparse kernels are for convolutional networks of floats)"
    )

    def __init__(self) -> None:
        self._threads = _THREADS

    def file(self, task: str) -> str:
        """Return where the artifact is in a bundle."""
        return "litert/model.litertlm" if task == GENERATION else "litert/model.tflite"

    def ready(self) -> None:
        """Raise MissingComponentError unless converter, packer and runtimes can be imported."""
        with needs(self.name, _PACKAGES), _quiet_logs():
            for module in (
                "litert_torch._convert.interface",
                "litert_lm_builder.litertlm_builder",
                "ai_edge_litert.compiled_model",
                "litert_lm",
            ):
                importlib.import_module(module)

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise InputError where this checkpoint cannot be written in this format."""
        if checkpoint.task not in ENDINGS.values():
            raise InputError(f"{checkpoint.name}: task {checkpoint.task} cannot be exported to litert")
        from slm_export.exporters.litert_lowering import check_operators

        with _quiet_logs():
            check_operators(checkpoint)

    def write(self, checkpoint: Checkpoint, options: ExportOptions, path: Path) -> Artifact:
        """Convert, put the weights in, and pack."""
        write = _write_decoder if checkpoint.task == GENERATION else _write_encoder
        with _quiet_logs():
            signatures = write(checkpoint, options, path)
        return written(path, self.name, checkpoint.parameters, signatures)

    def open(self, path: Path, task: str) -> Session:
        """Open an artifact in LiteRT's own runtime."""
        with needs(self.name, _PACKAGES):
            from slm_export.exporters.litert_session import open_session

            return open_session(path, task, self._threads)

    def stored(self, path: Path) -> Mapping[str, Quantized]:
        """Return every quantized matrix under its name in the checkpoint, read from the artifact alone."""
        with needs(self.name, _PACKAGES):
            from slm_export.exporters.litert_reader import read_weights

            return read_weights(path)

    def own_checks(self, path: Path, checkpoint: Checkpoint, tokens: Sequence[int]) -> tuple[Check, ...]:
        """Nothing that the other checks do not tell."""
        return ()

    def delegation(self, path: Path) -> Delegation:
        """Return what XNNPACK takes of the first function: decode, or the shortest input."""
        from slm_export.exporters.litert_delegation import delegation

        return delegation(path)

    def rounding(self, x: Tensor, weight: Weight) -> Tensor:
        """Return activations as XNNPACK rounds them: to int8 per token before codes."""
        from slm_export.graph.dialect import fake_quantize_per_token
        from slm_export.weights import Quantized

        return fake_quantize_per_token(x) if isinstance(weight, Quantized) else x

    def runner_tokenizer(self, bundle: Path) -> str:
        """Return the source's own tokenizer: it is packed into the artifact as it is."""
        return OWN_TOKENIZER

    def open_tokenizer(self, path: Path, tokenizer: Path, task: str) -> RuntimeTokenizer | None:
        """Open the tokenizer in a ``.litertlm``, as LiteRT-LM does; LiteRT alone has none."""
        if task != GENERATION:
            return None
        with needs(self.name, _PACKAGES):
            from slm_export.exporters.litert_runner import LiteRTLMTokenizer

            return LiteRTLMTokenizer(path)

    def write_adapter(self, factors: Mapping[str, Factors], base: Path, path: Path) -> None:
        """Write the inputs of the functions with places, for the file at ``base``, as safetensors."""
        from slm_export.exporters.adapter_matrices import write_adapter
        from slm_export.exporters.litert_session import places_of

        with needs(self.name, _PACKAGES):
            write_adapter(factors, places_of(base), base, path)

    def set_threads(self, count: int) -> None:
        """Let sessions that are opened from now on use ``count`` threads."""
        self._threads = count

    def generate(self, path: Path, tokenizer: Path, prompt: str, tokens: int, bos: int) -> str:
        """Return greedy text of LiteRT-LM, which has tokenizer and opening token in the file."""
        with needs(self.name, _PACKAGES):
            from slm_export.exporters.litert_runner import generate

            return generate(path, prompt, tokens)


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """Keep the converter from lowering the bar of everybody's log; it also advises on 64-bit inputs."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def _write_decoder(checkpoint: Checkpoint, options: ExportOptions, path: Path) -> tuple[Signature, ...]:
    from slm_export.exporters.adapter_matrices import Places
    from slm_export.exporters.litert_container import write_container
    from slm_export.exporters.litert_lowering import lower_decoder
    from slm_export.exporters.litert_session import ADAPTED

    lengths = [length for length in PREFILLS if length < options.context]
    places = Places.of(checkpoint, options.places, options.rank)
    with TemporaryDirectory(prefix="slm-export-", dir=path.parent) as folder:
        model = Path(folder) / "model.tflite"
        lower_decoder(checkpoint, options.context, lengths, model, places)
        write_container(model, options, path)
    vocabulary = checkpoint.config.get_text_config().vocab_size
    matrices = {name: f"float32{list(shape)}" for name, shape in places.inputs.items()}
    return tuple(
        Signature(
            prefix + (f"prefill_{length}" if length > 1 else "decode"),
            {"tokens": f"int32[1, {length}]", "input_pos": f"int32[{length}]"}
            | {"mask": f"float32[1, 1, {length}, {options.context}]"}
            | (matrices if prefix else {}),
            {} if length > 1 else {"logits": f"float32[1, 1, {vocabulary}]"},
        )
        for prefix in (("", ADAPTED) if places.shapes else ("",))
        for length in (*lengths, 1)
    )


def _write_encoder(checkpoint: Checkpoint, options: ExportOptions, path: Path) -> tuple[Signature, ...]:
    from slm_export.exporters.litert_lowering import lower_encoder

    name, shape = output_shape(checkpoint.task, checkpoint.config)
    lengths, names = lower_encoder(checkpoint, options.context, name, path)
    return tuple(
        Signature(
            f"encode_{length}",
            dict.fromkeys(names, f"int32[1, {length}]"),
            {name: shape.replace("tokens", str(length))},
        )
        for length in lengths
    )
