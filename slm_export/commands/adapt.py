"""What ``adapt`` does, and how its outcome is shown."""

from __future__ import annotations

from typing import Any

from slm_export.commands.learning import exported, grid_of, show_outcome, stored
from slm_export.commands.terminal import working


def adapt_command(asked: dict[str, Any], as_json: bool) -> None:
    """Teach, show the figures, then export what was asked for."""
    exports = asked.pop("exports")
    with working() as progress:
        from slm_export.compilation import make_plan
        from slm_export.learning.adapt import adapt

        request = _request(asked)
        made = exported(request.out, exports, request.force, stored(request.settings.grid))
        plans = [make_plan(each) for each in made]
        for plan in plans:
            plan.ready()
        outcome, out = adapt(request, progress)
        show_outcome(outcome, out, plans, progress, as_json)


def _request(asked: dict[str, Any]) -> Any:
    from slm_export.learning.adapt import Request
    from slm_export.learning.adapt_settings import AdaptSettings
    from slm_export.learning.settings import Training

    loop = ("steps", "batch", "together", "length", "rate", "schedule", "seed")
    settings = AdaptSettings(
        training=Training(**{name: asked.pop(name) for name in loop}),
        task=asked.pop("task"),
        low_rank=asked.pop("low_rank") or 0,
        grid=grid_of(asked.pop("for_bits"), asked.pop("group_size")),
        masked=asked.pop("masked"),
    )
    return Request(settings=settings, **asked)
