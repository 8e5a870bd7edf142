"""Rows of calibration.toml as the model of `slm-export plan` sees them: a shape, a machine, and what is predicted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from slm_export.planning.formats import FORMATS
from slm_export.planning.memory import KV_VALUE
from slm_export.planning.model import Matrix, ModelShape
from slm_export.planning.roofline import Constants, Machine, Work, seconds, work_of
from slm_export.planning.sizes import sizes_of
from slm_export.planning.storage import Stored, store

HERE = Path(__file__).resolve().parent
CONTEXT = 2048
"""Tokens of the cache, in every file whose size is known."""
Row = Mapping[str, Any]


def shape_of(data: Mapping[str, Any], row: Row) -> ModelShape:
    """Return the decoder of a row, from its geometry."""
    of = data["models"][row["model"]]
    hidden, wide = of["hidden"], of["heads"] * of["head_dim"]
    kv, intermediate, layers = of["kv_heads"] * of["head_dim"], of["intermediate"], of["layers"]
    attention = [(wide, hidden), (kv, hidden), (kv, hidden), (hidden, wide)]
    linears = [*attention, (intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    matrices = [
        Matrix(f"layers.{layer}.{index}", shape, "linear", 2)
        for layer in range(layers)
        for index, shape in enumerate(linears)
    ]
    tied = of["tied"] and not row.get("untied", False)
    matrices.append(Matrix("embedding", (of["vocabulary"], hidden), "embedding", 2))
    if not tied:
        matrices.append(Matrix("head", (of["vocabulary"], hidden), "head", 2))
    return ModelShape(
        folder=HERE,
        name=row["model"],
        architecture="LlamaForCausalLM",
        decodes=True,
        matrices=tuple(matrices),
        vectors=(2 * layers + 1) * hidden,
        others_bytes=0,
        tied=tied,
        layers=layers,
        kv_values=2 * layers * kv,
        kv_heads=of["kv_heads"],
        hidden=hidden,
        intermediate=intermediate,
        positions=None,
    )


def stored_of(shape: ModelShape, row: Row) -> tuple[Stored, ...]:
    """Return its matrices as the row says that they are stored."""
    linear, embedding, head = row["bits"]
    options = {"bits": linear, "embedding_bits": embedding, "head_bits": head, "group": row.get("group", 32)}
    return store(shape, [("group-quantize", options)])[0]


def work_for(data: Mapping[str, Any], row: Row, tokens: int, depth: int) -> Work:
    """Return a call of the model of a row, adapters included."""
    shape = shape_of(data, row)
    work = work_of(shape, stored_of(shape, row), tokens, depth, KV_VALUE[row["runtime"]])
    extra = row.get("extra_mb", 0) * 1e6
    return replace(work, bytes={**work.bytes, "float": work.bytes["float"] + extra})


def machine_of(data: Mapping[str, Any], row: Row) -> Machine:
    """Return the machine of a row; a row measured on a busy machine brings the bandwidth of its moment."""
    of = data["devices"][row["device"]]
    ghz = of.get("ghz")
    return Machine(
        row["device"], 1e9 * row.get("gb_s", of["gb_s"]), None if ghz is None else 1e9 * ghz, of["source"]
    )


def decode_of(data: Mapping[str, Any], row: Row, constants: Constants) -> float | None:
    """Return the predicted rate of decoding."""
    took = seconds(work_for(data, row, 1, row["prompt"]), machine_of(data, row), constants)
    return 1 / took if took else None


def prefill_of(data: Mapping[str, Any], row: Row, constants: Constants) -> float | None:
    """Return the predicted rate of reading the prompt."""
    took = seconds(work_for(data, row, row["prompt"], 0), machine_of(data, row), constants)
    return row["prompt"] / took if took else None


def size_of(data: Mapping[str, Any], row: Row) -> int:
    """Return the predicted bytes of a row's file."""
    shape = shape_of(data, row)
    stored = stored_of(shape, row)
    size = sizes_of(shape, stored, row["runtime"], CONTEXT).total
    wider = row.get("group_scale", 0) - FORMATS[row["runtime"]].group_scale
    if wider > 0:
        size += sum(wider * (one.matrix.count // one.group) for one in stored if one.bits == 4)
    return size
