"""Decoders and encoders as ONNX graphs: their inputs and outputs, and what is traced."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError
from slm_export.exporters.onnx_dialect import OnnxDialect
from slm_export.exporters.onnx_file import write_model
from slm_export.exporters.onnx_graph import Shape, convert, trace, translate
from slm_export.exporters.onnx_norms import with_norms
from slm_export.exporters.onnx_places import inputs_of
from slm_export.exporters.onnx_rotary import rotary_operators
from slm_export.exporters.onnx_stamp import TRACED
from slm_export.exporters.onnx_stored import Stored
from slm_export.graph.dialect import AttentionShape
from slm_export.graph.layers import CannotStamp, Layers, check_alike, keep_kinds, layers_of
from slm_export.graph.model import build_decoder, build_encoder
from slm_export.runtime import ExportOptions
from slm_export.source.tasks import output_shape
from slm_export.weights import Dense

TASK, CONTEXT, LEAST = "slm_export.task", "slm_export.context", "slm_export.least"
"""Keys of what a file says of itself: task, most tokens, least tokens."""

_CHECKED = 16
"""Tokens of the context, or of the input, when a model is only looked at."""
_SHORTEST = (1, 3)
"""Least tokens of an encoder's input, tried in this order; a session pads what is shorter."""

Written = tuple[int, Sequence[AttentionShape], dict[str, str], dict[str, str]]
"""Bytes, the attention of every layer, inputs and outputs of the signature."""


def check_decoder(checkpoint: Checkpoint) -> None:
    """Raise InputError where a decoder cannot be expressed.

    What is looked at is one layer of every kind, traced and translated; no matrix is read.
    """
    dialect = OnnxDialect(checkpoint)
    decoder = build_decoder(checkpoint, dialect, _CHECKED)
    _refuse_unlike(checkpoint, dialect.layers)
    keep_kinds(decoder)
    translate(_trace_decoder(_Decoder(with_norms(decoder.model), dialect), dialect.layers, _CHECKED))


def check_encoder(checkpoint: Checkpoint) -> None:
    """Raise InputError where an encoder cannot be expressed; reads no matrix."""
    encoder = build_encoder(checkpoint, OnnxDialect(checkpoint))
    keep_kinds(encoder)
    module = _Encoder(with_norms(encoder))
    translate(_trace_encoder(module, 2 + encoder.takes_token_types, _CHECKED)[1])


def write_decoder(checkpoint: Checkpoint, options: ExportOptions, path: Path) -> Written:
    """Write a decoder: from three of its layers where all are alike, else from all."""
    try:
        layers = layers_of(checkpoint)
        if layers.count <= TRACED:
            raise CannotStamp(f"{layers.count} layers")
        return _write_decoder(checkpoint, options, path, layers)
    except CannotStamp:
        return _write_decoder(checkpoint, options, path, None)


def _write_decoder(
    checkpoint: Checkpoint, options: ExportOptions, path: Path, layers: Layers | None
) -> Written:
    dialect = OnnxDialect(checkpoint, options.places)
    decoder = build_decoder(checkpoint, dialect, options.context)
    _refuse_unlike(checkpoint, dialect.layers)
    model = with_norms(decoder.model)
    vectors = _vectors(model)
    traced = dialect.layers
    if layers is not None:
        check_alike(decoder, layers)
        stack = cast(nn.ModuleList, decoder.get_submodule(layers.path))
        decoder.set_submodule(layers.path, stack[:TRACED])
        traced = dialect.layers[:TRACED]
    module = _Decoder(model, dialect)
    program = _trace_decoder(module, traced, options.context)
    inputs, outputs = _ends(dialect.layers, checkpoint.config.get_text_config().vocab_size)
    metadata = {TASK: checkpoint.task, CONTEXT: str(options.context)}
    places = inputs_of({name: checkpoint.weights[name].shape for name in options.places})
    graph, used = convert(program, _names(module, dialect), inputs, outputs, metadata, layers, places)
    size = write_model(graph, _stored(dialect, vectors, used), path)
    return size, dialect.layers, _described(inputs, "int64"), _described(outputs, "float32")


def write_encoder(checkpoint: Checkpoint, options: ExportOptions, path: Path) -> Written:
    """Write an encoder."""
    dialect = OnnxDialect(checkpoint)
    encoder = build_encoder(checkpoint, dialect)
    names = ["input_ids", "attention_mask", "token_type_ids"][: 2 + encoder.takes_token_types]
    module = _Encoder(with_norms(encoder))
    least, program = _trace_encoder(module, len(names), options.context)
    inputs: dict[str, Shape] = dict.fromkeys(names, (1, "tokens"))
    name, described = output_shape(checkpoint.task, checkpoint.config)
    sizes = described.removeprefix("float32[").removesuffix("]").split(", ")
    outputs: dict[str, Shape] = {name: tuple(int(size) if size.isdigit() else size for size in sizes)}
    metadata = {TASK: checkpoint.task, CONTEXT: str(options.context), LEAST: str(least)}
    graph, used = convert(program, _names(module, dialect), inputs, outputs, metadata)
    size = write_model(graph, _stored(dialect, _vectors(encoder), used), path)
    limits = f"int64[1, tokens={least}..{options.context}]"
    return size, (), dict.fromkeys(names, limits), {name: described}


def _vectors(model: nn.Module) -> dict[str, Stored]:
    """Return what is no matrix of a dialect, norms and biases, by name."""
    return {
        name: Stored(name, Dense(tuple(value.shape), value.dtype, value.detach))
        for name, value in model.named_parameters()
    }


def _names(module: _Decoder | _Encoder, dialect: OnnxDialect) -> dict[str, str]:
    """Return what the tracer calls a weight -> its name in the file."""
    vectors = {f"model.{name}": name for name, _ in module.model.named_parameters()}
    return {**vectors, **dialect.names_in(module)}


def _stored(dialect: OnnxDialect, vectors: Mapping[str, Stored], used: Collection[str]) -> list[Stored]:
    return [*dialect.stored.values(), *(vector for name, vector in vectors.items() if name in used)]


class _Decoder(nn.Module):
    def __init__(self, model: nn.Module, dialect: OnnxDialect) -> None:
        super().__init__()
        self.model = model
        self._call = dialect.call

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return float32 logits (1, 1, vocabulary), then keys and values of every layer.

        Given   int64 ids (1, n) of new tokens; mask (1, past and new); past keys and values of every layer in turn
        """
        self._call.begin(past, attention_mask)
        tokens = input_ids.shape[1]
        positions = torch.arange(tokens) + (attention_mask.shape[1] - tokens)
        output = self.model(
            input_ids=input_ids,
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=1,
            return_dict=True,
        )
        return (output.logits[:, -1:, :], *self._call.present)


class _Encoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        made: Tensor = self.model(*inputs)
        return made


def _trace_decoder(module: nn.Module, layers: Sequence[AttentionShape], context: int) -> ExportedProgram:
    past = [torch.zeros(1, layer.kv_heads, 5, layer.head_dim) for layer in layers for _ in "kv"]
    example = (torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 8, dtype=torch.int64), past)
    tokens, total = Dim("tokens", min=1, max=context), Dim("total", min=1, max=context)
    before = Dim("before", min=0, max=context)
    with rotary_operators(module):
        return trace(module, example, ({1: tokens}, {1: total}, [{2: before}] * len(past)))


def _trace_encoder(module: nn.Module, inputs: int, longest: int) -> tuple[int, ExportedProgram]:
    """Return the shortest input that the graph is right for, and the graph."""
    from torch._dynamo.exc import UserError

    example = tuple(torch.ones(1, 5, dtype=torch.int64) for _ in range(inputs))
    for least in _SHORTEST:
        tokens = Dim("tokens", min=least, max=longest)
        try:
            return least, trace(module, example, (({1: tokens},) * inputs,))
        except (UserError, ValueError):
            # A family that looks at its neighbours (MobileBERT) has another graph for one or two tokens.
            if least == _SHORTEST[-1]:
                raise
    raise AssertionError


def _ends(layers: Sequence[AttentionShape], vocabulary: int) -> tuple[dict[str, Shape], dict[str, Shape]]:
    inputs: dict[str, Shape] = {"input_ids": (1, "tokens"), "attention_mask": (1, "total")}
    outputs: dict[str, Shape] = {"logits": (1, 1, vocabulary)}
    for index, layer in enumerate(layers):
        for part in ("key", "value"):
            inputs[f"past_key_values.{index}.{part}"] = (1, layer.kv_heads, "before", layer.head_dim)
            outputs[f"present.{index}.{part}"] = (1, layer.kv_heads, "after", layer.head_dim)
    return inputs, outputs


def _described(ends: Mapping[str, Shape], kind: str) -> dict[str, str]:
    described = {}
    for name, shape in ends.items():
        dtype = "float32" if name.startswith("past") else kind
        described[name] = f"{dtype}[{', '.join(map(str, shape))}]"
    return described


def _refuse_unlike(checkpoint: Checkpoint, layers: Sequence[AttentionShape]) -> None:
    """Refuse layers whose caches differ in shape: onnxruntime-genai makes all of one."""
    shapes = {(layer.kv_heads, layer.head_dim) for layer in layers}
    if len(shapes) > 1:
        raise InputError(
            f"{checkpoint.name}: layers with {sorted(shapes)} key-value heads and widths cannot be exported to onnx: "
            "onnxruntime-genai gives all layers caches of one shape"
        )
