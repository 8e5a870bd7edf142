"""The exporters that we are compared with: for each, what is prepared, and the command that converts.

A Llama geometry of `geometries.py` in, int4 in groups of 32, embedding in int4 too, context 2048.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from geometries import GEOMETRIES
from safetensors import safe_open

CONTEXT = 2048


@dataclass(frozen=True)
class Command:
    """A conversion to run, and the files that it leaves."""

    arguments: Sequence[str]
    made: Sequence[Path]
    folder: Path | None = None
    """The current folder: some tools write there."""


@contextmanager
def export_llm(name: str, folder: Path, work: Path, python: str) -> Iterator[Command]:
    """ExecuTorch's own exporter, from the original Llama names."""
    out = work / f"{name}-export_llm.pte"
    checkpoint = out.with_suffix(".pth")
    torch.save(_meta_names(folder), checkpoint)
    parameters = out.with_suffix(".json")
    parameters.write_text(json.dumps(_meta_parameters(name)))
    module = "executorch.extension.llm.export.export_llm"
    options = {
        "base.model_class": "llama3_2",
        "base.checkpoint": checkpoint,
        "base.params": parameters,
        "base.metadata": '\'{"get_bos_id":0, "get_eos_ids":[1]}\'',
        "model.use_kv_cache": True,
        "model.use_sdpa_with_kv_cache": True,
        "model.dtype_override": "fp32",
        "quantization.qmode": "8da4w",
        "quantization.group_size": 32,
        "quantization.embedding_quantize": "'4,32'",
        "backend.xnnpack.enabled": True,
        "backend.xnnpack.extended_ops": True,
        "export.max_seq_length": CONTEXT,
        "export.max_context_length": CONTEXT,
        "export.output_name": out.name,
    }
    try:
        command = [python, "-m", module, *(f"{key}={value}" for key, value in options.items())]
        # It writes into the current folder, whatever output_dir says.
        yield Command(command, [out], out.parent)
    finally:
        checkpoint.unlink()


@contextmanager
def export_hf(name: str, folder: Path, work: Path, python: str) -> Iterator[Command]:
    """litert-torch's own exporter."""
    out = work / f"{name}-export_hf"
    out.mkdir(exist_ok=True)
    options = [f"--model={folder}", f"--output_dir={out}", "--quantization_recipe=dynamic_wi4b32_afp32"]
    options += ["--prefill_lengths=[128]", f"--cache_length={CONTEXT}"]
    command = [python, "-m", "litert_torch.generative.export_hf", *options]
    yield Command(command, [out / "model.litertlm"], out)


@contextmanager
def genai_builder(name: str, folder: Path, work: Path, python: str) -> Iterator[Command]:
    """onnxruntime-genai's model builder."""
    out = work / f"{name}-builder"
    out.mkdir(exist_ok=True)
    options = [
        "-i",
        str(folder),
        "-o",
        str(out),
        "-p",
        "int4",
        "-e",
        "cpu",
        "-c",
        str(work / "builder-cache"),
    ]
    options += ["--extra_options", "int4_accuracy_level=4", "int4_block_size=32", "hf_token=false"]
    command = [python, "-m", "onnxruntime_genai.models.builder", *options]
    yield Command(command, [out / "model.onnx"], out)


def _meta_names(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights under the names of the original Llama release, which export_llm reads."""
    names = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "embed_tokens": "tok_embeddings",
    }
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                name = key.removeprefix("model.")
                for ours, theirs in names.items():
                    name = name.replace(ours, theirs)
                # Rows of wq and wk are in another order there; of random weights any order is as good.
                found[name] = tensors.get_tensor(key)
    found["output.weight"] = found["tok_embeddings.weight"]
    return found


def _meta_parameters(name: str) -> dict[str, Any]:
    cls, options = GEOMETRIES[name]
    if cls != "LlamaForCausalLM":
        raise SystemExit(f"{name}: export_llm is compared for the Llama geometries only")
    return {
        "dim": options["hidden_size"],
        "hidden_dim": options["intermediate_size"],
        "n_layers": options["num_hidden_layers"],
        "n_heads": options["num_attention_heads"],
        "n_kv_heads": options["num_key_value_heads"],
        "vocab_size": options["vocab_size"],
        "norm_eps": options.get("rms_norm_eps", 1e-6),
        "rope_theta": options.get("rope_parameters", {}).get("rope_theta", 10000.0),
        "use_scaled_rope": "rope_parameters" in options,
    }


Prepare = Callable[[str, Path, Path, str], AbstractContextManager[Command]]
PEERS: Mapping[str, tuple[str, Prepare]] = {
    "executorch": ("export_llm", export_llm),
    "litert": ("export_hf", export_hf),
    "onnx": ("builder", genai_builder),
}
"""Format -> name and preparation of its peer."""
