"""Pruned models in every format: the artifact says what the pruned model says, whatever the widths of its layers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from families import DECODERS, ENCODERS, STOP, UNQUANTIZED, WHOLE, apart, ids_of, save, save_tokenizer
from test_structure import run

from slm_export.checkpoint import Checkpoint
from slm_export.compression.geometry import attentions, mlps
from slm_export.errors import InputError
from slm_export.exporters import litert
from slm_export.generation import Sampling, generate
from slm_export.graph.model import build_reference
from slm_export.optimizers.drop_layers import DropLayers
from slm_export.optimizers.prune_kv_groups import PruneKvGroups
from slm_export.optimizers.prune_neurons import PruneNeurons
from slm_export.registry import exporter
from slm_export.runtime import ExportOptions
from slm_export.source.load import load_checkpoint
from slm_export.tokenization.tokenizer import SourceTokenizer

TOKENS, CONTEXT = 24, 64
PROMPT = "def save(family"
GENERATED = 12


@pytest.fixture(autouse=True)
def one_prefill_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(litert, "PREFILLS", (16,))


def source(name: str, folder: Path, **more: Any) -> Checkpoint:
    cls, config, options = {**DECODERS, **ENCODERS}[name]
    save((cls, config, {**options, **more}), folder)
    if name in DECODERS:
        save_tokenizer(folder)
    return load_checkpoint(folder)


def exported(checkpoint: Checkpoint, format: str, folder: Path) -> Any:
    made = exporter(format)
    made.ready()
    made.check(checkpoint)
    path = folder / Path(made.file(checkpoint.task)).name
    options = ExportOptions(context=CONTEXT, stop_ids=(STOP,), bos_id=1, tokenizer=checkpoint.folder)
    made.write(WHOLE.run(checkpoint).checkpoint, options, path)
    return made.open(path, checkpoint.task)


@torch.no_grad()
def decoder_apart(session: Any, checkpoint: Checkpoint) -> float:
    """Read a prompt, then token by token; return how far that is from the pruned model in torch."""
    ids = ids_of(TOKENS)
    expected = build_reference(checkpoint)(input_ids=ids).logits[0]
    got = [session.logits(ids[0, :15].tolist(), 0)]
    got += [session.logits([int(ids[0, at])], at) for at in range(15, TOKENS)]
    return apart(torch.stack(got), expected[14:])


@pytest.mark.parametrize(
    "format",
    ["onnx", *(pytest.param(name, marks=pytest.mark.slow) for name in ("executorch", "litert", "coreml"))],
)
def test_a_decoder_with_layers_of_different_neurons(format: str, tmp_path: Path) -> None:
    """A layer less, one key-value head of two less in each, and as many neurons as each can spare."""
    pruned = source("llama-3.2", tmp_path / "source", num_hidden_layers=4)
    for step in (DropLayers(count=1), PruneKvGroups(fraction=0.5), PruneNeurons(fraction=1 / 3, multiple=32)):
        pruned = run(step, pruned).checkpoint
    assert len({parts.count for parts in mlps(pruned, "test")}) > 1
    session = exported(pruned, format, tmp_path)
    assert decoder_apart(session, pruned) <= UNQUANTIZED
    metadata = tmp_path / "genai_config.json"
    if metadata.exists():
        said = json.loads(metadata.read_text())["model"]["decoder"]
        assert (said["num_hidden_layers"], said["num_attention_heads"], said["num_key_value_heads"]) == (
            3,
            2,
            1,
        )
    made = exporter(format)
    if made.elsewhere is None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tmp_path / "source" / name, tmp_path / name)
        tokenizer = SourceTokenizer.load(tmp_path / "source")
        path = tmp_path / Path(made.file(pruned.task)).name
        text = made.generate(path, tmp_path / "tokenizer.json", PROMPT, GENERATED, 0)
        tokens = list(generate(session, tokenizer.encode(PROMPT), [STOP], GENERATED, Sampling()))
        assert text
        assert text == tokenizer.decode(tokens)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["executorch", "litert"])
@pytest.mark.parametrize("name", ["gpt-2", "phi-3", "gemma-3", "qwen-3"])
def test_a_decoder_with_layers_of_different_heads(name: str, format: str, tmp_path: Path) -> None:
    pruned = run(PruneKvGroups(fraction=1 / 3, uniform=False), source(name, tmp_path / "source")).checkpoint
    assert len({parts.count for parts in attentions(pruned, "test")}) > 1
    assert decoder_apart(exported(pruned, format, tmp_path), pruned) <= UNQUANTIZED


@pytest.mark.parametrize("format", ["onnx", "coreml"])
def test_caches_of_one_shape_are_what_some_formats_have(format: str, tmp_path: Path) -> None:
    pruned = run(PruneKvGroups(fraction=1 / 3, uniform=False), source("phi-3", tmp_path)).checkpoint
    with pytest.raises(InputError, match=f"key-value heads and widths cannot be exported to {format}"):
        exporter(format).check(pruned)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["executorch", "litert", "onnx", "coreml"])
@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta, classes"])
def test_an_encoder_with_layers_of_different_widths(name: str, format: str, tmp_path: Path) -> None:
    pruned = source(name, tmp_path / "source", **{"n_layers" if "distil" in name else "num_hidden_layers": 3})
    for step in (
        DropLayers(count=1),
        PruneKvGroups(fraction=0.25, uniform=False),
        PruneNeurons(fraction=0.25, multiple=32),
    ):
        pruned = run(step, pruned).checkpoint
    session, ids = exported(pruned, format, tmp_path), ids_of(TOKENS)
    with torch.no_grad():
        expected = build_reference(pruned)(ids, torch.ones_like(ids))[0]
    got = session.outputs(ids[0].tolist(), [1] * TOKENS)
    assert apart(got, expected) <= UNQUANTIZED


PROFILE = """
schema  = 1
name    = "narrow"
title   = "A narrower model"
target  = "linux"
formats = ["executorch", "litert", "onnx", "coreml"]
context = 256

[memory]
total_gb = { value = 8, source = "made up for a test" }

[[recipe]]
pass     = "prune-neurons"
fraction = 0.25

[[recipe]]
pass           = "group-quantize"
bits           = 8
embedding_bits = 8

[gates]
max_kl_mean          = 0.1
min_top1_agreement   = 0.85
max_perplexity_ratio = 1.1
min_greedy_agreement = 0.7
"""


@pytest.mark.slow
def test_a_narrower_model_goes_all_the_way(pycode: Path, tmp_path: Path, cli: Cli) -> None:
    profile, out = tmp_path / "narrow.toml", tmp_path / "out"
    profile.write_text(PROFILE)
    formats = ("executorch", "litert", "onnx", "coreml")
    chosen = [part for name in formats for part in ("--format", name)]
    asked = ("--target", "linux", "--device", profile, *chosen, "--no-bench", "--out", out, "--json")
    made = cli(pycode, *asked, timeout=1800)
    assert made.returncode == 0, made.stderr
    report = json.loads(made.stdout)
    assert {each["artifact"]["format"] for each in report["formats"]} == set(formats)
    row = next(row for row in report["passes"] if row["name"] == "prune-neurons")
    # 4 of 18 multiples of 256 neurons, three rows of 256 bfloat16 values each.
    assert row["bytes_before"] - row["bytes_after"] == 4 * 256 * 3 * 256 * 2
    assert any("1,024 of 4,608 neurons removed" in note for note in report["notes"])
    # The same passes on the same text give the same codes again.
    verified = cli("verify", out, "--source", pycode, "--json", timeout=1800)
    assert verified.returncode == 0, verified.stdout + verified.stderr
