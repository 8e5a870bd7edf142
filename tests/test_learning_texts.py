"""Text to learn from: what is read, what is left out and named, and that held-out text is really held out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slm_export.errors import InputError
from slm_export.learning.held_out import RUN, overlap, runs_of, split
from slm_export.learning.texts import Document, read_texts

WORDS = [f"word{number}" for number in range(10_000)]


def words(start: int, count: int = 60) -> str:
    return " ".join(WORDS[start : start + count])


def test_a_folder_is_read_and_what_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second\n\f\nthird\n\f\n\n")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    (tmp_path / "utf16.txt").write_text("text", encoding="utf-16")
    (tmp_path / "again.txt").write_text("first\n")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "c.txt").write_text("not read")
    texts = read_texts([tmp_path])
    assert [document.text.strip() for document in texts.documents] == ["first", "second", "third"]
    assert [Path(line.split(": ")[0]).name for line in texts.left_out] == ["photo.jpg", "utf16.txt"]
    assert (texts.empty, texts.duplicates, texts.files) == (1, 1, 3)


def test_a_file_that_is_named_and_no_text_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("Größe".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin.txt: not UTF-8 text \(byte 0xf6 at offset 2\)"):
        read_texts([path])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ('{"txt": "a"}', r'line 2: expected \{"text": ...\}'),
        ('{"text": 7}', r'line 2: expected \{"text": ...\}'),
        ("[1]", r'line 2: expected \{"text": ...\}'),
    ],
)
def test_a_broken_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + line + "\n")
    with pytest.raises(InputError, match=message):
        read_texts([path])


def test_nothing_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InputError, match="no text to learn from"):
        read_texts([tmp_path / "empty.txt"])
    with pytest.raises(InputError, match="no such file or folder"):
        read_texts([tmp_path / "missing.txt"])


def test_a_run_of_thirteen_words_is_an_overlap_and_twelve_are_none() -> None:
    training = [Document("training", f"{words(0)} {words(500, RUN)}")]
    clash = Document("clash", f"{words(1000)} {words(500, RUN).upper()}, {words(2000)}")
    free = Document("free", f"{words(3000)} {words(500, RUN - 1)} {words(4000)}")
    assert overlap(training, [free, clash]) == [("clash", "training")]


def test_given_held_out_text_that_overlaps_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(words(0))
    (tmp_path / "held.txt").write_text(f"{words(2000)} {words(20, RUN)}")
    training, held_out = read_texts([tmp_path / "train.txt"]), read_texts([tmp_path / "held.txt"])
    with pytest.raises(InputError, match=r"share a run of 13 words .*held.txt with .*train.txt"):
        split(training, held_out)


def test_documents_that_are_held_out_share_nothing_with_the_rest(tmp_path: Path) -> None:
    # Half of them share a paragraph with a neighbour.
    for number in range(40):
        shared = words(9000 + 20 * (number // 2), 20) if number % 4 < 2 else ""
        (tmp_path / f"{number:02}.txt").write_text(f"{words(200 * number)} {shared}")
    texts = read_texts([tmp_path])
    made = split(texts, None)
    assert len(made.training) + len(made.held_out) == 40
    assert 2 <= len(made.held_out) <= 12
    learned = set().union(*(runs_of(document.text) for document in made.training))
    assert not any(learned & runs_of(document.text) for document in made.held_out)
    assert made.sha256 == split(texts, None).sha256


def test_one_document_cannot_be_split() -> None:
    with pytest.raises(InputError, match="--held-out"):
        split(read_texts([Path(__file__)]), None)
