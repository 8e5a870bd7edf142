"""Where a MODEL argument leads. Nothing here touches the network."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from slm_export.errors import InputError, MachineError, SlmExportError
from slm_export.source.hub import find_model


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the hub answer every request with an error."""

    def fail(error: Exception) -> Mock:
        download = Mock(side_effect=error)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        return download

    return fail


def problem(model: str, revision: str | None = None, kind: type[SlmExportError] = InputError) -> str:
    with pytest.raises(kind) as caught:
        find_model(model, revision)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert find_model(str(tmp_path / "org")) == tmp_path / "org"
    assert find_model("~/org/name") == tmp_path / "org" / "name"
    monkeypatch.chdir(tmp_path)
    # A folder that is there goes before a hub name that is spelled alike.
    assert find_model("org/name") == Path("org/name")


def test_a_revision_of_a_folder_means_nothing(tmp_path):
    text = problem(str(tmp_path), "main")
    assert text == f"--revision main has no meaning for {tmp_path}, which is a folder"


def test_a_file_is_not_a_model(tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert "a file; give the model's folder" in problem(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("model", ["nowhere", "./no/where", "a/b/c", "-x/y", "org/", "org/na me", "../x/y"])
def test_what_is_neither_folder_nor_hub_name_is_refused_unasked(failing, model):
    download = failing(AssertionError())
    assert problem(model).startswith(f"{model}: no such folder")
    assert not download.called


def test_offline_a_model_that_was_never_downloaded(offline):
    text = problem("org/name")
    assert text == (
        "org/name: no such folder, not downloaded before, and offline mode is on (--offline, or HF_HUB_OFFLINE)"
    )
    assert "at revision v2, and offline" in problem("org/name", "v2")


def test_offline_the_hub_is_not_even_asked(offline, monkeypatch):
    download = Mock(return_value="/cache/org/name")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    find_model("org/name")
    assert download.call_args.kwargs["local_files_only"]


def test_offline_a_model_that_was_downloaded(offline):
    snapshot = offline / "models--org--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (offline / "models--org--name" / "refs").mkdir()
    (offline / "models--org--name" / "refs" / "main").write_text("0" * 40)
    assert find_model("org/name") == snapshot
    assert find_model("org/name", "0" * 40) == snapshot


def test_only_what_an_export_reads_is_asked_for(failing, monkeypatch):
    download = failing(AssertionError())
    download.side_effect = None
    download.return_value = "/cache/org/name"
    assert find_model("org/name", "v2") == Path("/cache/org/name")
    asked = download.call_args.kwargs
    assert asked["revision"] == "v2"
    assert not asked["local_files_only"]
    assert not any(".py" in pattern or ".bin" in pattern for pattern in asked["allow_patterns"])
    assert "README.md" in asked["allow_patterns"], "the licence stands there"
    for name in ("LICENSE", "LICENSE.txt", "License.md", "license", "NOTICE", "USE_POLICY.md", "Notice.txt"):
        assert any(fnmatchcase(name, pattern) for pattern in asked["allow_patterns"]), name


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (errors.GatedRepoError("no", response=Mock()), InputError, "log in with `hf auth login`"),
        (errors.RevisionNotFoundError("no", response=Mock()), InputError, "no revision 'v2' of it"),
        (errors.RepositoryNotFoundError("no", response=Mock()), InputError, "no such model on the hub"),
        (errors.HFValidationError("no"), InputError, "no such model on the hub"),
        (errors.LocalEntryNotFoundError("no"), MachineError, "the hub cannot be reached"),
        (ConnectionError("refused"), MachineError, "the hub fails: refused"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_hub_answers_is_told(failing, error, kind, says):
    failing(error)
    text = problem("org/name", "v2", kind)
    assert text.startswith("org/name: ")
    assert says in text


def test_a_full_disk_is_not_blamed_on_the_hub(failing):
    failing(OSError(28, "No space left on device"))
    text = problem("org/name", kind=MachineError)
    assert text.startswith(f"cannot download org/name: disk full ({constants.HF_HUB_CACHE}")
