"""Places for low-rank matrices in an ONNX graph: y = W x + B (A x), where A and B are inputs with a default.

    NAME.lora_A   float32 (in, rank)     A transposed, as a product of rows wants it
    NAME.lora_B   float32 (rank, out)    B transposed, the adapter's scale in it

The default of both is of rank 0, which adds nothing. Every place has a rank of its own, so one graph takes adapters of
any rank, and those that leave places out. An adapter is a file of ONNX Runtime's own format with such inputs by name:
`LoraAdapter` and `RunOptions.add_active_adapter` feed them, and so do `Adapters` of onnxruntime-genai.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; ONNX Runtime 1.20's multi-LoRA.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slm_export.bundles.checksums import sha256_file
from slm_export.errors import InputError
from slm_export.exporters.onnx_file import data_file
from slm_export.runtime import Factors

A, B = ".lora_A", ".lora_B"
VERSION = 1
"""Of what is written here: names and orientation of the matrices."""
_TRACED_RANK = 4
"""Of the stand-ins while a graph is traced; the file leaves it open."""


class Place(nn.Module):
    """A linear layer, and what an adapter adds to it."""

    lora_a: Tensor
    lora_b: Tensor

    def __init__(self, part: nn.Module, weight: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.part = part
        self.rows, columns = shape
        self.register_buffer("lora_a", torch.zeros(()).expand(columns, _TRACED_RANK))
        self.register_buffer("lora_b", torch.zeros(()).expand(_TRACED_RANK, self.rows))
        place = place_of(weight)
        self.keys = {"lora_a": place + A, "lora_b": place + B}

    def forward(self, x: Tensor) -> Tensor:
        """Return float32 (..., out) of float32 (..., in)."""
        down = _product(x, self.lora_a, _TRACED_RANK)
        made: Tensor = self.part(x) + _product(down, self.lora_b, self.rows)
        return made


def _product(x: Tensor, matrix: Tensor, columns: int) -> Tensor:
    # As it is: what the tracer makes of a product of three dimensions by two are reshapes around one of two.
    shape = (*x.shape[:-1], columns)
    made: Tensor = torch.onnx.ops.symbolic("MatMul", (x, matrix), dtype=torch.float32, shape=shape)
    return made


def place_of(weight: str) -> str:
    """Return the name of the place beside a weight: model.layers.0.self_attn.q_proj."""
    return weight.removesuffix(".weight")


def inputs_of(places: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the inputs of places, weight -> (out, in), with the one size of each that is fixed: in, or out."""
    return {
        place_of(name) + factor: (shape[1 if factor == A else 0],)
        for name, shape in places.items()
        for factor in (A, B)
    }


def leave_open(graph: Any, sizes: Mapping[str, tuple[int, ...]]) -> list[Any]:
    """Give the inputs of places a rank of their own and their default; return them, in the order of ``sizes``.

    Given   graph: places are inputs by their names, with the rank that was traced
    """
    import onnx_ir as ir

    values = {value.name: value for value in graph.inputs if value.name in sizes}
    assert values.keys() == sizes.keys(), sizes.keys() ^ values.keys()
    for name, (size,) in sizes.items():
        value, place = values[name], name.rpartition(".")[0]
        rank = ir.SymbolicDim(f"{place}.rank")
        down = name.endswith(A)
        value.shape = ir.Shape([size, rank] if down else [rank, size])
        if down:
            for node, _ in value.uses():
                (made,) = node.outputs
                made.shape = ir.Shape([*list(made.shape)[:-1], rank])
        value.const_value = ir.tensor(np.zeros((size, 0) if down else (0, size), np.float32), name=name)
        graph.register_initializer(value)
    return [values[name] for name in sizes]


def write_adapter(factors: Mapping[str, Factors], base: Path, path: Path) -> None:
    """Write an ``.onnx_adapter``, for the model at ``base`` alone.

    Given   factors: weight -> what is added to it
    """
    import onnxruntime

    # Kept to the end: an OrtValue of the CPU does not own the array that it was made of.
    inputs = {}
    for name, each in factors.items():
        inputs[place_of(name) + A] = each.down.t().contiguous().numpy()
        inputs[place_of(name) + B] = each.up.t().contiguous().numpy()
    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(VERSION)
    made.set_model_version(fingerprint(base))
    made.set_parameters(
        {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in inputs.items()}
    )
    made.export_adapter(str(path))


def read_adapter(path: Path, base: Path, places: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the inputs that an adapter file feeds, as OrtValues.

    Given   places: the model's inputs, with the size of each that is fixed

    Raises:
        InputError: it is no adapter file, is one for another model, or does not fit the model's places.
    """
    inputs = _inputs_in(path, base)
    for name, value in inputs.items():
        _refuse_misfit(path, name, value, places)
    return inputs


def read_factors(path: Path, base: Path) -> dict[str, Factors]:
    """Return what an adapter file adds to each weight, read back from the file alone.

    Raises:
        InputError: it is no adapter file, or one for another model.
    """
    values = {name: torch.from_numpy(value.numpy()) for name, value in _inputs_in(path, base).items()}
    return {
        f"{name.removesuffix(A)}.weight": Factors(
            value.t().clone(), values[name.removesuffix(A) + B].t().clone()
        )
        for name, value in values.items()
        if name.endswith(A)
    }


def _inputs_in(path: Path, base: Path) -> dict[str, Any]:
    import onnxruntime

    try:
        found = onnxruntime.AdapterFormat.read_adapter(str(path))
        version, model = found.get_adapter_version(), found.get_model_version()
        inputs: dict[str, Any] = dict(found.get_parameters())
    except Exception as error:  # the binding raises plain Exception and RuntimeError alike
        raise InputError(f"{path}: no adapter that ONNX Runtime can read: {error}; add it again") from error
    if version != VERSION:
        raise InputError(
            f"{path}: adapter version {version}, and this slm-export reads {VERSION}; add it again"
        )
    if model != fingerprint(base):
        raise InputError(
            f"{path}: was made for another model than {base}; add the adapter to this one with `slm-export adapter add`"
        )
    return inputs


def _refuse_misfit(path: Path, name: str, value: Any, places: Mapping[str, tuple[int, ...]]) -> None:
    """ONNX Runtime would take a buffer of any size that it is given as bound."""
    shape = tuple(value.shape())
    fixed = places.get(name)
    if fixed is None:
        raise InputError(
            f"{path}: {name} has no place in the model; add it again to a bundle with such places"
        )
    if (
        len(shape) != 2
        or shape[0 if name.endswith(A) else 1] != fixed[0]
        or value.data_type() != "tensor(float)"
    ):
        raise InputError(
            f"{path}: {name} is {value.data_type()} {list(shape)}, which does not fit; add it again"
        )


def fingerprint(base: Path) -> int:
    """Return 31 bits of the SHA-256 of a model and its data: all that the format has room for."""
    files = [file for file in (base, data_file(base)) if file.exists()]
    return _fingerprint(tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@functools.lru_cache(maxsize=8)
def _fingerprint(files: tuple[tuple[str, int, int], ...]) -> int:
    """Return it; sizes and times stand for content that was read before."""
    hashes = "".join(sha256_file(Path(name)) for name, _, _ in files)
    return int(hashlib.sha256(hashes.encode()).hexdigest()[:8], 16) & 0x7FFFFFFF
