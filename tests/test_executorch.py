"""The ExecuTorch exporter against transformers' own eager output, in every width, on a model of one layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from slm_export.checkpoint import Checkpoint
from slm_export.exporters.executorch import ExecuTorchExporter
from slm_export.exporters.executorch_dialect import xnnpack_rounding
from slm_export.graph.model import build_reference
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.runtime import DecoderSession, ExportOptions
from slm_export.source.load import load_checkpoint

CONTEXT = 48
WIDTHS = {
    "32 bits": GroupQuantize(bits=32, embedding_bits=32),
    "16 bits": GroupQuantize(bits=16, embedding_bits=16),
    "8 bits": GroupQuantize(bits=8, embedding_bits=8),
    "4 bits, group 32": GroupQuantize(bits=4, group=32, embedding_bits=8),
    "4 bits, group 64, embedding too": GroupQuantize(bits=4, group=64, embedding_bits=4),
}
# Shares of the range of the logits. Float sums are reordered; float16 has 11 bits; int8 activations may round
# apart where a value lies on the edge of a step.
TOLERANCE = {"32 bits": 1e-5, "16 bits": 2e-3}
ROUNDING = 0.02


@dataclass(frozen=True)
class Exported:
    width: str
    source: Checkpoint
    quantized: Checkpoint
    session: DecoderSession
    path: Path


@pytest.fixture(scope="module", params=WIDTHS)
def exported(
    request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    source = load_checkpoint(tiny_llama)
    quantized = WIDTHS[request.param].run(source).checkpoint
    exporter = ExecuTorchExporter()
    exporter.ready()
    path = tmp_path_factory.mktemp("executorch") / "model.pte"
    artifact = exporter.write(quantized, ExportOptions(CONTEXT, stop_ids=(1, 7), bos_id=0), path)
    assert artifact.bytes == path.stat().st_size
    session = exporter.open(path, "text-generation")
    assert isinstance(session, DecoderSession)
    return Exported(request.param, source, quantized, session, path)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return torch.randint(3, 4096, (CONTEXT,), generator=torch.Generator().manual_seed(1)).tolist()


def reference(exported: Exported, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        model = build_reference(exported.quantized, xnnpack_rounding)
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


def test_a_prompt_may_come_in_pieces(exported: Exported, tokens: list[int]) -> None:
    at_once = exported.session.logits(tokens, 0)
    exported.session.logits(tokens[:5], 0)
    exported.session.logits(tokens[5:30], 5)
    in_pieces = exported.session.logits(tokens[30:], 30)
    assert apart(in_pieces, at_once) <= TOLERANCE.get(exported.width, ROUNDING)


def test_an_earlier_conversation_leaves_no_trace(exported: Exported, tokens: list[int]) -> None:
    first = exported.session.logits(tokens[:9], 0)
    exported.session.logits(tokens[::-1], 0)
    assert torch.equal(exported.session.logits(tokens[:9], 0), first)


@pytest.mark.parametrize("exported", ["32 bits"], indirect=True)
def test_unquantized_it_matches_transformers_eager(
    exported: Exported, tiny_llama: Path, tokens: list[int]
) -> None:
    from transformers import AutoModelForCausalLM

    eager = AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        expected = eager(torch.tensor([tokens])).logits[0]
    got = torch.stack([exported.session.logits([token], at) for at, token in enumerate(tokens)])
    assert apart(got, expected) <= 1e-5


def test_the_file_names_what_runners_ask_for(exported: Exported) -> None:
    metadata = exported.session.metadata()
    assert metadata["get_eos_ids"] == [1, 7]
    assert metadata["get_bos_id"] == 0
    assert metadata["get_max_context_len"] == CONTEXT
    assert metadata["get_max_seq_len"] == CONTEXT
    assert metadata["get_vocab_size"] == 4096
    assert metadata["use_kv_cache"]
    assert metadata["enable_dynamic_shape"]


def test_more_than_the_context_is_refused(exported: Exported, tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        exported.session.logits([*tokens, 5], 0)


@pytest.mark.parametrize("exported", ["8 bits"], indirect=True)
def test_codes_reach_the_file_bit_for_bit(exported: Exported) -> None:
    """int8 codes lie in the file as they are, row by row, so a whole matrix can be searched for."""
    program = exported.path.read_bytes()
    for name, weight in exported.quantized.weights.items():
        if name.endswith("proj.weight"):
            assert weight.codes().numpy().tobytes() in program, name  # type: ignore[union-attr]
