"""Our 4 bits beside llama.cpp's, on the same tokens: KL divergence and perplexity against the float32 model.

    pip install gguf llama-cpp-python
    python benchmarks/quality/beside_llama_cpp.py examples/pycode-5m --bundle BUNDLE... [--tokens 76800]

For models of the Llama class. llama.cpp is given the model's float32 weights in a GGUF file, quantizes them with its
own code, with and without an importance matrix (the mean squares of what every matrix multiplies, which is what its
`llama-imatrix` gathers), and reads the windows with its own kernels, which round activations too. A bundle is read in
the runtime of its first format. Figures are means over windows with their standard error.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from heldout import calibration_documents, heldout_documents
from rich.console import Console
from rich.table import Table
from torch import Tensor

from slm_export.bundles.bundle import read_manifest
from slm_export.checkpoint import Checkpoint
from slm_export.evaltext import token_windows
from slm_export.graph.model import build_reference
from slm_export.registry import exporter
from slm_export.runtime import DecoderSession
from slm_export.source.load import load_checkpoint
from slm_export.tokenization.tokenizer import SourceTokenizer

WINDOW = 256
CALIBRATION_TOKENS = 32_768
SCHEMES = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}
"""Names of `llama_ftype`."""
_FAMILIES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOPS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}

Windows = tuple[tuple[int, ...], ...]
Reader = Callable[[tuple[int, ...]], Tensor]
"""Reads a window: float32 logits (tokens, vocabulary)."""


def gguf_name(name: str) -> str:
    """Return what llama.cpp calls a weight of a Llama."""
    if name in _TOPS:
        return _TOPS[name]
    _, _, index, rest = name.split(".", 3)
    return f"blk.{index}.{_FAMILIES[rest.removesuffix('.weight')]}.weight"


def write_gguf(source: Checkpoint, path: Path) -> None:
    """Write a Llama in float32, as llama.cpp wants it: rows of query and key in the order of its rotary embedding."""
    import gguf

    config = source.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, source.folder)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in source.weights.items():
        values = weight.float32()
        for part, count in heads.items():
            if part in name:
                rows, columns = values.shape
                values = (
                    values.view(count, 2, rows // count // 2, columns).transpose(1, 2).reshape(rows, columns)
                )
        writer.add_tensor(gguf_name(name), values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, folder: Path) -> None:
    """Only what loading asks for: windows are given as ids."""
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    )


@torch.no_grad()
def importance(source: Checkpoint, windows: Windows) -> dict[str, Tensor]:
    """Return, by llama.cpp's names, the mean square of every column's input, float32 (in,)."""
    model = build_reference(source)
    sums: dict[str, Tensor] = {}
    hooks = []
    for path, part in model.named_modules():
        name = f"{path}.weight"
        if source.roles.get(name) == "linear":

            def gather(
                module: Any, inputs: tuple[Tensor, ...], output: Tensor, key: str = gguf_name(name)
            ) -> None:
                sums[key] = sums.get(key, torch.zeros(())) + inputs[0].flatten(0, -2).square().sum(0)

            hooks.append(part.register_forward_hook(gather))
    for window in windows:
        model(input_ids=torch.tensor([window]), use_cache=False)
    for hook in hooks:
        hook.remove()
    count = sum(map(len, windows))
    return {name: total / count for name, total in sums.items()}


def quantize_gguf(source: Path, made: Path, ftype: int, matrix: Mapping[str, Tensor] | None) -> None:
    """Let llama.cpp quantize a file."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = ftype
    kept = []  # what the structures point to
    if matrix:
        rows = (llama_cpp.llama_cpp.llama_model_imatrix_data * (len(matrix) + 1))()
        for row, (name, values) in zip(rows, matrix.items(), strict=False):
            data = (ctypes.c_float * len(values))(*values.tolist())
            kept.append(data)
            row.name, row.size = name.encode(), len(values)
            row.data = ctypes.cast(data, ctypes.POINTER(ctypes.c_float))
        options.imatrix = ctypes.cast(rows, ctypes.POINTER(llama_cpp.llama_cpp.llama_model_imatrix_data))
        kept.append(rows)
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(made).encode(), ctypes.byref(options))
    if failed:
        raise RuntimeError(f"llama.cpp could not quantize {source}: {failed}")


def llama_cpp_reader(path: Path) -> Reader:
    """Return what reads windows with llama.cpp's kernels."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=WINDOW, n_batch=WINDOW, logits_all=True, n_gpu_layers=0, n_threads=2, verbose=False
    )

    def read(window: tuple[int, ...]) -> Tensor:
        model.reset()
        model.eval(list(window))
        return torch.from_numpy(model.scores[: len(window)].copy())

    return read


def artifact_reader(bundle: Path) -> tuple[str, int, Reader]:
    """Return what reads windows in the runtime of a bundle's first format, with the artifact's name and bytes."""
    manifest = read_manifest(bundle)
    entry = manifest.artifacts[0]
    session = exporter(entry.format).open(bundle / entry.path, manifest.model.task)
    assert isinstance(session, DecoderSession)

    def read(window: tuple[int, ...]) -> Tensor:
        return torch.stack([session.logits([token], at) for at, token in enumerate(window)])

    return f"ours: {bundle.name} ({entry.format})", entry.bytes, read


def measure(read: Reader, expected: list[Tensor], windows: Windows) -> tuple[Tensor, Tensor, Tensor]:
    """Return KL divergence, increase of the log perplexity and top-1 agreement, each (windows,)."""
    rows = []
    for window, source in zip(windows, expected, strict=True):
        got = read(window).log_softmax(-1)
        kl = (source.exp() * (source - got)).sum(-1).mean()
        following = torch.tensor(window[1:]).unsqueeze(1)
        increase = (source[:-1] - got[:-1]).gather(1, following).mean()
        rows.append(torch.stack((kl, increase, (source.argmax(-1) == got.argmax(-1)).float().mean())))
    kl, increase, agreement = torch.stack(rows).unbind(1)
    return kl, increase, agreement


def readers(
    source: Checkpoint, calibration: Windows, folder: Path, schemes: Collection[str]
) -> Iterator[tuple[str, int, Reader]]:
    """Yield llama.cpp's files, first the one that nothing is quantized in: name, bytes and reader."""
    whole = folder / "f32.gguf"
    write_gguf(source, whole)
    if len(schemes) == len(SCHEMES):
        yield "llama.cpp F32 (the conversion is right)", whole.stat().st_size, llama_cpp_reader(whole)
    matrix = importance(source, calibration)
    for name in schemes:
        ftype = SCHEMES[name]
        for weights, label in ((None, name), (matrix, f"{name} + imatrix")):
            if weights is not None and name == "Q8_0":
                continue
            made = folder / f"{label}.gguf"
            quantize_gguf(whole, made, ftype, weights)
            yield f"llama.cpp {label}", made.stat().st_size, llama_cpp_reader(made)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--bundle", type=Path, action="append", default=[])
    parser.add_argument("--tokens", type=int, default=300 * WINDOW)
    parser.add_argument("--scheme", action="append", choices=SCHEMES, help="Of llama.cpp's. [default: all]")
    arguments = parser.parse_args()
    source, tokenizer = load_checkpoint(arguments.model), SourceTokenizer.load(arguments.model)
    bos = tokenizer.bos_id if tokenizer.adds_bos else None

    def cut(documents: tuple[str, ...], tokens: int) -> Windows:
        return token_windows(documents, tokenizer.encode, WINDOW, bos, tokens)

    windows = cut(heldout_documents(arguments.model), arguments.tokens)
    calibration = cut(calibration_documents(), CALIBRATION_TOKENS)
    model = build_reference(source)
    with torch.no_grad():
        expected = [
            model(input_ids=torch.tensor([w]), use_cache=False).logits[0].log_softmax(-1) for w in windows
        ]
    table = Table(
        "weights", "MB", "KL mean", "ln ratio", "top-1", title=f"{len(windows)} windows of {WINDOW} tokens"
    )
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        rows = [artifact_reader(bundle) for bundle in arguments.bundle]
        for name, size, read in itertools.chain(
            rows, readers(source, calibration, Path(folder), arguments.scheme or SCHEMES)
        ):
            figures = measure(read, expected, windows)
            spread = [f"{f.mean():.4f} ± {f.std() / len(f) ** 0.5:.4f}" for f in figures]
            table.add_row(name, f"{size / 1e6:.2f}", *spread)
            console.print(name, *spread)
    console.print(table)


if __name__ == "__main__":
    main()
