"""The whole compile: read, quantize, write, open again, compare, measure, keep or refuse."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from slm_export.adapters.build import places_for, read_adapters
from slm_export.bundles import bundle
from slm_export.bundles.finished import until_the_end
from slm_export.bundles.lock import write_lock
from slm_export.checkpoint import Checkpoint
from slm_export.compilation import Plan, check_gates, context_for
from slm_export.evaltext import load_documents, text_sha256
from slm_export.judge import Subject
from slm_export.locked import held_against, inputs_of, lock_of
from slm_export.optimize import calibration_for, optimize
from slm_export.progress import Progress
from slm_export.proof import gates_for, prove, refuse_failures
from slm_export.reports.asked import asked
from slm_export.reports.by_weight import rows_of
from slm_export.reports.environment import environment
from slm_export.results import Artifact, ModelFacts, Report
from slm_export.runtime import Exporter, ExportOptions, Proven
from slm_export.source.hub import find_model
from slm_export.source.licences import copy_licences
from slm_export.source.load import check_values, load_checkpoint
from slm_export.source.provenance import facts_of, refuse_large_vocabulary, runtime_facts, source_of
from slm_export.source.tasks import GENERATION
from slm_export.tokenization.tokenizer import OWN_TOKENIZER, SourceTokenizer, tokenizer_of
from slm_export.toolchain import tools_of, versions


def export(plan: Plan, progress: Progress) -> tuple[Report, Path]:
    """Compile a model for a device, prove it, and put the bundle in its place.

    Returns the report and the bundle's folder. Nothing is left behind unless every gate passed.

    Raises:
        SlmExportError: whatever a user can cause or mend.
    """
    began = time.monotonic()
    check_gates(plan)
    folder = find_model(plan.model, plan.request.revision)
    documents = load_documents(plan.request.eval_text)
    toolchain = versions(tools_of(plan))
    lock = held_against(
        plan, plan.recipe, toolchain, lambda: source_of(folder, plan.request.revision), progress
    )
    # Only now, because a compiler takes seconds to import: a mistyped folder is told of at once.
    plan.ready()
    out = plan.request.out or Path(f"{folder.resolve().name}-{plan.profile.target}")
    with bundle.staged(out, plan.request.force) as staging, until_the_end() as kept:
        source, tokenizer, context = _read(plan, folder, progress)
        facts = _facts(source, context, progress)
        inputs = inputs_of(
            plan, plan.recipe, toolchain, source_of(folder, plan.request.revision, facts.source_sha256)
        )
        adapters = read_adapters(plan.request.adapters, source, facts.source_sha256, progress)
        calibration = calibration_for(plan.recipe, plan.request.calibration, source, tokenizer, progress)
        optimized = optimize(plan.recipe, source, facts.source_sha256, calibration, kept, progress)
        checkpoint = optimized.checkpoint
        gates = gates_for(plan, checkpoint)
        if checkpoint.vocabulary is not None:
            tokenizer = tokenizer_of(checkpoint)
        plan.target.bundle(tokenizer, staging.path)
        with bundle.machine_errors("copy the licence", staging.path):
            copy_licences(folder, staging.path)
        options = _options(plan, context, tokenizer, staging.path / "tokenizer")
        options = replace(options, **places_for(adapters, source))
        runners = _runner_tokenizers(plan, source, staging.path)
        notes = [
            *plan.notes,
            *optimized.notes,
            *(f"{name}: not used: {why}" for name, why in source.unused.items()),
        ]
        subjects = []
        for exporter in plan.exporters:
            artifact = _write(exporter, checkpoint, options, staging.path, progress)
            runner = staging.path / runners.get(exporter.name, OWN_TOKENIZER)
            subject = Subject(
                exporter, artifact.path, source.task, tokenizer, runner, documents, gates, context
            )
            subjects.append((artifact, subject))
        artifacts = tuple(artifact for artifact, _ in subjects)
        if lock is not None:
            notes += lock.refuse_other_bytes(artifacts, staging.path)
        results, pairs, more = prove(plan, subjects, adapters, (source, optimized), progress)
        notes += more
        report = Report(
            model=facts,
            target=plan.profile.target,
            device=plan.profile.name,
            device_title=plan.profile.title,
            passes=optimized.rows,
            calibration=optimized.calibration,
            formats=results,
            toolchain=toolchain,
            seconds=time.monotonic() - began,
            stages=dict(progress.stages),
            peak_rss_mb=progress.peak_rss_mb,
            parity=pairs,
            notes=tuple(notes),
            frontier=plan.frontier,
            asked=asked(plan.request),
            weights=rows_of(checkpoint, optimized.errors),
            environment=environment(),
            held_out=text_sha256(documents) if plan.request.verify else None,
        )
        refuse_failures(report)
        runtime = runtime_facts(source, tokenizer, options, runners)
        write_lock(staging.path, lock_of(inputs, artifacts, staging.path))
        with bundle.machine_errors(f"write what apps on {plan.profile.target} need", staging.path):
            proven = Proven(facts, artifacts, plan.profile, tokenizer, runtime)
            told = plan.target.finish(proven, staging.path)
        report = replace(report, notes=(*report.notes, *told))
        report = bundle.write_documents(staging.path, report, gates=gates, runtime=runtime)
        return report, staging.commit()


def _read(plan: Plan, folder: Path, progress: Progress) -> tuple[Checkpoint, SourceTokenizer, int]:
    """Read the model; whatever can be refused by its headers is refused before its weights are read."""
    with progress.stage("read the model"):
        source = load_checkpoint(folder)
        tokenizer = SourceTokenizer.load(folder)
        refuse_large_vocabulary(source, tokenizer)
        for exporter in plan.exporters:
            exporter.check(source)
        for step in plan.recipe:
            step.check(source)
        context = context_for(plan, source)
    with progress.stage("check every weight", total=len(source.weights)) as stage:
        check_values(source, stage.advance)
    return source, tokenizer, context


def _options(plan: Plan, context: int, tokenizer: SourceTokenizer, files: Path) -> ExportOptions:
    return ExportOptions(
        context=context,
        stop_ids=tokenizer.stop_ids,
        bos_id=tokenizer.bos_id,
        pad_id=tokenizer.pad_id,
        adds_bos=tokenizer.adds_bos,
        chat_template=tokenizer.chat_template,
        tokenizer=files,
        coreml=plan.profile.coreml,
    )


def _facts(source: Checkpoint, context: int, progress: Progress) -> ModelFacts:
    with progress.stage("hash the model"):
        return facts_of(source, context)


def _runner_tokenizers(plan: Plan, source: Checkpoint, folder: Path) -> dict[str, str]:
    """Return format -> the tokenizer file of the bundle that its runner is given; only decoders have a runner."""
    if source.task != GENERATION:
        return {}
    with bundle.machine_errors("write the tokenizer", folder):
        return {exporter.name: exporter.runner_tokenizer(folder) for exporter in plan.exporters}


def _write(
    exporter: Exporter, checkpoint: Checkpoint, options: ExportOptions, folder: Path, progress: Progress
) -> Artifact:
    path = folder / exporter.file(checkpoint.task)
    path.parent.mkdir(parents=True, exist_ok=True)
    doing = f"write {exporter.name}"
    with progress.stage(doing), bundle.machine_errors(doing, path):
        return exporter.write(checkpoint, options, path)
