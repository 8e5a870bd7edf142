"""The whole compile of a TensorFlow model: as `driver`, with TensorFlow for the source and its oracle."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from slm_export.bundles import bundle
from slm_export.bundles.lock import write_lock
from slm_export.checkpoint import Checkpoint
from slm_export.compilation import Plan
from slm_export.errors import InputError
from slm_export.exporters.litert_keras import Converted
from slm_export.exporters.litert_keras_file import write
from slm_export.fidelity.judging import checks_of
from slm_export.gates import Gates
from slm_export.keras.judge import judge
from slm_export.keras.read import Read, read_model, ready, source_of, source_sha256
from slm_export.keras.source import name_of
from slm_export.locked import held_against, inputs_of, lock_of
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.progress import Progress
from slm_export.proof import gates_for, refuse_failures, size_check
from slm_export.recipe import options_of
from slm_export.registry import exporter
from slm_export.reports.asked import asked
from slm_export.reports.by_weight import changes_of, rows_of
from slm_export.reports.environment import environment
from slm_export.results import Artifact, FormatResult, Latency, ModelFacts, PassRow, Quality, Report
from slm_export.source.licences import copy_licences, licence_of, licence_texts
from slm_export.source.tasks import CLASSIFICATION, EMBEDDING
from slm_export.toolchain import versions

FORMAT, SOURCE = "litert", "tensorflow"
_TOOLS = ("tensorflow", "keras", "ai-edge-litert", "torch")


def export(plan: Plan, progress: Progress) -> tuple[Report, Path]:
    """Compile a TensorFlow model for a device, prove it, and put the bundle in its place.

    Raises:
        SlmExportError: whatever a user can cause or mend.
    """
    began = time.monotonic()
    step = _recipe(plan)
    path = Path(plan.model).expanduser()
    ready()
    toolchain = versions(_TOOLS)
    lock = held_against(plan, (step,), toolchain, lambda: source_of(path), progress)
    out = plan.request.out or Path(f"{name_of(path)}-{plan.profile.target}")
    with bundle.staged(out, plan.request.force) as staging:
        read = read_model(path, plan.request.context, plan.request.eval_text, progress)
        facts = _facts(read, path, progress)
        inputs = inputs_of(plan, (step,), toolchain, source_of(path, facts.source_sha256))
        checkpoint, row = quantize(read.converted, step, progress)
        gates = gates_for(plan, checkpoint)
        if read.tokenizer is not None:
            plan.target.bundle(read.tokenizer, staging.path)
        with bundle.machine_errors("copy the licence", staging.path):
            copy_licences(path, staging.path)
        artifact = _write(read, checkpoint, facts.parameters, staging.path, progress)
        notes = lock.refuse_other_bytes((artifact,), staging.path) if lock else ()
        report = Report(
            model=facts,
            target=plan.profile.target,
            device=plan.profile.name,
            device_title=plan.profile.title,
            passes=(row,),
            formats=(_prove(plan, read, checkpoint, artifact, gates, progress),),
            toolchain=toolchain,
            seconds=time.monotonic() - began,
            stages=dict(progress.stages),
            peak_rss_mb=progress.peak_rss_mb,
            notes=(*plan.notes, *_recipe_note(plan), *read.notes, *notes),
            asked=asked(plan.request),
            weights=rows_of(checkpoint, changes_of(read.converted.checkpoint, checkpoint).errors),
            environment=environment(),
        )
        refuse_failures(report)
        write_lock(staging.path, lock_of(inputs, (artifact,), staging.path))
        report = bundle.write_documents(staging.path, report, gates=gates, runtime=_runtime(read))
        return report, staging.commit()


def quantize(converted: Converted, step: GroupQuantize, progress: Progress) -> tuple[Checkpoint, PassRow]:
    """Quantize the matrices of a converted model; every constant is changed, or skipped with a reason."""
    before, began = converted.checkpoint, time.monotonic()
    with progress.stage(step.name):
        result = step.run(before)
    # A pass knows the roles of weights; why a graph has no better role for one, only its reader does.
    skipped = {name: converted.reasons.get(name, reason) for name, reason in result.skipped.items()}
    if len(skipped) == len(before.weights):
        raise InputError(
            f"{before.folder}: nothing of it can be stored in 8 bits: its matrices are no variables of the model, "
            "or LiteRT has no 8-bit kernel for their operators; save it with its variables, not frozen"
        )
    row = PassRow(
        name=step.name,
        options=options_of(step),
        seconds=time.monotonic() - began,
        bytes_before=before.bytes,
        bytes_after=result.checkpoint.bytes,
        changed=len(before.weights) - len(skipped),
        skipped=skipped,
        error=changes_of(before, result.checkpoint).error,
    )
    return replace(result.checkpoint, history=(step.name,)), row


def _recipe(plan: Plan) -> GroupQuantize:
    """Return the one pass there is for these models; InputError where the user asks for another."""
    request = plan.request
    others = [name for name in request.formats or () if name != FORMAT]
    if others:
        raise InputError(
            f"--format {others[0]}: TensorFlow models are written for {FORMAT} only; leave --format out"
        )
    if FORMAT not in plan.profile.formats:
        raise InputError(f"device {plan.profile.name} does not run {FORMAT}, the format of TensorFlow models")
    if request.gates.over(plan.profile.gates).min_accelerated is not None:
        raise InputError(
            "gate min_accelerated: what XNNPACK takes of a TensorFlow model is not told; leave the gate out"
        )
    if request.revision is not None:
        raise InputError(
            f"--revision {request.revision} has no meaning for {plan.model}, which is no hub model"
        )
    asked = request.quantization
    for option, bits in (
        ("bits", asked.bits),
        ("embedding-bits", asked.embedding_bits),
        ("head-bits", asked.head_bits),
    ):
        if bits not in (None, 8):
            raise InputError(
                f"--{option} {bits}: TensorFlow models are stored in 8 bits; leave --{option} out"
            )
    if asked.group_size is not None:
        raise InputError(
            f"--group-size {asked.group_size} has no meaning at 8 bits, where a scale is a row's; leave it out"
        )
    return GroupQuantize(bits=8, embedding_bits=8)


def _recipe_note(plan: Plan) -> tuple[str, ...]:
    if plan.request.quantization.bits or all(getattr(step, "bits", 8) == 8 for step in plan.recipe):
        return ()
    return ("the device's recipe is for other models: TensorFlow models are stored in 8 bits",)


def _facts(read: Read, path: Path, progress: Progress) -> ModelFacts:
    parameters = sum(math.prod(variable.shape) for variable in read.model.variables.values())
    with progress.stage("hash the model"):
        return ModelFacts(
            name=read.model.name,
            architecture=read.model.architecture,
            task=read.converted.checkpoint.task,
            parameters=parameters,
            source_sha256=source_sha256(path),
            source_bytes=4 * parameters,
            licence=licence_of(path),
            context=read.converted.checkpoint.positions,
            licence_texts=licence_texts(path),
        )


def _write(read: Read, checkpoint: Checkpoint, parameters: int, folder: Path, progress: Progress) -> Artifact:
    path = folder / FORMAT / "model.tflite"
    path.parent.mkdir(parents=True, exist_ok=True)
    output = "embedding" if checkpoint.task == EMBEDDING else "scores"
    with progress.stage(f"write {FORMAT}"), bundle.machine_errors(f"write {FORMAT}", path):
        made = write(read.converted, checkpoint, list(read.model.ports), (output, read.model.width), path)
    return replace(made, bits_per_weight=8 * made.bytes / parameters)


def _prove(
    plan: Plan, read: Read, checkpoint: Checkpoint, artifact: Artifact, gates: Gates, progress: Progress
) -> FormatResult:
    quality: Quality | None = None
    latency: Latency | None = None
    checks = size_check(artifact, gates)
    if plan.request.verify:
        quality, more = judge(
            read.model,
            read.converted,
            checkpoint,
            exporter(FORMAT),
            artifact.path,
            read.held,
            gates,
            progress,
        )
        checks += more
    if plan.request.bench:
        with progress.stage(f"measure {FORMAT}"):
            latency = plan.target.benchmark(artifact.path, FORMAT, checkpoint.task)
        checks += checks_of(latency, gates, {})
    return FormatResult(artifact, quality, checks, latency)


def _runtime(read: Read) -> dict[str, Any]:
    """Return what an app must know to run the bundle."""
    checkpoint = read.converted.checkpoint
    facts: dict[str, Any] = {
        "source": SOURCE,
        "task": checkpoint.task,
        "context": checkpoint.positions,
        "padding_id": 0,
        "vocabulary": read.converted.rows,
    }
    if checkpoint.task == CLASSIFICATION:
        facts["labels"] = list(read.labels)
        if read.model.width == 1:
            facts["threshold"] = read.threshold
    return facts
