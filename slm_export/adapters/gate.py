"""Is an artifact with an adapter on as good as its source with that adapter? The gate of the base, once more.

    judge_adapter     held-out text, prompts, long texts and the vendor's own generation loop, with the adapter on
    judge_factors     what the adapter's file holds, read back, against what peft makes of the adapter
    judge_switching   every adapter on, off and on again in one session: the same to the bit, and not the base's
    judge_places      a miniature in 32 bits with factors by chance: a place, or a file, that is not as it should be

What peft makes of an adapter is the oracle (`reference`); what the artifact gets are factors, in a file of its runtime.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from slm_export import fidelity
from slm_export.adapters.low_rank import LowRank
from slm_export.adapters.reference import AdaptedReferences, adapted_model
from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError
from slm_export.fidelity.exactness import LIMIT, compared_decoder, furthest
from slm_export.fidelity.miniature import miniature
from slm_export.fidelity.tokens import TOKENS
from slm_export.graph.model import build_reference
from slm_export.judge import Subject
from slm_export.progress import Progress
from slm_export.results import Check, TokenQuality
from slm_export.runtime import AdaptableSession, AdapterExporter, ExportOptions, Factors
from slm_export.vendor_text import judge_vendor_text

_CONTEXT = 64
_PROMPT = 24
_SCALE = 0.05
"""Of factors by chance: what they add is felt, and drowns nothing."""


def judge_adapter(
    subject: Subject, references: fidelity.References, adapter: LowRank, file: Path, progress: Progress
) -> tuple[TokenQuality, tuple[Check, ...]]:
    """Return figures and checks of an artifact with an adapter on."""
    exporter = subject.exporter
    assert isinstance(exporter, AdapterExporter)
    held = judge_factors(exporter.stored_factors(file, subject.path), adapter)
    with progress.stage(f"verify {exporter.name} with {adapter.name}", total=TOKENS) as stage:
        session = _opened(subject)
        try:
            session.adapt(file)
            quality, checks = fidelity.judge_decoder(
                AdaptedReferences(references, adapter),
                session,
                exporter.rounding,
                subject.tokenizer,
                subject.documents,
                subject.gates,
                stage.advance,
            )
            text: tuple[Check, ...] = ()
            if exporter.no_adapter_runner is None:
                text = (_judge_text(subject, session, file),)
        finally:
            session.close()
    return quality, (*checks, *text, held)


def _judge_text(subject: Subject, session: AdaptableSession, file: Path) -> Check:
    return judge_vendor_text(
        subject.exporter,
        subject.path,
        subject.runner_tokenizer,
        subject.tokenizer,
        session,
        subject.prompt,
        file,
    )


def judge_factors(found: Mapping[str, Factors], adapter: LowRank) -> Check:
    """Hold the products of factors against peft's own: a small adapter's mistakes are lost among those of 4 bits."""
    if odd := sorted(found.keys() ^ adapter.deltas.keys()):
        return Check("factors", False, f"{odd[0]} is in the file or in the adapter, and not in both")
    far = {}
    for name, delta in adapter.deltas.items():
        wanted, each = delta(), found[name]
        span = max(float(wanted.abs().max()), torch.finfo(torch.float32).tiny)
        far[name] = float((each.up @ each.down - wanted).abs().max()) / span
    worst = max(far, key=lambda name: math.inf if math.isnan(far[name]) else far[name])
    words = f"what the file adds to {worst} is what peft adds, but for this share of its largest value"
    return Check("factors", far[worst] <= LIMIT, words, far[worst], LIMIT)


@torch.no_grad()
def judge_switching(subject: Subject, files: Mapping[str, Path]) -> tuple[Check, ...]:
    """Turn adapters on one after the other in one session, and again in the other order.

    Given   files: name -> file
    """
    tokens = subject.tokenizer.encode_with_template(subject.documents[0])[:_PROMPT]
    session = _opened(subject)
    try:
        steps: list[tuple[str, Path | None]] = [("no adapter", None), *files.items()]
        first = {name: _logits(session, file, tokens) for name, file in steps}
        again = {name: _logits(session, file, tokens) for name, file in reversed(steps)}
        loaded = {name: session.adapted(file, tokens) for name, file in files.items()}
    finally:
        session.close()
    other = [name for name, logits in first.items() if not torch.equal(logits, again[name])]
    idle = [name for name in files if torch.equal(first[name], first["no adapter"])]
    detail = "every adapter gives the same when it is turned on again, and another than the base"
    if other or idle:
        detail = f"not the same when turned on again: {other}" if other else f"no other than the base: {idle}"
    span = float(first["no adapter"].max() - first["no adapter"].min())
    apart = _largest([float((loaded[name] - first[name]).abs().max()) / span for name in files])
    words = (
        "the runtime's own loader of adapters gives what the session gives, but for this share of the range"
    )
    return (
        Check("adapters_switch", not (other or idle), detail),
        Check("adapters_load", apart <= LIMIT, words, apart, LIMIT),
    )


def _logits(session: AdaptableSession, file: Path | None, tokens: list[int]) -> Tensor:
    session.adapt(file)
    return session.logits(tokens, 0)


@torch.no_grad()
def judge_places(
    exporter: AdapterExporter, checkpoint: Checkpoint, places: tuple[str, ...], tokenizer: Path
) -> Check:
    """Write a miniature of a checkpoint with places and an adapter for it, and compare both with torch.

    Given   places: names of weights that adapters may add to
            tokenizer: a folder with the tokenizer's files
    """
    small = miniature(checkpoint)
    factors = _by_chance(small, [name for name in places if name in small.weights])
    context = min(_CONTEXT, small.positions or _CONTEXT)
    rank = max(each.down.shape[0] for each in factors.values())
    options = ExportOptions(
        context, stop_ids=(1,), bos_id=0, tokenizer=tokenizer, places=tuple(factors), rank=rank
    )
    with TemporaryDirectory(prefix="slm-export-") as folder:
        path = Path(folder) / exporter.file(small.task)
        path.parent.mkdir(parents=True)
        exporter.write(small, options, path)
        file = Path(folder) / f"adapter{exporter.adapter_suffix}"
        exporter.write_adapter(factors, path, file)
        session = exporter.open(path, small.task)
        assert isinstance(session, AdaptableSession)
        try:
            far = [furthest(compared_decoder(session, build_reference(small), small))[0]]
            session.adapt(file)
            model = adapted_model(small, {name: _product(each) for name, each in factors.items()})
            far.append(furthest(compared_decoder(session, model, small))[0])
        finally:
            session.close()
    words = (
        "in 32 bits, a miniature with factors by chance, off and on, gives torch's scores but for this share"
    )
    return Check("exact_adapters", _largest(far) <= LIMIT, words, _largest(far), LIMIT)


def _largest(values: list[float]) -> float:
    """Return the largest; what is no number counts as such."""
    return float(torch.tensor(values).max())


def _by_chance(small: Checkpoint, names: list[str]) -> dict[str, Factors]:
    """Return factors of several ranks."""
    generator, made = torch.Generator().manual_seed(0), {}
    for index, name in enumerate(names):
        rows, columns = small.weights[name].shape
        rank = 1 + index % 3
        down, up = (
            torch.randn(size, generator=generator) * _SCALE for size in ((rank, columns), (rows, rank))
        )
        made[name] = Factors(down, up)
    return made


def _product(each: Factors) -> Callable[[], Tensor]:
    return lambda: each.up @ each.down


def _opened(subject: Subject) -> AdaptableSession:
    session = subject.exporter.open(subject.path, subject.task)
    if not isinstance(session, AdaptableSession) or not session.places:
        session.close()
        raise InputError(
            f"{subject.path}: has no places for adapters; export the model again with --adapter NAME=FOLDER"
        )
    return session
