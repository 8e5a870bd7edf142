"""What a ``.keras`` file says of itself is looked at before TensorFlow is given it, and without TensorFlow."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_export.errors import InputError
from slm_export.keras.archive import SMALL, check_archive
from slm_export.keras.source import open_model

GOOD: dict[str, Any] = {
    "metadata.json": json.dumps({"keras_version": "3.12.0", "date_saved": "2026-01-01@00:00:00"}),
    "config.json": json.dumps({"module": "keras", "class_name": "Functional", "config": {"layers": []}}),
    "model.weights.h5": b"\x89HDF\r\n\x1a\n" + bytes(4000),
}


def archive(path: Path, entries: dict[str, Any], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as made:
        for name, content in entries.items():
            made.writestr(name, content)
    return path


def test_what_keras_writes_is_accepted(tmp_path: Path) -> None:
    check_archive(archive(tmp_path / "model.keras", GOOD))
    check_archive(archive(tmp_path / "packed.keras", GOOD, zipfile.ZIP_DEFLATED))
    check_archive(archive(tmp_path / "text.keras", {**GOOD, "assets/layers/text/vocabulary.txt": "a\nb"}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"config.json": None}, "it has no config.json"),
        ({"metadata.json": None}, "it has no metadata.json"),
        ({"model.weights.h5": None}, "it has no weights"),
        ({"config.json": "[]"}, "config.json holds no object"),
        ({"config.json": "{}"}, "config.json names no class"),
        ({"config.json": "[" * 100_000}, "Keras cannot read it"),
        ({"config.json": b"\xff\xfe"}, "Keras cannot read it"),
        ({"metadata.json": "not JSON"}, "Keras cannot read it"),
        ({"../outside": "x"}, "leads out of the archive"),
        ({"/etc/cron.d/x": "x"}, "leads out of the archive"),
        ({"assets/../../x": "x"}, "leads out of the archive"),
        ({"C:\\x": "x"}, "leads out of the archive"),
        ({f"assets/{number}": "" for number in range(10_001)}, "too many"),
    ],
)
def test_what_keras_does_not_write_is_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    entries = {name: content for name, content in {**GOOD, **change}.items() if content is not None}
    path = archive(tmp_path / "model.keras", entries)
    with pytest.raises(InputError, match=says) as caught:
        open_model(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith("save the model again")


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    bomb = {**GOOD, "model.weights.h5": bytes(SMALL + 1)}
    with pytest.raises(InputError, match=r"bytes say that they become 67,1"):
        check_archive(archive(tmp_path / "bomb.keras", bomb, zipfile.ZIP_DEFLATED))
    check_archive(archive(tmp_path / "stored.keras", bomb))


def test_a_size_that_is_a_lie_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "model.keras", GOOD, zipfile.ZIP_DEFLATED)
    content = path.read_bytes()
    at = content.index(b"PK\x01\x02")  # the first entry of the directory, metadata.json
    path.write_bytes(content[: at + 24] + struct.pack("<I", 5) + content[at + 28 :])
    with pytest.raises(InputError, match="Keras cannot read it"):
        check_archive(path)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.touch])
def test_what_is_no_file_is_refused(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.keras"
    make(path)
    with pytest.raises(InputError, match="Keras cannot read it"):
        check_archive(path)


@settings(max_examples=300, deadline=None, database=None)
@given(data=st.data())
def test_any_bytes_are_accepted_or_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    packed = data.draw(st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    content = bytearray(archive(folder / "model.keras", GOOD, packed).read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=8)):
        content[at] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.sampled_from((len(content), len(content), len(content) // 2, 40)))]
    (folder / "model.keras").write_bytes(content)
    with suppress(InputError):
        check_archive(folder / "model.keras")
