"""The readers of the product, each as what a folder of good files is and what is done with it.

READERS     every reader by its name
make_good   writes the small model, and its bundle in four formats, that inputs are made from
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

Read = Callable[[Path], object]
CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class Reader:
    """One reader.

    ``files`` are those of the folder ``good`` that inputs spoil, one at a time.
    """

    name: str
    good: str
    files: tuple[str, ...]
    read: Read
    cheap: bool = False
    """Takes a few milliseconds."""
    sealed: bool = False
    """Whether a link must not be followed out of the folder: in a bundle. A hub's cache consists of links."""
    vendor: bool = False
    """Whether a vendor's runtime reads the file, and not only code of ours."""
    patience: int = 1
    """How many times the limits of time it may take."""


def _silent(command: Callable[[], object]) -> None:
    """Run a command; a verdict that it gives by its exit code is no mistake."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            command()
        except SystemExit as left:
            if left.code != 1:
                raise


def read_source(folder: Path) -> None:
    from slm_export.source.load import check_values, load_checkpoint

    check_values(load_checkpoint(folder), lambda count, name: None)


def read_shards(folder: Path) -> None:
    from slm_export.source.shards import first_bad_value, read_shards

    for tensor in read_shards(folder)[0].values():
        first_bad_value(tensor.load())


def read_pooling(folder: Path) -> None:
    from slm_export.graph.pooling import read_pooling

    read_pooling(folder)


def read_plan(folder: Path) -> None:
    from slm_export.commands.plan import PlanRequest, plan_command

    _silent(lambda: plan_command(PlanRequest(model=str(folder), target="host"), as_json=True))


def read_tokenizer(folder: Path) -> None:
    from slm_export.exporters.litert_container import _metadata
    from slm_export.runtime import ExportOptions
    from slm_export.tokenization.tokenizer import SourceTokenizer

    made = SourceTokenizer.load(folder)
    made.decode(made.encode("Grüße,  wörld <s> 12"))
    made.render_chat("hello", "be brief")
    made.files()
    options = ExportOptions(
        8, made.stop_ids, made.bos_id, made.pad_id, made.adds_bos, made.chat_template, folder
    )
    _metadata(options)


def read_settings(folder: Path) -> None:
    from slm_export.commands.plan import PlanRequest
    from slm_export.compilation import Request
    from slm_export.keras.source import is_tensorflow_model
    from slm_export.settings import load_settings
    from slm_export.source.hub import find_model

    settings = load_settings(folder)
    if settings is not None:
        Request().over(settings)
        model = PlanRequest().over(settings).model
        is_tensorflow_model(model)
        if model is not None:
            with mock.patch.dict(os.environ, HF_HUB_OFFLINE="1"):
                find_model(model)


def read_profile(folder: Path) -> None:
    from slm_export.profile import load_profile
    from slm_export.quantization_options import QuantizationOptions
    from slm_export.recipe import build_recipe, options_of

    profile = load_profile(str(folder / "device.toml"))
    list(profile.figures())
    for step in build_recipe(profile.recipe, QuantizationOptions(), "device.toml"):
        json.dumps(options_of(step), allow_nan=False)


def read_recipe(folder: Path) -> None:
    from slm_export.bundles.manifest import read_manifest
    from slm_export.recipe import make_pass, options_of

    for step in read_manifest(folder).recipe:
        options = {key: value for key, value in step.items() if key != "pass"}
        options_of(make_pass(str(step.get("pass")), options, "manifest.json"))


def read_lock(folder: Path) -> None:
    from slm_export.bundles.lock import read_lock

    read_lock(folder / "slm-export.lock")


def read_manifest(folder: Path) -> None:
    from slm_export.bench.subject import find_subject
    from slm_export.bundles.bundle import verify_files
    from slm_export.bundles.integrity import strangers
    from slm_export.commands.comparing import report_command

    verify_files(folder)
    strangers(folder)
    _silent(lambda: report_command([folder], folder / "page.html", as_json=False))
    (folder / "page.html").unlink()
    find_subject(folder)


def read_difference(folder: Path) -> None:
    from slm_export.commands.comparing import diff_command
    from slm_export.reports.junit import Cases

    good = folder.parent / "good" / folder.name
    _silent(lambda: diff_command(good, folder, ["max_bytes_increase=0.1"], True, True, Cases()))


def _verified(format: str) -> Read:
    """Verify a bundle of one format whose manifest was changed along with the files, so that all hashes are right."""

    def read(folder: Path) -> None:
        from slm_export.commands.bundles import verify_command
        from slm_export.reports.junit import Cases

        _seal(folder, format)
        _silent(lambda: verify_command(folder, None, None, None, True, Cases()))

    return read


def _seal(folder: Path, format: str) -> None:
    """Let the manifest say what lies there."""
    from slm_export.bundles.checksums import sha256_file, size_of

    file = folder / "manifest.json"
    document = json.loads(file.read_text("utf-8"))
    document["artifacts"] = [one for one in document["artifacts"] if one["format"] == format]
    document["parity"] = []
    for entry in document["files"]:
        path = folder / entry["path"]
        if path.is_file() and not path.is_symlink():
            entry |= {"bytes": size_of(path), "sha256": sha256_file(path)}
    known = {entry["path"]: entry for entry in document["files"]}
    for one in document["artifacts"]:
        one["sha256"] = known[one["path"]]["sha256"]
        one["bytes"] = sum(known[path]["bytes"] for path in (one["path"], *one.get("data", ())))
    file.write_text(json.dumps(document), "utf-8")


def run_bundle(folder: Path) -> None:
    from slm_export.commands.bundles import run_command

    _silent(lambda: run_command(folder, "hello", None, 0.0, 1.0, 2, 0, True, False, True))


def _stored(format: str, name: str) -> Read:
    def read(folder: Path) -> None:
        from slm_export.registry import exporter

        for weight in exporter(format).stored(folder / name).values():
            weight.load()

    return read


def _opened(format: str, name: str, task: str = "text-generation") -> Read:
    def read(folder: Path) -> None:
        from slm_export.native_log import kept_from_terminal
        from slm_export.registry import exporter

        with kept_from_terminal():
            session = exporter(format).open(folder / name, task)
            try:
                session.metadata()
                if task == "text-generation":
                    session.logits([1, 2, 3], 0)  # type: ignore[union-attr]
            finally:
                session.close()

    return read


def read_container(folder: Path) -> None:
    from slm_export.exporters.litert_container import Container

    made = Container.read(folder / "model.litertlm")
    assert isinstance(made.stop_ids, tuple)
    with made.extracted():
        pass


def read_genai(folder: Path) -> None:
    from slm_export.exporters.onnx_genai import told

    assert isinstance(told(folder / "model.onnx").stop_ids, tuple)


def read_text(folder: Path) -> None:
    from slm_export.evaltext import load_documents

    load_documents(folder / "text.txt")


def _tokenizer_of(folder: Path) -> Any:
    # One for all inputs: what is spoilt is the text.
    from slm_export.tokenization.tokenizer import SourceTokenizer

    if folder not in _TOKENIZERS:
        _TOKENIZERS[folder] = SourceTokenizer.load(folder)
    return _TOKENIZERS[folder]


_TOKENIZERS: dict[Path, Any] = {}


def read_calibration(folder: Path) -> None:
    from slm_export.compression.calibration import read_calibration

    tokenizer = _tokenizer_of(folder.parent / "good" / "model")
    read_calibration(folder / "chats.jsonl", tokenizer, "text-generation", 64)


def read_keras(folder: Path) -> None:
    from slm_export.keras.source import is_tensorflow_model

    is_tensorflow_model(str(folder / "model.keras"))
    is_tensorflow_model(str(folder))


_MODEL = ("config.json", "model.safetensors")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_SHARDS = tuple(f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
_ARTIFACTS = (
    ("executorch", "executorch/model.pte"),
    ("litert", "litert/model.litertlm"),
    ("onnx", "onnx/model.onnx"),
)
_PACKAGE = "Model.mlpackage"
_SPECIFICATION = f"{_PACKAGE}/Data/com.apple.CoreML/model.mlmodel"
_BLOB = f"{_PACKAGE}/Data/com.apple.CoreML/weights/weight.bin"

READERS = {
    reader.name: reader
    for reader in (
        Reader("config", "model", ("config.json",), read_source),
        Reader("source", "model", _MODEL, read_source),
        Reader("safetensors", "weights", ("model.safetensors",), read_shards, cheap=True),
        Reader("index", "shards", ("model.safetensors.index.json", *_SHARDS), read_shards, cheap=True),
        Reader(
            "pooling",
            "encoder",
            ("modules.json", "1_Pooling/config.json"),
            read_pooling,
            cheap=True,
        ),
        Reader("plan", "model", _MODEL, read_plan, cheap=True),
        Reader("tokenizer", "model", _TOKENIZER, read_tokenizer),
        Reader(
            "generation",
            "model",
            ("generation_config.json", "tokenizer_config.json"),
            read_tokenizer,
        ),
        Reader("settings", "toml", ("slm-export.toml",), read_settings, cheap=True),
        Reader("profile", "toml", ("device.toml",), read_profile, cheap=True),
        Reader("recipe", "bundle", ("manifest.json",), read_recipe, cheap=True, sealed=True),
        Reader("lock", "bundle", ("slm-export.lock",), read_lock, cheap=True),
        Reader("manifest", "bundle", ("manifest.json", "report.json"), read_manifest, sealed=True),
        Reader("diff", "bundle", ("manifest.json", "report.json"), read_difference, sealed=True),
        Reader("text", "text", ("text.txt",), read_text, cheap=True),
        Reader("calibration", "text", ("chats.jsonl",), read_calibration, cheap=True),
        Reader("genai", "bundle/onnx", ("genai_config.json",), read_genai, cheap=True),
        Reader("container", "bundle/litert", ("model.litertlm",), read_container, cheap=True),
        Reader(
            "executorch", "bundle/executorch", ("model.pte",), _stored("executorch", "model.pte"), cheap=True
        ),
        Reader(
            "litert", "bundle/litert", ("model.litertlm",), _stored("litert", "model.litertlm"), cheap=True
        ),
        Reader("onnx", "bundle/onnx", ("model.onnx",), _stored("onnx", "model.onnx"), cheap=True),
        Reader(
            "onnx-data",
            "onnx-data",
            ("model.onnx", "model.onnx.data"),
            _stored("onnx", "model.onnx"),
            cheap=True,
        ),
        Reader(
            "coreml",
            "coreml",
            (_SPECIFICATION, _BLOB, f"{_PACKAGE}/Manifest.json"),
            _stored("coreml", _PACKAGE),
        ),
        Reader("coreml-run", "coreml", (_SPECIFICATION,), _opened("coreml", _PACKAGE)),
        Reader(
            "run",
            "bundle",
            ("manifest.json", "tokenizer/tokenizer.json"),
            run_bundle,
            vendor=True,
            sealed=True,
        ),
        *(
            Reader(
                f"verify-{format}",
                "bundle",
                (file, "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
                _verified(format),
                vendor=True,
                sealed=True,
                patience=10,
            )
            for format, file in _ARTIFACTS
        ),
        Reader(
            "executorch-run",
            "bundle/executorch",
            ("model.pte",),
            _opened("executorch", "model.pte"),
            vendor=True,
        ),
        Reader(
            "litert-run",
            "bundle/litert",
            ("model.litertlm",),
            _opened("litert", "model.litertlm"),
            vendor=True,
        ),
        Reader("onnx-run", "bundle/onnx", ("model.onnx",), _opened("onnx", "model.onnx"), vendor=True),
    )
}


def make_good(folder: Path) -> None:
    """Write the good files of every reader: a Llama of one layer, its bundle in four formats, texts and settings."""
    _write_model(folder / "model")
    for name in ("weights", "toml", "text"):
        (folder / name).mkdir()
    _write_weights(folder / "weights" / "model.safetensors")
    _write_shards(folder / "model", folder / "shards")
    (folder / "encoder" / "1_Pooling").mkdir(parents=True)
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in _MODULES]
    (folder / "encoder" / "modules.json").write_text(json.dumps(modules))
    (folder / "encoder" / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (folder / "toml" / "slm-export.toml").write_text(_SETTINGS)
    (folder / "toml" / "device.toml").write_text(_PROFILE)
    (folder / "text" / "text.txt").write_text("A page of text.\nIts second line.\n\f\nAnother document.\n")
    (folder / "text" / "chats.jsonl").write_text(_CHATS)
    _write_bundle(folder)


def _write_model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=288,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(["A page of text. " * 20, "Its second line, and another one. " * 20], trainer)
    config = LlamaConfig(
        vocab_size=made.get_vocab_size(),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    made.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special, "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def _write_weights(path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
    save_file(
        {f"layers.{at}": torch.ones(4, 8, dtype=dtype) for at, dtype in enumerate(dtypes)},
        path,
        {"format": "pt"},
    )


def _write_shards(model: Path, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    tensors = load_file(model / "model.safetensors")
    files = {name: _SHARDS[at % 2] for at, name in enumerate(sorted(tensors))}
    for file in _SHARDS:
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_bundle(folder: Path) -> None:
    from slm_export import driver
    from slm_export.compilation import Request, make_plan
    from slm_export.exporters import onnx_file
    from slm_export.native_log import kept_from_terminal
    from slm_export.progress import Progress, StderrConsole
    from slm_export.quantization_options import QuantizationOptions

    formats = ("executorch", "litert", "onnx")
    for target, chosen, out in (("android", formats, "bundle"), ("ios", ("coreml",), "apple")):
        request = Request(
            model=str(folder / "model"), target=target, formats=chosen, out=folder / out,
            quantization=QuantizationOptions(bits=4, group_size=32), context=64, verify=False, bench=False,
        )  # fmt: skip
        with kept_from_terminal() as stderr:
            driver.export(make_plan(request), Progress(StderrConsole(stderr)))
    shutil.copytree(folder / "apple" / "coreml", folder / "coreml")
    shutil.rmtree(folder / "apple")
    (folder / "onnx-data").mkdir()
    largest, onnx_file.LARGEST = onnx_file.LARGEST, 0
    least, onnx_file._LEAST_OUTSIDE = onnx_file._LEAST_OUTSIDE, 256
    try:
        _write_onnx_with_data(folder)
    finally:
        onnx_file.LARGEST, onnx_file._LEAST_OUTSIDE = largest, least


def _write_onnx_with_data(folder: Path) -> None:
    from slm_export.optimizers.group_quantize import GroupQuantize
    from slm_export.registry import exporter
    from slm_export.runtime import ExportOptions
    from slm_export.source.load import load_checkpoint

    checkpoint = GroupQuantize(bits=4, group=32).run(load_checkpoint(folder / "model")).checkpoint
    options = ExportOptions(64, (1,), 0, 2, tokenizer=folder / "model")
    exporter("onnx").write(checkpoint, options, folder / "onnx-data" / "model.onnx")


_MODULES = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
_SETTINGS = """\
model = "."
target = "android"
formats = ["executorch", "onnx"]
bits = 4
group_size = 32
embedding_bits = 8
context = 64
eval_text = "text.txt"
out = "out"
max_size = "600MB"
min_tokens_per_s = 3.5
[gates]
max_kl_mean = 0.5
min_top1_agreement = 0.5
max_bytes = 1000000
[diff]
max_bytes_increase = 0.02
"""
_PROFILE = """\
schema = 1
name = "mine"
title = "My phone"
target = "android"
formats = ["executorch", "litert"]
soc = "A chip"
context = 64
[cpu]
cores = { clusters = [{ core = "A", count = 4, ghz = 2.5 }], source = "a page" }
[memory]
total_gb = { value = 8, source = "a page" }
bandwidth_gb_s = { value = 51.2, source = "another page" }
[coreml]
ios = 18
query_lengths = [1, 64]
[gates]
max_kl_mean = 0.5
[[recipe]]
pass = "sparsify"
[[recipe]]
pass = "group-quantize"
bits = 4
group = 32
"""
_CHATS = "\n".join(
    json.dumps(line)
    for line in (
        {
            "messages": [
                {"role": "user", "content": "What is a page? " * 12},
                {"role": "assistant", "content": "Text."},
            ]
        },
        {"text": "A page of text. Its second line, and another one. " * 12},
        {
            "messages": [
                {"role": "user", "content": "And a line? " * 12},
                {"role": "assistant", "content": "Less."},
            ]
        },
    )
)
