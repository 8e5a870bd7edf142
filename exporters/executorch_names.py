"""What the matrices of a program are called in the checkpoint, kept in the program itself.

XNNPACK's constants lie under the sha256 of their bytes, and the table of a look-up has only a number. So the file
gets one entry of named data more, which no runtime asks for (`NamedDataMap` is a look-up by key): JSON,

    matrices    name -> [key of its codes, key of its scales], as XNNPACK calls them or would call them
    look_ups    the same pair of keys for the table of every look-up, in the order of the calls

It tells nothing but names: shapes, widths and values are the program's (`executorch_reader`). The keys stay what
they were when bytes are changed later, so a matrix that was tampered with is still found, and seen to differ.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

from slm_export.checkpoint import Checkpoint
from slm_export.exporters.executorch_stand_in import keys_of, xnnpack_nibbles
from slm_export.weights import Quantized

if TYPE_CHECKING:
    from torch import Tensor, fx
    from torch.export import ExportedProgram

ENTRY = "slm_export.weights"
LOOK_UPS = {"embedding_byte": 8, "embedding_4bit": 4}
"""Operator of `quantized_decomposed` -> bits of its table."""


def add_names(edge: Any, checkpoint: Checkpoint) -> None:
    """Put the entry into an edge program, of what is in it: a matrix that the graph never uses is not."""
    store = edge._named_data_store
    programs = [edge.exported_program(method) for method in sorted(edge.methods)]  # as they are emitted
    weights = {name: weight for name, weight in checkpoint.weights.items() if isinstance(weight, Quantized)}
    keys = {name: keys_of(weight) for name, weight in weights.items()}
    look_ups = [
        keys_of(table)
        for program in programs
        for node in program.graph.nodes
        if (table := _table(program, node))
    ]
    # Whatever was lowered must be a weight of this checkpoint, or a copied layer has got another's.
    known = set(keys.values())
    assert known.issuperset(look_ups)
    assert {scales for _, scales in known}.issuperset(k for k in store.pte_data if k.startswith("scale_"))
    kept = set(look_ups) | {pair for pair in known if store.pte_data.keys() >= set(pair)}
    matrices = {name: pair for name, pair in keys.items() if pair in kept}
    store.add_named_data(ENTRY, json.dumps({"matrices": matrices, "look_ups": look_ups}).encode())


def grid_matrix(codes: Tensor, scales: Tensor) -> Quantized:
    """Return a matrix that is stored as XNNPACK and the look-ups have it: int8 codes, or uint8 nibbles."""
    import torch

    bits = 8 if codes.dtype == torch.int8 else 4
    packed = codes if bits == 8 else xnnpack_nibbles(codes)
    shape = (codes.shape[0], codes.shape[1] * 8 // bits)
    return Quantized.of(shape, bits, packed, scales.to(torch.float32).reshape(shape[0], -1))


def _table(program: ExportedProgram, node: fx.Node) -> Quantized | None:
    """Return the table of a look-up; None for any other operation."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    if name not in (f"quantized_decomposed.{operator}.dtype" for operator in LOOK_UPS):
        return None
    codes, scales = (_buffer(program, argument) for argument in node.args[:2])
    return grid_matrix(codes, scales)


def _buffer(program: ExportedProgram, node: Any) -> Tensor:
    target = program.graph_signature.inputs_to_buffers[node.name]
    found = program.state_dict[target] if target in program.state_dict else program.constants[target]
    return cast("Tensor", found)
