"""One vector of many, as sentence-transformers makes it, and what of its folders is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import normal

from slm_export.errors import InputError
from slm_export.graph.pooling import Pooling, additive_mask, read_pooling

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
TRANSFORMER = {"type": "sentence_transformers.models.Transformer", "path": ""}
POOLING = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}
NORMALIZE = {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"}


def folder_with(folder: Path, modules: object, config: object = None) -> Path:
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return folder


def problem(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_pooling(folder)
    return str(caught.value)


def test_each_mode_reads_the_tokens_of_the_mask_only():
    hidden = normal(2, 4, 8)
    mean, cls, most = (Pooling(mode, normalize=False)(hidden, MASK) for mode in ("mean", "cls", "max"))
    assert torch.allclose(mean, torch.stack([hidden[0, :3].mean(0), hidden[1, 0]]))
    assert torch.equal(cls, hidden[:, 0])
    assert torch.equal(most, torch.stack([hidden[0, :3].amax(0), hidden[1, 0]]))


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_padding_changes_nothing(mode):
    hidden = normal(2, 4, 8)
    noisy = hidden + 100 * (1 - MASK).unsqueeze(-1)
    assert torch.equal(Pooling(mode)(hidden, MASK), Pooling(mode)(noisy, MASK))


def test_a_normalised_vector_has_length_1_and_zero_stays_zero():
    pooled = Pooling()(torch.cat([normal(1, 4, 8) * 1000, torch.zeros(1, 4, 8)]), MASK)
    assert torch.allclose(pooled.norm(dim=-1), torch.tensor([1.0, 0.0]))


def test_nothing_said_means_mean_and_normalised(tmp_path):
    assert read_pooling(tmp_path) == Pooling("mean", normalize=True, stated=False)


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": "max", "pooling_mode_mean_tokens": True}, "max"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_cls_token": True, "word_embedding_dimension": 384}, "cls"),
        ({"pooling_mode_max_tokens": True}, "max"),
    ],
)
def test_the_mode_is_read_in_both_spellings(tmp_path, config, mode):
    folder = folder_with(tmp_path, [TRANSFORMER, POOLING, NORMALIZE], config)
    assert read_pooling(folder) == Pooling(mode, normalize=True, stated=True)


def test_without_normalize_the_length_is_kept(tmp_path):
    assert not read_pooling(folder_with(tmp_path, [TRANSFORMER, POOLING], {"pooling_mode": "mean"})).normalize


def test_a_real_folder(minilm):
    assert read_pooling(minilm) == Pooling("mean", normalize=True, stated=True)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "pooling_mode_mean_sqrt_len_tokens"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "mean + cls"),
        ({"pooling_mode": "lasttoken"}, "lasttoken"),
        ({}, "of no kind"),
    ],
)
def test_a_mode_that_cannot_be_exported_is_named(tmp_path, config, named):
    text = problem(folder_with(tmp_path, [TRANSFORMER, POOLING], config))
    assert text.startswith(f"{tmp_path / '1_Pooling' / 'config.json'}: pooling {named} cannot be exported")
    assert text.endswith("known: mean, cls, max")


def test_no_step_is_left_out_silently(tmp_path):
    dense = {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}
    text = problem(folder_with(tmp_path, [TRANSFORMER, POOLING, dense], {"pooling_mode": "mean"}))
    assert "module Dense cannot be exported" in text


@pytest.mark.parametrize("modules", [{}, ["x"], "x", None])
def test_a_listing_that_is_none(tmp_path, modules):
    assert problem(folder_with(tmp_path, modules)).endswith("expected a list of modules")


def test_broken_files_are_named(tmp_path):
    folder = folder_with(tmp_path, [POOLING], [])
    assert problem(folder).endswith("config.json: expected a JSON object")
    (folder / "1_Pooling" / "config.json").unlink()
    assert "1_Pooling/config.json: not readable as JSON" in problem(folder)
    (folder / "modules.json").write_text("{")
    assert "modules.json: not readable as JSON" in problem(folder)


def test_the_additive_mask_is_zero_for_a_token_and_very_small_for_padding():
    mask = additive_mask(MASK)
    assert mask.shape == (2, 1, 1, 4)
    assert torch.equal(mask[:, 0, 0] == 0, MASK.bool())
    assert (mask[:, 0, 0][MASK == 0] <= -1e9).all()
