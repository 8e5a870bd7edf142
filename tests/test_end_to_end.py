"""Both real models the whole way, through the command line, and what was left behind."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, command, environment

from slm_export.bundles.bundle import read_manifest, verify_files


def exported(model: Path, folder: Path, *options: str) -> tuple[Path, dict[str, Any]]:
    """Export through the command line; return the bundle and the JSON document that it printed."""
    out = folder / "bundle"
    arguments = command(model, "--target", "android", "--out", out, "--json", *options)
    done = subprocess.run(
        arguments, cwd=folder, env=environment(), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


@pytest.fixture(scope="session")
def decoder(pycode: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    return exported(pycode, tmp_path_factory.mktemp("decoder"), "--bits", "8")


@pytest.fixture(scope="session")
def encoder(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    return exported(minilm, tmp_path_factory.mktemp("encoder"), "--bits", "8")


def test_a_decoder_at_8_bits_is_as_good_as_its_source(decoder: tuple[Path, dict[str, Any]]) -> None:
    _, document = decoder
    quality = document["formats"][0]["quality"]
    assert document["passed"]
    assert quality["perplexity_ratio"] <= 1.005
    assert quality["tokens"] >= 4000
    assert 0 < quality["lowering_kl_mean"] < quality["kl_mean"]
    assert {check["name"] for check in document["formats"][0]["checks"]} >= {
        "kl_mean",
        "top1_agreement",
        "perplexity_ratio",
        "greedy_agreement",
        "lowering_kl_mean",
        "degeneration",
        "stopping",
        "stop_tokens",
        "runner_text",
        "tokenizer_agreement",
    }


def test_a_decoder_is_measured_in_a_process_of_its_own(decoder: tuple[Path, dict[str, Any]]) -> None:
    latency = decoder[1]["formats"][0]["latency"]
    figures = ("load_ms", "time_to_first_token_ms", "prefill_tokens_per_s", "decode_tokens_per_s")
    assert all(math.isfinite(latency[name]) and latency[name] > 0 for name in figures)
    assert 0 < latency["model_rss_mb"] < latency["peak_rss_mb"]


def test_a_report_says_what_was_asked_and_what_became_of_every_weight(
    decoder: tuple[Path, dict[str, Any]],
) -> None:
    _, document = decoder
    assert document["asked"] == {"target": "android", "bits": 8}
    assert {"processor", "cores", "memory", "system"} <= document["environment"].keys()
    assert len(document["held_out"]) == 64
    rows = {row["name"]: row for row in document["weights"]}
    assert sum(row["bytes"] for row in rows.values()) == document["passes"][-1]["bytes_after"]
    assert sum(row["error"] is not None for row in rows.values()) == document["passes"][-1]["changed"]
    matrix = rows["model.layers.3.mlp.down_proj.weight"]
    assert (matrix["layer"], matrix["part"], matrix["bits"]) == (3, "mlp.down_proj", 8)
    assert 0 < matrix["error"] < 1e-3
    examples = document["formats"][0]["quality"]["examples"]
    assert [one["where"] for one in examples].count("held-out text") == 5
    assert examples[0]["kl"] == document["formats"][0]["quality"]["kl_max"]


def test_codes_of_two_bundles_are_compared(
    decoder: tuple[Path, dict[str, Any]], tmp_path: Path, cli: Cli
) -> None:
    copy = shutil.copytree(decoder[0], tmp_path / "copy")
    done = cli(
        "diff",
        decoder[0],
        copy,
        "--limit",
        "max_codes_changed=0",
        "--limit",
        "max_bytes_increase=0",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert len(document["codes"]) == 43
    assert {row["kind"] for row in document["codes"]} == {"same"}
    assert document["codes_from"] == "executorch"


def test_an_encoder_at_8_bits_is_a_quarter_of_its_size(
    encoder: tuple[Path, dict[str, Any]], minilm: Path
) -> None:
    out, document = encoder
    size = (out / "executorch" / "model.pte").stat().st_size
    assert size <= 0.26 * (minilm / "model.safetensors").stat().st_size
    assert document["formats"][0]["quality"]["cosine_mean"] >= 0.995


@pytest.mark.parametrize("name", ["decoder", "encoder"])
def test_a_bundle_is_complete_and_says_what_it_is(name: str, request: pytest.FixtureRequest) -> None:
    out, document = request.getfixturevalue(name)
    assert verify_files(out) == ()
    manifest = read_manifest(out)
    assert {entry.path for entry in manifest.files} >= {
        "executorch/model.pte",
        "tokenizer/tokenizer.json",
        "report.json",
        "report.html",
        "sbom.cdx.json",
    }
    assert manifest.model.architecture == document["model"]["architecture"]
    assert manifest.quality["executorch"]["gate"] == "pass"  # type: ignore[index]
    assert manifest.recipe[0]["pass"] == "group-quantize"
    assert manifest.runtime["context"] == document["model"]["context"]
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_verify_with_the_source_repeats_the_figures(
    decoder: tuple[Path, dict[str, Any]], pycode: Path, cli: Cli
) -> None:
    out, document = decoder
    done = cli("verify", out, "--source", pycode, "--json")
    assert done.returncode == 0, done.stderr
    again = {check["name"]: check["value"] for check in json.loads(done.stdout)["checks"]["executorch"]}
    first = {check["name"]: check["value"] for check in document["formats"][0]["checks"]}
    for name in ("kl_mean", "perplexity_ratio", "greedy_agreement"):
        # The runtime sums in the order that its threads finish in.
        assert again[name] == pytest.approx(first[name], rel=0.05)


def test_verify_notices_one_changed_byte(
    decoder: tuple[Path, dict[str, Any]], tmp_path: Path, cli: Cli
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(decoder[0], copy)
    program = copy / "executorch" / "model.pte"
    data = bytearray(program.read_bytes())
    data[len(data) // 2] ^= 1
    program.write_bytes(data)
    done = cli("verify", copy)
    assert done.returncode == 1
    assert "executorch/model.pte" in done.stdout
    assert cli("run", copy, "--prompt", "x").returncode == 1


def test_verify_refuses_another_source(
    decoder: tuple[Path, dict[str, Any]], tiny_llama: Path, cli: Cli
) -> None:
    done = cli("verify", decoder[0], "--source", tiny_llama)
    assert done.returncode == 2
    assert "not the model" in done.stderr


def test_run_streams_what_it_prints_at_once(decoder: tuple[Path, dict[str, Any]]) -> None:
    arguments = ("run", decoder[0], "--prompt", "def fibonacci(n):", "--max-tokens", "24")
    at_once = subprocess.run(
        command(*arguments, "--no-stream"), env=environment(), capture_output=True, text=True, check=True
    )
    streaming = subprocess.Popen(command(*arguments), env=environment(), stdout=subprocess.PIPE)
    assert streaming.stdout is not None
    pieces = list(iter(lambda: streaming.stdout.read1(), b""))  # type: ignore[union-attr]
    assert streaming.wait() == 0
    assert b"".join(pieces).decode() == at_once.stdout
    assert len(at_once.stdout) > 20
    assert len(pieces) > 1


def test_run_samples_by_its_seed(decoder: tuple[Path, dict[str, Any]], cli: Cli) -> None:
    def sample(seed: int) -> str:
        options = (
            "--temperature",
            "1",
            "--top-p",
            "0.9",
            "--max-tokens",
            "16",
            "--seed",
            str(seed),
            "--json",
        )
        done = cli("run", decoder[0], "--prompt", "import ", *options)
        text: str = json.loads(done.stdout)["text"]
        return text

    assert sample(1) == sample(1) != sample(2)


def test_the_stock_runner_gives_the_same_greedy_text(
    decoder: tuple[Path, dict[str, Any]], cli: Cli, tmp_path: Path
) -> None:
    """ExecuTorch's own loop, driven as an app drives it: nothing of ours but the files."""
    out = decoder[0]
    script = tmp_path / "runner.py"
    script.write_text(
        "import sys, torch\n"
        "from executorch.extension.pybindings import portable_lib\n"
        "from executorch.extension.llm.custom_ops import custom_ops\n"
        "from executorch.kernels import quantized\n"
        "from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner\n"
        "parts = []\n"
        "runner = TextLLMRunner(sys.argv[1], sys.argv[2])\n"
        "config = GenerationConfig(temperature=0.0, echo=False, max_new_tokens=40)\n"
        "runner.generate('class Stack:', config, parts.append)\n"
        "open(sys.argv[3], 'w').write(''.join(parts))\n"
    )
    answer = tmp_path / "answer.txt"
    files = (out / "executorch/model.pte", out / "tokenizer/tokenizer.json", answer)
    subprocess.run([sys.executable, script, *files], check=True, capture_output=True)
    ours = cli("run", out, "--prompt", "class Stack:", "--max-tokens", "40", "--json")
    assert json.loads(ours.stdout)["text"] == answer.read_text()


def test_an_encoder_prints_its_embedding(encoder: tuple[Path, dict[str, Any]], cli: Cli) -> None:
    done = cli("run", encoder[0], "--prompt", "The parcel arrived a day early.", "--json")
    embedding = json.loads(done.stdout)["embedding"]
    assert len(embedding) == 384
    assert sum(value * value for value in embedding) == pytest.approx(1, abs=1e-4)


def test_the_settings_of_the_current_folder_are_enough(tiny_llama: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "slm-export.toml").write_text(
        f'model = "{tiny_llama}"\ntarget = "android"\nbits = 8\nout = "made"\n\n'
        "[gates]\nmax_kl_mean = 0.5\nmin_top1_agreement = 0.1\nmin_greedy_agreement = 0.1\n"
    )
    done = cli("--target", "android", "--no-bench")
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "made")
    assert manifest.recipe[0]["bits"] == 8
    assert manifest.latency["executorch"] is None
    assert manifest.gates.max_kl_mean == 0.5
    assert "slm-export run made" in done.stdout
