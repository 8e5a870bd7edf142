"""Calibration text: from files, and from the model itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slm_export.compression.calibration import LENGTH, own_calibration, read_calibration, shipped_calibration
from slm_export.errors import InputError
from slm_export.graph.model import build_reference
from slm_export.source.load import load_checkpoint
from slm_export.source.tasks import EMBEDDING, GENERATION
from slm_export.tokenization.tokenizer import SourceTokenizer


@pytest.fixture(scope="module")
def tokenizer(pycode: Path) -> SourceTokenizer:
    return SourceTokenizer.load(pycode)


def test_documents_are_cut_into_windows_as_the_tokenizer_reads_them(tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("def add(a, b):\n    return a + b\n" * 400)
    made = read_calibration(file, tokenizer, GENERATION, 1024, tokens=1000)
    assert made.tokens == 1000
    assert {len(window) for window in made.windows[:-1]} == {LENGTH}
    assert not tokenizer.adds_bos
    assert all(tokenizer.bos_id not in window for window in made.windows)
    assert "return a + b" in tokenizer.decode(made.windows[0])


def test_what_is_learned_from_is_not_what_is_held_out(tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n\f\n".join(f"value_{n} = {n} * {n + 1}\n" * 20 for n in range(40)))
    made = read_calibration(file, tokenizer, GENERATION, 64)
    assert made.held_out
    assert not set(made.held_out) & set(made.learning)
    assert set(made.held_out) | set(made.learning) == set(made.windows)


def test_other_text_has_another_hash(tokenizer, tmp_path):
    hashes = set()
    for name in ("alpha", "beta"):
        file = tmp_path / f"{name}.txt"
        file.write_text(f"{name} = 1\n" * 200)
        hashes.add(read_calibration(file, tokenizer, GENERATION, 64).sha256)
    assert len(hashes) == 2


def test_chats_and_texts_of_a_jsonl_file_are_read(tokenizer, tmp_path):
    file = tmp_path / "chats.jsonl"
    talk = [
        {"role": "user", "content": "count = 7\n" * 60},
        {"role": "assistant", "content": "total = 9\n" * 60},
    ]
    lines = [{"messages": talk}, {"text": "line separators \u2028 are text\n" * 60}]
    file.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    read = "".join(
        tokenizer.decode(window) for window in read_calibration(file, tokenizer, GENERATION, 128).windows
    )
    assert "count = 7" in read
    assert "total = 9" in read
    assert "\u2028 are text" in read


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"prompt": "a"}', '{"messages": 3}', '{"messages": [{"role": "user"}]}']
)
def test_a_line_that_is_no_example_is_named(tokenizer, tmp_path, line):
    file = tmp_path / "chats.jsonl"
    file.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(InputError, match=r"chats\.jsonl, line 2: expected"):
        read_calibration(file, tokenizer, GENERATION, 128)


def test_an_empty_file_is_refused_for_what_it_is(tokenizer, tmp_path):
    file = tmp_path / "none.txt"
    file.write_text("\n")
    with pytest.raises(InputError, match="the calibration text is empty"):
        read_calibration(file, tokenizer, GENERATION, 128)


def test_a_decoder_writes_its_own_text_and_the_same_again(pycode, tokenizer):
    model = build_reference(load_checkpoint(pycode))
    one, other = (own_calibration(model, tokenizer, 12, lambda *_: None, tokens=120) for _ in range(2))
    assert one == other
    assert len(one.windows) == 10
    assert all(len(window) == 12 and window[0] == tokenizer.bos_id for window in one.windows)
    assert len(set(one.windows)) == 10  # sampled, not greedy
    assert max(max(window) for window in one.windows) < tokenizer.vocab_size


def test_an_encoder_is_given_paragraphs_between_its_own_special_tokens(minilm):
    tokenizer = SourceTokenizer.load(minilm)
    made = shipped_calibration(tokenizer, EMBEDDING, 64)
    before, after = tokenizer.template
    assert len(made.windows) > 20
    assert all([*window[:1]] == before and [*window[-1:]] == after for window in made.windows)
    assert max(map(len, made.windows)) == 64
    assert len({len(window) for window in made.windows}) > 5
