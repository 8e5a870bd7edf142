"""Checkpoint -> torch module, ready to run or to trace.

    build_decoder     tokens (1, n), input_pos (1,)  ->  logits (1, vocabulary) of the last token, KV cache inside
    build_encoder     input_ids (1, n), attention_mask (1, n)  ->  embedding (1, width) or the scores of its task
    build_reference   the same model as transformers runs it, whole sequences, one weight in memory at a time

The module is transformers' own, built empty, with the parts that a `Dialect` makes put in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slm_export.checkpoint import Checkpoint
from slm_export.compression.geometry import fit
from slm_export.errors import InputError
from slm_export.graph.dialect import AttentionShape, Dialect, Position, ReferenceDialect, Rounding
from slm_export.graph.pooling import Pooling, additive_mask, read_pooling
from slm_export.graph.rope import make_traceable
from slm_export.source.architecture import Architecture
from slm_export.source.load import architecture_of
from slm_export.source.tasks import ANSWERING, EMBEDDING, GENERATION, scores
from slm_export.weights import Dense

_CACHED = "slm_export_cached"
"""Our attention's name among transformers' attention functions."""


class Decoder(nn.Module):
    """A causal language model with its KV cache: one call takes the next tokens, however many."""

    def __init__(self, model: nn.Module, position: Position, context: int) -> None:
        super().__init__()
        self.model = model
        self.position = position
        self.context = context

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        """Return float32 (1, vocabulary), of int64 tokens (1, n) that begin at position input_pos (1,)."""
        start: Any = input_pos[0].item()
        torch._check(start >= 0)  # type: ignore[no-untyped-call]
        torch._check(start < self.context)  # type: ignore[no-untyped-call]
        self.position.begin(start)
        positions = (input_pos[0] + torch.arange(tokens.shape[1])).unsqueeze(0)
        output = self.model(
            input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=1, return_dict=True
        )
        logits: Tensor = output.logits
        return logits[:, -1, :]


class Encoder(nn.Module):
    """A bidirectional model and what is read from it."""

    def __init__(self, model: nn.Module, task: str, pooling: Pooling | None) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.pooling = pooling
        # A ready mask keeps transformers from looking at the values of one, which cannot be traced.
        self.takes_ready_mask = _takes_ready_mask(model)

    @property
    def takes_token_types(self) -> bool:
        """Whether question and passage are told apart by a third input."""
        return self.task == ANSWERING and getattr(self.model.config, "type_vocab_size", 1) > 1

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Return float32: embedding (batch, width), or the task's scores (batch, ...).

        Given   int64 ids and mask (batch, n), mask 1 for a token and 0 for padding; types (batch, n), 0 for the
                question and 1 for the passage, where the model tells them apart
        """
        mask = additive_mask(attention_mask) if self.takes_ready_mask else attention_mask
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.model(input_ids=input_ids, attention_mask=mask, return_dict=True, **types)
        if self.pooling is None:
            return scores(self.task, output)
        return self.pooling(output.last_hidden_state, attention_mask)


def build_decoder(checkpoint: Checkpoint, dialect: Dialect, context: int) -> Decoder:
    """Return the decoder, with a KV cache for ``context`` positions made by ``dialect``."""
    _register_attention()
    architecture = architecture_of(checkpoint)
    model = _filled(checkpoint, architecture, _CACHED, dialect)
    make_traceable(model, context)
    decoder = Decoder(model, Position(), context)
    _put_caches(decoder, dialect)
    return decoder.eval()


def build_encoder(checkpoint: Checkpoint, dialect: Dialect, attention: str = "eager") -> Encoder:
    """Return the encoder and the pooling or the scores that its task calls for.

    Given   attention: a function registered with transformers' AttentionInterface, used where the family attends
            through that interface
    """
    architecture = architecture_of(checkpoint)
    if not getattr(architecture.cls, "_supports_attention_backend", False):
        attention = "eager"
    pooling = read_pooling(checkpoint.folder) if checkpoint.task == EMBEDDING else None
    return Encoder(_filled(checkpoint, architecture, attention, dialect), checkpoint.task, pooling).eval()


def build_reference(
    checkpoint: Checkpoint, rounding: Rounding | None = None, dialect: Dialect | None = None
) -> nn.Module:
    """Return the oracle: for a decoder transformers' own module, for an encoder an `Encoder`.

    Given   rounding: what an artifact's runtime does to activations; None: nothing
            dialect: what makes its parts in place of the reference's dialect
    """
    dialect = dialect or ReferenceDialect(rounding)
    if checkpoint.task != GENERATION:
        return build_encoder(checkpoint, dialect)
    architecture = architecture_of(checkpoint)
    fast = getattr(architecture.cls, "_supports_sdpa", False)
    return _filled(checkpoint, architecture, "sdpa" if fast else "eager", dialect)


def _takes_ready_mask(model: nn.Module) -> bool:
    """Whether the model takes an additive mask of four dimensions; a few old families want (batch, n) of 0 and 1."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        ids = torch.zeros(1, 3, dtype=torch.int64)
        try:
            model(input_ids=ids, attention_mask=additive_mask(torch.ones(1, 3, dtype=torch.int64)))
        except (AssertionError, IndexError, ValueError, RuntimeError):
            return False
    return True


def _filled(
    checkpoint: Checkpoint, architecture: Architecture, attention: str, dialect: Dialect
) -> nn.Module:
    """Return the module with every weight in its place."""
    module = architecture.empty_module(attention)
    made: set[str] = set()
    for path, child in list(module.named_modules()):
        name = f"{path}.weight"
        role = checkpoint.roles.get(checkpoint.tied.get(name, name), "other")
        if role == "other" or not hasattr(child, "weight"):
            continue
        weight = checkpoint.weights[checkpoint.tied.get(name, name)]
        if isinstance(child, nn.Embedding):
            part = dialect.embedding(weight)
        else:
            bias = checkpoint.weights.get(checkpoint.tied.get(f"{path}.bias", f"{path}.bias"))
            part = dialect.linear(weight, None if bias is None else bias.float32())
        part = _with_scale(child, part)
        module.set_submodule(path, part.eval())
        made.add(path)
    _fill_the_rest(module, checkpoint, made)
    fit(module, checkpoint)
    return module


class _Scaled(nn.Module):
    def __init__(self, part: nn.Module, scale: float) -> None:
        super().__init__()
        self.part, self.scale = part, scale

    def forward(self, ids: Tensor) -> Tensor:
        scaled: Tensor = self.part(ids) * self.scale
        return scaled


def _with_scale(old: nn.Module, part: nn.Module) -> nn.Module:
    """Give a look-up the scale of the embedding it replaces; Gemma and others have one in a subclass."""
    if not isinstance(old, nn.Embedding) or type(old) is nn.Embedding:
        return part
    scale = getattr(old, "embed_scale", None)
    if scale is None:
        raise InputError(
            f"an embedding of class {type(old).__name__} does more than look up, and cannot be exported"
        )
    return _Scaled(part, float(scale))


def _fill_the_rest(module: nn.Module, checkpoint: Checkpoint, made: Collection[str]) -> None:
    """Load what no dialect made: norms, biases, single vectors."""
    for path, child in module.named_modules():
        if path in made:
            continue
        for key, _ in list(child.named_parameters(recurse=False)):
            name = f"{path}.{key}" if path else key
            weight = checkpoint.weights.get(name)
            if isinstance(weight, Dense):
                child.register_parameter(key, nn.Parameter(weight.float32().clone(), requires_grad=False))
    if left := [name for name, value in module.named_parameters() if value.is_meta]:
        raise AssertionError(f"{type(module).__name__}: parameters without a value: {left[:3]}")


def _register_attention() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_CACHED, _attend)
    AttentionMaskInterface.register(_CACHED, lambda *args, **kwargs: None)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as the part does that `_put_caches` gave this layer; without one yet, report what it needs."""
    part: nn.Module | None = getattr(module, "cached_attention", None)
    if part is not None:
        return part(query, key, value), None
    report: Callable[..., None] = module.report_attention  # type: ignore[assignment]
    report(module, query, key, scaling or query.shape[-1] ** -0.5, options)
    return query.transpose(1, 2), None


def _put_caches(decoder: Decoder, dialect: Dialect) -> None:
    """Give every attention layer its cache.

    What a layer needs (heads, their width, a window) is seen by running the model once on fake
    tensors, so nothing has to be known about the family's configuration keys.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    shapes: dict[nn.Module, AttentionShape] = {}

    def report(layer: nn.Module, query: Tensor, key: Tensor, scaling: float, options: dict[str, Any]) -> None:
        refuse_unknown(options)
        shapes[layer] = AttentionShape(
            heads=int(query.shape[1]),
            kv_heads=int(key.shape[1]),
            head_dim=int(key.shape[3]),
            context=decoder.context,
            scaling=float(scaling),
            window=options.get("sliding_window"),
            softcap=options.get("softcap"),
        )

    layers = [module for module in decoder.model.modules() if hasattr(module, "layer_idx")]
    for layer in layers:
        layer.report_attention = report  # type: ignore[assignment]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        tokens = torch.zeros(1, 2, dtype=torch.int64)
        decoder.model(input_ids=tokens, position_ids=torch.arange(2).unsqueeze(0), use_cache=False)
    for layer in layers:
        del layer.report_attention
    if not shapes:
        raise InputError(
            f"{type(decoder.model).__name__} does not attend through transformers' AttentionInterface"
        )
    _refuse_lost_windows(decoder.model.config, list(shapes.values()))
    for layer, shape in shapes.items():
        layer.cached_attention = dialect.cached_attention(shape, decoder.position)


def refuse_unknown(options: Mapping[str, Any]) -> None:
    """Refuse attention that takes a tensor we know nothing of, such as learned sinks: it must not be left out."""
    for name, value in options.items():
        if isinstance(value, Tensor) and name not in ("position_ids", "cache_position"):
            raise InputError(f"attention with '{name}' cannot be exported yet")


def _refuse_lost_windows(config: Any, shapes: Sequence[AttentionShape]) -> None:
    """A family may limit what a token sees through its mask alone, which we do not take; no limit may get lost."""
    kinds = getattr(config, "layer_types", None) or ()
    limited = sum(kind in ("sliding_attention", "chunked_attention") for kind in kinds)
    if limited > sum(shape.window is not None for shape in shapes):
        raise InputError(
            f"{config.model_type}: its {limited} layers of limited attention cannot be exported yet"
        )
