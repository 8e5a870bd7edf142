"""Training steps in ExecuTorch's runtime, beside torch's autograd."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TOKENIZER_FILES, Cli
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

from slm_export.errors import GateError, InputError
from slm_export.learning.on_device.build import (
    FACTS,
    PROGRAM,
    Request,
    build_trainer,
    random_batches,
    write_adapter,
)
from slm_export.learning.on_device.proof import Proof, prove
from slm_export.learning.on_device.step import FrozenEmbedding, FrozenLinear, learner, step_of
from slm_export.progress import Progress
from slm_export.recipe import make_pass
from slm_export.source.adapters import merged_from
from slm_export.source.hub import find_model
from slm_export.source.load import load_checkpoint
from slm_export.weights import Quantized


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, pycode: Path) -> Path:
    folder = tmp_path_factory.mktemp("models") / "classifier"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=4096,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
        num_labels=3,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(pycode / name, folder / name)
    return folder


def quiet() -> Progress:
    return Progress(silent=True)


def test_frozen_layers_compute_what_their_values_do(tiny_llama: Path) -> None:
    source = load_checkpoint(tiny_llama)
    made = make_pass("group-quantize", {"bits": 4, "group": 32, "embedding_bits": 8}, "test").run(source)
    linear = made.checkpoint.weights["model.layers.0.mlp.up_proj.weight"]
    table = made.checkpoint.weights["model.embed_tokens.weight"]
    assert isinstance(linear, Quantized)
    assert isinstance(table, Quantized)
    x, ids = torch.randn(2, 5, 64), torch.tensor([[0, 7, 4095]])
    torch.testing.assert_close(FrozenLinear(linear, None)(x), x @ linear.float32().t())
    torch.testing.assert_close(FrozenEmbedding(table)(ids), table.float32()[ids])


def test_a_decoder_s_adapter_learns_on_the_grid_that_ships(
    tiny_llama: Path, tmp_path: Path, cli: Cli
) -> None:
    done = cli(
        "adapter", "trainer", tiny_llama, "--out", "training", "--length", "8", "--rank", "2", "--json"
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    out = tmp_path / "training"
    assert facts == json.loads((out / FACTS).read_text())
    assert facts["base"] == {"bits": 4, "group": 32, "in_floats": []}
    beside = facts["beside_torch"]
    assert beside["gradient_difference"] < 1e-3
    assert len(set(beside["losses"])) == 4
    assert all(".lora_" in name for name in facts["parameters"])
    # A byte for each value of the base, and little else.
    assert (out / PROGRAM).stat().st_size < 4096 * 64 * 2
    made = find_model(str(out / "adapter"))
    facts_of_it = merged_from(made)
    assert facts_of_it is not None
    assert facts_of_it.rank == 2


def test_a_classifier_s_head_learns(classifier: Path, tmp_path: Path) -> None:
    out, proof = build_trainer(
        Request(str(classifier), tmp_path / "out", train="head", length=8, bits=8), quiet()
    )
    facts = json.loads((out / FACTS).read_text())
    assert sorted(facts["parameters"]) == ["model.classifier.bias", "model.classifier.weight"]
    assert facts["inputs"] == {"ids": [1, 8], "mask": [1, 8], "label": [1]}
    assert proof.parameter_difference < 1e-3
    assert not (out / "adapter").exists()


@pytest.fixture(scope="module")
def trainer(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Request]:
    request = Request(str(tiny_llama), tmp_path_factory.mktemp("trainer") / "out", length=8, bits=32)
    return build_trainer(request, quiet())[0], request


def test_what_a_device_learned_is_an_adapter(
    tiny_llama: Path, trainer: tuple[Path, Request], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(trainer[0], tmp_path / "out"))
    names = json.loads((out / FACTS).read_text())["parameters"]
    learned = {name: torch.randn(shape) for name, shape in names.items()}
    write_adapter(learned, out / "adapter")
    stored = load_file(out / "adapter" / "adapter_model.safetensors")
    assert sorted(map(tuple, (value.shape for value in stored.values()))) == sorted(
        map(tuple, names.values())
    )
    base = load_checkpoint(tiny_llama).weights["model.layers.0.self_attn.q_proj.weight"].float32()
    merged = load_checkpoint(find_model(str(out / "adapter")))
    up, down = (
        learned[f"model.base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.default.weight"]
        for side in "BA"
    )
    torch.testing.assert_close(
        merged.weights["model.layers.0.self_attn.q_proj.weight"].float32(), base + 2 * up @ down
    )


def test_a_runtime_that_trains_otherwise_is_refused(tiny_llama: Path, trainer: tuple[Path, Request]) -> None:
    out, request = trainer
    source = load_checkpoint(tiny_llama)

    def held_against(seed: int) -> Proof:
        module = learner(source, "adapter", request.rank, (), seed)
        return prove(out / PROGRAM, step_of(source, module), random_batches(source, request))

    assert held_against(request.seed).gradient_difference < 1e-3
    with pytest.raises(GateError, match=r"the runtime's (loss|gradient|parameter) differs from torch's by"):
        held_against(request.seed + 1)


def test_what_cannot_be_trained_is_refused(tiny_llama: Path, minilm: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="only a classifier has a head"):
        build_trainer(Request(str(tiny_llama), out, train="head"), quiet())
    with pytest.raises(InputError, match="a sentence-embedding model"):
        build_trainer(Request(str(minilm), out), quiet())
    with pytest.raises(InputError, match="--length 65 is more than the 64 positions"):
        build_trainer(Request(str(tiny_llama), out, length=65), quiet())
    with pytest.raises(InputError, match="no layers for an adapter"):
        build_trainer(Request(str(tiny_llama), out, targets=("nothing",)), quiet())
    assert list(tmp_path.iterdir()) == []
