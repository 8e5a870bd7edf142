"""A model -> a TFLite flatbuffer without weights, through litert-torch.

Given   a module whose parts are those of `litert_dialect`
Result  the flatbuffer's object form; each signature's weights are inputs, ``weights_<number>``
"""

from __future__ import annotations

import contextlib
import importlib
import io
import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slm_export.errors import InputError
from slm_export.exporters.litert_dialect import Embedding, Linear, LiteRTDialect, windowed, windows
from slm_export.graph.model import Decoder, Encoder

WEIGHTS, LOGITS = "weights", "logits"


@dataclass(frozen=True)
class Graph:
    """What the converter made."""

    model: Any
    """ai_edge_litert's ModelT."""
    names: tuple[str, ...]
    """Name of the weight that ``weights_<number>`` stands for."""
    vectors: Mapping[str, Tensor]
    """Norms and biases, by name."""


@dataclass(frozen=True)
class Signature:
    """A function of the file: a module and an example of what it is called with."""

    name: str
    module: nn.Module
    example: Mapping[str, Any]


class DecoderCall(nn.Module):
    """One call of a decoder as LiteRT-LM makes it: caches go in and come out.

    tokens int32 (1, n), input_pos int32 (n,), mask float32 (1, 1, n, context), kv_cache -> kv_cache, logits
    float32 (1, 1, vocabulary) of the last token
    """

    def __init__(
        self, decoder: Decoder, dialect: LiteRTDialect, inputs: Inputs, *, adapted: bool = False
    ) -> None:
        """``adapted``: whether the matrices of an adapter are among what goes in."""
        super().__init__()
        self.decoder, self._dialect, self._inputs = decoder, dialect, inputs
        self._adapted = adapted

    def forward(
        self,
        tokens: Tensor,
        input_pos: Tensor,
        mask: Tensor,
        kv_cache: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
    ) -> dict[str, Any]:
        """See the class."""
        call, layers = self._dialect.call, range(len(self._dialect.shapes))
        self._inputs.put(weights)
        call.adapted = self._adapted
        call.start = input_pos[:1]
        call.masks = {None: mask}
        for window in windows(self._dialect.shapes):
            call.masks[window] = windowed(mask, input_pos, window)
        call.keys = {index: kv_cache[f"k_{index}"] for index in layers}
        call.values = {index: kv_cache[f"v_{index}"] for index in layers}
        output = self.decoder.model(
            input_ids=tokens,
            position_ids=input_pos.unsqueeze(0),
            use_cache=False,
            logits_to_keep=1,
            return_dict=True,
        )
        caches = {f"k_{i}": call.keys[i] for i in layers} | {f"v_{i}": call.values[i] for i in layers}
        return {"kv_cache": caches, LOGITS: output.logits}


class EncoderCall(nn.Module):
    """One call of an encoder: int32 ids and mask (1, n), types where they are told apart."""

    def __init__(self, encoder: Encoder, inputs: Inputs, output: str) -> None:
        super().__init__()
        self.encoder, self._inputs, self._output = encoder, inputs, output

    def forward(self, weights: Mapping[str, Tensor], **inputs: Tensor) -> dict[str, Tensor]:
        """See the class."""
        self._inputs.put(weights)
        return {self._output: self.encoder(**inputs)}


class Inputs:
    """Every parameter of a module, taken out of it, to be brought by the call instead."""

    def __init__(self, module: nn.Module, dialect: LiteRTDialect) -> None:
        self._dialect = dialect
        self._places: dict[str, tuple[nn.Module, str]] = {}
        self.vectors: dict[str, Tensor] = {}
        matrices = {part.name for part in module.modules() if isinstance(part, Linear | Embedding)}
        for path, child in module.named_modules():
            for key, value in list(child.named_parameters(recurse=False)):
                name = f"{path}.{key}" if path else key
                self._places[name] = (child, key)
                self.vectors[name] = value.detach()
                delattr(child, key)
                setattr(child, key, self.vectors[name])
        self.names = (*sorted(matrices), *self.vectors, *dialect.places.inputs)

    def example(self) -> dict[str, Tensor]:
        """Return memory that is never touched, of the shapes of the weights."""
        shapes = {**{name: w.shape for name, w in self._dialect.call.weights.items()}}
        shapes |= {name: vector.shape for name, vector in self.vectors.items()}
        return {str(number): torch.empty(shapes[name]) for number, name in enumerate(self.names)}

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Let the parts use the weights of this call."""
        given = {name: weights[str(number)] for number, name in enumerate(self.names)}
        self._dialect.call.weights = given
        for name, (child, key) in self._places.items():
            setattr(child, key, given[name])


def convert(signatures: Sequence[Signature], inputs: Inputs) -> Graph:
    """Return the flatbuffer of some functions of one module."""
    flatbuffers = importlib.import_module("litert_torch._convert.litert_converter")
    made = [_function(signature, inputs) for signature in signatures]
    with _quiet():
        programs = [_program(function) for function in made]
        content = flatbuffers.exported_programs_to_flatbuffer(programs, made).to_bytes()
    schema = importlib.import_module("ai_edge_litert.schema_py_generated")
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    return Graph(model, inputs.names, inputs.vectors)


def check_operators(signature: Signature, inputs: Inputs) -> None:
    """Raise InputError, which names it, where a function has an operator that the converter does not know."""
    fx = importlib.import_module("litert_torch.fx_infra")
    lowerings = importlib.import_module("litert_torch.backend.lowerings")
    with _quiet():
        program = _program(_function(signature, inputs))
        unknown = _unknown(program, lowerings)
        rules = fx.decomp.pre_lower_decomp()
        # What has a rule, or was marked by a function, is taken apart before it is looked up; that takes its time.
        if any(target in rules or not isinstance(target, torch._ops.OpOverload) for target in unknown):
            unknown = _unknown(fx.safe_run_decompositions(program, rules, can_skip=False), lowerings)
    if unknown:
        named = ", ".join(sorted(map(str, unknown)))
        raise InputError(f"litert has no operator for {named}; choose another --format")


def _unknown(program: Any, lowerings: Any) -> set[Any]:
    called = {node.target for node in program.graph_module.graph.nodes if node.op == "call_function"}
    return {target for target in called - {operator.getitem} if lowerings.lookup(target) is None}


def _function(signature: Signature, inputs: Inputs) -> Any:
    """Return a signature as litert-torch has it."""
    functions = importlib.import_module("litert_torch._convert.signature")
    given = {**signature.example, WEIGHTS: inputs.example()}
    return functions.Signature(signature.name, signature.module.eval(), (), given)


def _program(function: Any) -> Any:
    """Return a function traced and prepared: the stages of `litert_torch.convert`, with one between them."""
    core = importlib.import_module("litert_torch._convert.core")
    return core._run_convert_passes(without_assertions(core.export_torch_signature(function)))


def without_assertions(program: Any) -> Any:
    """Return a program without what a model (FlauBERT) asserts of its inputs' values: no file can keep that."""
    graph = program.graph_module.graph
    for node in reversed(graph.nodes):
        name = getattr(node.target, "__name__", str(node.target))
        reads = any(part in name for part in ("_assert_scalar", "sym_constrain", "_local_scalar_dense"))
        if (
            node.op == "call_function"
            and not node.users
            and (reads or isinstance(node.meta.get("val"), torch.SymBool))
        ):
            graph.erase_node(node)
    program.graph_module.recompile()
    return program


def decoder_example(dialect: LiteRTDialect, tokens: int) -> dict[str, Any]:
    """Return what `DecoderCall` is traced with; the caches' memory is never touched."""
    context = dialect.shapes[0].context
    keys = {f"k_{i}": (1, s.kv_heads, context, s.head_dim) for i, s in enumerate(dialect.shapes)}
    values = {f"v_{i}": (1, s.kv_heads, s.head_dim, context) for i, s in enumerate(dialect.shapes)}
    return {
        "tokens": torch.zeros(1, tokens, dtype=torch.int32),
        "input_pos": torch.zeros(tokens, dtype=torch.int32),
        "mask": torch.zeros(1, 1, tokens, context),
        "kv_cache": {name: torch.empty(shape) for name, shape in (keys | values).items()},
    }


def load_operators() -> None:
    """Make the operators known that `litert_dialect` is made of."""
    importlib.import_module("litert_torch.backend.experimental.torch_tfl")
    importlib.import_module("litert_torch.generative.custom_ops.bmm_4d")
    importlib.import_module("litert_torch.generative.custom_ops.dynamic_update_slice")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the converter's progress off stdout, and its advice to itself off stderr."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
