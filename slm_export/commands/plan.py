"""``slm-export plan``: what an export would take and give, told in seconds. Imports no torch: that alone takes them."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from slm_export.errors import GateError, InputError
from slm_export.planning.forecast import PROMPT, Forecast, forecast
from slm_export.planning.model import ModelShape, read_model
from slm_export.planning.storage import QUANTIZING
from slm_export.profile import DeviceProfile, RecipeStep, default_profile, load_profile, shipped_profiles
from slm_export.quantization_options import QuantizationOptions, merged
from slm_export.settings import FILE_NAME, Settings, load_settings
from slm_export.source.hub import find_shapes

ALL = "all"


@dataclass(frozen=True)
class PlanRequest:
    """What the command line asks for; None where it says nothing."""

    model: str | None = None
    revision: str | None = None
    target: str | None = None
    device: str | None = None
    formats: tuple[str, ...] = ()
    quantization: QuantizationOptions = field(default_factory=QuantizationOptions)
    context: int | None = None
    passes: tuple[RecipeStep, ...] | None = None

    def over(self, settings: Settings) -> PlanRequest:
        """Return this request with what it leaves open taken from slm-export.toml."""
        own = {name: getattr(settings, name) for name in vars(self.quantization)}
        device = self.device or (settings.device if self.target in (None, settings.target) else None)
        return PlanRequest(
            self.model or settings.model,
            self.revision or (None if self.model else settings.revision),
            self.target or (None if self.device else settings.target),
            device,
            self.formats or settings.formats or (),
            self.quantization.over(QuantizationOptions(**own)),
            self.context or settings.context,
            self.passes or settings.passes,
        )


def plan_command(request: PlanRequest, as_json: bool) -> None:
    """Print the forecast of each device and format; GateError where a device cannot hold it."""
    settings = load_settings(Path.cwd())
    request = request if settings is None else request.over(settings)
    if not request.model:
        raise InputError(f"no model: give a model folder, or name one in {FILE_NAME} in the current folder")
    pairs = _pairs(request)
    model = read_model(find_shapes(request.model, request.revision))
    if request.context and model.positions and request.context > model.positions:
        raise InputError(
            f"context {request.context} is longer than the {model.positions} positions of {model.name}; "
            f"ask for {model.positions} or fewer"
        )
    found = [_forecast(model, profile, format, request) for profile, format in pairs]
    if as_json:
        print(json.dumps(to_json(model, found), ensure_ascii=False, indent=2))
    elif request.device == ALL:
        _print_table(_console(), model, found)
    else:
        for one in found:
            _print_one(_console(), model, one)
    unfit = [_unfit(one) for one in found if one.fits is False]
    if unfit and not as_json:
        raise GateError("\n".join(unfit))
    if unfit:
        sys.stdout.flush()
        sys.exit(GateError.exit_code)


def to_json(model: ModelShape, found: Sequence[Forecast]) -> dict[str, Any]:
    """Return everything that is predicted; what is not known is null, with its reason under ``unknown``."""
    return {
        "model": {
            "name": model.name,
            "architecture": model.architecture,
            "parameters": model.parameters,
            "source_bytes": model.source_bytes,
        },
        "predicted": [
            {
                **dataclasses.asdict(one),
                "artifact_bytes": one.sizes.total,
                "peak_memory_bytes": one.memory.total,
            }
            for one in found
        ],
    }


def _pairs(request: PlanRequest) -> list[tuple[DeviceProfile, str]]:
    """Return every device with every format that is asked of it.

    Raises:
        InputError: something is unknown, missing or contradictory.
    """
    if request.device == ALL:
        profiles: Sequence[DeviceProfile] = [
            profile for profile in shipped_profiles() if request.target in (None, profile.target)
        ]
    elif request.device:
        profiles = [load_profile(request.device)]
    elif request.target:
        profiles = [default_profile(request.target)]
    else:
        raise InputError(
            "no target: give --target android (or ios, linux, host), or a --device, or --device all"
        )
    if not profiles:
        default_profile(str(request.target))  # says what is wrong with the target
    pairs: list[tuple[DeviceProfile, str]] = []
    for profile in profiles:
        if request.target not in (None, profile.target):
            raise InputError(
                f"device {profile.name} belongs to target {profile.target}, not {request.target}; "
                "leave out --target, or choose another --device (`slm-export devices` lists them)"
            )
        for format in dict.fromkeys(request.formats or (profile.default_format,)):
            if format in profile.formats:
                pairs.append((profile, format))
            elif request.device != ALL:
                known = ", ".join(profile.formats)
                raise InputError(f"device {profile.name} does not run format {format}; it runs {known}")
    if not pairs:
        raise InputError(
            f"no device runs format {' or '.join(request.formats)}; `slm-export devices` lists them"
        )
    return pairs


def _forecast(model: ModelShape, profile: DeviceProfile, format: str, request: PlanRequest) -> Forecast:
    if request.quantization.palettize and format != "coreml":
        raise InputError(
            f"palettize: format {format} has no tables of values, only coreml does; leave it out, or choose coreml"
        )
    steps = request.passes or profile.recipe
    return forecast(model, profile, format, merged(steps, request.quantization, QUANTIZING), request.context)


def _unfit(one: Forecast) -> str:
    mend = (
        f"the nearest that would fit: {one.nearest}" if one.nearest else "no recipe of this model would fit"
    )
    return (
        f"{one.device}: {_mb(one.memory.total)} of memory predicted for {one.format} with a context of {one.context}, "
        f"of {_mb(one.limit)} that there are; {mend}"
    )


def _console() -> Console:
    return Console(soft_wrap=False, highlight=False)


def _print_table(console: Console, model: ModelShape, found: Sequence[Forecast]) -> None:
    console.print(Text(f"{model.name}: predicted, nothing was measured on these devices", "bold"))
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for head in ("device", "format"):
        table.add_column(head, no_wrap=True)
    for head in ("file MB", "memory", "fits", "context", "decode", "prefill", "first ms"):
        table.add_column(head, justify="right", no_wrap=True)
    for one in found:
        table.add_row(
            one.device,
            one.format,
            f"{one.sizes.total / 1e6:,.0f}",
            f"{one.memory.total / 1e6:,.0f}",
            _FITS[one.fits],
            _count(one.longest_context),
            _rate(one.speed.decode_tokens_per_s).split()[0],
            _rate(one.speed.prefill_tokens_per_s).split()[0],
            _milliseconds(one.speed.time_to_first_token_ms).split()[0],
        )
    console.print(table)
    told = (
        "memory: MB at the peak. context: the longest that fits. decode, prefill: tokens/s. -: not known; ask for "
        "one device to see why."
    )
    console.print(Text(told, "dim"))
    for note in dict.fromkeys(note for one in found for note in one.notes):
        console.print(Text(note, "yellow"))


_FITS = {True: "yes", False: "NO", None: "-"}


def _print_one(console: Console, model: ModelShape, one: Forecast) -> None:
    console.print(Text(f"{model.name} as {one.format} on {one.device}: predicted, not measured", "bold"))
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for row in _rows(model, one):
        table.add_row(*row)
    console.print(table)
    for note in one.notes:
        console.print(Text(note, "yellow"))


def _rows(model: ModelShape, one: Forecast) -> list[tuple[str, str, str]]:
    """Return every figure, with what it is of, or why it is not known."""
    return [*_file_rows(model, one), *_memory_rows(model, one), *_time_rows(model, one), *_cache_rows(one)]


def _file_rows(model: ModelShape, one: Forecast) -> list[tuple[str, str, str]]:
    sizes = one.sizes
    return [
        ("file", _mb(sizes.total), ""),
        ("  body", _mb(sizes.body), "linear layers, norms, program"),
        ("  embedding", _mb(sizes.embedding), "and the head: they are one matrix" if model.tied else ""),
        ("  head", _mb(sizes.head), ""),
        ("  tokenizer", _mb(sizes.tokenizer), "" if sizes.tokenizer else "in files of its own"),
    ]


def _memory_rows(model: ModelShape, one: Forecast) -> list[tuple[str, str, str]]:
    memory = one.memory
    rows = [
        (
            "peak memory",
            _mb(memory.total),
            f"with a context of {one.context} tokens" if model.decodes else "",
        ),
        ("  weights", _mb(memory.weights), "as the runtime holds them"),
        ("  KV cache", _mb(memory.kv_cache), ""),
        ("  activations", _mb(memory.activations), ""),
        ("  runtime", _mb(memory.runtime), ""),
        ("limit", _mb(one.limit), "of one app" if one.limit_of == "app" else "all memory of the device"),
        ("fits", _FITS[one.fits], one.unknown.get("fits", "")),
    ]
    if model.decodes:
        rows.append(("longest context", _count(one.longest_context), "tokens that the limit has room for"))
    return rows


def _time_rows(model: ModelShape, one: Forecast) -> list[tuple[str, str, str]]:
    speed, why, made = one.speed, one.unknown, one.conversion
    first = _milliseconds(speed.time_to_first_token_ms)
    rows = [("load", _milliseconds(speed.load_ms), why.get("load", ""))]
    if model.decodes:
        rows += [
            ("decode", _rate(speed.decode_tokens_per_s), why.get("decode", f"behind {PROMPT} tokens")),
            ("prefill", _rate(speed.prefill_tokens_per_s), why.get("prefill", f"of {PROMPT} tokens")),
            ("first token", first, ""),
        ]
    else:
        rows.append(("call", first, why.get("prefill", f"of {PROMPT} tokens")))
    took = f"{made.seconds:.0f} s" if made else "-"
    return [
        *rows,
        ("conversion", took, why.get("conversion", "on two cores, unverified")),
        ("  its memory", _mb(made.peak_bytes if made else None), ""),
    ]


def _cache_rows(one: Forecast) -> list[tuple[str, str, str]]:
    return [
        (f"KV cache of {length}", "", ", ".join(f"{name} {_mb(size)}" for name, size in sizes.items()))
        for length, sizes in one.kv_cache.items()
    ]


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f} ms"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g} tok/s"


def _mb(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.1f} MB"


def _count(tokens: int | None) -> str:
    return "-" if tokens is None else f"{tokens:,}"
