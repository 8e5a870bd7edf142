"""What ``delegate run``, ``list`` and ``check`` do, and how it is shown."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from slm_export.commands.terminal import print_json, stdout, working
from slm_export.delegates.config import Delegate, Delegates, load_delegates
from slm_export.delegates.state import State
from slm_export.errors import InputError, MissingComponentError, suggestion
from slm_export.reports.words import printable


def run_command(file: Path, once: bool) -> None:
    """Run the delegates of a file, until a signal or once."""
    found = load_delegates(file)
    with working() as progress:
        from contextlib import closing

        from slm_export.delegates.runner import Runner, failed_since

        with closing(State(Path(found.state))) as state:
            runner = Runner(found, state, progress.say)
            progress.say(f"{_many(found)}; Ctrl-C ends the run")
            if once:
                before = {name: state.counts(name).get("failed", 0) for name in found.delegates}
                runner.run_once()
                failed_since(state, found.delegates, before)
                return
            try:
                runner.run()
            except KeyboardInterrupt:
                # How it ends; what is not done is recorded.
                runner.stop()


def list_command(file: Path, as_json: bool) -> None:
    """Show the delegates of a file and what came of their triggers."""
    found = load_delegates(file)
    rows = [_row(name, one, found) for name, one in found.delegates.items()]
    if as_json:
        print_json({"delegates": rows})
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for head in ("delegate", "trigger", "where", "done", "waiting", "failed", "last"):
        table.add_column(head, overflow="fold")
    for row in rows:
        texts = [row["delegate"], row["trigger"], row["where"], row["done"], row["waiting"], row["failed"]]
        table.add_row(*(Text(printable(str(text))) for text in (*texts, row["last"] or "")))
    stdout().print(table)


def check_command(file: Path, as_json: bool) -> None:
    """Check a file and everything that it names, without running anything of it."""
    found = load_delegates(file)
    problems: list[str] = []
    with working() as progress, progress.stage("check bundles"):
        for name, one in found.delegates.items():
            problems += [f"delegates.{name}: {problem}" for problem in _problems(one)]
        if found.webhook is not None and not os.environ.get(found.webhook.token_env, "").strip():
            problems.append(f"webhook.token_env: no variable {found.webhook.token_env} is set")
    if problems:
        raise InputError("\n".join(f"{file}: {problem}" for problem in problems))
    if as_json:
        print_json({"delegates": list(found.delegates), "problems": []})
    else:
        click.echo(f"{file}: {_many(found)}, all well")


def _many(found: Delegates) -> str:
    return f"{len(found.delegates)} delegate{'s' * (len(found.delegates) != 1)}"


def _problems(delegate: Delegate) -> list[str]:
    import shutil

    from slm_export.bundles.bundle import read_manifest, verify_files
    from slm_export.delegates.nearest import Entries
    from slm_export.delegates.remote import key_of
    from slm_export.delegates.screening import Screen
    from slm_export.keras import bundle as keras_bundle
    from slm_export.tomlfile import read_model

    found: list[str] = []
    try:
        if delegate.bundle is not None:
            folder = Path(delegate.bundle)
            if keras_bundle.is_one(folder):
                raise InputError(f"{folder}: holds a model of TensorFlow, which delegates cannot run")
            manifest = read_manifest(folder)
            entry = (
                manifest.artifact(delegate.format) if delegate.format is not None else manifest.artifacts[0]
            )
            known = [each.name for each in manifest.adapters if each.format == entry.format]
            if delegate.adapter is not None and delegate.adapter not in known:
                hint = suggestion(delegate.adapter, known)
                found.append(f"adapter: {folder} has no '{delegate.adapter}' for {entry.format}{hint}")
            if delegate.nearest is not None:
                read_model(Path(delegate.nearest.file), Entries)
            found += [f"{folder}: {problem}" for problem in verify_files(folder)]
        if delegate.remote is not None:
            key_of(delegate.remote)
        if delegate.screened:
            Screen().ready()
    except (InputError, MissingComponentError) as error:
        found.append(str(error))
    trigger, command = delegate.trigger, delegate.output.command
    if (
        trigger.watch is not None
        and not Path(trigger.watch).exists()
        and not Path(trigger.watch).parent.is_dir()
    ):
        found.append(f"trigger.watch: {trigger.watch} is not there")
    if command is not None and shutil.which(command[0]) is None:
        found.append(f"output.command: {command[0]} is not there, or cannot be executed")
    return found


def _row(name: str, delegate: Delegate, found: Delegates) -> dict[str, Any]:
    from contextlib import closing

    row: dict[str, Any] = {
        "delegate": name,
        "trigger": str(delegate.trigger),
        "where": delegate.where + (", private" if delegate.private else ""),
        "done": 0,
        "waiting": 0,
        "failed": 0,
        "skipped": 0,
        "last": None,
    }
    if not Path(found.state).is_file():
        return row
    with closing(State(Path(found.state), reading=True)) as state:
        counts = state.counts(name)
        newest = state.last(name)
    waiting = counts.pop("waiting", 0) + counts.pop("answered", 0)
    if newest:
        last = newest[0]
        row["last"] = f"{last.time} {last.state}{f': {last.detail}' if last.detail else ''}"
    return {**row, **counts, "waiting": waiting}
