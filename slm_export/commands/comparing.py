"""What ``report`` and ``diff`` do, and how their outcome is shown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from slm_export.commands.terminal import print_json, stdout, working
from slm_export.errors import GateError, InputError
from slm_export.reports.codes import by_block, share_changed
from slm_export.reports.compared import read_bundles
from slm_export.reports.comparison import compare_bundles, to_json, to_markdown
from slm_export.reports.diff_limits import DiffLimits, parse_limits
from slm_export.reports.difference import Difference, difference, judge
from slm_export.reports.difference import to_json as difference_json
from slm_export.reports.figures import FIGURES
from slm_export.reports.junit import Cases
from slm_export.reports.words import figure, printable
from slm_export.results import Check
from slm_export.settings import load_settings

Checks = dict[str, tuple[Check, ...]]


def report_command(folders: Sequence[Path], html: Path | None, as_json: bool) -> None:
    """Compare bundles; Markdown on stdout, or JSON, and a page where one is asked for."""
    comparison = compare_bundles(read_bundles(folders))
    if html is not None:
        from slm_export.reports.page.comparison_page import comparison_page

        try:
            html.write_text(comparison_page(comparison), encoding="utf-8", newline="\n")
        except OSError as error:
            raise InputError(f"{html}: cannot be written: {error.strerror}; name another file") from None
    if as_json:
        print_json(to_json(comparison))
    else:
        print(to_markdown(comparison), end="")


def diff_command(
    old: Path, new: Path, limits: Sequence[str], no_codes: bool, as_json: bool, cases: Cases
) -> None:
    """Hold a new bundle against an old one; GateError where it is further than the limits allow."""
    settings = load_settings(Path.cwd())
    allowed = parse_limits(limits).over(settings.diff if settings else DiffLimits())
    with working() as progress:
        before, after = read_bundles((old, new))
        found = difference(before, after, progress, codes=not no_codes)
    cases.checks = judge(found, allowed)
    if no_codes:
        cases.skipped["bundle"] = {"codes": "codes were not compared (--no-codes)"}
    if as_json:
        print_json(difference_json(found, cases.checks))
    else:
        print_difference(stdout(), found, cases.checks)
    failed = [
        f"{name}: {check.name}" for name, group in cases.checks.items() for check in group if not check.passed
    ]
    if failed and as_json:
        sys.exit(GateError.exit_code)
    if failed:
        raise GateError(f"{new} is too far from {old}: {', '.join(failed)}")


def print_difference(console: Console, found: Difference, checks: Checks) -> None:
    """Print what is different, and the verdict."""
    console.print(_text(f"{found.old} -> {found.new}", "bold"))
    for note in found.notes:
        console.print(_text(f"  {note}", "yellow"))
    for format, figures in found.figures.items():
        _heading(console, format)
        table = _table()
        for one in FIGURES:
            if one.name in figures:
                before, after = figures[one.name]
                style = "red" if one.is_worse(before, after) else "green"
                change = _text(one.show_change(before, after), style)
                table.add_row(_text(f"  {one.label}"), one.show(before), one.show(after), change)
        console.print(table)
    _print_codes(console, found)
    _heading(console, "Recipe" if found.recipe[0] != found.recipe[1] else "Recipe: the same")
    if found.recipe[0] != found.recipe[1]:
        for sign, recipe in zip("-+", found.recipe, strict=True):
            console.print(_text(f"  {sign} {recipe}"))
    _heading(console, "Versions" if found.toolchain else "Versions: the same")
    for name, (before_version, after_version) in found.toolchain.items():
        console.print(_text(f"  {name} {before_version or 'none'} -> {after_version or 'none'}"))
    _print_checks(console, checks)


def _print_codes(console: Console, found: Difference) -> None:
    if found.codes is None:
        _heading(console, f"Codes: {found.codes_from}")
        return
    changed = [row for row in found.codes if row.kind != "same"]
    share = 100 * share_changed(found.codes)
    summary = f"the same in all {len(found.codes)} matrices"
    if changed:
        summary = f"{len(changed)} of {len(found.codes)} matrices differ, {share:.3g} % of all codes"
    _heading(console, f"Codes ({found.codes_from}): {summary}")
    table = _table()
    for block in by_block(found.codes) if changed else ():
        if block.changed_matrices:
            counts = f"{block.changed_matrices} of {block.matrices}"
            table.add_row(
                _text(f"  {block.block}"), counts, f"{100 * block.share:.3g} %", _text(block.what, "dim")
            )
    console.print(table) if changed else None


def _print_checks(console: Console, checks: Checks) -> None:
    rows = [(name, check) for name, group in checks.items() for check in group]
    if not rows:
        console.print()
        console.print(
            _text("No limit was set: nothing was judged (--limit, or [diff] in slm-export.toml)", "dim")
        )
        return
    _heading(console, "Limits")
    table = _table()
    for name, check in rows:
        value = "" if check.value is None else figure(check.value)
        verdict = _text("pass", "green") if check.passed else _text("FAIL", "bold red")
        table.add_row(
            Text("  ") + verdict, _text(f"{name}: {check.name}"), value, f"at most {figure(check.limit)}"
        )
    console.print(table)


def _heading(console: Console, title: str) -> None:
    console.print()
    console.print(_text(title, "bold"))


def _table() -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for column in range(4):
        table.add_column(justify="left" if column in (0, 3) else "right", overflow="fold")
    return table


def _text(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style)
