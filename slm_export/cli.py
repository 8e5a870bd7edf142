"""The commands. No logic: options in, a request out, an exit code."""

from __future__ import annotations

import difflib
import json
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import click

from slm_export import __version__, options
from slm_export.cli_adapter import ADAPTER
from slm_export.cli_federated import FEDERATED
from slm_export.cli_learning import LEARNING
from slm_export.cli_measuring import MEASURING
from slm_export.cli_privacy import PRIVACY
from slm_export.cli_serving import SERVING
from slm_export.errors import InputError, MachineError, SlmExportError, shown
from slm_export.interrupts import catch_signals, ignore_signals, still_an_interrupt

INTERRUPTED = 130


class _DefaultCommand(click.Group):
    """``slm-export MODEL --target android`` means ``slm-export export MODEL --target android``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {"--help", "-h", "--version"}
        if args and args[0] not in self.commands and args[0] not in own:
            self._refuse_misspelling(args)
            args = ["export", *args]
        return super().parse_args(ctx, args)

    def _refuse_misspelling(self, args: list[str]) -> None:
        near = difflib.get_close_matches(args[0], self.commands, n=1, cutoff=0.75)
        if near and not os.path.exists(args[0]):
            raise click.UsageError(f"unknown command '{args[0]}'; did you mean '{near[0]}'?")


@click.group(
    cls=_DefaultCommand,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="`slm-export MODEL --target android` is short for `slm-export export MODEL --target android`. "
    "Exit codes: 0 done, 1 a gate failed, 2 wrong input, 3 a component is missing, 4 the machine failed, "
    "130 interrupted.",
)
@click.version_option(__version__, prog_name="slm-export")
def cli() -> None:
    """Compile a trained small language model into verified mobile artifacts."""


@cli.command()
@click.argument("model", required=False)
@options.TARGET
@click.option("--device", help="A device profile by name (see `slm-export devices`), or your own FILE.toml.")
@options.FORMATS
@options.quantization
@options.budget
@click.option(
    "--pareto",
    is_flag=True,
    help="Print and plot size against quality of the best recipes, and export nothing.",
)
@options.CONTEXT
@options.REVISION
@options.EVAL_TEXT
@options.CALIBRATION
@options.ADAPTERS
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write. [default: MODEL-TARGET]")
@options.LOCKED
@click.option("--force", is_flag=True, help="Replace an existing bundle, once the new one is complete.")
@click.option("--no-verify", is_flag=True, help="Skip the comparison with the source model.")
@click.option("--no-bench", is_flag=True, help="Skip the measurement of speed.")
@options.JUNIT
@options.OFFLINE
@options.JSON
def export(as_json: bool, junit: Path | None, pareto: bool, **asked: Any) -> None:
    """Quantize MODEL for a device, write it, prove it, and leave a bundle that an app can ship.

    MODEL is a Hugging Face model folder, the name of a model on the hub, a .keras file or a SavedModel folder. Without
    it, slm-export.toml in the current folder names model, target, device, formats and gates.
    """
    from slm_export.reports.junit import recorded

    if pareto:
        from slm_export.commands.pareto import pareto_command

        pareto_command(options.request_of(asked), as_json)
        return
    with recorded(junit, "export") as cases:
        from slm_export.commands.bundles import export_command

        export_command(options.request_of(asked), as_json, cases)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="Text to continue, to answer, or to embed.")
@click.option("--format", "format", help="Which artifact of the bundle. [default: the first]")
@click.option("--adapter", metavar="NAME", help="Turn an adapter of the bundle on.")
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy."
)
@click.option("--top-p", type=click.FloatRange(min=0, max=1), default=1.0, show_default=True)
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--no-stream", is_flag=True, help="Print the text at once, when it is complete.")
@click.option("--no-chat-template", is_flag=True, help="Give the prompt to the model as it is.")
@options.JSON
def run(bundle: Path, **asked: Any) -> None:
    """Run a BUNDLE in its own runtime: stream text, or print an embedding or a label."""
    from slm_export.commands.bundles import run_command

    run_command(bundle, **asked)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--source", metavar="MODEL", help="The model it was made from: repeats the whole gate.")
@options.ADAPTERS
@options.EVAL_TEXT
@options.CALIBRATION
@options.JUNIT
@options.OFFLINE
@options.JSON
def verify(bundle: Path, junit: Path | None, **asked: Any) -> None:
    """Check a BUNDLE again: its files, its metadata, and with --source its fidelity."""
    from slm_export.reports.junit import recorded

    with recorded(junit, "verify") as cases:
        from slm_export.commands.bundles import verify_command

        verify_command(bundle, cases=cases, **asked)


@cli.command()
@click.argument("name", required=False)
@options.JSON
def devices(name: str | None, as_json: bool) -> None:
    """List the device profiles, or show the one called NAME (or in FILE.toml)."""
    from slm_export.commands.devices import devices_command

    devices_command(name, as_json)


for _command in (*MEASURING, *LEARNING, *SERVING, *PRIVACY, *ADAPTER, *FEDERATED):
    cli.add_command(_command)


def main() -> NoReturn:
    """Run the command line and exit with the code of the contract."""
    catch_signals()
    as_json = "--json" in sys.argv[1:]
    try:
        with still_an_interrupt():
            cli.main(standalone_mode=False)
            sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        _leave(InputError.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code, as_json)
    except SlmExportError as error:
        _fail(str(error), error.exit_code, as_json, getattr(error, "report", None))
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted; nothing was left behind", INTERRUPTED, as_json)
    except BrokenPipeError:
        # Whoever read our output has left, as `head` does.
        _leave(0)
    except (MemoryError, OSError) as error:
        _fail(f"the machine failed: {error or 'out of memory'}", MachineError.exit_code, as_json)
    except Exception:  # noqa: BLE001 - a bug of ours: not an exit code that means a verdict or a wrong input
        traceback.print_exc()
        _fail("slm-export itself is at fault; please report the lines above", MachineError.exit_code, as_json)
    _leave(0)


def _fail(message: str, code: int, as_json: bool, report: Any = None) -> NoReturn:
    message = shown(message)
    click.echo(f"error: {message}", err=True)
    if as_json:
        document: dict[str, Any] = {"error": {"message": message, "exit_code": code}}
        if report is not None:
            from slm_export.reports.report import to_json

            document["report"] = to_json(report)
        click.echo(json.dumps(document, ensure_ascii=False))
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Exit; a stdout that nobody reads any more must not turn that into a traceback."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    # The outcome is decided; a late Ctrl-C must not make another of it.
    ignore_signals()
    with suppress(OSError, ValueError):
        # Nothing of ours follows; native libraries log that they are taken down.
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.exit(code)
