from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from slm_export.errors import GateError, InputError, MissingComponentError
from slm_export.tokenization import runtime_tokenizers
from slm_export.tokenization.conformance import EXAMPLES_PER_KIND, Case, Conformance, cases, compare
from slm_export.tokenization.runtime_tokenizers import (
    ExecuTorchTokenizer,
    TokenizerLoadError,
    captured_stderr,
)
from slm_export.tokenization.tokenizer import SourceTokenizer

EXAMPLE = Path(__file__).parents[1] / "examples" / "pycode-5m"


@pytest.fixture(scope="module")
def source() -> SourceTokenizer:
    return SourceTokenizer.load(EXAMPLE)


@pytest.fixture(scope="module")
def all_cases(source: SourceTokenizer) -> tuple[Case, ...]:
    chats = ["<s>[user]hi\n[assistant]"]
    return cases(source.added_tokens, chats, source.vocabulary_sample(300))


def edited(change: Callable[[dict[str, Any]], object]) -> str:
    content = json.loads((EXAMPLE / "tokenizer.json").read_text())
    change(content)
    return json.dumps(content)


def against(source: SourceTokenizer, text: str, chosen: tuple[Case, ...]) -> Conformance:
    """Compare the source with the tokenizer that an edited tokenizer.json gives."""
    other = Tokenizer.from_str(text)
    return compare(
        source.encode,
        lambda string: other.encode(string, add_special_tokens=False).ids,
        source.decode,
        lambda ids: other.decode(ids, skip_special_tokens=False),
        chosen,
    )


def wrong(result: Conformance) -> set[str]:
    return {kind for kind, (count, _) in result.by_kind.items() if count}


# the strings


def test_there_are_some_thousands_of_cases_of_many_kinds_each_once(all_cases: tuple[Case, ...]):
    assert 3000 <= len(all_cases) <= 5000
    assert len({case.text for case in all_cases}) == len(all_cases)
    counts = Counter(case.kind for case in all_cases)
    assert len(counts) >= 15
    assert counts["chat-template"] == 1
    for case in all_cases:
        case.text.encode("utf-8")


def test_the_cases_are_the_same_every_time(source: SourceTokenizer, all_cases: tuple[Case, ...]):
    chats = ["<s>[user]hi\n[assistant]"]
    assert cases(source.added_tokens, chats, source.vocabulary_sample(300)) == all_cases


def test_the_cases_hold_what_implementations_part_on(all_cases: tuple[Case, ...]):
    text = "".join(case.text for case in all_cases)
    scripts = {unicodedata.name(char, "?").split()[0] for char in text if char.isalpha()}
    assert {"LATIN", "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "DEVANAGARI", "THAI", "CJK"} <= scripts
    assert {"HIRAGANA", "KATAKANA", "HANGUL", "HALFWIDTH", "FULLWIDTH", "GEORGIAN"} <= scripts
    for needle in ("\0", "\u200d", "\ufeff", "\r\n", "\xa0", "\U0001f3fd", "\u0301", "</s>", "\U000e0067"):
        assert needle in text, ascii(needle)
    for form in ("NFC", "NFD"):
        assert any(not unicodedata.is_normalized(form, case.text) for case in all_cases)


# what is found


def test_a_tokenizer_agrees_with_itself(source: SourceTokenizer, all_cases: tuple[Case, ...]):
    result = against(source, (EXAMPLE / "tokenizer.json").read_text(), all_cases)
    assert result.agreed
    assert result.examples == ()
    assert (
        result.summary()
        == f"the runtime's tokenizer agrees with the source's on all {len(all_cases):,} strings"
    )


def test_lost_merges_are_found_in_every_large_kind(source: SourceTokenizer, all_cases: tuple[Case, ...]):
    result = against(
        source, edited(lambda t: t["model"].update(merges=t["model"]["merges"][:2000])), all_cases
    )
    assert {"code", "lines", "sentences", "vocabulary"} <= wrong(result)


def test_the_very_last_merge_is_found(source: SourceTokenizer, all_cases: tuple[Case, ...]):
    full = cases(source.added_tokens, [], source.vocabulary_sample(source.vocab_size))
    result = against(source, edited(lambda t: t["model"]["merges"].pop()), full)
    assert "vocabulary" in wrong(result)


def test_another_pre_tokenizer_is_found(source: SourceTokenizer, all_cases: tuple[Case, ...]):
    digits = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    result = against(source, edited(lambda t: t.update(pre_tokenizer=digits)), all_cases)
    assert "numbers" in wrong(result)
    assert result.by_kind["whitespace"][0] == 0


def test_an_added_prefix_space_is_found(source: SourceTokenizer, all_cases: tuple[Case, ...]):
    result = against(source, edited(lambda t: t["pre_tokenizer"].update(add_prefix_space=True)), all_cases)
    assert result.by_kind["sentences"][0] > 100


@pytest.mark.parametrize(
    ("normalizer", "kind"),
    [("NFC", "combining-marks"), ("NFKC", "normal-forms"), ("NFD", "scripts"), ("Lowercase", "code")],
)
def test_an_added_normalizer_is_found(
    source: SourceTokenizer, all_cases: tuple[Case, ...], normalizer: str, kind: str
):
    result = against(source, edited(lambda t: t.update(normalizer={"type": normalizer})), all_cases)
    assert kind in wrong(result)
    assert kind in result.summary() or "more kinds" in result.summary()


def test_a_lost_special_token_is_found_and_named(source: SourceTokenizer, all_cases: tuple[Case, ...]):
    result = against(source, edited(lambda t: t["added_tokens"].pop(1)), all_cases)
    assert wrong(result) <= {"special-tokens", "lookalikes", "mixtures", "chat-template"}
    assert "special-tokens" in wrong(result)
    assert "special-tokens (" in result.summary()
    assert "</s>" in result.summary()


def test_a_wrong_decoder_is_found_where_the_ids_agree(source: SourceTokenizer, all_cases: tuple[Case, ...]):
    result = against(source, edited(lambda t: t.update(decoder={"type": "Fuse"})), all_cases)
    assert not result.agreed
    assert all(example.source == example.runtime for example in result.examples)
    assert "the ids agree, but the runtime shows" in result.summary()


def test_an_exception_of_the_runtime_is_a_mismatch_with_its_message():
    def fails(text: str) -> list[int]:
        if "\0" in text:
            raise RuntimeError("no NUL, please")
        return [ord(char) for char in text]

    texts = [Case("control", "a\0b"), Case("plain", "ab")]
    result = compare(lambda t: [ord(c) for c in t], fails, lambda ids: "".join(map(chr, ids)), None, texts)
    assert (result.total, result.mismatches) == (2, 1)
    assert result.by_kind == {"control": (1, 1), "plain": (0, 1)}
    assert result.examples[0].runtime is None
    assert "no NUL, please" in result.summary()


def test_an_exception_while_decoding_is_a_mismatch_too():
    def fails(ids: object) -> str:
        raise ValueError("no such token")

    result = compare(lambda t: [1], lambda t: [1], lambda ids: "a", fails, [Case("plain", "a")])
    assert "no such token" in result.summary()


def test_only_the_first_few_examples_of_a_kind_are_kept():
    texts = [Case("plain", str(i)) for i in range(50)]
    result = compare(lambda t: [1, 2], lambda t: [1, 2, 3], lambda ids: "", None, texts)
    assert result.mismatches == 50
    assert len(result.examples) == EXAMPLES_PER_KIND
    assert "from token 2 on, the source has [] and the runtime [3]" in result.summary()


# ExecuTorch's own tokenizer


@pytest.fixture(scope="module")
def cpp() -> ExecuTorchTokenizer:
    pytest.importorskip("pytorch_tokenizers")
    return ExecuTorchTokenizer(EXAMPLE)


def write(folder: Path, text: str) -> Path:
    (folder / "tokenizer.json").write_text(text)
    (folder / "tokenizer_config.json").write_bytes((EXAMPLE / "tokenizer_config.json").read_bytes())
    return folder


def conforms(source: SourceTokenizer, runtime: ExecuTorchTokenizer, chosen: tuple[Case, ...]) -> Conformance:
    return compare(source.encode, runtime.encode, source.decode, runtime.decode, chosen)


def test_executorch_reads_the_example_as_the_source_does(
    source: SourceTokenizer, cpp: ExecuTorchTokenizer, all_cases: tuple[Case, ...]
):
    result = conforms(source, cpp, all_cases)
    assert result.agreed, result.summary()


def test_executorch_knows_its_special_tokens_from_the_folder(cpp: ExecuTorchTokenizer):
    assert (cpp.vocab_size, cpp.bos_id, cpp.eos_ids) == (4096, 0, (1,))


def test_executorch_shows_halves_of_characters_as_replacements(
    source: SourceTokenizer, cpp: ExecuTorchTokenizer
):
    ids = source.encode("日")
    assert cpp.decode(ids) == "日"
    assert cpp.decode(ids[:1]) == "\ufffd" == source.decode(ids[:1])


def test_a_broken_copy_is_found_in_executorch(
    source: SourceTokenizer, cpp: ExecuTorchTokenizer, all_cases: tuple[Case, ...], tmp_path: Path
):
    text = edited(lambda t: t["model"].update(merges=t["model"]["merges"][:2000]))
    result = conforms(source, ExecuTorchTokenizer(write(tmp_path, text)), all_cases)
    assert {"code", "lines"} <= wrong(result)


def test_a_tokenizer_without_pre_tokenizer_loses_text_in_executorch(
    source: SourceTokenizer, cpp: ExecuTorchTokenizer, all_cases: tuple[Case, ...], tmp_path: Path
):
    write(tmp_path, edited(lambda t: t.update(pre_tokenizer=None)))
    result = conforms(SourceTokenizer.load(tmp_path), ExecuTorchTokenizer(tmp_path), all_cases)
    assert result.mismatches > 1000


def test_what_executorch_cannot_load_says_why(cpp: ExecuTorchTokenizer, tmp_path: Path, capfd):
    write(tmp_path, edited(lambda t: t.update(normalizer={"type": "NFKC"})))
    with pytest.raises(TokenizerLoadError, match="Unsupported Normalizer type: NFKC") as caught:
        ExecuTorchTokenizer(tmp_path)
    assert isinstance(caught.value, GateError)
    assert str(tmp_path) in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"model": {}}'])
def test_a_corrupt_file_is_a_load_error(cpp: ExecuTorchTokenizer, tmp_path: Path, content: str):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerLoadError):
        ExecuTorchTokenizer(tmp_path)


def test_executorch_says_nothing_on_stderr(cpp: ExecuTorchTokenizer, capfd):
    runtime = ExecuTorchTokenizer(EXAMPLE / "tokenizer.json")
    runtime.decode(runtime.encode("héllo"))
    with pytest.raises(ValueError, match="unknown token"):
        runtime.decode([10**6])
    print("still here", file=sys.stderr)
    assert capfd.readouterr() == ("", "still here\n")


def test_a_missing_file_is_an_input_error(cpp: ExecuTorchTokenizer, tmp_path: Path):
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(InputError, match=r"no such file"):
            ExecuTorchTokenizer(path)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pytorch_tokenizers", None)
    with pytest.raises(MissingComponentError, match=r"slm-export\[executorch\]"):
        ExecuTorchTokenizer(EXAMPLE)


def test_captured_stderr_gives_stderr_back_after_an_error(capfd):
    lines: list[str] = []

    def noisy() -> None:
        with captured_stderr(lines):
            os.write(2, b"inside\nlines\n")
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        noisy()
    os.write(2, b"outside\n")
    assert lines == ["inside", "lines"]
    assert capfd.readouterr().err == "outside\n"


def test_the_wrapper_is_a_runtime_tokenizer(cpp: ExecuTorchTokenizer):
    runtime: runtime_tokenizers.RuntimeTokenizer = cpp
    assert runtime.name == "ExecuTorch"
