"""The ONNX exporter in every width, on a model of one layer, and what its files hold."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from torch import Tensor

from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError
from slm_export.exporters.onnx import OnnxExporter
from slm_export.exporters.onnx_dialect import onnxruntime_rounding
from slm_export.exporters.onnx_file import data_file, read_stored
from slm_export.graph.layers import CannotStamp
from slm_export.graph.model import build_reference
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.runtime import DecoderSession, ExportOptions
from slm_export.source.load import load_checkpoint
from slm_export.source.tasks import GENERATION
from slm_export.tokenization.tokenizer import SourceTokenizer
from slm_export.weights import Quantized, grid_scale, pack_int4

CONTEXT = 48
WIDTHS = {
    "32 bits": GroupQuantize(bits=32, embedding_bits=32),
    "16 bits": GroupQuantize(bits=16, embedding_bits=16),
    "8 bits": GroupQuantize(bits=8, embedding_bits=8),
    "4 bits, group 32": GroupQuantize(bits=4, group=32, embedding_bits=8),
    "4 bits, group 64, embedding too": GroupQuantize(bits=4, group=64, embedding_bits=4),
}
# Shares of the range of the logits. Float sums are reordered; int8 activations may round apart where a value lies on
# the edge of a step.
TOLERANCE = {"32 bits": 1e-5, "16 bits": 1e-5}
ROUNDING = 0.02


@dataclass(frozen=True)
class Exported:
    width: str
    quantized: Checkpoint
    session: DecoderSession
    path: Path

    @property
    def matrices(self) -> dict[str, Quantized]:
        return {name: w for name, w in self.quantized.weights.items() if isinstance(w, Quantized)}


def export(checkpoint: Checkpoint, path: Path) -> DecoderSession:
    exporter = OnnxExporter()
    exporter.ready()
    artifact = exporter.write(checkpoint, ExportOptions(CONTEXT, stop_ids=(1, 7), bos_id=0), path)
    assert artifact.bytes == path.stat().st_size
    session = exporter.open(path, GENERATION)
    assert isinstance(session, DecoderSession)
    return session


@pytest.fixture(scope="module", params=WIDTHS)
def exported(
    request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    quantized = WIDTHS[request.param].run(load_checkpoint(tiny_llama)).checkpoint
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    return Exported(request.param, quantized, export(quantized, path), path)


def of_widths(*widths: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("exported", widths, indirect=True)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return torch.randint(3, 4096, (CONTEXT,), generator=torch.Generator().manual_seed(1)).tolist()


def reference(exported: Exported, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        model = build_reference(exported.quantized, onnxruntime_rounding)
        logits: Tensor = model(input_ids=torch.tensor([tokens])).logits[0]
    return logits


def apart(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / (expected.max() - expected.min()))


def test_reading_token_by_token_matches_torch(exported: Exported, tokens: list[int]) -> None:
    got = torch.stack([exported.session.logits([token], at) for at, token in enumerate(tokens)])
    assert apart(got, reference(exported, tokens)) <= TOLERANCE.get(exported.width, ROUNDING)


@pytest.mark.parametrize("length", [1, 2, 31, CONTEXT])
def test_reading_at_once_matches_torch(exported: Exported, tokens: list[int], length: int) -> None:
    got = exported.session.logits(tokens[:length], 0)
    expected = reference(exported, tokens[:length])[-1]
    assert apart(got, expected) <= TOLERANCE.get(exported.width, ROUNDING)


def test_an_earlier_conversation_leaves_no_trace(exported: Exported, tokens: list[int]) -> None:
    first = exported.session.logits(tokens[:9], 0)
    exported.session.logits(tokens[::-1], 0)
    assert torch.equal(exported.session.logits(tokens[:9], 0), first)


def test_more_than_the_context_is_refused(exported: Exported, tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        exported.session.logits([*tokens, 5], 0)


def test_every_code_and_scale_is_read_back_from_the_file(exported: Exported) -> None:
    stored = OnnxExporter().stored(exported.path)
    assert stored.keys() == exported.matrices.keys()
    for name, weight in exported.matrices.items():
        got = stored[name]
        assert (got.shape, got.bits, got.group) == (weight.shape, weight.bits, weight.group)
        assert torch.equal(got.packed, weight.packed), name
        assert torch.equal(got.scales, weight.scales), name


def test_a_tied_vocabulary_is_stored_once(exported: Exported) -> None:
    """The head is the embedding; everything else in the file is small."""
    floats = sum(w.bytes for w in exported.quantized.weights.values() if not isinstance(w, Quantized))
    # float32 there, bfloat16 in `bytes`; int8 has the sums of the columns too
    scales = sum(2 * w.scales.numel() + 4 * w.shape[0] * (w.bits == 8) for w in exported.matrices.values())
    codes = sum(w.bytes for w in exported.matrices.values())
    assert (
        exported.path.stat().st_size
        < codes + scales + 2 * floats * (exported.width == "16 bits") + floats + 30_000
    )


def test_the_file_is_onnx(exported: Exported) -> None:
    import onnx

    onnx.checker.check_model(str(exported.path), full_check=True)
    model = onnx.load(str(exported.path))
    names = {tensor.name for tensor in model.graph.initializer}
    assert len(names) == len(model.graph.initializer)
    if exported.width == "8 bits":
        assert "model.layers.0.self_attn.q_proj.weight.columns" in names


def test_the_file_says_nothing_of_this_machine(exported: Exported) -> None:
    import onnx

    text = str(onnx.load(str(exported.path)).SerializeToString()).lower()
    for word in ("site-packages", "/tmp", "/root", "/home", ".py", "stack_trace", "pkg.torch"):
        assert word not in text, word


@of_widths("4 bits, group 32")
def test_the_same_input_gives_the_same_bytes(exported: Exported, tmp_path: Path) -> None:
    export(exported.quantized, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == exported.path.read_bytes()


@of_widths("4 bits, group 32", "8 bits")
def test_a_flipped_code_is_seen(exported: Exported, tmp_path: Path) -> None:
    weight = exported.matrices["model.layers.0.mlp.down_proj.weight"]
    held = weight.packed ^ 0x88 if weight.bits == 4 else weight.packed.t()
    content = bytearray(exported.path.read_bytes())
    at = content.find(held.contiguous().numpy().tobytes())
    assert at > 0
    content[at] ^= 1
    (tmp_path / "model.onnx").write_bytes(content)
    stored = read_stored(tmp_path / "model.onnx")
    changed = [n for n, w in exported.matrices.items() if not torch.equal(stored[n].packed, w.packed)]
    assert changed == ["model.layers.0.mlp.down_proj.weight"]


@of_widths("8 bits")
@pytest.mark.parametrize("cut", [0, 10, 100_000])
def test_what_is_no_model_is_refused(exported: Exported, tmp_path: Path, cut: int) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(exported.path.read_bytes()[:cut])
    with pytest.raises(InputError, match=re.escape(str(path))):
        read_stored(path)
    with pytest.raises(InputError, match=re.escape(str(path))):
        OnnxExporter().open(path, GENERATION)
    with pytest.raises(InputError, match="not sentence-embedding"):
        OnnxExporter().open(exported.path, "sentence-embedding")


@of_widths("4 bits, group 32")
def test_large_weights_lie_beside_the_file(
    exported: Exported, tmp_path: Path, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slm_export.exporters.onnx_file.LARGEST", 1000)
    path = tmp_path / "model.onnx"
    exporter = OnnxExporter()
    artifact = exporter.write(exported.quantized, ExportOptions(CONTEXT), path)
    assert artifact.bytes == path.stat().st_size + data_file(path).stat().st_size
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in (path, data_file(path)):
        shutil.move(file, moved / file.name)
    session: Any = exporter.open(moved / path.name, GENERATION)
    assert torch.equal(session.logits(tokens, 0), exported.session.logits(tokens, 0))
    stored = exporter.stored(moved / path.name)
    assert all(torch.equal(stored[n].packed, w.packed) for n, w in exported.matrices.items())


@of_widths("8 bits")
def test_genai_is_told_what_it_needs(exported: Exported) -> None:
    config = json.loads(exported.path.with_name("genai_config.json").read_text())
    assert config["model"]["eos_token_id"] == [1, 7]
    assert config["model"]["bos_token_id"] == 0
    assert config["model"]["context_length"] == config["search"]["max_length"] == CONTEXT
    assert exported.session.stop_ids == (1, 7)
    assert exported.session.context == CONTEXT


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (8, 256)])
def test_the_rounding_is_the_kernels_own(bits: int, group: int, tmp_path: Path) -> None:
    """Without it a product is off by the steps of the activations; with it only the order of sums is another."""
    from slm_export.exporters.onnx_dialect import OnnxDialect
    from slm_export.exporters.onnx_file import write_model
    from slm_export.exporters.onnx_graph import convert, trace

    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(-7, 8, (48, 256), generator=generator, dtype=torch.int8)
    scales = grid_scale(torch.rand(48, 256 // group, generator=generator) + 0.01)
    weight = Quantized.of((48, 256), bits, codes if bits == 8 else pack_int4(codes), scales)
    dialect = OnnxDialect(_Named(weight))  # type: ignore[arg-type]
    module = torch.nn.Sequential(dialect.linear(weight, None))
    x = torch.randn(3, 256, generator=generator) * 5
    program = trace(module, (x,), (None,))
    graph, _ = convert(program, dialect.names_in(module), {"x": (3, 256)}, {"y": (3, 48)}, {})
    write_model(graph, dialect.stored.values(), tmp_path / "model.onnx")
    got = run(tmp_path / "model.onnx", x)
    expected = onnxruntime_rounding(x, weight) @ weight.float32().t()
    assert apart(got, expected) <= 1e-5
    assert apart(got, x @ weight.float32().t()) > 1e-4


class _Named:
    """As much of a checkpoint as a dialect looks at."""

    def __init__(self, weight: Quantized) -> None:
        self.weights, self.tied = {"weight": weight}, dict[str, str]()


def run(path: Path, x: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    made: np.ndarray[Any, Any] = session.run(None, {"x": x.numpy()})[0]
    return torch.from_numpy(made)


@of_widths("8 bits")
def test_the_runners_tokenizer_reads_as_the_source(exported: Exported, pycode: Path) -> None:
    bundle = exported.path.parent / "bundle"
    shutil.copytree(pycode, bundle / "tokenizer")
    exporter = OnnxExporter()
    assert exporter.runner_tokenizer(bundle) == "onnx/tokenizer.json"
    shutil.copy(exported.path.with_name("genai_config.json"), bundle / "onnx")
    tokenizer = exporter.open_tokenizer(
        bundle / "onnx" / "model.onnx", bundle / "onnx" / "tokenizer.json", GENERATION
    )
    assert tokenizer is not None
    source = SourceTokenizer.load(pycode)
    text = "def main():\n    return {'größe': 1}  # ok\n"
    assert tokenizer.encode(text) == source.encode(text)
    assert tokenizer.decode(source.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, (1, 7))


def test_heads_of_an_odd_width_are_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="multiples of 8"):
        OnnxExporter().check(load_checkpoint(tmp_path))


def test_copied_layers_are_traced_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is put together of three layers computes what all layers, traced, compute."""
    from slm_export.exporters import onnx_models

    name, config, options = families.DECODERS["qwen-2.5"]  # with biases
    families.save((name, config, {**options, "num_hidden_layers": 6}), tmp_path)
    quantized = WIDTHS["4 bits, group 32"].run(load_checkpoint(tmp_path)).checkpoint
    traced: list[int] = []
    trace_decoder = onnx_models._trace_decoder

    def counted(module: torch.nn.Module, layers: Sequence[Any], context: int) -> Any:
        traced.append(len(layers))
        return trace_decoder(module, layers, context)

    def refuse(checkpoint: Checkpoint) -> None:
        raise CannotStamp("asked to trace every layer")

    monkeypatch.setattr(onnx_models, "_trace_decoder", counted)
    copied = export(quantized, tmp_path / "copied.onnx")
    monkeypatch.setattr(onnx_models, "layers_of", refuse)
    whole = export(quantized, tmp_path / "whole.onnx")
    assert traced == [3, 6]
    tokens = families.ids_of(CONTEXT)[0].tolist()
    for length in (1, 2, 17, CONTEXT):
        assert torch.equal(copied.logits(tokens[:length], 0), whole.logits(tokens[:length], 0))
    copied.logits(tokens[:9], 0)
    whole.logits(tokens[:9], 0)
    assert torch.equal(copied.logits(tokens[9:12], 9), whole.logits(tokens[9:12], 9))
    assert operators(tmp_path / "copied.onnx") == operators(tmp_path / "whole.onnx")


def operators(path: Path) -> list[str]:
    import onnx

    return [node.op_type for node in onnx.load(str(path)).graph.node]


def test_a_layer_is_its_kernels_and_little_else(tmp_path: Path) -> None:
    """Each node costs some of a token's time: no turning of heads to and fro, no sums beside norms."""
    families.save(families.DECODERS["llama-3.2"], tmp_path)
    export(
        WIDTHS["4 bits, group 64, embedding too"].run(load_checkpoint(tmp_path)).checkpoint,
        tmp_path / "model.onnx",
    )
    found = Counter(operators(tmp_path / "model.onnx"))
    layers = 3
    assert found["MatMulNBits"] == 7 * layers + 1
    assert found["RotaryEmbedding"] == found["SkipSimplifiedLayerNormalization"] == 2 * layers
    assert found["RMSNormalization"] == found["GroupQueryAttention"] // layers == 1
    assert not found["Transpose"]
    assert found["Reshape"] + found["Add"] <= 8  # of positions and angles
