"""Both real models into every format by one command: the same integers in each, and each as good as its source."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, command, environment

from slm_export.registry import exporter

FORMATS = ("executorch", "litert", "onnx")
Exported = tuple[Path, dict[str, Any]]


def exported(model: Path, folder: Path) -> Exported:
    out = folder / "bundle"
    options = [part for name in FORMATS for part in ("--format", name)]
    arguments = command(model, "--target", "android", "--bits", "8", "--out", out, "--json", *options)
    done = subprocess.run(
        arguments, cwd=folder, env=environment(), capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


@pytest.fixture(scope="module")
def decoder(pycode: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(pycode, tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def encoder(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(minilm, tmp_path_factory.mktemp("encoder"))


@pytest.mark.parametrize("name", ["decoder", pytest.param("encoder", marks=pytest.mark.slow)])
def test_every_pair_of_formats_carries_the_same_integers(name: str, request: pytest.FixtureRequest) -> None:
    out, document = request.getfixturevalue(name)
    pairs = document["parity"]
    assert [tuple(pair["formats"]) for pair in pairs] == [
        ("executorch", "litert"),
        ("executorch", "onnx"),
        ("litert", "onnx"),
    ]
    quantized = document["passes"][0]["changed"]
    assert all(pair["differing"] == [] and pair["matrices"] == quantized > 30 for pair in pairs)
    assert json.loads((out / "manifest.json").read_text())["parity"] == pairs


def test_the_formats_of_a_decoder_say_nearly_the_same(decoder: Exported) -> None:
    for pair in decoder[1]["parity"]:
        assert pair["top1_agreement"] >= 0.95
        assert 0 < pair["kl_mean"] < 0.01
        assert 0 < pair["greedy_agreed"] <= pair["greedy_tokens"]


@pytest.mark.slow
def test_the_formats_of_an_encoder_say_nearly_the_same(encoder: Exported) -> None:
    for pair in encoder[1]["parity"]:
        assert 0.995 <= pair["cosine_min"] <= pair["cosine_mean"] <= 1


def test_every_format_goes_through_the_whole_gate(decoder: Exported) -> None:
    wanted = {"kl_mean", "perplexity_ratio", "lowering_kl_mean", "codes", "stop_tokens", "runner_text"}
    for result in decoder[1]["formats"]:
        checks = {check["name"]: check["passed"] for check in result["checks"]}
        assert wanted | {"tokenizer_agreement"} <= checks.keys()
        assert all(checks.values())
        assert result["quality"]["perplexity_ratio"] <= 1.005
        assert result["latency"]["decode_tokens_per_s"] > 0


def test_the_report_says_what_xnnpack_takes_of_litert(decoder: Exported) -> None:
    found = {result["artifact"]["format"]: result["delegation"] for result in decoder[1]["formats"]}
    taken = found["litert"]
    assert taken["taken_multiplications"] == taken["multiplications"] > 0
    assert 0 < sum(taken["rest"].values()) == taken["operators"] - taken["taken"]
    assert found["onnx"] is None


@pytest.mark.parametrize("format", FORMATS)
def test_run_gives_every_format_its_own_runtime(format: str, decoder: Exported, cli: Cli) -> None:
    prompt = ("--prompt", "def fibonacci(n):", "--max-tokens", "12", "--json")
    done = cli("run", decoder[0], "--format", format, *prompt)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["text"].startswith("\n    return")


def test_verify_names_the_one_code_that_was_changed(decoder: Exported, tmp_path: Path, cli: Cli) -> None:
    """With a manifest that vouches for the changed file, only the comparison of formats can notice."""
    name = "model.layers.2.mlp.up_proj.weight"
    copy = tmp_path / "copy"
    shutil.copytree(decoder[0], copy)
    file = copy / "litert" / "model.litertlm"
    codes = exporter("litert").stored(file)[name].packed.numpy().tobytes()
    content = bytearray(file.read_bytes())
    content[content.index(codes) + 1000] ^= 1
    old = hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_bytes(content)
    manifest = copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace(old, hashlib.sha256(content).hexdigest()))
    done = cli("verify", copy, "--json")
    assert done.returncode == 1, done.stderr
    failed = [
        check
        for group in json.loads(done.stdout)["checks"].values()
        for check in group
        if not check["passed"]
    ]
    assert {check["name"] for check in failed} >= {
        "codes of executorch and litert",
        "codes of litert and onnx",
    }
    assert all(name in check["detail"] for check in failed if check["name"].startswith("codes of"))
