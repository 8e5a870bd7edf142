"""Decoders and encoders as Core ML functions whose weights are inputs: what is traced, and how it is converted."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError
from slm_export.exporters.coreml_dialect import NAMESPACE, Call, CoreMLDialect, positions, rms_norm
from slm_export.exporters.coreml_frontend import KEYS, VALUES, lowering
from slm_export.exporters.coreml_rotary import with_tables
from slm_export.graph.dialect import AttentionShape
from slm_export.graph.model import Encoder, build_decoder, build_encoder
from slm_export.graph.norms import exchange_norms
from slm_export.weights import Dense, Weight

IDS, MASK, LOGITS = "inputIds", "causalMask", "logits"
"""Inputs and output of a decoder, as swift-transformers and Apple's recipe for Llama name them."""
DECODE, PREFILL = "decode", "prefill"
"""A decoder's functions: one token, and any number of them."""
WEIGHT = "weight_"
"""How the inputs begin that become constants; a number follows."""
_UNWANTED = {
    # These turn indices into 16 bits and guard against negative ones, of which there are none.
    "common::add_int16_cast",
    "common::guard_negative_gather_indices",
    # The reciprocal of a number that float16 holds is one that it does not.
    "common::divide_to_multiply",
    # States are updated at once as it is; this makes new operators, named by what was converted before.
    "common::canonicalize_inplace_pattern",
}


@dataclass(frozen=True)
class Function:
    """A converted function."""

    model: Any
    """coremltools' model, of a program with this function alone."""
    names: tuple[str, ...]
    """Of the checkpoint's weights, in the order of the inputs `WEIGHT`."""


@dataclass(frozen=True)
class Traced:
    """A graph that takes its weights as inputs."""

    program: ExportedProgram
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    layers: tuple[AttentionShape, ...] = ()


class _Module(nn.Module):
    """What is traced: the model behind inputs for its weights."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model = exchange_norms(model, _RMSNorm)
        self.call = call
        self.names = tuple(call.weights)

    def begin(self, weights: Sequence[Tensor]) -> None:
        self.call.weights = dict(zip(self.names, weights, strict=True))


class _Decoder(_Module):
    def __init__(self, model: nn.Module, dialect: CoreMLDialect, context: int) -> None:
        super().__init__(model, dialect.call)
        layer = dialect.shapes[0]
        shape = (len(dialect.shapes), 1, layer.kv_heads, context, layer.head_dim)
        for name in (KEYS, VALUES):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float16))

    def forward(self, ids: Tensor, mask: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Return float32 logits (1, tokens, vocabulary) of int32 ids (1, tokens), mask (1, 1, tokens, end)."""
        self.begin(weights)
        call = self.call
        call.mask, call.keys, call.values = mask, self.get_buffer(KEYS), self.get_buffer(VALUES)
        output = self.model(
            input_ids=ids, position_ids=positions(ids, mask), use_cache=False, return_dict=True
        )
        for name, held in ((KEYS, call.keys), (VALUES, call.values)):
            self.get_buffer(name).copy_(held)
        logits: Tensor = output.logits
        return logits


class _Encoder(_Module):
    def forward(self, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        self.begin(weights)
        made: Tensor = self.model(*inputs)
        return made


class _RMSNorm(nn.Module):
    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = rms_norm(x, self.weight, self.eps)
        return made


def is_half(weight: Weight) -> bool:
    """Whether a matrix is one of a float16 program."""
    return not isinstance(weight, Dense) or weight.dtype == torch.float16


def program_dtype(checkpoint: Checkpoint) -> str:
    """Return fp16, or fp32 where every matrix was kept as it came: "32 bits"."""
    matrices = [
        weight
        for name, weight in checkpoint.weights.items()
        if checkpoint.roles.get(name, "other") != "other"
    ]
    return "fp16" if any(map(is_half, matrices)) else "fp32"


def check_decoder(checkpoint: Checkpoint) -> None:
    """Raise InputError where the attention of a family cannot be expressed; reads no matrix."""
    dialect = CoreMLDialect(checkpoint)
    build_decoder(checkpoint, dialect, 16)
    shapes = {(layer.kv_heads, layer.head_dim) for layer in dialect.shapes}
    if len(shapes) > 1:
        raise InputError(
            f"{checkpoint.name}: layers with {sorted(shapes)} key-value heads and widths cannot be exported to "
            f"coreml: the state {KEYS} holds all layers in one shape"
        )


def trace_decoder(checkpoint: Checkpoint, context: int) -> Traced:
    """Return the graph of a decoder with a cache of ``context`` positions."""
    dialect = CoreMLDialect(checkpoint)
    decoder = build_decoder(checkpoint, dialect, context)
    with_tables(decoder.model, context)
    module = _Decoder(decoder.model, dialect, context)
    weights = [dialect.call.weights[name] for name in module.names]
    example = (torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 1, 3, 8), weights)
    tokens, end = Dim("tokens", min=1, max=context), Dim("end", min=1, max=context)
    program = _export(module, example, ({1: tokens}, {2: tokens, 3: end}, [None] * len(weights)))
    return Traced(program, module.names, tuple(tuple(w.shape) for w in weights), tuple(dialect.shapes))


def trace_encoder(checkpoint: Checkpoint, longest: int) -> tuple[Traced, tuple[str, ...]]:
    """Return the graph of an encoder, and the names of its inputs."""
    dialect = CoreMLDialect(checkpoint)
    encoder: Encoder = build_encoder(checkpoint, dialect)
    names = ("input_ids", "attention_mask", "token_type_ids")[: 2 + encoder.takes_token_types]
    module = _Encoder(encoder, dialect.call)
    weights = [dialect.call.weights[name] for name in module.names]
    example = [torch.ones(1, 5, dtype=torch.int32) for _ in names]
    tokens = Dim("tokens", min=3, max=longest)
    program = _export(module, (example, weights), ([{1: tokens}] * len(names), [None] * len(weights)))
    return Traced(program, module.names, tuple(tuple(w.shape) for w in weights)), names


def convert(traced: Traced, inputs: Sequence[Any], output: str, dtype: str, target: Any) -> Function:
    """Convert a graph for inputs of the given shapes.

    Given   inputs: coremltools' TensorTypes of everything but the weights; dtype: fp16 or fp32, of all arithmetic
    """
    import coremltools as ct
    from coremltools.converters.mil.mil import types

    kind = types.fp16 if dtype == "fp16" else types.fp32
    weights = [
        ct.TensorType(name=f"{WEIGHT}{index}", shape=shape, dtype=kind)
        for index, shape in enumerate(traced.shapes)
    ]
    pipeline = ct.PassPipeline.DEFAULT
    pipeline.remove_passes(_UNWANTED)
    pipeline.insert_pass(0, _own_pass())
    with lowering(dtype), _quiet():
        model = ct.convert(
            traced.program,
            inputs=[*inputs, *weights],
            outputs=[ct.TensorType(name=output, dtype=kind)],
            minimum_deployment_target=target,
            compute_precision=ct.precision.FLOAT16 if dtype == "fp16" else ct.precision.FLOAT32,
            pass_pipeline=pipeline,
            skip_model_load=True,
        )
    return Function(model, traced.names)


def _export(module: nn.Module, example: tuple[Any, ...], shapes: tuple[Any, ...]) -> ExportedProgram:
    with torch.no_grad():
        program = torch.export.export(module.eval(), example, dynamic_shapes=shapes, strict=False)
        decomposed: ExportedProgram = program.run_decompositions()
        return decomposed


@cache
def _own_pass() -> str:
    """Register a pass, once in a process, and return its name.

    A traced buffer that changes is written back where the graph ends. Ours are states by then, written where they
    change, and writing them again would copy all of the cache at every call.
    """
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.pass_registry import register_pass

    @register_pass(namespace=NAMESPACE)
    class drop_idle_writes(AbstractGraphPass):  # type: ignore[misc]
        def apply(self, prog: Any) -> None:
            for function in prog.functions.values():
                for operation in list(function.operations):
                    if operation.op_type == "coreml_update_state" and _is_idle(operation):
                        function.remove_ops([operation])

    return f"{NAMESPACE}::drop_idle_writes"


def _is_idle(update: Any) -> bool:
    """Whether a state is given what was read from it, and nobody asks for the result."""
    value = update.value
    while value.op is not None and value.op.op_type == "cast":
        value = value.op.x
    written = value.op is not None and value.op.op_type == "coreml_update_state"
    return bool(written and value.op.state is update.state and not update.outputs[0].child_ops)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep coremltools' progress bars and its advice on dtypes to itself."""
    log = logging.getLogger("coremltools")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
