"""What ``export``, ``verify``, ``run`` and ``bench`` do, and how their outcome is shown."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from slm_export.bundles.scratch import scratch
from slm_export.commands.terminal import print_json, stdout, working
from slm_export.compilation import Request, make_plan
from slm_export.errors import GateError, InputError
from slm_export.native_log import kept_from_terminal
from slm_export.reports.junit import Cases
from slm_export.reports.words import figure, limit, printable
from slm_export.source.tasks import GENERATION

if TYPE_CHECKING:
    from slm_export.bench.command import BenchRequest


def export_command(request: Request, as_json: bool, cases: Cases) -> None:
    """Export, then print the report."""
    from slm_export.reports.report import print_report, to_json

    with working() as progress:
        from slm_export import driver
        from slm_export.budget import search
        from slm_export.keras import export as keras_export
        from slm_export.keras import source as keras_source

        tensorflow = keras_source.is_tensorflow_model(request.model)
        if tensorflow and request.budget:
            raise InputError(f"{request.model}: a budget is searched for in models of transformers alone")
        if tensorflow and request.adapters:
            raise InputError(f"{request.model}: adapters belong to models of transformers alone")
        plain = keras_export.export if tensorflow else driver.export
        export = search.export if request.budget else plain
        report, out = export(make_plan(request), progress)
    cases.of_report(report)
    shown = _as_typed(out)
    if as_json:
        print_json({**to_json(report), "out": str(out)})
    else:
        print_report(stdout(), report, shown)


def verify_command(
    folder: Path,
    source: str | None,
    eval_text: Path | None,
    calibration: Path | None,
    adapters: tuple[str, ...],
    as_json: bool,
    cases: Cases,
) -> None:
    """Verify a bundle, then print every check; GateError where one failed."""
    with working() as progress:
        from slm_export import opened
        from slm_export.keras import bundle as keras_bundle
        from slm_export.source.adapters import parse_adapters

        if keras_bundle.is_one(folder):
            if calibration is not None:
                raise InputError(f"{calibration}: nothing is calibrated in a bundle of a TensorFlow model")
            if adapters:
                raise InputError(f"--adapter {adapters[0]}: a bundle of a TensorFlow model has no adapters")
            found = keras_bundle.verify(folder, source, eval_text, progress)
        else:
            found = opened.verify(folder, source, eval_text, calibration, progress, parse_adapters(adapters))
    cases.checks = found.checks
    if as_json:
        print_json(opened.to_json(found))
    else:
        console = stdout()
        for name, group in found.checks.items():
            for check in group:
                verdict = Text("pass", "green") if check.passed else Text("FAIL", "bold red")
                value = "" if check.value is None else f" {figure(check.value)} {limit(check)}".rstrip()
                console.print(verdict, Text(printable(f"{name}: {check.name}{value}")))
                if not check.passed or not value:
                    console.print(Text(printable(f"     {check.detail}"), "dim"))
        for note in found.notes:
            console.print(Text(f"note {printable(note)}", "yellow"))
    failed = [check.name for group in found.checks.values() for check in group if not check.passed]
    if failed and not as_json:
        raise GateError(f"{folder}: {', '.join(failed)} failed")
    if failed:
        sys.exit(GateError.exit_code)


def run_command(
    folder: Path,
    prompt: str,
    format: str | None,
    adapter: str | None,
    temperature: float,
    top_p: float,
    max_tokens: int,
    seed: int,
    no_stream: bool,
    no_chat_template: bool,
    as_json: bool,
) -> None:
    """Run a bundle on a prompt."""
    with kept_from_terminal(), scratch():
        from slm_export.generation import Sampling
        from slm_export.keras import bundle as keras_bundle
        from slm_export.opened import open_bundle

        if keras_bundle.is_one(folder):
            if adapter is not None:
                raise InputError(f"--adapter {adapter}: a bundle of a TensorFlow model has no adapters")
            _print_answer(keras_bundle.run(folder, prompt, format), as_json)
            return
        with closing(open_bundle(folder, format)) as opened:
            opened.adapt(adapter)
            if opened.manifest.model.task != GENERATION:
                _print_answer(opened.answer(prompt), as_json)
                return
            sampling = Sampling(temperature, top_p, seed)
            _print_text(
                prompt,
                opened.text(prompt, max_tokens, sampling, chat=not no_chat_template),
                as_json,
                no_stream,
            )


def _print_text(prompt: str, pieces: Iterator[str], as_json: bool, no_stream: bool) -> None:
    if as_json:
        print_json({"prompt": prompt, "text": "".join(pieces)})
    elif no_stream:
        print("".join(pieces))
    else:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        print()


def _print_answer(answered: dict[str, Any], as_json: bool) -> None:
    from slm_export.answers import lines

    if as_json:
        print_json(answered)
    else:
        print("\n".join(lines(answered)))


def bench_command(request: BenchRequest, as_json: bool) -> None:
    """Measure an artifact, then print the table; of several devices, exit with what those that failed came to."""
    if request.of_a_fleet:
        _bench_fleet_command(request, as_json)
        return
    with working() as progress:
        from slm_export.bench.command import bench
        from slm_export.bench.show import print_measurements, to_json

        found = bench(request, progress)
    if as_json:
        print_json(to_json(found))
    else:
        print_measurements(stdout(), found)


def _bench_fleet_command(request: BenchRequest, as_json: bool) -> None:
    with working() as progress:
        from slm_export.bench.command import bench_fleet
        from slm_export.bench.show_fleet import print_fleet, to_json

        found = bench_fleet(request, progress)
    if as_json:
        print_json(to_json(found))
    else:
        print_fleet(stdout(), found)
    if codes := [one.exit_code for one in found if one.error is not None]:
        sys.stdout.flush()
        # As of a matrix: the failure that another try mends least.
        sys.exit(min(codes))


def _as_typed(out: Path) -> Path:
    """Return the bundle's folder as a person here would type it."""
    try:
        return out.relative_to(Path.cwd())
    except ValueError:
        return out
