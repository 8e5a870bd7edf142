"""An artifact of a TensorFlow model against that model, in LiteRT and in TensorFlow's own runtime.

Four outputs are held side by side for every input: the model's own; the model's with the codes' values put back
into its variables; the artifact's in LiteRT; the artifact's in TensorFlow Lite. The first against the third is the
quality, the second against the third is what lowering costs, and the codes in the file must be those that were
meant, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slm_export.checkpoint import Checkpoint
from slm_export.exporters.litert_keras import Converted
from slm_export.fidelity.judging import checks_of
from slm_export.gates import Gates
from slm_export.keras.inputs import HeldOut, Ids
from slm_export.keras.source import IDS, MASK, TensorFlowModel, tensorflow
from slm_export.parity import judge_codes, quantized_weights
from slm_export.progress import Progress
from slm_export.results import Check, EmbeddingQuality, Quality, ScoreQuality
from slm_export.runtime import EncoderSession, Exporter
from slm_export.source.tasks import CLASSIFICATION, EMBEDDING

LOWERING = 0.05
"""Share of the outputs' own spread that rounding activations to 8 bits may cost; a broken kernel costs all of it.
Recurrent and attention models that were tried cost 0.002 to 0.02."""

PADDING = 1e-4
"""By how much padding may move the output of a model that takes inputs of any length."""


def task_of(source: TensorFlowModel, outputs: Tensor) -> tuple[str, str]:
    """Return the task of a model by some of its outputs (inputs, width), and why it was taken for that."""
    if "embed" in source.output.lower():
        return EMBEDDING, f"its output is called {source.output}"
    lengths = outputs.square().sum(-1).sqrt()
    if source.width > 1 and outputs.min() < 0 and bool(((lengths - 1).abs() < 1e-3).all()):
        return EMBEDDING, "its outputs have length 1"
    return CLASSIFICATION, "its outputs are no unit vectors"


def threshold_of(outputs: Tensor) -> float:
    """Return where a single score turns from no to yes: in the middle of probabilities, or at 0."""
    return 0.5 if bool(((outputs >= 0) & (outputs <= 1)).all()) else 0.0


def source_outputs(source: TensorFlowModel, inputs: Sequence[Ids], tokens: int, *, padded: bool) -> Tensor:
    """Return what the model itself gives, (inputs, width); a model of a fixed length is always given that."""
    if source.tokens is None and not padded:
        return torch.cat([source.outputs([ids], [[1] * len(ids)]) for ids in inputs])
    rows = [(ids, [0] * (tokens - len(ids))) for ids in inputs]
    return source.outputs(
        [[*ids, *blank] for ids, blank in rows], [[*[1] * len(ids), *blank] for ids, blank in rows]
    )


def judge(
    source: TensorFlowModel,
    converted: Converted,
    checkpoint: Checkpoint,
    exporter: Exporter,
    path: Path,
    held: HeldOut,
    gates: Gates,
    progress: Progress,
) -> tuple[Quality, tuple[Check, ...]]:
    """Measure an artifact and hold it against the thresholds.

    Given   checkpoint: the one of ``converted``, quantized, that the artifact was written from
    """
    tokens, inputs = int(checkpoint.positions or 0), held.inputs
    with progress.stage("verify litert", total=4 * len(inputs)) as stage:
        own = source_outputs(source, inputs, tokens, padded=False)
        stage.advance(len(inputs), "inputs")
        with source.holding(_put_back(converted, checkpoint)):
            lowered = source_outputs(source, inputs, tokens, padded=True)
        stage.advance(len(inputs), "inputs")
        found = _in_litert(exporter, path, checkpoint.task, inputs)
        stage.advance(len(inputs), "inputs")
        other = _in_tensorflow(path, inputs, tokens, list(source.ports))
        stage.advance(len(inputs), "inputs")
    quality, checks = _compared(checkpoint.task, own, lowered, found, held, gates)
    _, theirs = _compared(checkpoint.task, own, lowered, other, held, gates)
    checks += tuple(dataclasses.replace(check, name=f"tensorflow_{check.name}") for check in theirs)
    codes = judge_codes(exporter.stored(path), quantized_weights(checkpoint))
    checks += (_lowering(own, lowered, found), dataclasses.replace(codes, name="stored_weights"))
    if source.tokens is None:
        padded = source_outputs(source, inputs, tokens, padded=True)
        checks += (_padding(own, padded, tokens),)
    return quality, checks


def _put_back(converted: Converted, checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """Return variable -> the values that its codes stand for."""
    values: dict[str, Tensor] = {}
    for name, weight in quantized_weights(checkpoint).items():
        matrix = weight.float32()
        values |= {variable: origin.back(matrix) for variable, origin in converted.origins[name].items()}
    return values


def _in_litert(exporter: Exporter, path: Path, task: str, inputs: Sequence[Ids]) -> Tensor:
    session = exporter.open(path, task)
    try:
        assert isinstance(session, EncoderSession)
        return torch.stack([session.outputs(ids, [1] * len(ids)) for ids in inputs])
    finally:
        session.close()


def _in_tensorflow(path: Path, inputs: Sequence[Ids], tokens: int, ports: Sequence[str]) -> Tensor:
    import numpy as np

    interpreter = tensorflow().lite.Interpreter(model_path=str(path))
    run: Any = interpreter.get_signature_runner(f"encode_{tokens}")
    results = []
    for ids in inputs:
        blank = [0] * (tokens - len(ids))
        given = {IDS: [*ids, *blank], MASK: [*[1] * len(ids), *blank]}
        ((_, result),) = run(**{name: np.array([given[name]], np.int32) for name in ports}).items()
        results.append(torch.from_numpy(result[0].copy()))
    return torch.stack(results)


def _compared(
    task: str, own: Tensor, lowered: Tensor, found: Tensor, held: HeldOut, gates: Gates
) -> tuple[Quality, tuple[Check, ...]]:
    apart = (own - found).abs().amax(-1)
    lowering = (found - lowered).abs().max().item()
    hint = "; these ids are made up: --eval-text FILE gives real ones" if held.made_up else ""
    if task == EMBEDDING:
        cosines = F.cosine_similarity(own, found, dim=-1)
        worst = _shown(held.inputs[int(cosines.argmin())])
        quality: Quality = EmbeddingQuality(
            cosine_min=cosines.min().item(),
            cosine_mean=cosines.mean().item(),
            sentences=len(held.inputs),
            worst_sentence=worst,
            lowering_max_abs=lowering,
        )
        detail = f"furthest from the source on ids {worst}{hint}"
        return quality, checks_of(quality, gates, dict.fromkeys(("cosine_min", "cosine_mean"), detail))
    quality = ScoreQuality(
        agreement=(_choices(own, own) == _choices(found, own)).to(torch.float32).mean().item(),
        max_abs=apart.max().item(),
        sentences=len(held.inputs),
        lowering_max_abs=lowering,
    )
    detail = f"scores are furthest apart on ids {_shown(held.inputs[int(apart.argmax())])}{hint}"
    return quality, checks_of(quality, gates, dict.fromkeys(("agreement", "max_abs"), detail))


def _choices(scores: Tensor, own: Tensor) -> Tensor:
    """Return the class of every input; a single score is a yes or a no."""
    return scores.squeeze(-1) >= threshold_of(own) if scores.shape[-1] == 1 else scores.argmax(-1)


def _lowering(own: Tensor, lowered: Tensor, found: Tensor) -> Check:
    """Hold the cost of lowering against how far outputs of different inputs lie apart."""
    cost, spread = _rms(found - lowered), _rms(own - own.mean(0))
    share = cost / spread if spread else (0.0 if not cost else float("inf"))
    detail = "outputs differ from those of the model with the same codes, as a share of how much they vary"
    return Check("lowering_share", share <= LOWERING, detail, share, LOWERING)


def _padding(own: Tensor, padded: Tensor, tokens: int) -> Check:
    apart = (own - padded).abs().max().item()
    detail = (
        f"the artifact fills inputs up to {tokens} tokens with id 0, and the model itself then says something else; "
        "mask the padding (Embedding(mask_zero=True)), or build it with a fixed length"
    )
    return Check("padding", apart <= PADDING, detail, apart, PADDING)


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def _shown(ids: Ids) -> str:
    text = " ".join(str(token) for token in ids[:24])
    return f"{text} ..." if len(ids) > 24 else text
