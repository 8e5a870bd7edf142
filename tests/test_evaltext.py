from __future__ import annotations

from pathlib import Path

import pytest

from slm_export.errors import InputError
from slm_export.evaltext import MINIMUM_TAIL, load_documents, load_sentences, token_windows


def encode(text: str) -> list[int]:
    return [ord(char) for char in text]


def test_the_shipped_sample_is_many_documents_in_many_scripts():
    documents = load_documents(None)
    text = "".join(documents)
    assert 30 <= len(documents) <= 100
    assert 40_000 <= len(text.encode()) <= 60_000
    assert "\f" not in text
    assert "\r" not in text
    for first, last in ("az", "ая", "اي", "अह", "가힣", "ぁん", "一龥"):
        assert any(first <= char <= last for char in text), f"no character between {first} and {last}"
    for word in ("def ", "#include", "public final class", "fun ", "export function", "SELECT", "set -euo"):
        assert word in text


def test_the_sentences_are_varied_and_each_once():
    sentences = load_sentences()
    assert len(sentences) >= 100
    assert len(set(sentences)) == len(sentences)
    assert min(map(len, sentences)) <= 3
    assert max(map(len, sentences)) >= 400
    assert all(sentence == sentence.strip() for sentence in sentences)


def test_a_line_of_only_a_form_feed_separates_documents(tmp_path: Path):
    file = tmp_path / "text.txt"
    file.write_bytes(b"one\n\f\ntwo \f still two\n\f\r\n\f\n  \n\f\nthree")
    assert load_documents(file) == ("one\n", "two \f still two\n", "three")


def test_a_file_without_form_feeds_is_one_document(tmp_path: Path):
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo \xc3\xa9\n")
    assert load_documents(file) == ("one\r\n\r\ntwo é\n",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b" \n\f\n\t\n", "empty"),
        (b"caf\xe9 au lait", "0xe9 at offset 3"),
        (b"PK\x03\x04\x00\x00", "binary"),
        ("text".encode("utf-16"), "UTF-16"),
    ],
)
def test_a_file_that_is_no_text_is_refused_with_the_reason(tmp_path: Path, content: bytes, said: str):
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        load_documents(file)
    assert str(file) in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="no such file"):
        load_documents(tmp_path / "nowhere.txt")
    with pytest.raises(InputError, match="not a file"):
        load_documents(tmp_path)


def test_windows_hold_every_token_in_order_but_the_short_tails():
    documents = ["a" * 200, "b" * (128 + MINIMUM_TAIL - 1), "c" * (64 + MINIMUM_TAIL)]
    windows = token_windows(documents, encode, 64, None, 10_000)
    assert all(len(set(window)) == 1 for window in windows), "a window mixes documents"
    length = {name: sum(len(w) for w in windows if w[0] == ord(name)) for name in "abc"}
    assert length == {"a": 192, "b": 128, "c": 64 + MINIMUM_TAIL}
    assert max(map(len, windows)) == 64


def test_windows_of_a_document_are_consecutive():
    text = "".join(chr(0x100 + i) for i in range(300))
    windows = token_windows([text], encode, 100, None, 10_000)
    assert [token for window in windows for token in window] == encode(text)


def test_every_window_opens_with_bos_and_counts_it():
    windows = token_windows(["a" * 100, "b" * 100], encode, 40, 7, 10_000)
    assert all(window[0] == 7 and 7 not in window[1:] for window in windows)
    assert max(map(len, windows)) == 40


def test_rounds_reach_every_document_before_any_second_window():
    windows = token_windows([name * 1000 for name in "abcde"], encode, 64, None, 64 * 7)
    assert [chr(window[0]) for window in windows] == list("abcdeab")


def test_few_tokens_read_few_documents():
    seen: list[str] = []

    def counting(text: str) -> list[int]:
        seen.append(text[0])
        return encode(text)

    token_windows([name * 1000 for name in "abcde"], counting, 64, None, 100)
    assert seen == ["a", "b"]


@pytest.mark.parametrize("limit", [33, 64, 65, 95, 96, 97, 128, 200])
def test_never_more_than_the_limit_nor_a_crumb_at_its_end(limit: int):
    windows = token_windows(["a" * 500, "b" * 500], encode, 64, 1, limit)
    assert limit - MINIMUM_TAIL < sum(map(len, windows)) <= limit
    assert all(len(window) >= MINIMUM_TAIL for window in windows)


def test_short_windows_are_kept_whole_when_the_context_is_short():
    windows = token_windows(["a" * 40], encode, 16, None, 1000)
    assert [len(window) for window in windows] == [16, 16]


def test_a_text_too_short_for_one_window_is_refused():
    with pytest.raises(InputError, match="too short"):
        token_windows(["short"], encode, 64, None, 1000)


def test_the_shipped_sample_is_covered_by_its_first_tokens():
    documents = load_documents(None)
    windows = token_windows(documents, encode, 128, None, 128 * len(documents))
    starts = {window[:20] for window in windows}
    assert len(starts) == len(documents)
