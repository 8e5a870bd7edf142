"""What ``distil`` does, and how its outcome is shown."""

from __future__ import annotations

from typing import Any

from slm_export.commands.learning import exported, grid_of, show_outcome, stored
from slm_export.commands.terminal import working
from slm_export.errors import InputError


def distil_command(asked: dict[str, Any], as_json: bool) -> None:
    """Teach, show the table, then export what was asked for."""
    exports = asked.pop("exports")
    with working() as progress:
        from slm_export.compilation import make_plan
        from slm_export.learning.distil import distil
        from slm_export.learning.processes import rank
        from slm_export.progress import Progress

        request = _request(asked)
        made = exported(request.out, exports, request.force, stored(request.settings.grid))
        plans = [make_plan(each) for each in made]
        for plan in plans:
            plan.ready()
        taught = distil(request, progress if rank() == 0 else Progress(silent=True))
        if taught is None:
            return
        outcome, out = taught
        show_outcome(outcome, out, plans, progress, as_json)


def _request(asked: dict[str, Any]) -> Any:
    from slm_export.budget.budget import parse_bytes
    from slm_export.learning.distil import Request
    from slm_export.learning.distil_settings import DecoderLosses, DistilSettings, EncoderLosses
    from slm_export.learning.settings import Training
    from slm_export.learning.shapes import parse_shape

    ways = [name for name in ("student", "shrink", "max_size") if asked[name] is not None]
    if len(ways) != 1:
        given = " and ".join(f"--{name.replace('_', '-')}" for name in ways) or "none of them"
        raise InputError(
            f"a student is one of --student FOLDER, --shrink SHARES and --max-size SIZE; given: {given}"
        )
    loop = ("steps", "batch", "together", "length", "rate", "schedule", "seed")
    settings = DistilSettings(
        training=Training(**{name: asked[name] for name in loop}),
        shape=None if asked["shrink"] is None else parse_shape(asked["shrink"]),
        decoder=DecoderLosses(
            temperature=asked["temperature"],
            hard=asked["hard"],
            divergence=asked["divergence"],
            top_k=asked["top_k"] or 0,
            on_policy=asked["on_policy"],
        ),
        encoder=EncoderLosses(
            **{name: asked[name] for name in ("embedding", "contrastive", "hidden", "attention")}
        ),
        grid=grid_of(asked["for_bits"], asked["group_size"]),
    )
    return Request(
        teacher=asked["teacher"],
        data=asked["data"],
        out=asked["out"],
        student=asked["student"],
        max_size=None if asked["max_size"] is None else parse_bytes(asked["max_size"], "--max-size"),
        held_out=asked["held_out"],
        data_licence=asked["data_licence"],
        settings=settings,
        force=asked["force"],
    )
