"""The runtime's training beside torch's: loss, gradients and parameters, on the same batches, step by step.

The oracle is autograd on transformers' own module with the same values; it has nothing of the program but the weights.
The runtime works in a process of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slm_export.child import call, serve
from slm_export.errors import GateError
from slm_export.learning.on_device.step import trainable

LIMIT = 1e-3
"""Of the largest difference, as a share of the largest value of the same tensor: both sum float32 in another order."""
RATE = 0.1
"""Of plain SGD, which the runtime brings."""

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Proof:
    """How far the runtime is from torch at worst."""

    steps: int
    losses: tuple[float, ...]
    """Of the runtime, before each step and after the last, nats."""
    loss_difference: float
    gradient_difference: float
    """Share of the largest value of a gradient."""
    parameter_difference: float
    """The same of the parameters, after the last step."""


def prove(program: Path, step: nn.Module, batches: Sequence[Batch]) -> Proof:
    """Train both by plain SGD, a step for each batch, and compare.

    Raises:
        GateError: they differ by more than `LIMIT`.
        MachineError: the runtime died.
    """
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder) / "inputs.safetensors", Path(folder) / "outputs.safetensors"
        save_file(
            {f"{b}.{i}": value for b, batch in enumerate(batches) for i, value in enumerate(batch)}, inputs
        )
        request = {"program": str(program), "inputs": str(inputs), "outputs": str(outputs), "rate": RATE}
        call(__name__, request, "train in the runtime")
        theirs = load_file(outputs)
    ours = _by_autograd(step, batches)
    found = Proof(
        steps=len(batches),
        losses=tuple(theirs[f"loss.{i}"].item() for i in range(len(batches) + 1)),
        loss_difference=_worst(ours, theirs, "loss."),
        gradient_difference=_worst(ours, theirs, "gradient."),
        parameter_difference=_worst(ours, theirs, "parameter."),
    )
    for what in ("loss", "gradient", "parameter"):
        if not getattr(found, f"{what}_difference") <= LIMIT:
            raise GateError(
                f"the runtime's {what} differs from torch's by {getattr(found, f'{what}_difference'):.2g} of its size; "
                f"{LIMIT:g} is the limit"
            )
    return found


def _by_autograd(step: nn.Module, batches: Sequence[Batch]) -> dict[str, Tensor]:
    learned = trainable(step)
    optimizer = torch.optim.SGD(learned.values(), lr=RATE)
    found: dict[str, Tensor] = {}
    for index, batch in enumerate(batches):
        optimizer.zero_grad()
        loss = step(*batch)[0]
        loss.backward()
        found[f"loss.{index}"] = loss.detach()
        for name, value in learned.items():
            assert value.grad is not None, name
            found[f"gradient.{index}.{name}"] = value.grad.clone()
        optimizer.step()
    with torch.no_grad():
        found[f"loss.{len(batches)}"] = step(*batches[-1])[0]
    return found | {f"parameter.{name}": value.detach().clone() for name, value in learned.items()}


def _worst(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], prefix: str) -> float:
    mine = {name: value for name, value in ours.items() if name.startswith(prefix)}
    if mine.keys() != {name for name in theirs if name.startswith(prefix)}:
        return float("inf")
    return max(_difference(value, theirs[name]) for name, value in mine.items())


def _difference(ours: Tensor, theirs: Tensor) -> float:
    # A gradient may be 0 everywhere: that of the one matrix, while the other is.
    size = max(float(ours.abs().max()), 1e-12)
    return float((ours - theirs).abs().max()) / size


def _train(request: dict[str, Any]) -> dict[str, Any]:
    """Train in the runtime; only to be called in the child."""
    from executorch.extension.training.pybindings._training_lib import get_sgd_optimizer
    from executorch.extension.training.pybindings._training_module import _load_for_executorch_for_training

    stored = load_file(request["inputs"])
    count = len({name.partition(".")[0] for name in stored})
    batches = [
        [stored[f"{b}.{i}"] for i in range(sum(name.startswith(f"{b}.") for name in stored))]
        for b in range(count)
    ]
    module = _load_for_executorch_for_training(request["program"])
    found: dict[str, Tensor] = {}
    optimizer = None
    for index, batch in enumerate(batches):
        found[f"loss.{index}"] = module.forward_backward("forward", batch)[0].clone()
        gradients = module.named_gradients()
        found |= {f"gradient.{index}.{name}": value.clone() for name, value in gradients.items()}
        optimizer = optimizer or get_sgd_optimizer(module.named_parameters(), request["rate"])
        optimizer.step(gradients)
    found[f"loss.{count}"] = module.forward_backward("forward", batches[-1])[0].clone()
    found |= {f"parameter.{name}": value.clone() for name, value in module.named_parameters().items()}
    save_file({name: value.contiguous() for name, value in found.items()}, request["outputs"])
    return {}


if __name__ == "__main__":
    serve(_train)
