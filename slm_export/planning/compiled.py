"""What the model of a machine says of an artifact that was made, beside what was measured of it."""

from __future__ import annotations

from slm_export.checkpoint import Checkpoint
from slm_export.planning.forecast import PROMPT
from slm_export.planning.machines import machine_of, this_machine
from slm_export.planning.memory import KV_VALUE
from slm_export.planning.model import Matrix, ModelShape, dimensions, kv_heads
from slm_export.planning.roofline import Constants, Machine, fitted, seconds, work_of
from slm_export.planning.storage import Stored
from slm_export.profile import DeviceProfile
from slm_export.reports.details import PredictedPhase, Prediction
from slm_export.results import Latency, TokenLatency
from slm_export.source.tasks import GENERATION
from slm_export.weights import Dense, Palettized, Quantized, Weight


def shape_of(checkpoint: Checkpoint) -> tuple[ModelShape, tuple[Stored, ...]]:
    """Return a checkpoint as a plan sees it, every matrix stored as it is."""
    stored = tuple(
        _stored(Matrix(name, (weight.shape[0], weight.shape[1]), role, 2), weight)
        for name, weight in checkpoint.weights.items()
        if (role := checkpoint.roles.get(name, "other")) != "other"
    )
    decodes = checkpoint.task == GENERATION
    config = checkpoint.config.get_text_config().to_dict()
    layers, hidden = dimensions(config)
    heads, width = kv_heads(config)
    shape = ModelShape(
        folder=checkpoint.folder,
        name=checkpoint.name,
        architecture=checkpoint.architecture,
        decodes=decodes,
        matrices=tuple(one.matrix for one in stored),
        vectors=0,
        others_bytes=0,
        tied=bool(checkpoint.tied),
        layers=layers,
        kv_values=2 * layers * heads * width if decodes else 0,
        kv_heads=heads,
        hidden=hidden,
        intermediate=0,
        positions=checkpoint.positions,
    )
    return shape, stored


def here(checkpoint: Checkpoint, format: str, latency: Latency | None) -> Prediction | None:
    """Return what is predicted for this machine, with what was measured; None where nothing is known or measured."""
    if latency is None:
        return None
    if isinstance(latency, TokenLatency):
        tokens = latency.prefill_tokens
        read, token = latency.prefill_tokens_per_s, latency.decode_tokens_per_s
        measured = (tokens / read if read else None, 1 / token if token else None)
    else:
        tokens, median = latency.tokens, latency.latency_ms.get("p50")
        measured = (None if median is None else median / 1000, None)
    constants = fitted()["host"].get(format)
    if constants is None:
        return None
    return _prediction(checkpoint, format, this_machine(), constants, tokens, measured)


def there(checkpoint: Checkpoint, format: str, profile: DeviceProfile) -> Prediction | None:
    """Return what is predicted for a device; None where its profile or the measurements do not tell."""
    constants = fitted()["device"].get(format)
    if profile.target == "host" or constants is None:
        return None
    return _prediction(checkpoint, format, machine_of(profile), constants, PROMPT, (None, None))


def _prediction(
    checkpoint: Checkpoint,
    format: str,
    machine: Machine,
    constants: Constants,
    tokens: int,
    measured: tuple[float | None, float | None],
) -> Prediction | None:
    model, stored = shape_of(checkpoint)
    works = [work_of(model, stored, tokens, 0, KV_VALUE[format])]
    if model.decodes:
        works.append(work_of(model, stored, 1, tokens, KV_VALUE[format]))
    kinds = works[0].multiply_adds
    kind = max(kinds, key=lambda name: kinds[name])
    share, rate = constants.share.get(kind), constants.per_cycle.get(kind)
    if not (share and rate and machine.bytes_per_s and machine.cycles_per_s):
        return None
    phases = [
        PredictedPhase(work.name, work.operations, work.total_bytes, took, of)
        for work, of in zip(works, measured, strict=False)
        if (took := seconds(work, machine, constants)) is not None
    ]
    return Prediction(
        machine.name,
        share * machine.bytes_per_s,
        2 * rate * machine.cycles_per_s,
        tuple(phases),
        f"{machine.source}; shares and rates of {format} fitted (docs/plan.md)",
    )


def _stored(matrix: Matrix, weight: Weight) -> Stored:
    if isinstance(weight, Palettized):
        return Stored(matrix, weight.bits, weight.group, palette=True)
    if isinstance(weight, Quantized):
        return Stored(matrix, weight.bits, weight.group if weight.bits == 4 else 0)
    assert isinstance(weight, Dense)
    return Stored(matrix, 8 * weight.dtype.itemsize)
