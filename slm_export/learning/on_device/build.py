"""The folder that an app takes to train on: program, what it expects, and the adapter to begin with.

OUT/
  training.pte     one method, ``forward``: loss, predictions, gradients, parameters (ExecuTorch's TrainingModule)
  training.json    inputs, parameters, what is frozen, hashes, and how far the runtime is from torch
  adapter/         as peft saves it, before any step; `write_adapter` puts a device's parameters into the same form
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from slm_export.bundles.checksums import sha256_file
from slm_export.bundles.staging import staged
from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError, MissingComponentError
from slm_export.learning.on_device.lowering import lower
from slm_export.learning.on_device.proof import Batch, Proof, prove
from slm_export.learning.on_device.step import (
    IGNORED,
    Learns,
    freeze_on_grid,
    learner,
    step_of,
    trainable,
)
from slm_export.progress import Progress
from slm_export.recipe import make_pass
from slm_export.source.hub import find_model
from slm_export.source.load import load_checkpoint
from slm_export.source.provenance import source_sha256
from slm_export.source.tasks import GENERATION

PROGRAM, FACTS, ADAPTER = "training.pte", "training.json", "adapter"
ADAPTER_FILE = "adapter_model.safetensors"
STEPS = 3
"""That the runtime is held against torch for."""


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    model: str
    out: Path
    force: bool = False
    train: Learns = "adapter"
    rank: int = 4
    targets: tuple[str, ...] = ()
    """Names of linear layers; none: those that peft takes for this family."""
    length: int = 64
    """Tokens of a batch: the program has this one shape, and shorter texts are padded."""
    bits: int = 4
    """Of the frozen matrices: 4 (in groups of 32, embedding 8), 8 or 32."""
    seed: int = 0


def build_trainer(request: Request, progress: Progress) -> tuple[Path, Proof]:
    """Make the folder; nothing is left behind unless the runtime trains as torch does.

    Raises:
        SlmExportError: whatever a user can cause or mend.
    """
    _require_executorch()
    folder = find_model(request.model)
    with staged(request.out, request.force) as staging:
        with progress.stage("read the model"):
            source = load_checkpoint(folder)
            if source.positions is not None and request.length > source.positions:
                raise InputError(
                    f"--length {request.length} is more than the {source.positions} positions of {source.name}"
                )
            shipped = on_grid(source, request.bits)
        step = step_of(shipped, learner(shipped, request.train, request.rank, request.targets, request.seed))
        oracle = step_of(
            shipped, learner(shipped, request.train, request.rank, request.targets, request.seed)
        )
        with progress.stage("lower the training step"):
            left = freeze_on_grid(shipped, step.model)
            batches = random_batches(shipped, request)
            lower(step, batches[0], staging.path / PROGRAM)
        with progress.stage("train beside torch"):
            proof = prove(staging.path / PROGRAM, oracle, batches)
        if request.train == "adapter":
            model: Any = step.model
            model.peft_config["default"].save_pretrained(str(staging.path / ADAPTER))
            write_adapter(dict(trainable(step)), staging.path / ADAPTER)
        facts = _facts(request, source, step, left, proof, sha256_file(staging.path / PROGRAM))
        (staging.path / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        return staging.commit(), proof


def write_adapter(parameters: Mapping[str, Tensor], folder: Path) -> None:
    """Write what learned, by the runtime's names, as peft's ``adapter_model.safetensors``."""
    tensors = {
        name.removeprefix("model.").replace(".default.", "."): value.detach().contiguous().clone()
        for name, value in parameters.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / ADAPTER_FILE, {"format": "pt"})


def on_grid(source: Checkpoint, bits: int) -> Checkpoint:
    """Return a checkpoint with the values that ship: at 4 bits in groups of 32, embeddings at 8; at 32 as it is."""
    if bits == 32:
        return source
    options = {"bits": bits, "embedding_bits": 8} | ({"group": 32} if bits == 4 else {})
    return make_pass("group-quantize", options, "adapter trainer").run(source).checkpoint


def random_batches(checkpoint: Checkpoint, request: Request) -> list[Batch]:
    """Return batches of tokens by chance, some of them padding; the last is that of the step before."""
    generator = torch.Generator().manual_seed(request.seed)
    words = min(
        weight.shape[0]
        for name, weight in checkpoint.weights.items()
        if checkpoint.roles[name] == "embedding"
    )
    made: list[Batch] = []
    for index in range(STEPS):
        ids = torch.randint(words, (1, request.length), generator=generator)
        kept = request.length - index
        if checkpoint.task == GENERATION:
            labels = ids.clone()
            labels[:, kept:] = IGNORED
            made.append((ids, labels))
        else:
            mask = (torch.arange(request.length) < kept).long()[None]
            label = torch.randint(checkpoint.config.num_labels, (1,), generator=generator)
            made.append((ids, mask, label))
    return made


def _facts(
    request: Request,
    source: Checkpoint,
    step: torch.nn.Module,
    left: tuple[str, ...],
    proof: Proof,
    sha256: str,
) -> dict[str, Any]:
    names = ("ids", "labels") if source.task == GENERATION else ("ids", "mask", "label")
    return {
        "schema": 1,
        "model": {"name": source.name, "task": source.task, "source_sha256": source_sha256(source.folder)},
        "program": {"path": PROGRAM, "sha256": sha256, "method": "forward"},
        "trains": request.train,
        "rank": request.rank if request.train == "adapter" else None,
        "base": {"bits": request.bits, "group": 32 if request.bits == 4 else None, "in_floats": list(left)},
        "inputs": {name: [1] if name == "label" else [1, request.length] for name in names},
        "ignored_label": IGNORED if source.task == GENERATION else None,
        "parameters": {name: list(value.shape) for name, value in trainable(step).items()},
        "beside_torch": asdict(proof),
    }


def _require_executorch() -> None:
    try:
        from executorch.extension.training.pybindings import _training_lib  # noqa: F401
    except ImportError as error:
        raise MissingComponentError(
            f"training on devices needs ExecuTorch with its training extension ({error}); "
            "pip install 'slm-export[executorch]'"
        ) from error
