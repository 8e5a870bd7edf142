"""The weight files of a folder: found, complete, readable, or refused with a reason."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from checkpoints import normal
from safetensors.torch import save_file
from torch import Tensor

from slm_export.errors import InputError
from slm_export.source.shards import INDEX, first_bad_value, read_shards

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def sharded(folder: Path) -> Path:
    save_file({"a": normal(2, 3)}, folder / FIRST)
    save_file({"b": normal(4, seed=1), "c": torch.arange(3)}, folder / SECOND)
    write_index(folder, {"a": FIRST, "b": SECOND, "c": SECOND})
    return folder


def write_index(folder: Path, mapping: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": mapping}))


def problem(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_shards(folder)
    return str(caught.value)


def test_floats_are_read_and_the_rest_is_named(tmp_path):
    tensors, left = read_shards(sharded(tmp_path))
    assert set(tensors) == {"a", "b"}
    assert left == {"c": "I64 values, not floats"}
    assert torch.equal(tensors["a"].load(), normal(2, 3))
    assert torch.equal(tensors["b"].load(), normal(4, seed=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_kind_of_float(tmp_path, dtype):
    values = normal(3, 2).to(dtype)
    save_file({"w": values, "empty": torch.zeros(0, 4, dtype=dtype)}, tmp_path / "model.safetensors")
    tensors, _ = read_shards(tmp_path)
    assert (tensors["w"].dtype, tensors["w"].shape, tensors["w"].bytes) == (dtype, (3, 2), 6 * dtype.itemsize)
    assert torch.equal(tensors["w"].load(), values)
    assert tensors["empty"].load().shape == (0, 4)


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    tensors, _ = read_shards(sharded(tmp_path))
    (tmp_path / FIRST).unlink()
    assert tensors["b"].load().shape == (4,)
    with pytest.raises((InputError, OSError)):
        tensors["a"].load()


def test_one_whole_file_makes_a_stale_index_void(tmp_path):
    save_file({"w": normal(2)}, tmp_path / "model.safetensors")
    write_index(tmp_path, {"gone": FIRST})
    assert set(read_shards(tmp_path)[0]) == {"w"}


def test_numbered_shards_need_no_index(tmp_path):
    (sharded(tmp_path) / INDEX).unlink()
    assert set(read_shards(tmp_path)[0]) == {"a", "b"}


def test_a_single_file_may_have_any_name(tmp_path):
    save_file({"w": normal(2)}, tmp_path / "weights.safetensors")
    assert set(read_shards(tmp_path)[0]) == {"w"}


# --- what is refused ---------------------------------------------------------------------------------


def test_a_shard_that_the_index_lists_is_missing(tmp_path):
    (sharded(tmp_path) / SECOND).unlink()
    assert problem(tmp_path) == (
        f"{tmp_path}: missing {SECOND} of 2 shards that {INDEX} lists; download the model again"
    )


def test_without_an_index_the_numbers_tell_that_a_shard_is_missing(tmp_path):
    sharded(tmp_path)
    (tmp_path / INDEX).unlink()
    (tmp_path / SECOND).unlink()
    assert problem(tmp_path).startswith(f"{tmp_path}: 1 shards where {FIRST} says there are 2; ")


def test_a_promised_tensor_is_not_there(tmp_path):
    write_index(sharded(tmp_path), {"a": FIRST, "b": SECOND, "d": SECOND, "e": SECOND})
    assert problem(tmp_path).startswith(
        f"{tmp_path / SECOND}: tensor d is promised by {INDEX}, but not there"
    )
    assert "(2 missing in all)" in problem(tmp_path)


def test_two_shards_hold_one_tensor(tmp_path):
    sharded(tmp_path)
    save_file({"a": normal(2, 3)}, tmp_path / SECOND)
    write_index(tmp_path, {"a": SECOND, "b": FIRST})
    assert "tensor a is in another shard too" in problem(tmp_path)


def test_two_models_in_one_folder(tmp_path):
    for name in ("one.safetensors", "two.safetensors"):
        save_file({"w": normal(2)}, tmp_path / name)
    assert "several weight files" in problem(tmp_path)
    assert "keep one model in a folder" in problem(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 30, -1])
def test_a_file_cut_short(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    save_file({"w": normal(64)}, path)
    os.truncate(path, keep if keep >= 0 else path.stat().st_size + keep)
    assert problem(tmp_path).startswith(f"{path}: truncated or corrupt (")


@pytest.mark.parametrize("start", [b"\xff" * 8, b"<html>no"])
def test_a_header_that_is_none(tmp_path, start):
    path = tmp_path / "model.safetensors"
    save_file({"w": normal(64)}, path)
    path.write_bytes(start + path.read_bytes()[8:])
    assert problem(tmp_path).startswith(f"{path}: truncated or corrupt (")
    assert problem(tmp_path).endswith("download the model again")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "../x"}}',
        "\xff",
    ],
)
def test_a_broken_index(tmp_path, text):
    (sharded(tmp_path) / INDEX).write_bytes(text.encode("latin-1"))
    assert problem(tmp_path).startswith(f"{tmp_path / INDEX}: not a readable index of shards (")


def test_pickles_are_refused_and_never_opened(tmp_path):
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    assert "can run any code when opened" in problem(tmp_path)
    assert "save_pretrained" in problem(tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("m.gguf", "GGUF"), ("tf_model.h5", "Keras"), ("m.onnx", "ONNX"), ("f.msgpack", "Flax")],
)
def test_weights_of_another_format_are_named(tmp_path, name, kind):
    (tmp_path / name).write_bytes(b"")
    assert problem(tmp_path).startswith(f"{tmp_path}: {name} is a {kind} file; ")


def test_no_weights_at_all(tmp_path):
    assert problem(tmp_path) == f"{tmp_path}: no weights; expected model.safetensors, or shards and {INDEX}"


# --- values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("value", "bad"),
    [("nan", "NaN"), ("inf", "infinity"), ("-inf", "infinity"), ("1", None)],
)
def test_values_that_are_not_finite_are_found(dtype, value, bad):
    tensor: Tensor = torch.zeros(3, 5, dtype=dtype)
    tensor[1, 2] = float(value)
    assert first_bad_value(tensor) == bad
    assert first_bad_value(tensor[:0]) is None
