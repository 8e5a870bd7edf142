"""Device profiles on the terminal: a table of all, or one with every figure and its source."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from slm_export.profile import DeviceProfile, Figure

_UNKNOWN = Text("-", style="dim")


def print_profiles(console: Console, profiles: Iterable[DeviceProfile]) -> None:
    """Print one row per profile. A dash is a figure that is not publicly known."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("device", "target", "formats"):
        table.add_column(heading, no_wrap=True)
    table.add_column("memory", justify="right", no_wrap=True)
    table.add_column("bandwidth", justify="right", no_wrap=True)
    table.add_column("title", overflow="fold")
    for profile in profiles:
        memory = profile.memory
        table.add_row(
            Text(profile.name),
            profile.target,
            " ".join(profile.formats),
            _figure(memory.total_gb if memory else None, "GB"),
            _figure(memory.bandwidth_gb_s if memory else None, "GB/s"),
            Text(profile.title),
        )
    console.print(table)


def print_profile(console: Console, profile: DeviceProfile) -> None:
    """Print one profile: what it is, every figure with its source, gates and recipe."""
    console.print(Text(profile.title, style="bold"), Text(f"({profile.name})"))
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for key, value in _facts(profile):
        facts.add_row(key, Text(value))
    console.print(facts)
    console.print()
    _print_figures(console, profile)
    if gates := profile.gates.model_dump(exclude_none=True):
        console.print()
        console.print(Text("gates", style="bold"))
        for name, limit in gates.items():
            console.print(Text(f"  {name} = {limit}"))
    if profile.recipe:
        console.print()
        console.print(Text("recipe", style="bold"))
        for number, step in enumerate(profile.recipe, 1):
            options = ", ".join(f"{key} = {value}" for key, value in step.options.items())
            console.print(Text(f"  {number}. {step.pass_name}" + (f"  {options}" if options else "")))


def _facts(profile: DeviceProfile) -> Iterable[tuple[str, str]]:
    yield "target", profile.target
    yield "formats", ", ".join(profile.formats) + f" (default: {profile.default_format})"
    if profile.soc is not None:
        yield "chip", profile.soc
    if profile.context is not None:
        yield "context", f"{profile.context} tokens"
    if "coreml" in profile.formats:
        lengths = profile.coreml.query_lengths
        asked = "any number of tokens" if lengths == "dynamic" else f"{', '.join(map(str, lengths))} tokens"
        yield "Core ML", f"iOS {profile.coreml.ios} or later, {asked} in one call"


def _print_figures(console: Console, profile: DeviceProfile) -> None:
    figures = list(profile.figures())
    if not figures:
        console.print(Text("This profile states no figures.", style="dim"))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("figure", no_wrap=True)
    table.add_column("value", overflow="fold", ratio=2)
    table.add_column("source", overflow="fold", ratio=3)
    for key, value, source in figures:
        table.add_row(Text(key), Text(value), Text(source))
    console.print(table)


def _figure(figure: Figure | None, unit: str) -> Text:
    return _UNKNOWN if figure is None else Text(f"{figure.value:g} {unit}")
