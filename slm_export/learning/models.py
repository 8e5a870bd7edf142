"""Models that learn and that teach: transformers' own modules in float32, and folders as transformers reads them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError
from slm_export.graph.pooling import Pooling, read_pooling
from slm_export.machine import machine_errors
from slm_export.source.load import architecture_of, load_checkpoint
from slm_export.source.provenance import refuse_large_vocabulary
from slm_export.source.tasks import EMBEDDING
from slm_export.tokenization.tokenizer import SourceTokenizer, tokenizer_files

_BESIDE = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "labels.txt",
)


@dataclass(frozen=True)
class Model:
    """A model that is trained, or asked."""

    folder: Path
    """Where it was read from."""
    module: Any
    """A transformers model with float32 parameters, in evaluation mode."""
    tokenizer: SourceTokenizer
    task: str
    """One of `tasks.ENDINGS`."""
    pooling: Pooling | None
    """What makes one vector of a text; None but for sentence embeddings."""
    positions: int | None
    """The most tokens of one text; None: without bound."""
    dtype: torch.dtype
    """Of the weights in the folder."""

    @property
    def parameters(self) -> int:
        """Number of values; a tied pair counts once."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        device: torch.device = next(self.module.parameters()).device
        return device


def load(folder: Path) -> Model:
    """Read a model folder, checked as an export checks it, into a module that can learn.

    Raises:
        InputError: whatever is wrong with the folder.
        MachineError: there is too little memory.
    """
    checkpoint = load_checkpoint(folder)
    tokenizer = SourceTokenizer.load(folder)
    refuse_large_vocabulary(checkpoint, tokenizer)
    with machine_errors("load the model", folder):
        module = module_of(checkpoint)
    pooling = read_pooling(folder) if checkpoint.task == EMBEDDING else None
    return Model(
        folder, module, tokenizer, checkpoint.task, pooling, checkpoint.positions, dtype_of(checkpoint)
    )


def module_of(checkpoint: Checkpoint) -> nn.Module:
    """Return transformers' module with the weights of a checkpoint as float32 parameters that can be trained.

    Raises:
        InputError: a shape that the configuration cannot say, such as layers of different widths.
    """
    from transformers.initialization import no_init_weights

    architecture = architecture_of(checkpoint)
    config = type(checkpoint.config).from_dict(checkpoint.config.to_dict())
    config._attn_implementation = "sdpa" if getattr(architecture.cls, "_supports_sdpa", False) else "eager"
    config.dtype = torch.float32
    config.use_cache = False
    with no_init_weights():
        module: nn.Module = architecture.cls(config, **architecture.options)
    module = module.float()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            weight = checkpoint.weights[checkpoint.tied.get(name, name)]
            values = weight.float32()
            if name in checkpoint.transposed:
                values = values.t()
            if values.shape != parameter.shape:
                raise InputError(
                    f"{checkpoint.folder}: {name} has shape {tuple(values.shape)} where its configuration says "
                    f"{tuple(parameter.shape)}; a model of layers that differ cannot be taught"
                )
            parameter.copy_(values)
    tie = getattr(module, "tie_weights", None)
    if callable(tie):
        tie()
    return module.eval()


def dtype_of(checkpoint: Checkpoint) -> torch.dtype:
    """Return the type that most values of a checkpoint are stored in."""
    counts: dict[torch.dtype, int] = {}
    for weight in checkpoint.weights.values():
        kind = getattr(weight, "dtype", torch.float32)
        counts[kind] = counts.get(kind, 0) + weight.count
    return max(counts, key=lambda kind: counts[kind])


def save(model: Model, out: Path, dtype: torch.dtype | None = None) -> None:
    """Write a module with the files that its folder has beside the weights: tokenizer, pooling, generation.

    Given   dtype: of the weights; None: as they were stored before
    """
    dtype = dtype or model.dtype
    with machine_errors("write the model", out):
        out.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().to(dtype).cpu() for name, value in model.module.state_dict().items()}
        model.module.config.dtype = dtype
        model.module.save_pretrained(out, state_dict=state)
        model.module.config.dtype = torch.float32
        tidy_config(out)
        mode = (out / "config.json").stat().st_mode
        for file in out.glob("*.safetensors"):
            file.chmod(mode)  # a temporary file's own is the owner's alone
        copy_beside(model.folder, out)


def tidy_config(out: Path) -> None:
    """Take out of config.json what says how a model was trained, not what it is."""
    path = out / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw.pop("_attn_implementation", None)
    raw["use_cache"] = True
    path.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_beside(source: Path, out: Path) -> None:
    """Copy tokenizer, pooling and labels; what is in ``out`` already stays, but for the tokenizer's files."""
    for file in tokenizer_files(source):
        shutil.copyfile(file, out / file.name)
    for name in _BESIDE:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    for folder in sorted(source.glob("[0-9]_*")):
        if folder.is_dir():
            shutil.copytree(folder, out / folder.name, dirs_exist_ok=True)
