"""The command that takes personal data out of texts. No logic, as in cli.py, which adds it to its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slm_export import options


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write; made.")
@click.option(
    "--how",
    type=click.Choice(["replace", "hash", "drop"]),
    default="replace",
    show_default=True,
    help="By a number, by a keyed hash, or by nothing.",
)
@click.option("--key-env", metavar="NAME", help="Variable with the key of --how hash.")
@click.option(
    "--only", multiple=True, metavar="ENTITY", help="Look for this alone; repeatable. [default: all]"
)
@click.option(
    "--entities",
    type=click.Path(path_type=Path),
    help="FILE.toml with entities of your own (docs/privacy.md).",
)
@click.option("--ner", metavar="MODEL", help="spaCy pipeline that finds names: a package or a folder.")
@options.JSON
def anonymise(as_json: bool, **asked: Any) -> None:
    """Write FILES (.txt, .md, .jsonl, or folders of them) without personal data.

    By patterns and checksums: e-mail, telephone, bank accounts, cards, wallets, keys, addresses, identity numbers, and
    names where a word before says that one comes. Everything happens on this machine (docs/privacy.md).
    """
    from slm_export.commands.anonymise import anonymise_command

    anonymise_command(asked, as_json)


PRIVACY = (anonymise,)
