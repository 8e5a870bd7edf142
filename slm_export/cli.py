"""The commands. No logic: options in, a request out, an exit code."""

from __future__ import annotations

import difflib
import json
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from slm_export import __version__
from slm_export.errors import InputError, MachineError, SlmExportError
from slm_export.interrupts import catch_signals, ignore_signals, still_an_interrupt

if TYPE_CHECKING:
    from slm_export.compilation import Request

INTERRUPTED = 130
_BITS = click.Choice(["4", "8", "16", "32"])
_EMBEDDING_BITS = click.Choice(["4", "6", "8", "16", "32"])
_JSON = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document on stdout and nothing else."
)

_CALIBRATION = click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Text or JSONL of chats that calibrated passes measure activations on. [default: written by the model]",
)


def _token_counts(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Return the counts of ``128,512``."""
    if value is None:
        return None
    parts = value.split(",")
    if not all(part.isdecimal() and part.isascii() for part in parts):
        raise click.BadParameter(f"'{value}' is no list of token counts; write them as 128,512", ctx, param)
    return tuple(dict.fromkeys(map(int, parts)))


_JUNIT = click.option(
    "--junit",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write the checks for a CI server, a case for each.",
)


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
@click.option("--target", help="Where it will run: android, linux or host.")
@click.option("--device", help="A device profile by name (see `slm-export devices`), or your own FILE.toml.")
@click.option(
    "--format", "formats", multiple=True, help="Format to write; may be repeated. [default: the device's]"
)
@click.option("--bits", type=_BITS, help="Bits of the linear layers' weights. [default: the device's recipe]")
@click.option(
    "--group-size", type=click.Choice(["32", "64", "128", "256"]), help="Weights per scale, at 4 bits."
)
@click.option(
    "--palettize",
    type=click.Choice(["4", "6"]),
    help="Core ML: bits of indices into tables, for the Neural Engine, in place of --bits.",
)
@click.option(
    "--embedding-bits",
    type=_EMBEDDING_BITS,
    help="Bits of the embedding, and of a head that is tied to it. 6: with --palettize alone.",
)
@click.option(
    "--head-bits", type=_EMBEDDING_BITS, help="Bits of an output head of its own. [default: as the embedding]"
)
@click.option(
    "--max-size", metavar="SIZE", help="Find the best recipe whose files are no larger: 600MB, 0.6GB."
)
@click.option(
    "--max-memory", metavar="SIZE", help="The same, of the memory that the model takes when it runs."
)
@click.option(
    "--min-tokens-per-s",
    type=click.FloatRange(min=0, min_open=True),
    help="The same, of the speed of decoding.",
)
@click.option(
    "--max-perplexity-ratio",
    type=click.FloatRange(min=1, min_open=True),
    help="Find the smallest recipe that is this good, or with the limits above one that keeps to all: 1.01.",
)
@click.option(
    "--min-cosine",
    type=click.FloatRange(min=0, max=1, min_open=True, max_open=True),
    help="The same for encoders of embeddings: mean cosine to the source's, such as 0.99.",
)
@click.option(
    "--pareto",
    is_flag=True,
    help="Print and plot size against quality of the best recipes, and export nothing.",
)
@click.option("--context", type=click.IntRange(min=1), help="Tokens that the KV cache holds.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option(
    "--eval-text", type=click.Path(path_type=Path), help="Held-out text to judge by. [default: a sample]"
)
@_CALIBRATION
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write. [default: MODEL-TARGET]")
@click.option("--force", is_flag=True, help="Replace an existing bundle, once the new one is complete.")
@click.option("--no-verify", is_flag=True, help="Skip the comparison with the source model.")
@click.option("--no-bench", is_flag=True, help="Skip the measurement of speed.")
@_JUNIT
@_JSON
def export(as_json: bool, junit: Path | None, pareto: bool, **options: Any) -> None:
    """Quantize MODEL for a device, write it, prove it, and leave a bundle that an app can ship.

    MODEL is a Hugging Face model folder, the name of a model on the hub, a .keras file or a SavedModel folder. Without
    it, slm-export.toml in the current folder names model, target, device, formats and gates.
    """
    from slm_export.reports.junit import recorded

    if pareto:
        from slm_export.commands.pareto import pareto_command

        pareto_command(_request(options), as_json)
        return
    with recorded(junit, "export") as cases:
        from slm_export.commands.bundles import export_command

        export_command(_request(options), as_json, cases)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="Text to continue, to answer, or to embed.")
@click.option("--format", "format", help="Which artifact of the bundle. [default: the first]")
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy."
)
@click.option("--top-p", type=click.FloatRange(min=0, max=1), default=1.0, show_default=True)
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--no-stream", is_flag=True, help="Print the text at once, when it is complete.")
@click.option("--no-chat-template", is_flag=True, help="Give the prompt to the model as it is.")
@_JSON
def run(bundle: Path, **options: Any) -> None:
    """Run a BUNDLE in its own runtime: stream text, or print an embedding or a label."""
    from slm_export.commands.bundles import run_command

    run_command(bundle, **options)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--source", metavar="MODEL", help="The model it was made from: repeats the whole gate.")
@click.option(
    "--eval-text", type=click.Path(path_type=Path), help="Held-out text to judge by. [default: a sample]"
)
@_CALIBRATION
@_JUNIT
@_JSON
def verify(bundle: Path, junit: Path | None, **options: Any) -> None:
    """Check a BUNDLE again: its files, its metadata, and with --source its fidelity."""
    from slm_export.reports.junit import recorded

    with recorded(junit, "verify") as cases:
        from slm_export.commands.bundles import verify_command

        verify_command(bundle, cases=cases, **options)


@cli.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--html", metavar="FILE", type=click.Path(path_type=Path), help="Write a page, too.")
@_JSON
def report(bundles: tuple[Path, ...], html: Path | None, as_json: bool) -> None:
    """Compare BUNDLES side by side, as Markdown for a pull request; the first is what the others are held against."""
    from slm_export.commands.comparing import report_command

    report_command(bundles, html, as_json)


@cli.command()
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option(
    "--limit",
    "limits",
    multiple=True,
    metavar="NAME=VALUE",
    help="How far NEW may be from OLD, such as max_bytes_increase=0.02; may be repeated. [default: slm-export.toml]",
)
@click.option(
    "--no-codes", is_flag=True, help="Leave out the comparison of codes: manifests are enough then."
)
@_JUNIT
@_JSON
def diff(**options: Any) -> None:
    """Tell how the bundle NEW differs from OLD: size, codes by layer, fidelity, speed, versions."""
    from slm_export.commands.comparing import diff_command
    from slm_export.reports.junit import recorded

    with recorded(options.pop("junit"), "diff") as cases:
        diff_command(cases=cases, **options)


@cli.command()
@click.argument("artifact", metavar="BUNDLE|FILE", type=click.Path(path_type=Path))
@click.option(
    "--on",
    type=click.Choice(["host", "adb", "ssh", "devicectl"]),
    default="host",
    show_default=True,
    help="This machine, an Android device, a board, or an Apple device.",
)
@click.option("--device", metavar="SERIAL|HOST", help="Which one, where there are several.")
@click.option("--format", "format", help="Which artifact of the bundle. [default: the first]")
@click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="[default: as many as cores; on a device: 4]")
@click.option(
    "--prefill",
    metavar="N,N,...",
    callback=_token_counts,
    help="Lengths of prompts. [default: 128,512, as far as they fit]",
)
@click.option(
    "--depth",
    metavar="N,N,...",
    callback=_token_counts,
    help="Tokens in the context before decoding. [default: 0,128,512]",
)
@click.option(
    "--sustained",
    type=click.FloatRange(min=0),
    default=0,
    metavar="SECONDS",
    help="Generate for so long, too.",
)
@click.option(
    "--compare",
    multiple=True,
    metavar="OTHER",
    type=click.Path(path_type=Path),
    help="Beside it, taking turns: another bundle, .pte, .litertlm, .tflite, .onnx or .gguf; may be repeated.",
)
@click.option("--runner", metavar="PATH", help="The vendor's program for the device (docs/bench.md).")
@_JSON
def bench(as_json: bool, **options: Any) -> None:
    """Measure how fast an artifact loads, reads and writes, with medians and their spread."""
    from slm_export.bench.command import BenchRequest
    from slm_export.commands.bundles import bench_command

    bench_command(BenchRequest(sustained_s=options.pop("sustained"), **options), as_json)


@cli.command()
@click.argument("name", required=False)
@_JSON
def devices(name: str | None, as_json: bool) -> None:
    """List the device profiles, or show the one called NAME (or in FILE.toml)."""
    from slm_export.commands.bundles import devices_command

    devices_command(name, as_json)


def _request(options: dict[str, Any]) -> Request:
    """Return the request of a command line, what it leaves open filled from slm-export.toml."""
    from slm_export.budget.budget import Budget, parse_bytes
    from slm_export.compilation import Request
    from slm_export.recipe import QuantizationOptions
    from slm_export.settings import load_settings

    def number(name: str) -> int | None:
        return None if options[name] is None else int(options[name])

    def size(name: str) -> int | None:
        return None if options[name] is None else parse_bytes(options[name], f"--{name.replace('_', '-')}")

    request = Request(
        model=options["model"],
        revision=options["revision"],
        target=options["target"],
        device=options["device"],
        formats=options["formats"] or None,
        quantization=QuantizationOptions(
            number("bits"),
            number("group_size"),
            number("embedding_bits"),
            number("head_bits"),
            number("palettize"),
        ),
        context=options["context"],
        out=options["out"],
        eval_text=options["eval_text"],
        calibration=options["calibration"],
        budget=Budget(
            size("max_size"),
            size("max_memory"),
            options["min_tokens_per_s"],
            options["max_perplexity_ratio"],
            options["min_cosine"],
        ),
        force=options["force"],
        verify=not options["no_verify"],
        bench=not options["no_bench"],
    )
    settings = load_settings(Path.cwd())
    return request if settings is None else request.over(settings)


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
