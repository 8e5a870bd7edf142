"""What ``reason`` does, and how its outcome is shown."""

from __future__ import annotations

from typing import Any

from slm_export.commands.learning import exported, grid_of, show_outcome, stored
from slm_export.commands.terminal import working


def reason_command(asked: dict[str, Any], as_json: bool) -> None:
    """Tune on reasoning, show the scores, then export what was asked for."""
    exports = asked.pop("exports")
    with working() as progress:
        from slm_export.compilation import make_plan
        from slm_export.learning.reason import artifact_scores, reason

        request = _request(asked)
        made = exported(request.out, exports, request.force, stored(request.settings.grid))
        plans = [make_plan(each) for each in made]
        for plan in plans:
            plan.ready()
        outcome, out = reason(request, progress)
        show_outcome(
            outcome, out, plans, progress, as_json, lambda bundle: artifact_scores(bundle, request, progress)
        )


def _request(asked: dict[str, Any]) -> Any:
    from slm_export.budget.budget import parse_bytes
    from slm_export.learning.checker import Limits
    from slm_export.learning.reason import Request
    from slm_export.learning.reason_settings import Reasoning
    from slm_export.learning.settings import Training

    loop = ("steps", "batch", "together", "length", "rate", "schedule", "seed")
    settings = Reasoning(
        training=Training(**{name: asked.pop(name) for name in loop}),
        samples=asked.pop("samples"),
        shortest=asked.pop("shortest"),
        answer_tokens=asked.pop("answer_tokens"),
        low_rank=asked.pop("low_rank") or 0,
        grid=grid_of(asked.pop("for_bits"), asked.pop("group_size")),
    )
    limits = Limits(
        seconds=asked.pop("checker_seconds"),
        memory=parse_bytes(asked.pop("checker_memory"), "--checker-memory"),
    )
    return Request(settings=settings, checker_limits=limits, **asked)
