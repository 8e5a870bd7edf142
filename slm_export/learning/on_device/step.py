"""One training step as a module: tokens and labels in, the loss out, gradients for what may learn.

The frozen part is what ships: codes and scales of the integer grid, made into floats as they are used. Codes of 4 bits
take a byte each here, because the portable kernels that training runs on have no packed ones. What learns are peft's
low-rank matrices (Hu et al., "LoRA", 2021) or the layers behind the encoder, in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError, MissingComponentError
from slm_export.learning.models import module_of
from slm_export.source.tasks import CLASSIFICATION, GENERATION
from slm_export.weights import Quantized

Learns = Literal["adapter", "head"]
IGNORED = -100


class FrozenLinear(nn.Module):
    """A linear layer of codes, int8 (out, in), and scales, float32 (out, groups)."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Quantized, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes", weight.codes())
        self.register_buffer("scales", weight.scales.float())
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + bias, (..., out)."""
        grouped = self.codes.view(*self.scales.shape, -1).float() * self.scales.unsqueeze(-1)
        bias = self.bias
        assert bias is None or isinstance(bias, Tensor)
        return nn.functional.linear(x, grouped.view(self.codes.shape), bias)


class FrozenEmbedding(nn.Module):
    """A table of codes and scales; rows are made into floats as they are looked up."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Quantized) -> None:
        super().__init__()
        self.register_buffer("codes", weight.codes())
        self.register_buffer("scales", weight.scales.float())

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows, float32 (..., width)."""
        codes, scales = self.codes[ids], self.scales[ids]
        rows = codes.view(*scales.shape, -1).float() * scales.unsqueeze(-1)
        return rows.view(codes.shape)


class DecoderStep(nn.Module):
    """Given   ids, labels: int64 (1, tokens); a label of -100 is not to be learned
    Result  the mean cross entropy of the next token in nats; the likeliest next tokens, int64 (1, tokens)
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss and predictions."""
        logits = self.model(input_ids=ids).logits
        loss = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        return loss, logits.detach().argmax(-1)


class ClassifierStep(nn.Module):
    """Given   ids, mask: int64 (1, tokens); label: int64 (1,)
    Result  the cross entropy in nats; the likeliest class, int64 (1,)
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss and prediction."""
        logits = self.model(input_ids=ids, attention_mask=mask).logits
        return nn.functional.cross_entropy(logits, label), logits.detach().argmax(-1)


def learner(checkpoint: Checkpoint, learns: Learns, rank: int, targets: tuple[str, ...], seed: int) -> Any:
    """Return transformers' module in float32, values as they ship; nothing but what learns requires a gradient.

    Raises:
        InputError: the model has no such layers, no head, or is of a task that is not trained on devices.
        MissingComponentError: peft is not installed.
    """
    if checkpoint.task not in (GENERATION, CLASSIFICATION):
        raise InputError(
            f"{checkpoint.folder}: a {checkpoint.task} model; on devices, models of text-generation and "
            "text-classification are trained"
        )
    module: Any = module_of(checkpoint).requires_grad_(False)
    # The fused attention has no gradient among the runtime's operators.
    module.set_attn_implementation("eager")
    if learns == "adapter":
        return _adapted(module, checkpoint, rank, targets, seed)
    if checkpoint.task != CLASSIFICATION:
        raise InputError(f"{checkpoint.folder}: only a classifier has a head to train; train an adapter")
    trunk = f"{module.base_model_prefix}."
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.startswith(trunk))
    return module


def step_of(checkpoint: Checkpoint, module: nn.Module) -> DecoderStep | ClassifierStep:
    """Return the step over a `learner`."""
    return DecoderStep(module) if checkpoint.task == GENERATION else ClassifierStep(module)


def freeze_on_grid(checkpoint: Checkpoint, module: nn.Module) -> tuple[str, ...]:
    """Put codes and scales in the place of floats wherever the checkpoint has them; return what stays in floats."""
    left = []
    for path, child in list(module.named_modules()):
        if not isinstance(child, nn.Linear | nn.Embedding) or child.weight.requires_grad or ".lora_" in path:
            continue
        name = f"{checkpoint_name(path)}.weight"
        weight = checkpoint.weights.get(checkpoint.tied.get(name, name))
        if not isinstance(weight, Quantized) or name in checkpoint.transposed:
            left.append(name)
            continue
        parent, _, last = path.rpartition(".")
        frozen = (
            FrozenEmbedding(weight) if isinstance(child, nn.Embedding) else FrozenLinear(weight, child.bias)
        )
        setattr(module.get_submodule(parent), last, frozen)
    return tuple(left)


def checkpoint_name(path: str) -> str:
    """Return what a checkpoint calls a module that peft has wrapped."""
    return path.removeprefix("base_model.model.").removesuffix(".base_layer")


def trainable(module: nn.Module) -> Mapping[str, nn.Parameter]:
    """Return what learns, by the names that the runtime uses."""
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


def _adapted(module: Any, checkpoint: Checkpoint, rank: int, targets: tuple[str, ...], seed: int) -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingComponentError(
            f"adapters need peft, which cannot be imported ({error}); pip install 'slm-export[learning]'"
        ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            lora_dropout=0.0,
            target_modules=list(targets) or None,
            task_type="CAUSAL_LM" if checkpoint.task == GENERATION else None,
            base_model_name_or_path=str(checkpoint.folder.resolve()),
        )
        try:
            return peft.get_peft_model(module, config).eval()
        except ValueError as error:
            raise InputError(
                f"{checkpoint.folder}: no layers for an adapter: {error}; name them with --targets"
            ) from error
