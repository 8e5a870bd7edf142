"""A bundle says what it is, and notices when it was touched."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from sample_reports import (
    GATES,
    RUNTIME,
    SHA,
    artifact_of,
    decoder_report,
    encoder_report,
    fill,
    make,
    tree,
    unverified,
)

from slm_export.bundles.bundle import (
    read_manifest,
    sha256_file,
    size_of,
    tree_files,
    verify_files,
    write_documents,
)
from slm_export.bundles.manifest import Manifest, to_text
from slm_export.errors import GateError, InputError, MachineError

# --- the manifest ------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make(tmp_path / "out")


def test_the_manifest_says_what_the_schema_promises(bundle: Path) -> None:
    data = json.loads((bundle / "manifest.json").read_text())
    assert list(data)[:5] == ["schema", "model", "target", "device", "recipe"]
    assert data["schema"] == 1
    assert data["model"]["source_sha256"] == SHA
    assert data["recipe"] == [{"pass": "group-quantize", "bits": 4, "group": 32}]
    assert data["artifacts"][0]["path"] == "executorch/model.pte"
    assert data["gates"] == {"max_kl_mean": 0.05}
    assert data["runtime"] == RUNTIME
    quality = data["quality"]["executorch"]
    assert {"kl_mean", "kl_p99", "kl_max", "top1_agreement", "perplexity_ratio"} < set(quality)
    assert {"tokens", "lowering_max_abs", "greedy_agreement"} < set(quality)
    assert quality["gate"] == "pass"
    assert quality["perplexity"] is None
    latency = data["latency"]["executorch"]
    assert {"where", "threads", "prefill_tokens_per_s", "decode_tokens_per_s"} < set(latency)
    assert {"time_to_first_token_ms", "load_ms", "peak_rss_mb", "runs"} < set(latency)
    assert [entry["path"] for entry in data["files"]] == sorted(tree(bundle).keys() - {"manifest.json"})


def test_the_manifest_survives_a_round_trip(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert to_text(manifest) == (bundle / "manifest.json").read_text()
    assert manifest.gates == GATES
    assert manifest.artifact("executorch").bytes == 4096
    with pytest.raises(InputError, match="no coreml artifact"):
        manifest.artifact("coreml")


def test_the_same_export_gives_the_same_bytes(tmp_path: Path) -> None:
    assert tree(make(tmp_path / "one")) == tree(make(tmp_path / "two"))


def test_no_path_of_the_machine_gets_into_a_bundle(bundle: Path) -> None:
    for name, content in tree(bundle).items():
        assert str(bundle.parent).encode() not in content, name
        assert b".partial" not in content, name


def manifest_of(folder: Path, kind: str) -> Manifest:
    artifact = artifact_of(fill(folder))
    report = {
        "encoder": encoder_report(artifact),
        "unverified": unverified(decoder_report(artifact)),
        "failed": decoder_report(artifact, kl_mean=0.5),
    }[kind]
    write_documents(folder, report)
    return read_manifest(folder)


def test_an_encoder_has_cosines_and_percentiles(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, "encoder")
    quality, latency = manifest.quality["executorch"], manifest.latency["executorch"]
    assert quality is not None
    assert (quality["cosine_min"], quality["cosine_mean"], quality["gate"]) == (0.97, 0.995, "pass")
    assert latency is not None
    assert latency["latency_ms"] == {"p50": 14.1, "p90": 15.2, "p99": 19.9}


def test_what_was_not_measured_is_null(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, "unverified")
    assert manifest.quality == {"executorch": None}
    assert manifest.latency == {"executorch": None}


def test_a_failed_check_fails_the_gate(tmp_path: Path) -> None:
    quality = manifest_of(tmp_path, "failed").quality["executorch"]
    assert quality is not None
    assert quality["gate"] == "fail"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_is_no_number_is_never_written(tmp_path: Path, value: float) -> None:
    artifact = artifact_of(fill(tmp_path))
    with pytest.raises(GateError, match=r"executorch: kl_mean is (nan|inf)"):
        write_documents(tmp_path, decoder_report(artifact, kl_mean=value))


def test_an_artifact_that_changed_after_it_was_verified_is_not_bundled(tmp_path: Path) -> None:
    path = fill(tmp_path)
    report = decoder_report(artifact_of(path))
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    with pytest.raises(MachineError, match=r"executorch/model\.pte: changed"):
        write_documents(tmp_path, report)
    assert not (tmp_path / "manifest.json").exists()


# --- a bundle that was touched -----------------------------------------------------------------------


def test_verify_names_what_changed_is_missing_and_extra(bundle: Path) -> None:
    path = bundle / "executorch" / "model.pte"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    (bundle / "tokenizer" / "tokenizer.json").unlink()
    (bundle / "tokenizer" / "added.txt").write_text("x")
    (bundle / "report.json").write_text("{}")
    assert [(problem.path, problem.kind) for problem in verify_files(bundle)] == [
        ("executorch/model.pte", "changed"),
        ("report.json", "changed"),
        ("tokenizer/added.txt", "extra"),
        ("tokenizer/tokenizer.json", "missing"),
    ]


def test_every_file_is_missed_and_every_bit_counts(bundle: Path) -> None:
    def problems() -> list[tuple[str, str]]:
        return [(problem.path, problem.kind) for problem in verify_files(bundle)]

    names = [entry.path for entry in read_manifest(bundle).files]
    assert {"executorch/model.pte", "report.html", "sbom.cdx.json", "tokenizer/tokenizer.json"} < set(names)
    for name in names:
        path = bundle / name
        content = path.read_bytes()
        flipped = content[:-1] + bytes(byte ^ 1 for byte in content[-1:])
        for changed in {flipped, content[:-1], content + b"\n"} - {content}:
            path.write_bytes(changed)
            assert problems() == [(name, "changed")]
        path.unlink()
        assert problems() == [(name, "missing")]
        path.write_bytes(content)
    for folder in {path.parent for path in bundle.rglob("*")}:
        (folder / "added").touch()
        assert problems() == [((folder / "added").relative_to(bundle).as_posix(), "extra")]
        (folder / "added").unlink()
    assert problems() == []


def test_a_link_in_place_of_a_file_is_refused(bundle: Path) -> None:
    path = bundle / "executorch" / "model.pte"
    elsewhere = bundle.parent / "model.pte"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(InputError, match="symbolic link"):
        verify_files(bundle)
    path.unlink()
    elsewhere.rename(path)
    (bundle / "executorch").rename(bundle.parent / "moved")
    (bundle / "executorch").symlink_to(bundle.parent / "moved")
    with pytest.raises(InputError, match="symbolic link"):
        read_manifest(bundle)


def test_links_and_pipes_that_came_in_are_extra(bundle: Path) -> None:
    (bundle / "link").symlink_to("/etc/passwd")
    os.mkfifo(bundle / "pipe")
    assert [(problem.path, problem.kind) for problem in verify_files(bundle)] == [
        ("link", "extra"),
        ("pipe", "extra"),
    ]


@pytest.mark.parametrize(
    "path",
    ["../secret", "/etc/passwd", "a/../../b", "a//b", "", ".", "./a", "C:/x", "a\\b", "a\0b", "a\x1b[2J"],
)
def test_paths_that_leave_the_bundle_are_refused(bundle: Path, path: str) -> None:
    data = json.loads((bundle / "manifest.json").read_text())
    # Both, so that the two lists still agree and only the path itself is wrong.
    data["files"][0]["path"] = data["artifacts"][0]["path"] = path
    (bundle / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"does not stay inside the bundle|holds a character"):
        read_manifest(bundle)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 2}, "schema 2 is not one"),
        ({"schema": True}, "schema True is not one"),
        ({"surprise": 1}, "surprise"),
        ({"files": []}, "not in the list of files"),
        ({"model": {}}, "model"),
        ({"gates": {"max_kl_meen": 1.0}}, "max_kl_meen"),
    ],
)
def test_a_manifest_that_is_not_understood_is_refused(
    bundle: Path, change: dict[str, object], words: str
) -> None:
    data = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**data, **change}))
    with pytest.raises(InputError, match=words):
        read_manifest(bundle)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"schema": NaN}'])
def test_a_corrupt_manifest_is_an_input_error(bundle: Path, content: bytes) -> None:
    (bundle / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match=r"manifest\.json: "):
        read_manifest(bundle)


def test_a_missing_huge_or_special_manifest_is_an_input_error(bundle: Path) -> None:
    path = bundle / "manifest.json"
    os.truncate(path, 1 << 30)
    with pytest.raises(InputError, match="too many"):
        read_manifest(bundle)
    path.unlink()
    with pytest.raises(InputError, match="give the folder"):
        read_manifest(bundle)
    os.mkfifo(path)
    with pytest.raises(InputError, match="not a plain file"):
        read_manifest(bundle)


# --- checksums ---------------------------------------------------------------------------------------


def test_the_hash_of_a_tree_is_that_of_its_sha256sum_listing(tmp_path: Path) -> None:
    for name, text in {"b": "2", "a/x": "1", "a.x": "3"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    listing = "".join(f"{sha256_file(tmp_path / name)}  {name}\n" for name in ("a.x", "a/x", "b"))
    (tmp_path.parent / "listing").write_text(listing)
    assert sha256_file(tmp_path) == sha256_file(tmp_path.parent / "listing")
    assert [entry.path for entry in tree_files(tmp_path)] == ["a.x", "a/x", "b"]
    assert size_of(tmp_path) == 3


def test_a_package_folder_is_an_artifact_like_a_file(tmp_path: Path) -> None:
    fill(tmp_path)
    package = tmp_path / "coreml" / "Model.mlpackage"
    (package / "Data").mkdir(parents=True)
    (package / "Data" / "weights.bin").write_bytes(b"w" * 100)
    (package / "Manifest.json").write_text("{}")
    write_documents(tmp_path, decoder_report(artifact_of(package, "coreml")))
    assert verify_files(tmp_path) == ()
    data = json.loads((tmp_path / "manifest.json").read_text())
    data["artifacts"][0]["sha256"] = SHA
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    assert [problem.path for problem in verify_files(tmp_path)] == ["coreml/Model.mlpackage"]


def test_a_link_never_gets_into_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "weights").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match="not a plain file"):
        tree_files(tmp_path)


def test_the_sbom_names_model_files_and_packages(bundle: Path) -> None:
    sbom = json.loads((bundle / "sbom.cdx.json").read_text())
    assert (sbom["bomFormat"], sbom["specVersion"]) == ("CycloneDX", "1.6")
    assert "timestamp" not in sbom["metadata"]
    components = {component["bom-ref"]: component for component in sbom["components"]}
    assert components["model"]["type"] == "machine-learning-model"
    assert components["model"]["hashes"] == [{"alg": "SHA-256", "content": SHA}]
    assert components["model"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert components["package:torch@2.13.0+cpu"]["purl"] == "pkg:pypi/torch@2.13.0%2Bcpu"
    assert components["package:python@3.11.7"]["purl"].startswith("pkg:generic/")
    files = {
        entry.path: entry.sha256 for entry in read_manifest(bundle).files if entry.path != "sbom.cdx.json"
    }
    listed = {
        component["name"]: component["hashes"][0]["content"]
        for component in components.values()
        if component["type"] == "file"
    }
    assert listed == files


def test_the_sbom_is_what_cyclonedx_asks_for(tmp_path: Path) -> None:
    report = decoder_report(artifact_of(fill(tmp_path)))
    (tmp_path / "licences").mkdir()
    (tmp_path / "licences" / "USE POLICY.md").write_text("Be kind.")
    model = dataclasses.replace(report.model, licence="llama3.2", licence_texts=("licences/USE POLICY.md",))
    write_documents(tmp_path, dataclasses.replace(report, model=model))
    text = (tmp_path / "sbom.cdx.json").read_text()
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(text) is None
    assert validator.validate_str(text.replace('"SHA-256"', '"SHA-257"')) is not None
    (component,) = [one for one in json.loads(text)["components"] if one["bom-ref"] == "model"]
    assert component["licenses"] == [{"license": {"name": "llama3.2"}}]
    (reference,) = component["externalReferences"]
    assert (reference["type"], reference["url"]) == ("license", "licences/USE%20POLICY.md")
    entry = {one.path: one for one in read_manifest(tmp_path).files}["licences/USE POLICY.md"]
    assert reference["hashes"] == [{"alg": "SHA-256", "content": entry.sha256}]
