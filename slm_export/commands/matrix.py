"""What ``matrix`` does, and how its outcome is shown."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from slm_export.commands.terminal import print_json, stdout, working
from slm_export.matrix.command import MatrixRequest, make
from slm_export.matrix.results import Summary
from slm_export.matrix.summary import HEADS, headline, row_of, skipped_words, write
from slm_export.reports.words import printable


def matrix_command(request: MatrixRequest, as_json: bool) -> None:
    """Export every cell, compare what was made, and exit with what the cells came to."""
    with working() as progress:
        summary = make(request, progress)
        document = write(summary)
    if as_json:
        print_json(document)
    else:
        print_summary(stdout(), summary)
    if summary.exit_code:
        sys.stdout.flush()
        sys.exit(summary.exit_code)


def print_summary(console: Console, summary: Summary) -> None:
    """Print the table of cells, why some failed, what was left out, and where to read on."""
    console.print(Text(headline(summary), "bold"))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for head in HEADS[:-1]:
        table.add_column(head, justify="right" if head in ("time", "memory") else "left", overflow="fold")
    for one in summary.results:
        table.add_row(
            *(Text(text) for text in row_of(one)[:-1]), style="red" if one.outcome == "failed" else ""
        )
    console.print(table)
    for one in summary.failed:
        console.print(Text(printable(f"FAIL {one.cell.name}: {one.reason}"), "red"))
        console.print(Text(printable(f"     {one.folder}"), "dim"))
    for line in skipped_words(summary):
        console.print(Text(printable(f"skipped {line}"), "yellow"))
    console.print(Text(printable(f"side by side: {summary.out / 'matrix.html'}"), "dim"))
