"""A small transformers Llama as a Core ML package with its cache as state, by way of torch.export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTEXT = 32


@torch.library.custom_op("coreml_test::kv_update", mutates_args=())
def kv_update(cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
    """cache (layers, 1, heads, context, dim) of one layer, new (1, heads, tokens, dim), start int32 (1,)."""
    result = cache.clone()
    at = int(start[0])
    result[:, :, at : at + new.shape[2]] = new
    return result


@kv_update.register_fake
def _(cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
    return torch.empty_like(cache)


def llama(layers: int, width: int, context: int = CONTEXT) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


class Decoder(nn.Module):
    """ids int32 (1, tokens), start int32 (1,) -> logits; caches are buffers, one of each kind per layer."""

    def __init__(self, model: Any, context: int = CONTEXT) -> None:
        super().__init__()
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface

        AttentionInterface.register("coreml_test", self._attend)
        AttentionMaskInterface.register("coreml_test", lambda *args, **kwargs: None)
        self.model, self.context = model, context
        model.config._attn_implementation = "coreml_test"
        shape = (1, model.config.num_key_value_heads, context, model.config.head_dim)
        for layer in range(model.config.num_hidden_layers):
            self.register_buffer(f"keys_{layer}", torch.zeros(shape))
            self.register_buffer(f"values_{layer}", torch.zeros(shape))

    def forward(self, ids: Tensor, start: Tensor) -> Tensor:
        self._start = start
        positions = torch.arange(ids.shape[1], dtype=torch.int32).unsqueeze(0) + start
        # Not `where`: coremltools types its result without the condition's shape, which the evaluator refuses.
        unseen = torch.arange(self.context) > positions[0].unsqueeze(1)
        self._mask = unseen.float() * -30000.0
        hidden = self.model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        logits: Tensor = self.model.lm_head(hidden)
        return logits

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        stored = []
        for kind, new in (("keys", key), ("values", value)):
            cache = self.get_buffer(f"{kind}_{module.layer_idx}")
            cache.copy_(kv_update(cache, new, self._start))
            stored.append(cache.repeat_interleave(query.shape[1] // new.shape[1], dim=1))
        output = F.scaled_dot_product_attention(query, *stored, attn_mask=self._mask)
        return output.transpose(1, 2), None


def register_lowering() -> None:
    """Teach coremltools' front end the one operator it lacks."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op

    def kv_update(context: Any, node: Any) -> None:
        cache, new, start = (context[name] for name in node.inputs[:3])
        end = mb.add(x=start, y=mb.slice_by_size(x=mb.shape(x=new), begin=[2], size=[1]))
        made = mb.slice_update(
            x=cache,
            update=new,
            begin=mb.concat(values=[[0, 0], start, [0]], axis=0),
            end=mb.concat(values=[[0, 0], end, [0]], axis=0),
            begin_mask=[True, True, False, True],
            end_mask=[True, True, False, True],
            name=node.name,
        )
        context.add(made)

    register_torch_op(torch_alias=["coreml_test::kv_update"], override=True)(kv_update)


def save(decoder: Decoder, path: Path, tokens: int | None) -> None:
    """Convert for this many tokens at a time, None for any number, and save."""
    import coremltools as ct

    register_lowering()
    count = 2 if tokens is None else tokens
    example = (torch.zeros(1, count, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    sizes = {1: torch.export.Dim("tokens", min=1, max=decoder.context)} if tokens is None else None
    with torch.no_grad():
        program = torch.export.export(decoder, example, dynamic_shapes=(sizes, None))
    length = ct.RangeDim(1, decoder.context, default=1) if tokens is None else tokens
    ct.convert(
        program.run_decompositions(),
        inputs=[
            ct.TensorType(name="ids", shape=(1, length), dtype=int),
            ct.TensorType(name="start", shape=(1,), dtype=int),
        ],
        outputs=[ct.TensorType(name="logits")],
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT16,
        skip_model_load=True,
    ).save(str(path))
