"""Bundles with adapters that stay apart: exported, added to, run, and refused where a file is another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from forked import Forked
from starlette.testclient import TestClient
from test_adapters_apart import adapter_of

from slm_export.bundles.checksums import sha256_file
from slm_export.bundles.manifest import MANIFEST, read_manifest
from slm_export.errors import GateError, InputError
from slm_export.opened import open_bundle

PROMPT = "def read(path):"


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters")
    return {
        "first": adapter_of(tiny_llama, place / "first", 3),
        "second": adapter_of(tiny_llama, place / "second", 4, r=2, target_modules=["q_proj", "v_proj"]),
        "third": adapter_of(tiny_llama, place / "third", 5, r=1, target_modules=["v_proj"]),
    }


@pytest.fixture(scope="module")
def exported(
    tiny_llama: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, quick_cli: Forked
) -> Path:
    """A bundle with places at two layers, and one adapter."""
    out = tmp_path_factory.mktemp("bundles") / "made"
    done = quick_cli(
        tiny_llama, "--target", "host", "--format", "onnx", "--bits", "8", "--context", "64", "--no-verify",
        "--no-bench", "--adapter", f"second={folders['second']}", "--out", out, cwd=out.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def manifest_of(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / MANIFEST).read_text())
    return found


def text_of(bundle: Path, adapter: str | None) -> str:
    from slm_export.generation import Sampling

    opened = open_bundle(bundle)
    opened.adapt(adapter)
    try:
        return "".join(opened.text(PROMPT, 24, Sampling(), chat=False))
    finally:
        opened.close()


def test_the_manifest_says_what_an_adapter_is_for(exported: Path, folders: dict[str, Path]) -> None:
    written = manifest_of(exported)
    (entry,) = written["adapters"]
    file = exported / "adapters" / "second.onnx_adapter"
    assert entry["path"] == "adapters/second.onnx_adapter"
    assert (entry["bytes"], entry["sha256"]) == (file.stat().st_size, sha256_file(file))
    assert (
        entry["base_sha256"] == written["artifacts"][0]["sha256"] == sha256_file(exported / "onnx/model.onnx")
    )
    assert (entry["name"], entry["format"], entry["rank"]) == ("second", "onnx", 2)
    assert entry["targets"] == ["q_proj", "v_proj"]
    assert entry["quality"] is None  # it was not verified
    assert entry["path"] in {each["path"] for each in written["files"]}
    lock = json.loads((exported / "slm-export.lock").read_text())
    assert lock["inputs"]["adapters"] == {"second": entry["source_sha256"]}


def test_an_open_bundle_switches(exported: Path) -> None:
    base, adapted = text_of(exported, None), text_of(exported, "second")
    assert base != adapted
    assert text_of(exported, None) == base
    with pytest.raises(InputError, match="no adapter 'secnd' for this format; did you mean 'second'"):
        text_of(exported, "secnd")


def test_the_command_turns_it_on(exported: Path, quick_cli: Forked) -> None:
    asked = ("run", exported, "--prompt", PROMPT, "--max-tokens", "24", "--no-stream", "--no-chat-template")
    done = quick_cli(*asked, "--adapter", "second", cwd=exported.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout == text_of(exported, "second") + "\n"
    done = quick_cli(*asked, "--adapter", "none", cwd=exported.parent)
    assert done.returncode == 2
    assert "known: second" in done.stderr


def test_a_file_that_was_changed_is_refused(bundle: Path, quick_cli: Forked) -> None:
    file = bundle / "adapters" / "second.onnx_adapter"
    data = bytearray(file.read_bytes())
    data[-40] ^= 1
    file.write_bytes(data)
    with pytest.raises(GateError, match=r"second\.onnx_adapter: changed"):
        text_of(bundle, "second")
    assert text_of(bundle, None)
    done = quick_cli("verify", bundle, cwd=bundle.parent)
    assert done.returncode == 1
    assert "adapters/second.onnx_adapter: changed" in done.stdout
    done = quick_cli("adapter", "list", bundle, cwd=bundle.parent)
    assert done.returncode == 1
    assert "second.onnx_adapter: changed" in done.stderr


def test_an_adapter_of_another_base_is_refused(bundle: Path) -> None:
    written = manifest_of(bundle)
    written["adapters"][0]["base_sha256"] = "0" * 64
    (bundle / MANIFEST).write_text(json.dumps(written))
    with pytest.raises(InputError, match="was made for another onnx artifact than that of the bundle"):
        read_manifest(bundle)


def test_a_whole_other_base_is_refused_by_the_adapter_s_file(bundle: Path) -> None:
    """Whoever writes a manifest to match still has a file that says which model it is for."""
    model = bundle / "onnx/model.onnx"
    # A field that comes twice: the same model, with other bytes.
    model.write_bytes(model.read_bytes() + b"\x1a\x00")
    written = manifest_of(bundle)
    facts = {"bytes": model.stat().st_size, "sha256": sha256_file(model)}
    written["artifacts"][0] |= facts
    next(each for each in written["files"] if each["path"] == "onnx/model.onnx").update(facts)
    written["adapters"][0]["base_sha256"] = facts["sha256"]
    (bundle / MANIFEST).write_text(json.dumps(written))
    assert text_of(bundle, None)
    with pytest.raises(InputError, match="was made for another model"):
        text_of(bundle, "second")


def test_one_is_added_judged_and_removed(
    bundle: Path, tiny_llama: Path, folders: dict[str, Path], tmp_path: Path, quick_cli: Forked
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def read(path):\n    with open(path) as file:\n        return file.read()\n\n" * 12)
    before, model = manifest_of(bundle), sha256_file(bundle / "onnx/model.onnx")
    third = f"third={folders['third']}"
    done = quick_cli(
        "adapter",
        "add",
        bundle,
        third,
        "--source",
        tiny_llama,
        "--eval-text",
        text,
        "--json",
        cwd=bundle.parent,
    )
    assert done.returncode == 0, done.stderr
    added = json.loads(done.stdout)
    assert all(check["passed"] for check in added["checks"])
    names = {check["name"] for check in added["checks"]}
    assert {"third: kl_mean", "third: lowering_kl_mean", "third: runner_text", "third: factors"} <= names
    assert {"adapters_switch", "adapters_load", "exact_adapters"} <= names
    after = manifest_of(bundle)
    assert [each["name"] for each in after["adapters"]] == ["second", "third"]
    assert after["adapters"][1]["quality"]["kl_mean"] is not None
    assert {key: after[key] for key in before if key not in ("adapters", "files")} == {
        key: before[key] for key in before if key not in ("adapters", "files")
    }
    assert sha256_file(bundle / "onnx/model.onnx") == model
    assert '"adapters/third.onnx_adapter"' in (bundle / "sbom.cdx.json").read_text()
    assert text_of(bundle, "third") != text_of(bundle, "second")
    again = quick_cli("adapter", "add", bundle, third, "--source", tiny_llama, cwd=bundle.parent)
    assert again.returncode == 2
    assert "has an adapter 'third' already" in again.stderr
    done = quick_cli("adapter", "remove", bundle, "third", cwd=bundle.parent)
    assert done.returncode == 0, done.stderr
    assert manifest_of(bundle) == before
    assert sorted(path.name for path in bundle.parent.iterdir() if path.name.startswith(".bundle")) == []


def test_layers_without_places_are_refused(
    bundle: Path, tiny_llama: Path, folders: dict[str, Path], quick_cli: Forked
) -> None:
    before = manifest_of(bundle)
    done = quick_cli(
        "adapter", "add", bundle, f"first={folders['first']}", "--source", tiny_llama, cwd=bundle.parent
    )
    assert done.returncode == 2
    assert "has no place (it has: q_proj, v_proj)" in done.stderr
    assert "export the model again with --adapter first=FOLDER" in done.stderr
    assert manifest_of(bundle) == before
    assert [path.name for path in (bundle / "adapters").iterdir()] == ["second.onnx_adapter"]


def test_another_source_is_refused(
    bundle: Path, pycode: Path, folders: dict[str, Path], quick_cli: Forked
) -> None:
    done = quick_cli(
        "adapter", "add", bundle, f"third={folders['third']}", "--source", pycode, cwd=bundle.parent
    )
    assert done.returncode == 2
    assert "another sha256" in done.stderr
    done = quick_cli("adapter", "remove", bundle, "thrid", cwd=bundle.parent)
    assert done.returncode == 2
    assert "known: second" in done.stderr


def test_a_served_bundle_has_a_name_for_each(exported: Path) -> None:
    from slm_export.serving.engine import Engine
    from slm_export.serving.server import make_app

    engine = Engine(lambda: open_bundle(exported), 1)
    name = engine.model.manifest.model.name
    try:
        with TestClient(make_app(engine, None, True), base_url="http://127.0.0.1") as client:
            listed = client.get("/v1/models").json()["data"]
            assert [each["id"] for each in listed] == [name, f"{name}:second"]
            assert client.get(f"/v1/models/{name}:second").json()["id"] == f"{name}:second"
            asked = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0}
            for adapter in (None, "second", None):
                model = name if adapter is None else f"{name}:{adapter}"
                answer = client.post("/v1/completions", json={**asked, "model": model}).json()
                assert answer["model"] == model
                assert answer["choices"][0]["text"] == text_of(exported, adapter)
            refused = client.post("/v1/completions", json={**asked, "model": f"{name}:third"})
            assert refused.status_code == 404
            assert f"'{name}:second'" in refused.json()["error"]["message"]
    finally:
        engine.close()


@pytest.mark.slow
def test_several_formats_are_judged_with_it_on(
    tiny_llama: Path, folders: dict[str, Path], tmp_path: Path, quick_cli: Forked
) -> None:
    out, text = tmp_path / "made", tmp_path / "text.txt"
    text.write_text("def read(path):\n    with open(path) as file:\n        return file.read()\n\n" * 12)
    done = quick_cli(
        tiny_llama, "--target", "host", "--format", "onnx", "--format", "executorch", "--format", "litert",
        "--bits", "8", "--context", "64", "--eval-text", text, "--no-bench",
        "--adapter", f"first={folders['first']}", "--adapter", f"third={folders['third']}",
        "--out", out, "--json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    for made in report["formats"]:
        checks = {check["name"] for check in made["checks"]}
        wanted = {
            f"{name}: {what}" for name in ("first", "third") for what in ("kl_mean", "factors", "stopping")
        }
        assert wanted | {"adapters_switch", "adapters_load", "exact_adapters"} <= checks
        assert [each["name"] for each in made["adapters"]] == ["first", "third"]
        assert all(each["quality"]["tokens"] > 100 for each in made["adapters"])
    told = "\n".join(report["notes"])
    assert "stock runners call `forward` alone" in told
    assert "LiteRT-LM runs the functions without an adapter" in told
    listed = {(each["name"], each["format"]): each["path"] for each in manifest_of(out)["adapters"]}
    assert listed["third", "executorch"] == "adapters/third.executorch.safetensors"
    assert listed["first", "litert"] == "adapters/first.litert.safetensors"
    asked = ("run", out, "--prompt", PROMPT, "--max-tokens", "24", "--no-stream", "--no-chat-template")
    texts = {
        quick_cli(*asked, "--format", format, "--adapter", "first", cwd=tmp_path).stdout
        for format in ("onnx", "executorch", "litert")
    }
    assert len(texts) == 1
    done = quick_cli("verify", out, "--source", tiny_llama, "--eval-text", text, "--adapter",
                     f"third={folders['third']}", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "onnx: third: factors" in done.stdout
    assert "executorch: third: kl_mean" in done.stdout
    assert "adapter first was not compared with its source" in done.stdout
    done = quick_cli("verify", out, "--source", tiny_llama, "--eval-text", text, "--adapter",
                     f"third={folders['first']}", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 2
    assert "not the adapter that the bundle has" in done.stderr
