"""A checkpoint -> the ``.tflite`` file: build, convert, put layers and weights in.

A decoder whose layers are all alike is converted with three of them and put together from that (`litert_stamp`); one
whose layers differ is converted whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from slm_export.checkpoint import Checkpoint
from slm_export.exporters.adapter_matrices import NO_PLACES, Places
from slm_export.exporters.litert_dialect import LiteRTDialect
from slm_export.exporters.litert_file import Function, Placer
from slm_export.exporters.litert_graph import (
    LOGITS,
    WEIGHTS,
    DecoderCall,
    EncoderCall,
    Graph,
    Inputs,
    Signature,
    convert,
    decoder_example,
    load_operators,
)
from slm_export.exporters.litert_graph import check_operators as check_graph
from slm_export.exporters.litert_session import ADAPTED
from slm_export.exporters.litert_stamp import TRACED, Roles, stamp, without_dead
from slm_export.graph.layers import CannotStamp, Layers, check_alike, keep_kinds, layers_of
from slm_export.graph.model import Encoder, build_decoder, build_encoder
from slm_export.source.tasks import GENERATION

_DECODE = "decode"
_ENCODER_LENGTHS = (32, 128, 512)
_CHECKED = 16
"""Tokens of the context, or of the input, when only operators are looked at."""


def check_operators(checkpoint: Checkpoint) -> None:
    """Raise InputError where a model has an operator that LiteRT lacks.

    What is looked at is one layer of every kind, traced; no matrix is read and nothing is converted.
    """
    load_operators()
    dialect = LiteRTDialect(checkpoint)
    if checkpoint.task == GENERATION:
        decoder = build_decoder(checkpoint, dialect, _CHECKED)
        keep_kinds(decoder)
        inputs = Inputs(decoder.model, dialect)
        signature = Signature(_DECODE, DecoderCall(decoder, dialect, inputs), decoder_example(dialect, 1))
    else:
        encoder = build_encoder(checkpoint, dialect)
        keep_kinds(encoder)
        inputs = Inputs(encoder.model, dialect)
        signature = _encoder_function(encoder, inputs, _CHECKED, "output")
    check_graph(signature, inputs)


def lower_decoder(
    checkpoint: Checkpoint, context: int, lengths: Sequence[int], path: Path, places: Places = NO_PLACES
) -> str | None:
    """Write a decoder; return why every layer had to be converted, or None if three were enough.

    Given   lengths: tokens of the prefill functions
            places: with any, every function is there a second time, with the matrices of an adapter as inputs
    """
    load_operators()
    try:
        if places.shapes:
            raise CannotStamp("there are places for adapters")
        _write_stamped(checkpoint, context, lengths, path)
    except CannotStamp as error:
        graph = _decoder_graph(checkpoint, context, lengths, None, places)
        _write(graph, checkpoint, graph.vectors, None, path, places)
        return str(error)
    return None


def lower_encoder(
    checkpoint: Checkpoint, context: int, output: str, path: Path
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Write an encoder; return the lengths of its functions, and the names of their inputs."""
    load_operators()
    dialect = LiteRTDialect(checkpoint)
    encoder = build_encoder(checkpoint, dialect)
    lengths = (*(length for length in _ENCODER_LENGTHS if length < context), context)
    inputs = Inputs(encoder.model, dialect)
    signatures = [_encoder_function(encoder, inputs, length, output) for length in lengths]
    graph = convert(signatures, inputs)
    _write(graph, checkpoint, graph.vectors, None, path)
    return lengths, tuple(signatures[0].example)


def _encoder_function(encoder: Encoder, inputs: Inputs, length: int, output: str) -> Signature:
    names = ("input_ids", "attention_mask", "token_type_ids")[: 2 + encoder.takes_token_types]
    example = {name: torch.ones(1, length, dtype=torch.int32) for name in names}
    return Signature(f"encode_{length}", EncoderCall(encoder, inputs, output), example)


def _write_stamped(checkpoint: Checkpoint, context: int, lengths: Sequence[int], path: Path) -> None:
    layers = layers_of(checkpoint)
    if layers.count <= TRACED:
        raise CannotStamp(f"{layers.count} layers")
    every = build_decoder(checkpoint, LiteRTDialect(checkpoint), context)
    check_alike(every, layers)
    vectors = dict(every.model.named_parameters())
    del every
    graph = _decoder_graph(checkpoint, context, lengths, layers)
    _write(graph, checkpoint, vectors, layers, path)


def _decoder_graph(
    checkpoint: Checkpoint,
    context: int,
    lengths: Sequence[int],
    layers: Layers | None,
    places: Places = NO_PLACES,
) -> Graph:
    """Return the graph of all layers, or of the first three of ``layers``."""
    dialect = LiteRTDialect(checkpoint, places)
    decoder = build_decoder(checkpoint, dialect, context)
    if layers is not None:
        stack = cast(nn.ModuleList, decoder.get_submodule(layers.path))
        decoder.set_submodule(layers.path, stack[:TRACED])
        del dialect.shapes[TRACED:]
    inputs = Inputs(decoder.model, dialect)
    # The first function is the one that tools look at.
    functions = ((_DECODE, 1), *((f"prefill_{n}", n) for n in lengths))
    signatures = [
        Signature(
            (ADAPTED if adapted else "") + name,
            DecoderCall(decoder, dialect, inputs, adapted=adapted),
            decoder_example(dialect, length),
        )
        for adapted in ((False, True) if places.shapes else (False,))
        for name, length in functions
    ]
    return convert(signatures, inputs)


def _write(
    graph: Graph,
    checkpoint: Checkpoint,
    vectors: Mapping[str, Tensor],
    layers: Layers | None,
    path: Path,
    places: Places = NO_PLACES,
) -> None:
    functions, matrices = [], places.inputs.keys()
    for signature in graph.model.signatureDefs:
        subgraph = graph.model.subgraphs[signature.subgraphIndex]
        name = signature.signatureKey.decode()
        inputs, outputs = _inputs(signature, graph), _roles(signature.outputs)
        if layers is not None:
            inputs, outputs = stamp(graph.model, subgraph, inputs, outputs, layers)
        if name.removeprefix(ADAPTED).startswith("prefill_"):
            # Only the cache is wanted: the product with the vocabulary would cost as much as some layers.
            outputs = {tensor: role for tensor, role in outputs.items() if role != LOGITS}
            without_dead(subgraph, outputs)
        used = {int(tensor) for op in subgraph.operators for tensor in op.inputs}
        inputs = {t: role for t, role in inputs.items() if t in used or role not in matrices}
        functions.append(Function(name, signature.subgraphIndex, inputs, outputs))
    placer = Placer(graph.model, checkpoint, vectors)
    placer.place(functions)
    placer.write(path)


def _inputs(signature: Any, graph: Graph) -> Roles:
    """Return what the inputs of a function are; weights by their names in the checkpoint."""
    prefix = f"{WEIGHTS}_"
    return {
        tensor: graph.names[int(name.removeprefix(prefix))] if name.startswith(prefix) else name
        for tensor, name in _roles(signature.inputs).items()
    }


def _roles(maps: Sequence[Any]) -> Roles:
    return {entry.tensorIndex: entry.name.decode() for entry in maps}
