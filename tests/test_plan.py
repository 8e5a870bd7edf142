"""`slm-export plan`: roofline, memory, what fits, exit codes; and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from test_plan_model import write_headers

from slm_export.cli import cli
from slm_export.errors import GateError, InputError
from slm_export.planning.forecast import forecast
from slm_export.planning.memory import longest_context, memory_of
from slm_export.planning.model import ModelShape, read_model
from slm_export.planning.roofline import Constants, Machine, Work, fitted, seconds, work_of
from slm_export.planning.sizes import sizes_of
from slm_export.planning.storage import store
from slm_export.profile import load_profile

GB = 10**9
INT4 = [("group-quantize", {"bits": 4, "group": 32, "embedding_bits": 8})]


def geometry(layers: int = 2, hidden: int = 256, vocabulary: int = 4096) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a Llama."""
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name in ("q", "k", "v", "o"):
            rows = hidden // 4 if name in "kv" else hidden
            tensors[f"{at}self_attn.{name}_proj.weight"] = (rows, hidden)
        for name in ("gate", "up"):
            tensors[f"{at}mlp.{name}_proj.weight"] = (4 * hidden, hidden)
        tensors[f"{at}mlp.down_proj.weight"] = (hidden, 4 * hidden)
    return tensors


def folder_of(path: Path, layers: int = 2, hidden: int = 256, vocabulary: int = 4096) -> Path:
    """Write headers of a Llama that ties its head to its embedding."""
    write_headers(
        path,
        geometry(layers, hidden, vocabulary),
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    return path


@pytest.fixture
def model(tmp_path: Path) -> ModelShape:
    return read_model(folder_of(tmp_path / "model"))


def device(tmp_path: Path, limit_gb: float | None = None, total_gb: float = 8) -> str:
    """Return a profile with everything that a prediction needs."""
    limit = "" if limit_gb is None else f'app_limit_gb = {{ value = {limit_gb}, source = "a test" }}\n'
    text = f"""
schema  = 1
name    = "phone"
title   = "A phone"
target  = "android"
formats = ["executorch", "litert"]
context = 1024

[cpu.cores]
clusters = [{{ core = "big", count = 4, ghz = 2.5 }}]
source   = "a test"

[cpu.isa]
features = ["dotprod", "i8mm"]
source   = "a test"

[memory]
total_gb       = {{ value = {total_gb}, source = "a test" }}
bandwidth_gb_s = {{ value = 50, source = "a test" }}
{limit}
[[recipe]]
pass           = "group-quantize"
bits           = 4
group          = 32
embedding_bits = 8
"""
    path = tmp_path / "phone.toml"
    path.write_text(text)
    return str(path)


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["plan", *arguments])


def planned(*arguments: str) -> Mapping[str, Any]:
    result = plan(*arguments, "--json")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    (one,) = json.loads(result.stdout)["predicted"]
    assert isinstance(one, dict)
    return one


# The roofline


def call(tokens: int = 1, kv: float = 0.0) -> Work:
    return Work("a call", tokens, {"int4": 2e9, "int8": 1e9}, {"int4": 4e9 * tokens, "int8": 1e9}, kv, 10)


def test_the_slower_of_memory_and_cores_decides_for_each_class() -> None:
    machine = Machine("m", 10 * GB, 1e9, "")
    memory_bound = Constants({"int4": 0.5, "int8": 0.25}, {"int4": 1e6, "int8": 1e6}, 0.0)
    assert seconds(call(), machine, memory_bound) == pytest.approx(2 / 5 + 1 / 2.5)
    cores_bound = Constants({"int4": 0.5, "int8": 0.25}, {"int4": 8.0, "int8": 1e6}, 0.0)
    assert seconds(call(), machine, cores_bound) == pytest.approx(4 / 8 + 1 / 2.5)


def test_cache_and_layers_cost_time_too() -> None:
    machine, of = Machine("m", 10 * GB, None, ""), Constants({"int4": 1.0, "int8": 1.0}, {}, 0.003)
    assert seconds(call(kv=1e9), machine, of) == pytest.approx(0.3 + 0.1 + 0.03)


@pytest.mark.parametrize(
    ("machine", "of", "tokens"),
    [
        (Machine("m", None, 1e9, ""), Constants({"int4": 1, "int8": 1}, {"int4": 1, "int8": 1}, 0), 1),
        (Machine("m", 1e9, 1e9, ""), Constants({"int4": 1}, {"int4": 1, "int8": 1}, 0), 1),
        (Machine("m", 1e9, None, ""), Constants({"int4": 1, "int8": 1}, {"int4": 1, "int8": 1}, 0), 64),
        (Machine("m", 1e9, 1e9, ""), Constants({"int4": 1, "int8": 1}, {}, 0), 64),
    ],
    ids=["no bandwidth", "a class that nothing was fitted for", "no clocks", "no rates"],
)
def test_what_is_not_known_is_not_predicted(machine: Machine, of: Constants, tokens: int) -> None:
    assert seconds(call(tokens), machine, of) is None


def test_a_token_reads_every_matrix_once_and_a_prompt_its_head_once(model: ModelShape) -> None:
    stored, _ = store(model, [("group-quantize", {"bits": 8, "embedding_bits": 8})])
    linear = sum(m.count for m in model.matrices if m.role == "linear")
    rows = sum(m.shape[0] for m in model.matrices)
    token, prompt = work_of(model, stored, 1, 100, 4), work_of(model, stored, 64, 0, 4)
    assert token.bytes["int8"] == model.parameters - model.vectors + 2 * rows
    assert prompt.bytes == token.bytes
    assert token.multiply_adds["int8"] == linear + 4096 * 256
    assert prompt.multiply_adds["int8"] == 64 * linear + 4096 * 256
    assert token.kv_bytes == 4 * 101 * model.kv_values
    assert model.kv_values == 2 * 2 * 64


def test_every_constant_is_a_share_or_a_rate() -> None:
    assert {"executorch", "litert"} <= fitted()["device"].keys()
    for where, formats in fitted().items():
        for of in formats.values():
            assert all(0 < share <= (1.25 if where == "host" else 1.0) for share in of.share.values())
            assert all(rate > 0 for rate in of.per_cycle.values())
            assert of.layer_s >= 0


# Memory


@pytest.mark.parametrize("limit", [20 << 20, 40 << 20, 21_500_000])
def test_the_longest_context_is_the_last_that_fits(model: ModelShape, limit: int) -> None:
    file = sizes_of(model, store(model, INT4)[0], "executorch", 0).total
    longest = longest_context(model, file, "executorch", limit)
    assert longest is not None
    if longest:
        assert memory_of(model, file, longest, "executorch").total <= limit
    if longest < 4096:
        assert memory_of(model, file, longest + 1, "executorch").total > limit


def test_the_cache_grows_with_the_context_and_its_precision(model: ModelShape, tmp_path: Path) -> None:
    made = forecast(model, load_profile(device(tmp_path)), "executorch", INT4, None)
    assert made.memory.kv_cache == 1024 * model.kv_values * 4
    assert made.kv_cache[1024] == {
        "float32": made.memory.kv_cache,
        "float16": made.memory.kv_cache // 2,
        "int8": made.memory.kv_cache // 4,
    }
    assert max(made.kv_cache) == 4096  # the model has no positions beyond


# The command


def test_a_package_holds_the_angles_of_its_context(model: ModelShape) -> None:
    stored, _ = store(model, INT4)
    longer, shorter = (sizes_of(model, stored, "coreml", tokens).total for tokens in (1024, 512))
    assert longer - shorter == 512 * 64 * 2 * 2  # cosine and sine in float16, of heads of 64
    same = {sizes_of(model, stored, "executorch", tokens).total for tokens in (1024, 512)}
    assert len(same) == 1


@pytest.mark.slow
@pytest.mark.parametrize("format", ["executorch", "litert", "onnx", "coreml"])
def test_a_planned_file_is_as_large_as_the_real_one(format: str, tmp_path: Path) -> None:
    folder = str(Path(__file__).resolve().parent.parent / "examples" / "pycode-5m")
    asked = (folder, "--target", "ios" if format == "coreml" else "android", "--format", format)
    out = tmp_path / "bundle"
    made = CliRunner().invoke(
        cli, ["export", *asked, "--no-verify", "--no-bench", "--out", str(out), "--json"]
    )
    assert made.exit_code == 0, made.output
    (real,) = json.loads((out / "manifest.json").read_text())["artifacts"]
    assert planned(*asked)["artifact_bytes"] == pytest.approx(real["bytes"], rel=0.02)


def test_a_plan_tells_all_of_one_device(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", layers=8)
    one = planned(str(folder), "--device", device(tmp_path, limit_gb=1))
    assert one["fits"] is True
    assert one["artifact_bytes"] == sum(one["sizes"].values())
    assert one["peak_memory_bytes"] == sum(one["memory"].values())
    assert one["sizes"]["head"] == 0
    assert one["speed"]["decode_tokens_per_s"] > 1
    assert one["speed"]["time_to_first_token_ms"] == pytest.approx(
        128_000 / one["speed"]["prefill_tokens_per_s"]
    )
    assert one["conversion"]["seconds"] > 0
    assert one["longest_context"] == 4096
    # Whatever is null says why.
    assert one["speed"]["load_ms"] is None
    assert "was not measured on such a device" in one["unknown"]["load"]


def test_a_limit_that_is_not_published_is_not_made_up(tmp_path: Path) -> None:
    one = planned(str(folder_of(tmp_path / "model")), "--device", device(tmp_path))
    assert one["fits"] is None
    assert "no limit of memory for one app is published" in one["unknown"]["fits"]


def test_what_does_not_fit_is_exit_code_1_and_the_nearest_that_would(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", layers=4, hidden=1024, vocabulary=8192)
    asked = (str(folder), "--bits", "16", "--device", device(tmp_path, limit_gb=0.15))
    result = plan(*asked)
    assert isinstance(result.exception, GateError)
    assert result.exception.exit_code == 1
    assert "the nearest that would fit: --bits 8" in str(result.exception)
    assert "fits" in result.stdout
    assert plan(*asked, "--json").exit_code == 1
    assert planned(*asked)["fits"] is False
    # What is told to fit does.
    assert planned(str(folder), "--bits", "8", *asked[3:])["fits"] is True


def test_more_than_all_memory_never_fits(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", layers=4, hidden=1024, vocabulary=8192)
    one = planned(str(folder), "--bits", "32", "--device", device(tmp_path, total_gb=0.1))
    assert one["fits"] is False


def test_the_nearest_may_be_a_shorter_context(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model")
    asked = (str(folder), "--device", device(tmp_path, limit_gb=0.025), "--context")
    one = planned(*asked, "4096")
    assert one["fits"] is False
    assert one["nearest"].startswith("--context ") or "--bits" in one["nearest"]
    words = one["nearest"].split()
    if "--context" in words:
        assert planned(*asked[:2], asked[2], *words)["fits"] is True


def test_all_devices_are_a_table(tmp_path: Path) -> None:
    folder = str(folder_of(tmp_path / "model"))
    result = plan(folder, "--device", "all")
    assert result.exit_code == 0, result.output
    for name in ("android-4gb", "iphone-17", "oneplus-12", "raspberry-pi-5", "host"):
        assert name in result.stdout
    found = json.loads(plan(folder, "--device", "all", "--target", "linux", "--json").stdout)["predicted"]
    assert [one["device"] for one in found] == ["jetson-orin-nano", "raspberry-pi-5", "x86-edge-8gb"]


def test_an_apple_device_without_a_bandwidth_says_so(tmp_path: Path) -> None:
    one = planned(str(folder_of(tmp_path / "model")), "--device", "iphone-15-pro")
    assert one["speed"]["decode_tokens_per_s"] is None
    assert "iphone-15-pro states no memory bandwidth" in one["unknown"]["decode"]
    assert one["fits"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "onplus-12"], "did you mean 'oneplus-12'"),
        (["--target", "android", "--context", "5000"], "longer than the 4096 positions"),
        (["--target", "ios", "--device", "pixel-8"], "belongs to target android"),
        (["--device", "pixel-8", "--format", "coreml"], "does not run format coreml"),
        (["--target", "android", "--palettize", "4"], "only coreml does"),
        (["--target", "ios", "--palettize", "4", "--bits", "4"], "one of the two"),
        (["--target", "androd"], "did you mean 'android'"),
        (["--target", "androd", "--device", "all"], "did you mean 'android'"),
        ([], "no target"),
    ],
)
def test_a_mistake_is_told_of(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = plan(str(folder_of(tmp_path / "model")), *arguments)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)


def test_settings_fill_what_is_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path / "model")
    (tmp_path / "slm-export.toml").write_text(
        'model = "model"\ntarget = "android"\ndevice = "oneplus-12"\nbits = 8\ncontext = 512\n'
    )
    monkeypatch.chdir(tmp_path)
    one = planned()
    assert (one["device"], one["context"]) == ("oneplus-12", 512)
    assert planned("--bits", "4")["artifact_bytes"] < one["artifact_bytes"]
    # Another target than the settings' device is of: that target's own.
    assert planned("--target", "linux")["device"] == "raspberry-pi-5"


def test_a_plan_needs_no_torch(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model")
    script = (
        "import sys; from slm_export.cli import cli\n"
        f"cli.main(['plan', {str(folder)!r}, '--device', 'all', '--json'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'safetensors', 'executorch', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_this_machine_reads_memory() -> None:
    from slm_export.planning.machines import this_machine

    found = this_machine()
    assert found.bytes_per_s is not None
    assert 1e8 < found.bytes_per_s < 1e13
    assert found.cycles_per_s is None or 1e8 < found.cycles_per_s < 1e13
