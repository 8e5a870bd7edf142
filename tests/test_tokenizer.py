from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from slm_export.errors import InputError
from slm_export.tokenization.tokenizer import Detokenizer, SourceTokenizer, tokenizer_files

EXAMPLE = Path(__file__).parents[1] / "examples" / "pycode-5m"
FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")


@pytest.fixture(scope="module")
def example() -> SourceTokenizer:
    return SourceTokenizer.load(EXAMPLE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        shutil.copy(EXAMPLE / name, tmp_path / name)
    return tmp_path


def edit(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    content.update(changes)
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def test_the_example_is_read_as_it_was_trained(example: SourceTokenizer):
    assert example.vocab_size == 4096
    assert example.bos_id == 0
    assert example.stop_ids == (1,)
    assert example.special_tokens == example.added_tokens == ("<s>", "</s>", "<pad>")
    assert example.render_chat("hello") is None


def test_encode_adds_nothing_and_decode_gives_the_text_back(example: SourceTokenizer):
    for text in ("", "def f(x):\n    return x\n", " héllo 日本語 🙂\t\r\n", "<s>a</s>", "x" * 5000):
        ids = example.encode(text)
        assert example.decode(ids) == text
    assert example.encode("<s>a") == [0, *example.encode("a")]


def test_whether_the_tokenizer_opens_a_text_by_itself(example: SourceTokenizer, folder: Path):
    assert not example.adds_bos
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    edit(folder / "tokenizer.json", post_processor=template)
    tokenizer = SourceTokenizer.load(folder)
    assert tokenizer.adds_bos
    assert tokenizer.encode("a") == example.encode("a")


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ([7, 9, 7], 3, (7, 9)),  # generate() looks nowhere else
        (7, 3, (7,)),
        (None, 3, (3, 1)),
        (..., [3, 4], (3, 4, 1)),
        (..., ..., (1,)),
        ([], 1, (1,)),
    ],
)
def test_stop_ids_are_where_generate_stops(folder: Path, generation, config, expected):
    edit(folder / "generation_config.json", eos_token_id=generation)
    edit(folder / "config.json", eos_token_id=config)
    assert SourceTokenizer.load(folder).stop_ids == expected


def test_stop_ids_of_a_multimodal_config_are_found_inside(folder: Path):
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", eos_token_id=..., text_config={"eos_token_id": 5})
    assert SourceTokenizer.load(folder).stop_ids == (5, 1)


@pytest.mark.parametrize("value", ["</s>", True, -1, [1, "2"], 1.5])
def test_a_stop_id_that_is_no_id_is_refused(folder: Path, value):
    edit(folder / "generation_config.json", eos_token_id=value)
    with pytest.raises(InputError, match=r"generation_config.json: eos_token_id"):
        SourceTokenizer.load(folder)


def test_the_chat_template_is_rendered_up_to_the_answer(folder: Path):
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = SourceTokenizer.load(folder)
    assert tokenizer.render_chat("hi") == "[user]hi\n[assistant]"
    assert tokenizer.render_chat("hi", system="be brief") == "[system]be brief\n[user]hi\n[assistant]"


@pytest.mark.parametrize("template", ["{% for %}", "{{ raise_exception('no system role') }}", "{{ 1 / 0 }}"])
def test_a_chat_template_that_fails_is_an_input_error(folder: Path, template: str):
    edit(folder / "tokenizer_config.json", chat_template=template)
    with pytest.raises(InputError, match="chat template"):
        SourceTokenizer.load(folder).render_chat("hi")


def test_a_folder_without_a_tokenizer_is_refused(folder: Path):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="no tokenizer; expected"):
        SourceTokenizer.load(folder)
    with pytest.raises(InputError, match="no such folder"):
        SourceTokenizer.load(folder / "nowhere")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"added_tokens": [], "model": {"type": "Magic"}}', "\udcff"]
)
def test_a_corrupt_tokenizer_is_refused(folder: Path, content: str):
    (folder / "tokenizer.json").write_bytes(content.encode("utf-8", errors="surrogateescape"))
    with pytest.raises(InputError) as caught:
        SourceTokenizer.load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "auto_map", [{"AutoTokenizer": ["evil.Tok", None]}, ["evil.Tok", None], {"AutoTokenizer": "evil.Tok"}]
)
def test_code_in_the_folder_is_never_executed(folder: Path, auto_map):
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\nclass Tok: pass\n")
    edit(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Tok")
    with pytest.raises(InputError, match="code of its own"):
        SourceTokenizer.load(folder)
    assert not (folder / "ran").exists()
    assert "evil" not in sys.modules


def test_tokenizer_json_is_passed_on_to_the_byte(example: SourceTokenizer):
    assert example.tokenizer_json_bytes() == (EXAMPLE / "tokenizer.json").read_bytes()


def test_a_vocabulary_without_tokenizer_json_is_converted(tmp_path: Path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nhello\nworld\n##ly\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    tokenizer = SourceTokenizer.load(tmp_path)
    converted = tmp_path / "converted"
    converted.mkdir()
    (converted / "tokenizer.json").write_bytes(tokenizer.tokenizer_json_bytes())
    (converted / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    text = "Hello worldly"
    assert tokenizer.encode(text) == [5, 6, 7]
    assert SourceTokenizer.load(converted).encode(text) == [5, 6, 7]


def test_only_the_tokenizer_files_go_into_a_bundle(folder: Path):
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "tokenization_evil.py").write_text("")
    (folder / "chat_template.jinja").write_text("")
    names = [file.name for file in tokenizer_files(folder)]
    assert names == [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ]


def test_the_vocabulary_sample_is_text_and_spread(example: SourceTokenizer):
    sample = example.vocabulary_sample(100)
    assert 90 <= len(sample) <= 100
    assert not any("\ufffd" in text for text in sample)
    assert len(set(sample)) == len(sample)


TEXTS = ("plain text", "日本語とé", "🙂👩‍👩‍👧 ñ", "देवनागरी", "a\ufffdb", "")


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_joins_to_the_whole_and_never_shows_half_a_character(example: SourceTokenizer, text: str):
    stream = Detokenizer(example.decode)
    pieces = [stream.add(token) for token in example.encode(text)]
    assert "".join(pieces) + stream.flush() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_stream_shows_a_character_as_soon_as_it_is_whole():
    stream = Detokenizer(lambda ids: bytes(ids).decode("utf-8", errors="replace"))
    assert [stream.add(byte) for byte in "aé日b".encode()] == ["a", "", "é", "", "", "日", "b"]


def test_bytes_that_never_become_a_character_are_shown_in_the_end():
    stream = Detokenizer(lambda ids: bytes(ids).decode("utf-8", errors="replace"))
    assert [stream.add(byte) for byte in b"a\xe6\x97b"] == ["a", "", "", "\ufffdb"]
    assert stream.add(0xE6) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""
    assert stream.add(ord("c")) == "c"


def test_a_stream_keeps_the_spaces_of_a_decoder_that_strips_the_first():
    words = ["▁def", "▁f", "(", "▁x", ")"]
    stream = Detokenizer(lambda ids: "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" "))
    assert "".join(stream.add(i) for i in range(len(words))) + stream.flush() == "def f( x)"


def test_a_long_stream_decodes_only_its_end():
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return "ab" * len(ids)

    stream = Detokenizer(decode)
    assert "".join(stream.add(i) for i in range(500)) == "ab" * 500
    assert longest <= 4
