"""The LiteRT exporter: what the file holds, that its copied layers are converted ones, and that a fault in it shows."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import families
import pytest
import torch
from families import apart, ids_of

from slm_export.checkpoint import Checkpoint
from slm_export.errors import InputError
from slm_export.exporters import litert, litert_lowering
from slm_export.exporters.litert import LiteRTExporter
from slm_export.exporters.litert_container import Container
from slm_export.exporters.litert_runner import LiteRTLMTokenizer
from slm_export.graph.layers import CannotStamp
from slm_export.graph.model import build_reference
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.parity import differing, judge_codes
from slm_export.runtime import DecoderSession, ExportOptions
from slm_export.source.load import load_checkpoint
from slm_export.tokenization.runtime_tokenizers import TokenizerLoadError
from slm_export.weights import Dense, Quantized

CONTEXT = 64
LAYERS = 5
# Widths of the default recipes; biases, a tied vocabulary and an all-zero row come along.
RECIPE = GroupQuantize(bits=4, group=32, embedding_bits=4)
PAD = 0


@dataclass(frozen=True)
class Exported:
    folder: Path
    source: Checkpoint
    quantized: Checkpoint
    path: Path

    @property
    def options(self) -> ExportOptions:
        return ExportOptions(
            CONTEXT, stop_ids=(families.STOP, 7), bos_id=1, adds_bos=True, tokenizer=self.folder
        )


def stored_of(checkpoint: Checkpoint) -> Mapping[str, Quantized]:
    return {name: weight for name, weight in checkpoint.weights.items() if isinstance(weight, Quantized)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("litert")
    name, config, options = families.DECODERS["qwen-2.5"]
    deep = {**options, "num_hidden_layers": LAYERS, "tie_word_embeddings": True}
    families.save((name, config, deep), folder)
    families.save_tokenizer(folder)
    source = with_zero_row(load_checkpoint(folder))
    made = Exported(folder, source, RECIPE.run(source).checkpoint, folder / "model.litertlm")
    exporter = LiteRTExporter()
    exporter.ready()
    artifact = exporter.write(made.quantized, made.options, made.path)
    assert artifact.bytes == made.path.stat().st_size
    return made


def with_zero_row(source: Checkpoint) -> Checkpoint:
    name = next(name for name, role in source.roles.items() if role == "embedding")
    table = source.weights[name].float32().clone()
    table[PAD] = 0
    return source.with_weights({name: Dense(tuple(table.shape), table.dtype, lambda: table)})


def opened(path: Path) -> DecoderSession:
    session = LiteRTExporter().open(path, "text-generation")
    assert isinstance(session, DecoderSession)
    return session


def test_a_decoder_is_its_reference_token_by_token_and_in_prompts(exported: Exported) -> None:
    ids = ids_of(40)
    ids[0, 3] = PAD
    with torch.no_grad():
        expected = build_reference(exported.quantized, LiteRTExporter().rounding)(input_ids=ids).logits[0]
    session = opened(exported.path)
    tokens = ids[0].tolist()
    steps = torch.stack([session.logits([token], at) for at, token in enumerate(tokens)])
    assert apart(steps, expected) <= families.ROUNDING
    # Of lengths that a function has, that it fills in part, and that take several.
    for length in (1, 2, 16, 17, 18, 40):
        assert apart(session.logits(tokens[:length], 0), expected[length - 1]) <= families.ROUNDING
    session.logits(tokens[:30], 0)
    assert apart(session.logits(tokens[30:], 30), expected[-1]) <= families.ROUNDING
    session.close()


def test_a_prompt_may_fill_the_context(exported: Exported) -> None:
    """What a function writes behind its tokens must not be pushed back over what is there already."""
    tokens = ids_of(CONTEXT)[0].tolist()
    session = opened(exported.path)
    steps = [session.logits([token], at) for at, token in enumerate(tokens)][-1]
    session.logits(tokens[: CONTEXT - 9], 0)
    assert apart(session.logits(tokens[CONTEXT - 9 :], CONTEXT - 9), steps) <= 1e-5
    with pytest.raises(ValueError, match="do not fit"):
        session.logits([1], CONTEXT)
    session.close()


def test_copied_layers_are_converted_layers(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(checkpoint: Checkpoint) -> None:
        raise CannotStamp("asked to convert every layer")

    monkeypatch.setattr(litert, "PREFILLS", (16,))
    # Without a reason to convert every layer: else two conversions of all are compared.
    assert litert_lowering.lower_decoder(exported.quantized, CONTEXT, [], tmp_path / "m.tflite") is None
    monkeypatch.setattr(litert_lowering, "layers_of", refuse)
    LiteRTExporter().write(exported.quantized, exported.options, tmp_path / "whole.litertlm")
    copied, whole = opened(exported.path), opened(tmp_path / "whole.litertlm")
    tokens = ids_of(30)[0].tolist()
    for length in (1, 17, 30):
        assert torch.equal(copied.logits(tokens[:length], 0), whole.logits(tokens[:length], 0))
    assert torch.equal(copied.logits(tokens[:3], 30), whole.logits(tokens[:3], 30))


def test_layers_that_differ_are_all_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, config, options = families.DECODERS["gemma-3"]
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    families.save((name, config, {**options, "num_hidden_layers": 4, "layer_types": kinds}), tmp_path)
    reason = litert_lowering.lower_decoder(load_checkpoint(tmp_path), CONTEXT, [], tmp_path / "m.tflite")
    assert reason is not None
    assert "differs from layer 0" in reason


def test_the_files_integers_are_the_checkpoints(exported: Exported) -> None:
    stored = LiteRTExporter().stored(exported.path)
    check = judge_codes(stored, stored_of(exported.quantized))
    assert check.passed, check.detail
    assert len(stored) == 7 * LAYERS + 1  # the tied vocabulary once


def test_a_tied_vocabulary_is_in_the_file_once(exported: Exported) -> None:
    (name,) = (name for name, role in exported.source.roles.items() if role == "embedding")
    weight = exported.quantized.weights[name]
    assert isinstance(weight, Quantized)
    row = weight.packed[5].numpy().tobytes()
    assert exported.path.read_bytes().count(row) == 1


@pytest.mark.parametrize("what", ["codes", "scales"])
def test_a_flipped_bit_is_seen_and_named(exported: Exported, what: str, tmp_path: Path) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    weight = exported.quantized.weights[name]
    assert isinstance(weight, Quantized)
    part = weight.packed if what == "codes" else weight.scales.half()
    content = bytearray(exported.path.read_bytes())
    at = content.index(part.contiguous().view(torch.uint8).numpy().tobytes())
    content[at + 11] ^= 0x10
    damaged = tmp_path / "damaged.litertlm"
    damaged.write_bytes(content)
    stored = LiteRTExporter().stored(damaged)
    assert differing(stored, stored_of(exported.quantized)) == (name,)
    assert name in judge_codes(stored, stored_of(exported.quantized)).detail


def test_the_same_model_gives_the_same_bytes(exported: Exported, tmp_path: Path) -> None:
    again = tmp_path / "again.litertlm"
    LiteRTExporter().write(exported.quantized, exported.options, again)
    assert again.read_bytes() == exported.path.read_bytes()
    assert str(tmp_path).encode() not in again.read_bytes()


def test_the_runner_is_told_what_the_model_needs(exported: Exported) -> None:
    session = opened(exported.path)
    assert session.stop_ids == (families.STOP, 7)
    assert session.context == CONTEXT
    assert session.metadata()["start_token"] == [1]
    tokenizer = LiteRTExporter().open_tokenizer(exported.path, exported.path, "text-generation")
    assert tokenizer is not None
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (families.STOP, 7))
    ids = tokenizer.encode("def save(family)")
    assert ids
    assert tokenizer.decode(ids) == "def save(family)"


def test_a_tokenizer_that_ends_its_process_is_a_failed_tokenizer(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ends is the child that reads text, not the export."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    tokenizer = LiteRTLMTokenizer(exported.path)
    assert tokenizer.encode("def")
    os.kill(tokenizer._child._process.pid, signal.SIGABRT)
    with pytest.raises(ValueError, match=r"read text with LiteRT-LM died \(SIGABRT\)"):
        tokenizer.encode("def")
    with pytest.raises(ValueError, match="died"):
        tokenizer.decode([5])
    del tokenizer
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_file_that_is_none_is_a_failed_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "model.litertlm"
    file.write_bytes(b"LITERTLM" + bytes(1000))
    with pytest.raises(TokenizerLoadError, match="LiteRT-LM cannot open it"):
        LiteRTLMTokenizer(file)


def test_the_chat_template_and_the_sampler_are_packed(exported: Exported, tmp_path: Path) -> None:
    from slm_export.exporters.litert_container import write_container

    for file in exported.folder.glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(
        '{"do_sample": true, "top_k": 9, "top_p": 0.5, "temperature": 0.7}'
    )
    options = replace(exported.options, chat_template="{{ messages }}", tokenizer=tmp_path)
    with Container.read(exported.path).extracted() as model:
        write_container(model, options, tmp_path / "m.litertlm")
    metadata = Container.read(tmp_path / "m.litertlm").metadata
    assert metadata.jinja_prompt_template == "{{ messages }}"
    sampler = metadata.sampler_params
    assert (sampler.k, round(sampler.p, 3), round(sampler.temperature, 3)) == (9, 0.5, 0.7)


def test_xnnpack_takes_every_product(exported: Exported) -> None:
    found = LiteRTExporter().delegation(exported.path)
    assert found.function == "decode"
    assert found.taken_multiplications == found.multiplications > 0
    assert found.taken + sum(found.rest.values()) == found.operators
    assert "FULLY_CONNECTED" not in found.rest


@pytest.mark.parametrize("content", [b"", b"LITERTLM" + b"\0" * 64, b"not a model" * 100])
def test_what_is_no_container_is_an_input_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.litertlm"
    path.write_bytes(content)
    with pytest.raises(InputError, match="export the model again"):
        LiteRTExporter().open(path, "text-generation")


def test_an_operator_that_litert_lacks_is_named() -> None:
    from slm_export.exporters import litert_graph

    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"y": torch.special.bessel_j0(x)}

    class NoInputs:
        names, vectors = (), {}

        def example(self) -> dict[str, torch.Tensor]:
            return {}

    signature = litert_graph.Signature("odd", Odd(), {"x": torch.ones(2)})
    with pytest.raises(InputError, match="no operator for aten"):
        litert_graph.check_operators(signature, NoInputs())  # type: ignore[arg-type]
