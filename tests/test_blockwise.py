"""Walking a model block by block: the same values as the model itself, replaced weights, going on after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import dense
from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from slm_export.checkpoint import Checkpoint
from slm_export.compression.blocks import CannotWalk
from slm_export.compression.blockwise import Block, Walk
from slm_export.graph.model import build_reference
from slm_export.source.load import load_checkpoint

WINDOWS = [(5, 6, 7, 8), (9, 10, 11, 12), (13, 14), (20, 21, 22, 23)]


def saved(model: object, folder: Path) -> Checkpoint:
    model.save_pretrained(folder)  # type: ignore[attr-defined]
    return load_checkpoint(folder)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Three blocks, biases everywhere, matrices stored as (in, out)."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=3, n_head=2)
    return saved(GPT2LMHeadModel(config), tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return saved(BertModel(BertConfig(vocab_size=50, **sizes)), tmp_path_factory.mktemp("bert"))


def inside(checkpoint: Checkpoint, path: str, window: tuple[int, ...]) -> torch.Tensor:
    """Return what a module of transformers' own model gives for one window, (tokens, width)."""
    model = build_reference(checkpoint)
    seen: list[torch.Tensor] = []
    found = dict(model.named_modules())
    part = found.get(path, found.get(f"model.{path}"))
    part.register_forward_hook(  # type: ignore[union-attr]
        lambda _, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    ids = torch.tensor([window])
    with torch.no_grad():
        model(ids, torch.ones_like(ids)) if checkpoint.task != "text-generation" else model(input_ids=ids)
    return seen[0].reshape(len(window), -1)


def rows(block: Block, window: tuple[int, ...]) -> torch.Tensor:
    """Return what a block makes of one window, (tokens, width)."""
    for batch in block.batches:
        for row, ids in enumerate(batch.ids.tolist()):
            if tuple(ids) == window:
                with torch.no_grad():
                    return block.run(batch)[row]
    raise AssertionError(window)


@pytest.mark.parametrize("which", ["gpt2", "bert", "pycode"])
def test_blocks_make_what_they_make_in_the_model(which, request, tmp_path):
    found = request.getfixturevalue(which)
    checkpoint = load_checkpoint(found) if isinstance(found, Path) else found
    stack = {"gpt2": "transformer.h", "bert": "encoder.layer", "pycode": "model.layers"}[which]
    count = 0
    for block in Walk(checkpoint, WINDOWS, tmp_path):
        for window in WINDOWS:
            expected = inside(checkpoint, f"{stack}.{block.index}", window)
            assert torch.allclose(rows(block, window), expected, rtol=1e-4, atol=1e-4)
        assert block.linears.keys() <= checkpoint.weights.keys()
        assert sorted(name for stage in block.stages for name in stage) == sorted(block.linears)
        count += 1
    assert count == checkpoint.config.num_hidden_layers


def test_layers_with_the_same_input_are_one_stage(bert, pycode, tmp_path):
    (tmp_path / "bert").mkdir()
    block = next(iter(Walk(bert, WINDOWS, tmp_path / "bert")))
    assert [[name.split(".")[-2] for name in stage] for stage in block.stages] == [
        ["query", "key", "value"],
        ["dense"],
        ["dense"],
        ["dense"],
    ]
    block = next(iter(Walk(load_checkpoint(pycode), WINDOWS, tmp_path)))
    assert [[name.split(".")[-2] for name in stage] for stage in block.stages] == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_second_moments_are_those_of_the_inputs(bert, tmp_path):
    name = "encoder.layer.1.output.dense.weight"
    inputs = torch.cat([inside(bert, "encoder.layer.1.intermediate", window) for window in WINDOWS])
    *_, block = Walk(bert, WINDOWS, tmp_path)
    assert torch.allclose(block.gram(name), inputs.t() @ inputs / len(inputs), rtol=1e-4, atol=1e-5)


def test_what_is_put_into_a_block_makes_the_inputs_of_the_next(gpt2, tmp_path):
    name = "transformer.h.0.mlp.c_proj.weight"
    other = dense(torch.zeros(gpt2.weights[name].shape))
    changed = gpt2.with_weights({name: other})
    for block in Walk(gpt2, WINDOWS, tmp_path, targets=True):
        if block.index == 0:
            block.replace(name, other)
            continue
        path = f"transformer.h.{block.index}"
        for batch in block.batches:
            for row, window in enumerate(batch.ids.tolist()):
                expected = inside(changed, f"transformer.h.{block.index - 1}", tuple(window))
                assert torch.allclose(block.inputs.read(batch)[row], expected, rtol=1e-4, atol=1e-4)
                # The targets are those of the model as it came.
                assert block.targets is not None
                expected = inside(gpt2, path, tuple(window))
                assert torch.allclose(block.targets.read(batch)[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [False, True])
def test_a_walk_that_was_killed_goes_on_with_the_block_that_it_was_in(gpt2, tmp_path, targets):
    name = "transformer.h.0.mlp.c_proj.weight"
    first = Walk(gpt2, WINDOWS, tmp_path, targets=targets)
    assert first.finished == ()
    blocks = iter(first)
    next(blocks).replace(name, dense(torch.zeros(gpt2.weights[name].shape)))
    expected = rows(next(blocks), WINDOWS[0])
    del blocks
    second = Walk(gpt2, WINDOWS, tmp_path, targets=targets)
    assert name in second.finished
    assert all(".h.0." in name for name in second.finished)
    again = iter(second)
    block = next(again)
    assert block.index == 1
    assert torch.equal(rows(block, WINDOWS[0]), expected)
    assert [block.index for block in again] == [2]
    assert list(Walk(gpt2, WINDOWS, tmp_path, targets=targets)) == []
    second.forget()
    assert [block.index for block in Walk(gpt2, WINDOWS, tmp_path, targets=targets)] == [0, 1, 2]


def test_memory_holds_the_matrices_of_one_block(gpt2, tmp_path):
    walk = Walk(gpt2, WINDOWS, tmp_path)
    held = []
    for _ in walk:
        in_memory = [part for part in walk._model.modules() if getattr(part, "matrix", None) is not None]
        held.append(len(in_memory))
    assert held == [4, 4, 4]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_model_that_repeats_its_block_is_no_sequence(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    checkpoint = saved(AlbertModel(AlbertConfig(vocab_size=50, embedding_size=16, **sizes)), tmp_path)
    with pytest.raises(CannotWalk, match="not run one after the other, each once"):
        Walk(checkpoint, WINDOWS, tmp_path)
