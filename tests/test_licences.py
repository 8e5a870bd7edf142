"""A model's licence: what it is called, and its texts, which go into the bundle."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from forked import Forked

from slm_export.bundles.bundle import read_manifest, verify_files
from slm_export.errors import InputError
from slm_export.source.licences import LARGEST, copy_licences, licence_files, licence_texts, licences_sha256

TEXTS = (
    "COPYING",
    "LICENSE",
    "LICENSE-CODE",
    "LICENSE.txt",
    "License.pdf",
    "MODEL_LICENSE",
    "NOTICE",
    "Notice.txt",
    "ThirdPartyNotices.txt",
    "USE_POLICY.md",
    "acceptable-use-policy.md",
    "licence.md",
)
OTHERS = ("README.md", "config.json", "license.py", "license.json", "model.safetensors", "unlicensed.txt")


def test_texts_are_told_by_their_names_and_carried_as_they_are(tmp_path: Path) -> None:
    model, bundle = tmp_path / "model", tmp_path / "bundle"
    for folder in (model, bundle, model / "licenses"):
        folder.mkdir()
    for name in (*TEXTS, *OTHERS):
        (model / name).write_bytes(name.encode() + b"\r\n\xff")
    assert tuple(file.name for file in licence_files(model)) == TEXTS
    copy_licences(model, bundle)
    assert {file.name: file.read_bytes() for file in (bundle / "licences").iterdir()} == {
        name: (model / name).read_bytes() for name in TEXTS
    }
    assert licence_texts(model) == tuple(f"licences/{name}" for name in TEXTS)


def test_a_model_without_one_has_no_folder_of_it(tmp_path: Path) -> None:
    copy_licences(tmp_path, tmp_path)
    copy_licences(tmp_path / "model.keras", tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert licences_sha256(tmp_path) is None


def test_the_hash_is_of_name_and_texts(tmp_path: Path) -> None:
    seen = [licences_sha256(tmp_path)]
    for name, text in (
        ("README.md", "---\nlicense: mit\n---\n"),
        ("README.md", "---\nlicense: apache-2.0\n---\n"),
        ("LICENSE", "MIT"),
        ("LICENSE", "MIT, really"),
        ("NOTICE", "MIT, really"),
    ):
        (tmp_path / name).write_text(text)
        seen.append(licences_sha256(tmp_path))
    assert len(set(seen)) == len(seen)
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\nOther words.\n")
    assert licences_sha256(tmp_path) == seen[-1]


def test_links_are_followed_to_licences_alone(tmp_path: Path) -> None:
    """What is copied is given away with the bundle; it is no file that a stranger's link chose."""
    secret, model = tmp_path / "id_rsa", tmp_path / "model"
    model.mkdir()
    secret.write_text("secret")
    (model / "LICENSE").symlink_to(secret)
    with pytest.raises(InputError, match="which is not called a licence"):
        copy_licences(model, tmp_path)
    assert not (tmp_path / "licences").exists()
    (model / "LICENSE").unlink()
    (tmp_path / "LICENSE").write_text("MIT")
    (model / "LICENSE").symlink_to(tmp_path / "LICENSE")
    assert [file.read_text() for file in licence_files(model)] == ["MIT"]


def test_the_hubs_cache_is_links(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / ("0f" * 20)).write_text("MIT")
    (snapshot / "LICENSE").symlink_to(Path("../../blobs") / ("0f" * 20))
    assert [file.read_text() for file in licence_files(snapshot)] == ["MIT"]


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "LICENSE"
    os.mkfifo(file)
    with pytest.raises(InputError, match="not a regular file"):
        licence_files(tmp_path)
    file.unlink()
    file.symlink_to(file)
    with pytest.raises(InputError, match="cannot be read"):
        licence_files(tmp_path)
    file.unlink()
    with file.open("wb") as opened:
        opened.truncate(LARGEST + 1)
    with pytest.raises(InputError, match="which is no licence's text"):
        licence_files(tmp_path)


def test_a_bundle_has_the_texts(tiny_llama: Path, quick_cli: Forked, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    (model / "LICENSE").write_text("Do as you like.")
    (model / "README.md").write_text("---\nlicense: other\nlicense_name: as-you-like\n---\n")
    options = ("--target", "host", "--format", "onnx", "--bits", "32", "--no-verify", "--no-bench")
    done = quick_cli(model, *options, "--out", "out", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    bundle = tmp_path / "out"
    assert verify_files(bundle) == ()
    assert (bundle / "licences" / "LICENSE").read_text() == "Do as you like."
    assert "licences/LICENSE" in {entry.path for entry in read_manifest(bundle).files}
    told = json.loads(done.stdout)["model"]
    assert (told["licence"], told["licence_texts"]) == ("as-you-like", ["licences/LICENSE"])
    assert "licence as-you-like (licences/LICENSE)" in (bundle / "report.html").read_text()
    (bundle / "licences" / "LICENSE").write_text("Do as I say.")
    assert [problem.path for problem in verify_files(bundle)] == ["licences/LICENSE"]
