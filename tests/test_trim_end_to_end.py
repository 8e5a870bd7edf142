"""A smaller vocabulary the whole way through the command line, into every format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli
from forked import Forked

from slm_export.bundles.bundle import read_manifest, verify_files
from slm_export.tokenization.tokenizer import SourceTokenizer

PROFILE = """
schema  = 1
name    = "trimmed"
title   = "Trimmed"
target  = "{target}"
formats = ["{formats}"]
context = {context}

[[recipe]]
pass = "trim-vocabulary"
tokens = 1024

[[recipe]]
pass           = "group-quantize"
bits           = 8
embedding_bits = 8
"""
SOURCES = Path(__file__).parents[1] / "slm_export"


def written(folder: Path, target: str, context: int, *formats: str) -> tuple[str | Path, ...]:
    """Write profile and texts; return the options that name them."""
    profile = PROFILE.format(target=target, context=context, formats='", "'.join(formats))
    (folder / "device.toml").write_text(profile)
    for name, modules in (
        ("calibration", ("source/load", "graph/model", "weights", "source/shards")),
        ("eval-text", ("driver",)),
    ):
        texts = [(SOURCES / f"{module}.py").read_text("utf-8") for module in modules]
        (folder / f"{name}.txt").write_text("\n\f\n".join(texts), encoding="utf-8")
    # What a domain's rarer words cost is a question of the domain; here, of what is done about them.
    (folder / "slm-export.toml").write_text(
        "[gates]\nmax_perplexity_ratio = 100.0\nmin_greedy_agreement = 0.5\n"
    )
    calibration, judged = folder / "calibration.txt", folder / "eval-text.txt"
    return ("--device", folder / "device.toml", "--calibration", calibration, "--eval-text", judged)


@pytest.fixture(scope="session")
def tiny(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, quick_cli: Forked
) -> tuple[Path, tuple[str | Path, ...]]:
    folder = tmp_path_factory.mktemp("trimmed")
    options = written(folder, "host", 64, "executorch")
    out = folder / "bundle"
    done = quick_cli(tiny_llama, *options, "--out", out, "--no-bench", cwd=folder)
    assert done.returncode == 0, done.stderr
    return out, options[2:]


def test_a_bundle_has_the_tokenizer_that_its_artifact_was_made_with(
    tiny: tuple[Path, Any], tiny_llama: Path
) -> None:
    out, _ = tiny
    assert verify_files(out) == ()
    manifest = read_manifest(out)
    assert manifest.recipe[0] == {"pass": "trim-vocabulary", "keep": 0.25, "tokens": 1024}
    quality = manifest.quality["executorch"]
    assert quality is not None
    assert quality["gate"] == "pass"
    assert isinstance(quality["tokens_ratio"], float)
    assert quality["tokens_ratio"] > 1
    made, source = SourceTokenizer.load(out / "tokenizer"), SourceTokenizer.load(tiny_llama)
    assert made.vocab_size == 1024
    assert manifest.runtime["stop_ids"] == list(made.stop_ids)
    assert manifest.runtime["bos_id"] == made.bos_id
    text = "def größe(x):\n    return '日本🙂'\n"
    assert made.decode(made.encode(text)) == source.decode(source.encode(text)) == text
    (signature,) = manifest.artifacts[0].signatures[:1]
    assert signature.outputs == {"logits": "float32[1, 1024]"}


def test_the_bundle_runs(tiny: tuple[Path, Any], quick_cli: Forked) -> None:
    done = quick_cli("run", tiny[0], "--prompt", "def größe(x):", "--max-tokens", "8", "--json", cwd=tiny[0])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["text"]


def test_verify_repeats_the_recipe_on_the_same_text(
    tiny: tuple[Path, tuple[str | Path, ...]], tiny_llama: Path, quick_cli: Forked
) -> None:
    out, texts = tiny
    done = quick_cli("verify", out, "--source", tiny_llama, *texts, "--json", cwd=out.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]["executorch"]}
    assert checks["vocabulary"]["passed"]
    assert "1,024 of 4,096 tokens" in checks["vocabulary"]["detail"]
    first = read_manifest(out).quality["executorch"]
    assert first is not None
    assert checks["perplexity_ratio"]["value"] == pytest.approx(first["perplexity_ratio"], rel=0.05)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--calibration",), "give text of that domain to judge it on"),
        (("--eval-text",), "give such a text with --calibration FILE"),
    ],
)
def test_text_that_nobody_named_is_asked_for(
    tiny: tuple[Path, tuple[str | Path, ...]],
    tiny_llama: Path,
    tmp_path: Path,
    quick_cli: Forked,
    given: tuple[str, ...],
    message: str,
) -> None:
    options = written(tmp_path, "host", 64, "executorch")
    named = [part for at, part in enumerate(options) if options[at - at % 2] in ("--device", *given)]
    done = quick_cli(tiny_llama, *named, "--out", tmp_path / "bundle", cwd=tmp_path)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    verified = quick_cli("verify", tiny[0], "--source", tiny_llama, *named[2:], cwd=tmp_path)
    assert verified.returncode == 2
    assert message in " ".join(verified.stderr.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "target", "formats", "context"),
    [
        ("pycode", "host", ("executorch", "litert", "onnx"), 256),
        (
            "tiny_llama",
            "ios",
            ("coreml", "executorch"),
            64,
        ),  # operator by operator, a larger one takes minutes
    ],
)
def test_every_format_carries_the_smaller_vocabulary(
    model: str,
    target: str,
    formats: tuple[str, ...],
    context: int,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    cli: Cli,
) -> None:
    folder: Path = request.getfixturevalue(model)
    asked = [part for name in formats for part in ("--format", name)]
    sizes = []
    for recipe in ("whole", "trimmed"):
        options = written(tmp_path, target, context, *formats)
        if recipe == "whole":
            profile = tmp_path / "device.toml"
            profile.write_text(
                profile.read_text().replace('pass = "trim-vocabulary"\ntokens = 1024\n\n[[recipe]]\n', "")
            )
            options = (*options[:2], "--no-verify")
        out = tmp_path / recipe
        done = cli(folder, *options, *asked, "--out", out, "--no-bench", "--json", timeout=1800)
        assert done.returncode == 0, done.stderr
        assert verify_files(out) == ()
        sizes.append({entry.format: entry.bytes for entry in read_manifest(out).artifacts})
    document = json.loads(done.stdout)
    assert all(pair["differing"] == [] for pair in document["parity"])
    width = 256 if model == "pycode" else 64
    for result in document["formats"]:
        assert result["quality"]["kl_mean"] < 0.02
        assert {check["name"]: check["passed"] for check in result["checks"]}["vocabulary"]
        saved = sizes[0][result["artifact"]["format"]] - sizes[1][result["artifact"]["format"]]
        # int8: at least a byte per value of a row that is gone, and its scale.
        assert saved > (4096 - 1024) * (width + 2)
