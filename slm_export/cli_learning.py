"""The commands that teach a model. No logic, as in cli.py, which adds them to its own."""

from __future__ import annotations

from typing import Any

import click

from slm_export import options, options_adapt, options_learning, options_reason


@click.command()
@click.argument("teacher")
@options_learning.distil
@options_learning.training
@options_learning.result
@options.OFFLINE
@options.JSON
def distil(as_json: bool, **asked: Any) -> None:
    """Teach a smaller model what TEACHER knows: a folder or the name of a model on the hub.

    The student is a folder (--student), the teacher with fewer parts (--shrink), or what fits into a size
    (--max-size). It is measured beside its teacher on text that it did not learn from (docs/distillation.md).
    """
    from slm_export.commands.distil import distil_command

    distil_command(asked, as_json)


@click.command()
@click.argument("teacher")
@click.argument("model")
@options_reason.reason
@options_learning.grid
@options_learning.loop
@options_learning.result
@options.OFFLINE
@options.JSON
def reason(as_json: bool, **asked: Any) -> None:
    """Tune MODEL on step-by-step solutions that TEACHER writes: a folder, a hub name, or an OpenAI-compatible URL.

    Solutions are checked against known answers, or by a command; wrong, duplicate and leaked ones are rejected. MODEL
    is scored on held-out problems before and after (docs/distillation.md). The key of a URL is read from the
    environment variable SLM_EXPORT_TEACHER_KEY alone.
    """
    from slm_export.commands.reason import reason_command

    reason_command(asked, as_json)


@click.command()
@click.argument("model")
@options_adapt.adapt
@options_learning.grid
@options_learning.loop
@options_learning.result
@options.OFFLINE
@options.JSON
def adapt(as_json: bool, **asked: Any) -> None:
    """Teach MODEL a domain from plain text (--data), or a task from labelled examples (--task with --labels).

    Plain text teaches by itself: a decoder the next token, an encoder hidden ones. MODEL is measured before and after
    on what it did not learn from (docs/distillation.md).
    """
    from slm_export.commands.adapt import adapt_command

    adapt_command(asked, as_json)


LEARNING = (distil, adapt, reason)
