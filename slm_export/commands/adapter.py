"""What ``adapter trainer`` does and prints."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from slm_export.bundles.scratch import scratch
from slm_export.commands.terminal import working
from slm_export.learning.on_device.build import FACTS, PROGRAM, Request, build_trainer


def trainer_command(asked: dict[str, Any], as_json: bool) -> None:
    """Build the folder, and say how far the runtime is from torch."""
    request = Request(**asked | {"bits": int(asked["bits"]), "targets": tuple(asked["targets"])})
    with scratch(), working() as progress:
        out, proof = build_trainer(request, progress)
    if as_json:
        print((out / FACTS).read_text(encoding="utf-8"), end="")
        return
    console = Console(highlight=False)
    size = (out / PROGRAM).stat().st_size / 1e6
    console.print(f"{out / PROGRAM}: {size:.1f} MB, {request.length} tokens a step", markup=False)
    losses = ", ".join(f"{loss:.4f}" for loss in proof.losses)
    console.print(f"{proof.steps} steps in the runtime: loss {losses}")
    console.print(
        f"beside torch's autograd: gradients differ by {proof.gradient_difference:.1g} of their size at most, "
        f"parameters by {proof.parameter_difference:.1g}"
    )
