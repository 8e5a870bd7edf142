"""A plan reads headers: what it tells of a model is what the loaded model says, and what its passes would do."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import families
import pytest
import small_models
import torch

from slm_export.checkpoint import Checkpoint
from slm_export.compression.workbench import Workbench
from slm_export.errors import InputError
from slm_export.optimizers.drop_layers import DropLayers
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.optimizers.palettize import Palettize
from slm_export.optimizers.prune_kv_groups import PruneKvGroups
from slm_export.optimizers.prune_neurons import PruneNeurons
from slm_export.planning.compiled import shape_of
from slm_export.planning.model import read_model
from slm_export.planning.shaping import SHAPING, shaped
from slm_export.planning.storage import OTHERS, QUANTIZING, smaller, store
from slm_export.profile import default_profile
from slm_export.quantization_options import PALETTIZE, QuantizationOptions, merged
from slm_export.recipe import PASSES
from slm_export.source.load import load_checkpoint
from slm_export.weights import Dense, Palettized, Quantized

DECODERS = ("llama-3.2", "gemma-2", "phi-4-mini", "gpt-2", "smollm-3")
ENCODERS = ("bert, masks", "distilbert, answers", "mobilebert")
REST = sorted((families.DECODERS.keys() | families.ENCODERS.keys()) - {*DECODERS, *ENCODERS})


@pytest.mark.parametrize(
    "name", [*DECODERS, *ENCODERS, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)]
)
def test_headers_tell_what_the_module_tells(name: str, tmp_path: Path) -> None:
    family = {**families.DECODERS, **families.ENCODERS}[name]
    families.save(family, tmp_path)
    model, loaded = read_model(tmp_path), load_checkpoint(tmp_path)

    of_module = Counter(
        (role, tuple(sorted(loaded.weights[weight].shape)))
        for weight, role in loaded.roles.items()
        if role != "other" and weight in loaded.weights
    )
    of_headers = Counter((matrix.role, tuple(sorted(matrix.shape))) for matrix in model.matrices)
    assert of_headers == of_module
    assert model.tied == bool(loaded.tied) or not model.decodes
    assert model.positions is not None
    assert model.decodes == (name in families.DECODERS)
    # What remains are biases and norms; a tied bias is one vector under two names.
    vectors = sum(w.count for n, w in loaded.weights.items() if loaded.roles.get(n, "other") == "other")
    assert vectors <= model.vectors + model.others_bytes <= 1.02 * vectors + families.VOCABULARY


def test_the_cache_is_that_of_the_heads(tmp_path: Path) -> None:
    small_models.llama(tmp_path, head_dim=24)
    assert read_model(tmp_path).kv_values == 2 * 2 * 2 * 24  # keys and values, 2 layers, 2 heads


def _stored(loaded: Checkpoint) -> dict[str, tuple[int, int, bool]]:
    def of(weight: Any) -> tuple[int, int, bool]:
        if isinstance(weight, Dense):
            return 16 if weight.dtype == torch.float16 else 32, 0, False
        assert isinstance(weight, Quantized | Palettized)
        grouped = weight.group if isinstance(weight, Palettized) or weight.bits == 4 else 0
        return weight.bits, grouped, isinstance(weight, Palettized)

    return {name: of(w) for name, w in loaded.weights.items() if loaded.roles[name] != "other"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 8, "embedding_bits": 8},
        {"bits": 4, "group": 64, "embedding_bits": 4, "head_bits": 16},
        {"bits": 16, "embedding_bits": 32},
        {"bits_by_tensor": {"*.v_proj.weight": 8, "model.layers.0.self_attn.v_proj.weight": 16}},
        {"group_by_tensor": {"*mlp*": 64, "*down_proj*": 32}},
    ],
    ids=str,
)
def test_a_plan_stores_what_the_pass_stores(options: dict[str, Any], tmp_path: Path) -> None:
    # 80 columns of down: no group divides them, and it stays as it is.
    loaded = small_models.llama(tmp_path, intermediate_size=80)
    done = GroupQuantize(**options).run(loaded).checkpoint
    stored, notes = store(read_model(tmp_path), [(GroupQuantize.name, options)])
    assert {one.matrix.name: (one.bits, one.group, one.palette) for one in stored} == _stored(done)
    assert not notes


@pytest.mark.parametrize("options", [{}, {"bits": 6, "embedding_bits": 4, "group_channels": 12}], ids=str)
def test_a_plan_stores_what_palettizing_stores(options: dict[str, Any], tmp_path: Path) -> None:
    done = Palettize(**options).run(small_models.llama(tmp_path)).checkpoint
    stored, _ = store(read_model(tmp_path), [(PALETTIZE, options)])
    assert {one.matrix.name: (one.bits, one.group, one.palette) for one in stored} == _stored(done)


@pytest.mark.parametrize("embedding", [4, 8, 16, 32])
@pytest.mark.parametrize("palettes", [False, True])
def test_tables_of_positions_keep_8_bits(palettes: bool, embedding: int, tmp_path: Path) -> None:
    families.save(families.ENCODERS["bert"], tmp_path)
    options: dict[str, Any] = {"embedding_bits": embedding}
    made = Palettize(**options) if palettes else GroupQuantize(**options)
    done = made.run(load_checkpoint(tmp_path)).checkpoint
    stored, _ = store(read_model(tmp_path), [(made.name, options)])
    assert {one.matrix.name: (one.bits, one.group, one.palette) for one in stored} == _stored(done)


def test_every_pass_is_known_to_plans() -> None:
    assert {name for name, cls in PASSES.items() if cls.quantizes} == QUANTIZING
    assert set(PASSES) <= QUANTIZING | {PALETTIZE} | OTHERS
    resized = {name for name, cls in PASSES.items() if cls.structural} - {"awq", "rotate"}
    assert resized == SHAPING.keys()


PRUNING = (
    (DropLayers, {"count": 1}),
    (PruneNeurons, {"fraction": 0.3, "multiple": 8, "uniform": True}),
    (PruneKvGroups, {"fraction": 0.5}),
    pytest.param(DropLayers, {"fraction": 0.5}, marks=pytest.mark.slow),
    pytest.param(PruneNeurons, {"fraction": 0.5, "uniform": True}, marks=pytest.mark.slow),
    pytest.param(PruneNeurons, {"fraction": 0.25}, marks=pytest.mark.slow),
)


@pytest.mark.parametrize(("cls", "options"), PRUNING, ids=str)
def test_what_is_pruned_leaves_what_was_planned(cls: Any, options: dict[str, Any], tmp_path: Path) -> None:
    loaded = small_models.llama(tmp_path, intermediate_size=256, num_hidden_layers=3, num_key_value_heads=4)
    done = cls(**options).run(loaded, Workbench(calibration=small_models.random_text(8))).checkpoint
    model, notes = shaped(read_model(tmp_path), [(cls.name, options)])
    assert not notes
    made, _ = shape_of(done)
    if options.get("uniform") or cls is not PruneNeurons:
        assert Counter(m.shape for m in model.matrices) == Counter(m.shape for m in made.matrices)
    else:  # each layer is planned to lose the mean
        assert model.parameters - model.vectors == pytest.approx(made.parameters, rel=0.01)
    assert model.layers == made.layers


def test_fewer_tokens_are_fewer_rows(tmp_path: Path) -> None:
    small_models.llama(tmp_path, vocab_size=1000)
    model, _ = shaped(read_model(tmp_path), [("trim-vocabulary", {"keep": 0.5})])
    assert {m.shape[0] for m in model.matrices if m.role in ("embedding", "head")} == {512}
    model, _ = shaped(read_model(tmp_path), [("trim-vocabulary", {"tokens": 90})])
    assert {m.shape[0] for m in model.matrices if m.role in ("embedding", "head")} == {96}


def test_what_headers_do_not_tell_is_not_guessed(tmp_path: Path) -> None:
    families.save(families.ENCODERS["albert"], tmp_path)
    before = read_model(tmp_path)
    model, notes = shaped(before, [("drop-layers", {"count": 1}), ("prune-kv-groups", {})])
    assert model == before
    assert "drop-layers: what it narrows cannot be told" in notes[0]
    assert len(notes) == 2
    _, notes = store(before, [("novel", {})])
    assert "novel" in notes[0]


def test_a_group_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    small_models.llama(tmp_path)
    with pytest.raises(InputError, match=r"group size 128 does not divide the 96 columns .* fits: 32"):
        store(read_model(tmp_path), [("group-quantize", {"group": 128})])


def test_the_next_recipes_take_less_and_less(tmp_path: Path) -> None:
    small_models.llama(tmp_path, hidden_size=256, intermediate_size=256)
    model = read_model(tmp_path)
    sizes = [
        sum(one.bytes("executorch", tied=False) for one in store(model, recipe)[0])
        for _, recipe in smaller(merged(default_profile("android").recipe, QuantizationOptions(), QUANTIZING))
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)


def write_headers(folder: Path, tensors: dict[str, tuple[int, ...]], **config: Any) -> None:
    """Write a folder whose safetensors file has headers, and a hole where the values would be."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensors.items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **config}))


def test_no_value_is_read(tmp_path: Path) -> None:
    write_headers(tmp_path, {"model.embed_tokens.weight": (1000, 64)}, vocab_size=1000, num_hidden_layers=1)
    size = (tmp_path / "model.safetensors").stat().st_size
    os.truncate(tmp_path / "model.safetensors", size - 1000 * 64 * 2)
    assert read_model(tmp_path).parameters == 64_000


@pytest.mark.parametrize("said", [True, False, None])
@pytest.mark.parametrize("stored", [True, False])
def test_a_head_is_tied_as_said_or_where_none_is_stored(
    stored: bool, said: bool | None, tmp_path: Path
) -> None:
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (100, 64)}
    if stored:
        tensors["lm_head.weight"] = (100, 64)
    config = {} if said is None else {"tie_word_embeddings": said}
    write_headers(tmp_path, tensors, vocab_size=100, **config)
    model = read_model(tmp_path)
    tied = not stored if said is None else said
    assert model.tied == tied
    assert sum(m.role == "head" for m in model.matrices) == (stored and not tied)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or corrupt"),
        (b"\xff" * 8, "truncated or corrupt"),
        ((2).to_bytes(8, "little") + b"{]", "truncated or corrupt"),
        ((14).to_bytes(8, "little") + b'{"a":{"b": 1}}', "truncated or corrupt"),
    ],
)
def test_a_broken_file_is_told_of(content: bytes, message: str, tmp_path: Path) -> None:
    write_headers(tmp_path, {"a.weight": (4, 4)})
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_model(tmp_path)


def test_a_configuration_without_a_class_is_told_of(tmp_path: Path) -> None:
    write_headers(tmp_path, {"a.weight": (4, 4)}, architectures=None)
    with pytest.raises(InputError, match="name the model's class"):
        read_model(tmp_path)
