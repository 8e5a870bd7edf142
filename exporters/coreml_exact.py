"""Does a package compute its model, rounding apart?

Rounding to float16 moves every value by up to 2^-11 of itself, and a small mistake of the conversion hides behind
that: a wrong epsilon, one constant out of many. So the program is also executed in float32, with its constants as they
are stored, beside the torch model with the same constants. What remains is the order of float operations, some 1e-6
of the range of the scores. The limit leaves room for the few numbers of a family that are not among those constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slm_export.checkpoint import Checkpoint
from slm_export.exporters.coreml_dialect import query_factor
from slm_export.exporters.coreml_graph import program_dtype
from slm_export.exporters.coreml_session import Decoder, Encoder
from slm_export.exporters.mil.package import Package
from slm_export.exporters.mil.widened import widened
from slm_export.graph.model import build_reference
from slm_export.graph.norms import rms_norm_of
from slm_export.graph.rope import FixedRope
from slm_export.results import Check
from slm_export.source.tasks import GENERATION
from slm_export.weights import Dense

LIMIT = 1e-4
"""Largest difference, as a share of the range of the scores."""
_SMALLEST = 2.0**-24
"""The least that float16 holds, in place of an epsilon that it does not: BERT's is 1e-12."""
_STEPS = 4
_LEAST, _MOST = 2 * _STEPS, 64


@torch.no_grad()
def judge_exact(path: Path, checkpoint: Checkpoint, tokens: Sequence[int]) -> Check:
    """Compare a package without rounding with the checkpoint that it was made from, on some tokens of text."""
    package = widened(Package.open(path))
    model = rounded_reference(checkpoint)
    compare = _decoder if checkpoint.task == GENERATION else _encoder
    got, expected = compare(package, model, (list(tokens) * _LEAST)[:_MOST])
    far = float((got - expected).abs().max() / (expected.max() - expected.min()))
    detail = "without rounding, the program gives the scores of its model, but for this share of their range"
    return Check("exact_lowering", far <= LIMIT, detail, far, LIMIT)


def rounded_reference(checkpoint: Checkpoint) -> nn.Module:
    """Return the oracle in float32, with the vectors and rotary tables that a float16 program stores."""
    if program_dtype(checkpoint) == "fp32":
        return build_reference(checkpoint)
    dense = {name: _half(weight) for name, weight in checkpoint.weights.items() if isinstance(weight, Dense)}
    model = build_reference(checkpoint.with_weights(dense))
    for path, module in model.named_modules():
        if isinstance(module, FixedRope) or hasattr(module, "rope_type"):
            module.register_forward_hook(_round)
        if isinstance(module, nn.LayerNorm):
            module.eps = max(_stored(module.eps), _SMALLEST)
        if isinstance(scaling := getattr(module, "scaling", None), float):
            factor = scaling  # by which an encoder multiplies
            if checkpoint.task == GENERATION and hasattr(module, "head_dim"):
                softcap = getattr(module, "attn_logit_softcapping", None) or 0.0
                factor = query_factor(scaling, module.head_dim, softcap)
            module.scaling = scaling * _stored(factor) / factor
        found = rms_norm_of(module)
        if found is not None and not torch.equal(found[0], module.weight):
            # Gemma's weight is what it adds to 1, and the program stores the sum.
            weight = checkpoint.weights[f"{path}.weight"].float32()
            module.weight = nn.Parameter((1 + weight).half().float() - 1, requires_grad=False)
    return model


def _decoder(package: Package, model: nn.Module, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Return the scores after a prompt and after some single steps, of both."""
    # A mask of zeros, as some callers hand in: that no token sees a later one is the program's own doing.
    session = Decoder(package, hidden=0.0)
    tokens = tokens[: session.context]
    expected = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -_STEPS - 1 :]
    first = len(tokens) - _STEPS
    got = [session.logits(tokens[:first], 0)]
    got += [session.logits([tokens[at]], at) for at in range(first, len(tokens))]
    session.close()
    return torch.stack(got), expected


def _encoder(package: Package, model: nn.Module, tokens: list[int]) -> tuple[Tensor, Tensor]:
    session = Encoder(package)
    tokens = tokens[: session.context]
    got = session.outputs(tokens, [1] * len(tokens))
    ids = torch.tensor([tokens])
    types = (torch.zeros_like(ids),) if session.takes_token_types else ()
    expected = model(ids, torch.ones_like(ids), *types)[0]
    return got[tuple(slice(0, size) for size in expected.shape)], expected


def _stored(number: float) -> float:
    return float(torch.tensor(number).half())


def _half(weight: Dense) -> Dense:
    return Dense(weight.shape, torch.float16, lambda: weight.load().to(torch.float16))


def _round(module: nn.Module, arguments: Any, made: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(table.half().float() for table in made)
