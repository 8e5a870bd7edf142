"""The readers of the product, each as what a folder of good files is and what is done with it.

`good_files` writes what inputs are made from.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from good_files import SHARDS

Read = Callable[[Path], object]


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
        _silent(lambda: verify_command(folder, None, None, None, (), True, Cases()))

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

    _silent(lambda: run_command(folder, "hello", None, None, 0.0, 1.0, 2, 0, True, False, True))


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


def read_delegates(folder: Path) -> None:
    from slm_export.delegates.config import load_delegates

    load_delegates(folder / "delegates.toml")


def read_federation(folder: Path) -> None:
    from slm_export.federated.settings import read_federation

    read_federation(folder / "federation.toml")


def read_adapter(folder: Path) -> None:
    from slm_export.adapters.low_rank import read_low_rank
    from slm_export.source.load import load_checkpoint

    base = folder.parent / "good" / "model"
    if base not in _CHECKPOINTS:
        _CHECKPOINTS[base] = load_checkpoint(base)
    read_low_rank("one", folder, _CHECKPOINTS[base], "0" * 64)


_CHECKPOINTS: dict[Path, Any] = {}

_MODEL = ("config.json", "model.safetensors")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
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
        Reader("index", "shards", ("model.safetensors.index.json", *SHARDS), read_shards, cheap=True),
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
        Reader("delegates", "toml", ("delegates.toml",), read_delegates, cheap=True),
        Reader("federation", "toml", ("federation.toml",), read_federation, cheap=True),
        Reader("adapter", "adapter", ("adapter_config.json", "adapter_model.safetensors"), read_adapter),
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
