"""ExecuTorch through XNNPACK: ``model.pte``, for Android, iOS and Linux alike.

Given   a checkpoint on the integer grid, or in 16 or 32 bits
Result  one program with one method, ``forward``:
        a decoder takes tokens (1, n) and their start position, keeps its KV cache inside and returns the
        logits of the last token; an encoder takes ids and mask (1, n) and returns an embedding or scores.
        Constant methods tell the stock LLM runners (Android's ``LlmModule``, ``TextLLMRunner``) the rest.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError, needs
from slm_export.exporters.adapter_inputs import AdaptersAsInputs
from slm_export.exporters.executorch_reader import stored
from slm_export.exporters.executorch_session import load_runtime, open_session, run_text_llm_runner
from slm_export.results import Artifact, Check, Signature, written
from slm_export.runtime import ExportOptions, Factors, Session
from slm_export.source.tasks import ENDINGS, GENERATION, output_shape
from slm_export.tokenization.phone_tokenizer import for_executorch
from slm_export.tokenization.runtime_tokenizers import ExecuTorchTokenizer, RuntimeTokenizer
from slm_export.weights import Quantized, Weight

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

PREFILL_CHUNK = 512
"""Longest input of one call. Runners feed a longer prompt in pieces; room is planned for this many tokens,
so it is a bound on memory too."""

_CONFIG = "tokenizer_config.json"

_SHORTEST = (1, 3)
"""Least tokens of an encoder's input, tried in this order; a session pads what is shorter."""

_PACKAGES = "the executorch package"


class ExecuTorchExporter(AdaptersAsInputs):
    """Writes and opens ``.pte`` programs."""

    name: ClassVar[str] = "executorch"
    elsewhere: ClassVar[str | None] = None
    packages: ClassVar[tuple[str, ...]] = ("executorch",)
    tables: ClassVar[bool] = False
    adapter_suffix: ClassVar[str] = ".executorch.safetensors"
    no_adapter_runner: ClassVar[str | None] = (
        "ExecuTorch's stock runners call `forward` alone, without an adapter: an app turns one on with the module API"
    )
    dense_only: ClassVar[str | None] = (
        "XNNPACK has no sparse int8 or int4 kernel "
        "(its sparse kernels are for convolutional networks of floats)"
    )

    def file(self, task: str) -> str:
        """Return where the program is in a bundle."""
        return "executorch/model.pte"

    def ready(self) -> None:
        """Raise MissingComponentError unless executorch can be imported, kernels included."""
        with needs(self.name, _PACKAGES):
            importlib.import_module("executorch.exir")
            importlib.import_module("torch.ao.quantization.fx._decomposed")
            load_runtime()
            # What the operators mean to a tracer.
            importlib.import_module("executorch.extension.llm.custom_ops.custom_ops")

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise InputError where this checkpoint cannot be lowered."""
        if checkpoint.task not in ENDINGS.values():
            raise InputError(f"{checkpoint.name}: task {checkpoint.task} cannot be exported to executorch")

    def write(self, checkpoint: Checkpoint, options: ExportOptions, path: Path) -> Artifact:
        """Trace, lower and write the program."""
        write = _write_decoder if checkpoint.task == GENERATION else _write_encoder
        signatures = write(checkpoint, options, path)
        return written(path, self.name, checkpoint.parameters, signatures)

    def open(self, path: Path, task: str) -> Session:
        """Open a program in ExecuTorch's own runtime."""
        with needs(self.name, _PACKAGES):
            load_runtime()
        return open_session(path, task)

    def stored(self, path: Path) -> Mapping[str, Quantized]:
        """Return the quantized matrices of a program, under their names in the checkpoint."""
        return stored(path)

    def runner_tokenizer(self, bundle: Path) -> str:
        """Return the file for ``TextLLMRunner``; where it needs other words, write one to executorch/tokenizer/."""
        own = bundle / "tokenizer" / "tokenizer.json"
        made = for_executorch(json.loads(own.read_text(encoding="utf-8")))
        if made is None:
            return own.relative_to(bundle).as_posix()
        file = bundle / "executorch" / "tokenizer" / own.name
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")
        # Its opening and stop tokens are read from there.
        shutil.copyfile(own.with_name(_CONFIG), file.with_name(_CONFIG))
        return file.relative_to(bundle).as_posix()

    def own_checks(self, path: Path, checkpoint: Checkpoint, tokens: Sequence[int]) -> tuple[Check, ...]:
        """Nothing that the other checks do not tell."""
        return ()

    def delegation(self, path: Path) -> None:
        """Not told: what XNNPACK takes is decided when the program is written."""

    def rounding(self, x: Tensor, weight: Weight) -> Tensor:
        """Return activations as XNNPACK rounds them."""
        from slm_export.exporters.executorch_dialect import xnnpack_rounding

        return xnnpack_rounding(x, weight)

    def open_tokenizer(self, path: Path, tokenizer: Path, task: str) -> RuntimeTokenizer:
        """Open the C++ tokenizer of ExecuTorch's runners, given the folder, which also names special tokens."""
        return ExecuTorchTokenizer(tokenizer.parent)

    def write_adapter(self, factors: Mapping[str, Factors], base: Path, path: Path) -> None:
        """Write the inputs of ``forward_adapted`` for the program at ``base``, as safetensors."""
        from slm_export.exporters.adapter_matrices import write_adapter
        from slm_export.exporters.executorch_places import places_of

        write_adapter(factors, places_of(base), base, path)

    def set_threads(self, count: int) -> None:
        """Let XNNPACK and the custom kernels use ``count`` threads in this process."""
        with needs(self.name, _PACKAGES):
            load_runtime()._unsafe_reset_threadpool(count)

    def generate(self, path: Path, tokenizer: Path, prompt: str, tokens: int, bos: int) -> str:
        """Return greedy text of the Python binding of ``TextLLMRunner``, which is what phones run."""
        with needs(self.name, _PACKAGES):
            load_runtime()
        return run_text_llm_runner(path, tokenizer, prompt, tokens, bos)


def _write_decoder(checkpoint: Checkpoint, options: ExportOptions, path: Path) -> tuple[Signature, ...]:
    from slm_export.exporters.adapter_matrices import Places
    from slm_export.exporters.executorch_dialect import ExecuTorchDialect
    from slm_export.exporters.executorch_gelu import with_tanh_gelu
    from slm_export.exporters.executorch_lowering import lower_decoder, to_edge, write
    from slm_export.exporters.executorch_norms import with_norms
    from slm_export.exporters.executorch_places import ENTRY, METHOD, trace_adapted
    from slm_export.graph.model import build_decoder

    dialect = ExecuTorchDialect(checkpoint, options.places)
    longest = min(PREFILL_CHUNK, options.context)

    def build(checkpoint: Checkpoint) -> nn.Module:
        return with_norms(with_tanh_gelu(build_decoder(checkpoint, dialect, options.context)))

    def trace(module: nn.Module) -> ExportedProgram:
        return _trace_decoder(module, longest)

    constants = _constants(checkpoint, options)
    vocabulary = checkpoint.config.get_text_config().vocab_size
    inputs, outputs = (
        {"tokens": f"int64[1, 1..{longest}]", "input_pos": "int64[1]"},
        {"logits": f"float32[1, {vocabulary}]"},
    )
    forward = Signature("forward", inputs, outputs)
    if not options.places:
        lower_decoder(checkpoint, build, trace, constants, path)
        return (forward,)
    # Every layer is lowered, twice: what copies layers knows of one method.
    places = Places.of(checkpoint, options.places, options.rank)
    module = build(checkpoint)
    programs = {"forward": trace(module), METHOD: trace_adapted(module, dialect.matrices, places, longest)}
    write(to_edge(programs, constants), checkpoint, path, entries={ENTRY: places.entry()})
    matrices = {name: f"float32{list(shape)}" for name, shape in places.inputs.items()}
    return forward, Signature(METHOD, {**inputs, **matrices}, outputs)


def _trace_decoder(module: nn.Module, longest: int) -> ExportedProgram:
    import torch
    from torch.export import Dim, export

    example = (torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    tokens = Dim("tokens", min=1, max=longest)
    with torch.no_grad():
        return export(module, example, dynamic_shapes=({1: tokens}, None), strict=False)


def _constants(checkpoint: Checkpoint, options: ExportOptions) -> Mapping[str, Any]:
    """Return the constant methods that the LLM runners read."""
    constants: dict[str, Any] = {
        "get_max_seq_len": min(PREFILL_CHUNK, options.context),
        "get_max_context_len": options.context,
        "get_vocab_size": int(checkpoint.config.get_text_config().vocab_size),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
        "get_eos_ids": list(options.stop_ids),
    }
    if options.bos_id is not None:
        constants["get_bos_id"] = options.bos_id
    return constants


def _write_encoder(checkpoint: Checkpoint, options: ExportOptions, path: Path) -> tuple[Signature, ...]:
    from slm_export.exporters.executorch_dialect import ExecuTorchDialect, register_whole_attention
    from slm_export.exporters.executorch_gelu import with_tanh_gelu
    from slm_export.exporters.executorch_lowering import to_edge, write
    from slm_export.exporters.executorch_norms import with_norms
    from slm_export.graph.model import build_encoder

    dialect = ExecuTorchDialect()
    encoder = build_encoder(checkpoint, dialect, register_whole_attention())
    names = ["input_ids", "attention_mask", "token_type_ids"][: 2 + encoder.takes_token_types]
    least, program = _trace_encoder(with_norms(with_tanh_gelu(encoder)), len(names), options.context)
    constants = {
        "get_max_seq_len": options.context,
        "get_min_seq_len": least,
        "takes_token_types": encoder.takes_token_types,
    }
    write(to_edge(program, constants), checkpoint, path)
    inputs = dict.fromkeys(names, f"int64[1, tokens={least}..{options.context}]")
    name, shape = output_shape(checkpoint.task, checkpoint.config)
    return (Signature("forward", inputs, {name: shape}),)


def _trace_encoder(module: nn.Module, inputs: int, longest: int) -> tuple[int, ExportedProgram]:
    """Return the shortest input that the graph is right for, and the graph."""
    import torch
    from torch._dynamo.exc import UserError
    from torch.export import Dim, export

    example = tuple(torch.ones(1, 5, dtype=torch.int64) for _ in range(inputs))
    for least in _SHORTEST:
        tokens = Dim("tokens", min=least, max=longest)
        try:
            with torch.no_grad():
                return least, export(module, example, dynamic_shapes=({1: tokens},) * inputs, strict=False)
        except (UserError, ValueError):
            # A family that looks at its neighbours (MobileBERT) has another graph for one or two tokens.
            if least == _SHORTEST[-1]:
                raise
    raise AssertionError
