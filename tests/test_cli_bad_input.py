"""Every wrong input through the command line: which exit code, what is said, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli
from forked import Forked
from safetensors.torch import load_file, save_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
QUERY = "model.layers.0.self_attn.q_proj.weight"
PROFILE = 'schema = 1\nname = "mine"\ntitle = "Mine"\ntarget = "host"\nformats = ["executorch"]\n'
EXPORT = ("model", "--target", "host", "--out", "out")

Work = Path


@pytest.fixture
def work(tiny_llama: Path, tmp_path: Path) -> Work:
    """A folder to work in, with a model in it that a test may spoil."""
    shutil.copytree(tiny_llama, tmp_path / "work" / "model")
    return tmp_path / "work"


def refused(done: subprocess.CompletedProcess[str], work: Work, code: int = 2) -> str:
    """Return the message of a command that must have failed as the contract says."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert not [name for name in os.listdir(work) if name == "out" or name.endswith(".partial")]
    _, _, message = done.stderr.partition("error: ")
    assert message.count("\n") == 1, done.stderr
    assert message.endswith("\n")
    return message.strip()


def quietly_refused(done: subprocess.CompletedProcess[str], work: Work, code: int = 2) -> str:
    assert done.stdout == ""
    return refused(done, work, code)


def json_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    document = json.loads(done.stdout)
    assert isinstance(document, dict)
    assert document["error"]["exit_code"] == done.returncode
    assert f"error: {document['error']['message']}\n" in done.stderr
    return document


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def change_weights(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def rewrite(model: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(model / SINGLE).items()}
        change(tensors)
        save_file(tensors, model / SINGLE)

    return rewrite


def make_shards(promise: dict[str, str] | None = None, keep: int = 2) -> Callable[[Path], None]:
    def shard(model: Path) -> None:
        tensors = load_file(model / SINGLE)
        files = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(tensors)}
        for file in sorted(set(files.values()))[:keep]:
            save_file({name: tensors[name] for name in tensors if files[name] == file}, model / file)
        (model / SINGLE).unlink()
        (model / INDEX).write_text(json.dumps({"weight_map": {**files, **(promise or {})}}))

    return shard


def pickle_only(model: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(model.parent / "sprung"),)

    (model / SINGLE).unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))


def remote_code(model: Path) -> None:
    trap = f"import os\nos.mkdir({str(model.parent / 'sprung')!r})\n"
    for name in ("configuration_mine.py", "modeling_mine.py"):
        (model / name).write_text(trap)
    where = {"AutoConfig": "configuration_mine.MyConfig", "AutoModelForCausalLM": "modeling_mine.MyModel"}
    change_config(model_type="mine", architectures=["MyModel"], auto_map=where)(model)


MODELS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no folder": (shutil.rmtree, ("model: no such folder; give a model folder, or a hub name",)),
    "no config": (
        lambda model: (model / "config.json").unlink(),
        ("model: no config.json; give a Hugging Face model folder",),
    ),
    "config is not JSON": (
        lambda model: (model / "config.json").write_text("{'a': 1}"),
        ("model/config.json: not readable as JSON", "line 1 column 2"),
    ),
    "missing shard": (make_shards(keep=1), ("model: missing model-00002-of-00002.safetensors", "download")),
    "truncated shard": (
        lambda model: os.truncate(model / SINGLE, 100_000),
        ("model/model.safetensors: truncated or corrupt", "100,000 bytes", "download the model again"),
    ),
    "corrupt header": (
        lambda model: (model / SINGLE).write_bytes(b"<html>404 not found</html>"),
        ("model/model.safetensors: truncated or corrupt", "download the model again"),
    ),
    "promised tensor": (
        make_shards({"extra.weight": "model-00001-of-00002.safetensors"}),
        ("model-00001-of-00002.safetensors: tensor extra.weight is promised by", "download"),
    ),
    "shapes": (
        change_config(intermediate_size=256),
        ("down_proj.weight has shape (64, 128), but config.json makes it (64, 256)", "another model"),
    ),
    "NaN": (
        change_weights(lambda tensors: tensors[QUERY].__setitem__((0, 3), float("nan"))),
        (f"model: weight {QUERY} holds NaN; the model is damaged or its training diverged",),
    ),
    "infinity": (
        change_weights(lambda tensors: tensors[QUERY].__setitem__((0, 3), float("-inf"))),
        (f"model: weight {QUERY} holds infinity",),
    ),
    "pickles": (pickle_only, ("pytorch_model.bin", "never opened here", "save_pretrained")),
    "remote code": (
        remote_code,
        ("model/config.json: model type 'mine' needs Python code", "never executed"),
    ),
    "model type": (
        change_config(model_type="lama"),
        ("model/config.json: unknown model type 'lama'; did you mean 'llama'?",),
    ),
    "architecture": (
        change_config(architectures=["LlamaForCausalML"]),
        ("unknown architecture 'LlamaForCausalML'; did you mean 'LlamaForCausalLM'?",),
    ),
    "large tokenizer": (
        lambda model: (
            change_config(vocab_size=4000)(model),
            change_weights(
                lambda tensors: tensors.update(
                    {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:4000].clone()}
                )
            )(model),
        ),
        ("the tokenizer has 4096 tokens, but the embedding only 4000 rows; resize the embedding",),
    ),
    "no tokenizer": (
        lambda model: (model / "tokenizer.json").unlink(),
        ("model: no tokenizer; expected tokenizer.json",),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_be_exported(quick_cli: Forked, work: Work, name: str) -> None:
    spoil, says = MODELS[name]
    spoil(work / "model")
    message = quietly_refused(quick_cli(*EXPORT, cwd=work), work)
    assert all(part in message for part in says), message
    assert not (work / "sprung").exists()


OPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "target": (("model", "--target", "androd"), ("unknown target 'androd'; did you mean 'android'?",)),
    "device": (("model", "--device", "pixel8"), ("unknown device 'pixel8'; did you mean 'pixel-8'?",)),
    "no target": (("model",), ("no target: give --target",)),
    "format": (
        (*EXPORT, "--format", "executorh"),
        ("unknown format 'executorh'; did you mean 'executorch'?",),
    ),
    "format of other devices": ((*EXPORT, "--format", "coreml"), ("device host does not run format coreml",)),
    "option": ((*EXPORT, "--bit", "4"), ("--bit", "--bits")),
    "value": ((*EXPORT, "--bits", "5"), ("--bits", "'5'", "'4', '8', '16', '32'")),
    "command": (("exprt", "--target", "host"), ("unknown command 'exprt'; did you mean 'export'?",)),
    "group": (
        (*EXPORT, "--bits", "4", "--group-size", "128"),
        ("group size 128 does not divide the 64 columns of", "a group size that fits this model: 32 or 64"),
    ),
    "context": (
        (*EXPORT, "--context", "65"),
        ("context 65 is longer than the 64 positions of model; ask for 64",),
    ),
    "head bits": (
        (*EXPORT, "--head-bits", "4"),
        ("head bits 4 and embedding bits 8 differ, but this model ties",),
    ),
    "out is a file": (
        (*EXPORT[:-1], "model/config.json"),
        ("config.json: exists and is not a folder; choose",),
    ),
    "out is in a file": (
        (*EXPORT[:-1], "model/config.json/out"),
        ("out: cannot be written (", "choose another"),
    ),
    "out cannot be written": ((*EXPORT[:-1], "/proc/out"), ("/proc/out: cannot be written (", "--out")),
    "revision": (
        (*EXPORT, "--revision", "v1"),
        ("--revision v1 has no meaning for model, which is a folder",),
    ),
    "eval text": ((*EXPORT, "--eval-text", "no.txt"), ("no.txt: ",)),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_cannot_be_meant(quick_cli: Forked, work: Work, name: str) -> None:
    arguments, says = OPTIONS[name]
    before = sorted(work.rglob("*"))
    message = quietly_refused(quick_cli(*arguments, cwd=work), work)
    assert all(part in message for part in says), message
    assert sorted(work.rglob("*")) == before


@pytest.mark.parametrize(
    ("settings", "profile", "expected"),
    [
        ('bitts = 4\nmodel = "model"', "", "slm-export.toml: unknown key 'bitts'; did you mean 'bits'?"),
        ("", "titel = 1\n", "my.toml: unknown key 'titel'; did you mean 'title'?"),
        (
            "",
            '[[recipe]]\npass = "group-quantize"\nbit = 4\n',
            "my.toml: group-quantize: unknown option 'bit'; did",
        ),
    ],
)
def test_keys_that_are_not_known(
    quick_cli: Forked, work: Work, settings: str, profile: str, expected: str
) -> None:
    (work / "slm-export.toml").write_text(settings)
    (work / "my.toml").write_text(PROFILE + profile)
    done = quick_cli("model", "--device", "my.toml", "--out", "out", cwd=work)
    assert quietly_refused(done, work).startswith(expected)


def test_an_existing_folder_is_replaced_by_force_only_and_only_a_bundle(
    quick_cli: Forked, work: Work
) -> None:
    (work / "mine").mkdir()
    (work / "mine" / "thesis.txt").write_text("years of work")
    for options, says in (
        ((), "exists already; use --force"),
        (("--force",), "not replaced, even with --force"),
    ):
        done = quick_cli(*EXPORT[:-1], "mine", *options, cwd=work)
        assert says in quietly_refused(done, work)
        assert (work / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "arguments",
    [
        ("model", "--target", "host", "--no-such"),
        ("model", "--target", "androd"),
        ("nowhere", "--target", "host"),
    ],
    ids=["option", "target", "model"],
)
def test_with_json_the_error_is_the_one_document_on_stdout(
    quick_cli: Forked, work: Work, arguments: tuple[str, ...]
) -> None:
    done = quick_cli(*arguments, "--json", cwd=work)
    assert json_of(done)["error"]["message"] == refused(done, work)


def test_a_process_of_its_own_says_the_same(cli: Cli, quick_cli: Forked, work: Work) -> None:
    """What the tests here rely on: nothing depends on imports that were made before."""
    (work / "model" / "config.json").unlink()
    alone, shared = cli(*EXPORT, cwd=work), quick_cli(*EXPORT, cwd=work)
    assert quietly_refused(alone, work) == quietly_refused(shared, work)
