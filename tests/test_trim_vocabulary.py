"""Fewer tokens: every text can still be read, and what is read in tokens that stay is read as before."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from test_phone_tokenizer import BOUNDARY, PIECES, gemma, llama_2
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PhiConfig, PhiForCausalLM

from slm_export.checkpoint import Checkpoint, PassResult, Vocabulary
from slm_export.compression.calibration import Calibration, read_calibration
from slm_export.compression.workbench import Workbench
from slm_export.errors import InputError
from slm_export.fidelity import judge_vocabulary
from slm_export.fidelity.vocabularies import fewer_tokens
from slm_export.graph.model import build_reference
from slm_export.optimize import optimize
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.optimizers.trim_vocabulary import TrimVocabulary
from slm_export.progress import Progress
from slm_export.source.load import load_checkpoint
from slm_export.source.tasks import FILLING, GENERATION
from slm_export.tokenization.spelling import chosen, spelling_of
from slm_export.tokenization.tokenizer import SourceTokenizer, tokenizer_of
from slm_export.tokenization.tokenizer_trim import document_of, indispensable, trimmed_files

DOMAIN = tuple(Path(__file__).with_name(f"test_{name}.py").read_text("utf-8") for name in ("load", "shards"))
TRAINING = tuple(
    (Path(__file__).parents[1] / "slm_export" / f"{name}.py").read_text("utf-8")
    for name in ("driver", "source/load", "graph/model", "tokenization/tokenizer", "weights")
)
TEXTS = st.one_of(
    st.text(max_size=60),
    st.lists(
        st.sampled_from(
            [
                "def f(x):",
                "    return",
                " lag",
                "é",
                "e\u0301",
                "日本",
                "🙂",
                "👩‍👩‍👧",
                "\x00",
                "\r\n",
                "<s>",
                "x" * 40,
            ]
        ),
        max_size=12,
    ).map("".join),
)


@dataclass(frozen=True)
class Trimmed:
    source: SourceTokenizer
    made: SourceTokenizer
    kept: tuple[int, ...]
    files: dict[str, bytes]


def opened(folder: Path, kept: Sequence[int], files: dict[str, bytes]) -> SourceTokenizer:
    return tokenizer_of(replace(checkpoint({}), folder=folder, vocabulary=Vocabulary(tuple(kept), files)))


def trimmed(source: SourceTokenizer, documents: Sequence[str], size: int) -> Trimmed:
    document = document_of(source)
    uses = Counter(token for text in documents for token in source.encode(text))
    stay = indispensable(
        document, source, LlamaConfig(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    )
    kept = tuple(sorted(chosen(spelling_of(document), stay, uses, size)))
    files = trimmed_files(document, source, {token: row for row, token in enumerate(kept)})
    return Trimmed(source, opened(source.folder, kept, files), kept, files)


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made.train_from_iterator(TRAINING, trainers.WordPieceTrainer(vocab_size=900, special_tokens=special))
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.decoder = decoders.WordPiece()
    made.enable_padding(pad_id=0, pad_token="[PAD]")
    return made


def unigram(*, byte_fallback: bool = False) -> Tokenizer:
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(BOUNDARY, "always")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=700, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    trained.train_from_iterator(TRAINING, trainer)
    vocabulary = [tuple(entry) for entry in json.loads(trained.to_str())["model"]["vocab"]]
    if byte_fallback:
        vocabulary += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    made = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=byte_fallback))
    made.add_special_tokens(special)
    made.pre_tokenizer = trained.pre_tokenizer
    made.decoder = decoders.Sequence([*PIECES, decoders.Strip(" ", 1, 0)])
    return made


MADE: dict[str, tuple[Callable[[], Tokenizer] | None, int]] = {
    "byte-level BPE": (None, 512),
    "BPE with bytes": (gemma, 400),
    "BPE with bytes and a prefix": (llama_2, 320),
    "WordPiece": (word_piece, 320),
    "Unigram": (unigram, 224),
    "Unigram with bytes": (lambda: unigram(byte_fallback=True), 384),
}


@pytest.fixture(scope="module", params=list(MADE))
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory, pycode: Path) -> Trimmed:
    make, size = MADE[request.param]
    folder = pycode
    if make is not None:
        folder = tmp_path_factory.mktemp("tokenizer")
        make().save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return trimmed(SourceTokenizer.load(folder), DOMAIN, size)


@given(text=TEXTS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_text_reads_back_as_before(pair: Trimmed, text: str) -> None:
    ids = pair.made.encode(text)
    assert max(ids, default=0) < len(pair.kept)
    assert pair.made.decode(ids) == pair.source.decode(pair.source.encode(text))


@given(text=TEXTS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_is_read_in_tokens_that_stay_is_read_as_before(pair: Trimmed, text: str) -> None:
    before = pair.source.encode(text)
    if set(before) <= set(pair.kept):
        assert [pair.kept[token] for token in pair.made.encode(text)] == before


def test_most_lines_of_the_domain_are_read_in_the_very_same_tokens(pair: Trimmed) -> None:
    lines = [line for text in (*DOMAIN, *TRAINING) for line in text.splitlines()]
    same = 0
    for line in lines:
        before = pair.source.encode(line)
        if set(before) <= set(pair.kept):
            assert [pair.kept[token] for token in pair.made.encode(line)] == before
            same += 1
    assert 0.1 * len(lines) < same < len(lines)


def test_the_strings_that_tokenizers_part_on_read_back_as_before(pair: Trimmed) -> None:
    both = fewer_tokens(pair.source, pair.made, pair.kept, pair.source.vocab_size)
    check = judge_vocabulary(both, DOMAIN)
    assert check.passed, check.detail


def test_it_has_as_many_tokens_as_asked_and_the_domain_needs_few_more(pair: Trimmed) -> None:
    assert len(pair.kept) == pair.made.vocab_size
    counts = [sum(len(one.encode(text)) for text in DOMAIN) for one in (pair.source, pair.made)]
    other = [token for token in range(len(pair.kept)) if token not in pair.kept]
    assert other, "tokens of the domain are not the first of the vocabulary"
    assert counts[0] <= counts[1] < 1.8 * counts[0]


def test_what_nothing_spells_stays(pair: Trimmed) -> None:
    spelling = spelling_of(document_of(pair.source))
    assert set(spelling.ids.values()) - set(spelling.parts) <= set(pair.kept)
    everything = set(spelling.ids.values())
    with pytest.raises(InputError, match=r"tokens have to stay: .*; 8 are too few"):
        chosen(spelling, everything - set(spelling.parts), {}, 8)


def test_bpe_keeps_what_its_tokens_are_merged_from(pair: Trimmed) -> None:
    spelling = spelling_of(document_of(pair.source))
    if spelling.derived:
        assert all(set(spelling.parts.get(token, ())) <= set(pair.kept) for token in pair.kept)


def test_unused_tokens_go_first_and_the_last_of_the_vocabulary_before_the_others() -> None:
    vocabulary = {text: token for token, text in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    merges = [("a", "b"), ("b", "c"), ("ab", "c")]
    document = {"model": {"type": "BPE", "vocab": vocabulary, "merges": merges}}
    spelling = spelling_of(document)
    assert spelling.parts == {3: (0, 1), 4: (1, 2), 5: (3, 2)}
    assert chosen(spelling, (), {3: 5}, 5) == {0, 1, 2, 3, 4}
    assert chosen(spelling, (), {3: 5}, 4) == {0, 1, 2, 3}
    assert chosen(spelling, (), {4: 2, 5: 3}, 5) == {0, 1, 2, 3, 5}  # not "ab", which "abc" is merged from
    assert chosen(spelling, (), {4: 9, 5: 3}, 4) == {0, 1, 2, 4}


def test_a_token_of_many_merges_is_spelled_by_those_that_make_it() -> None:
    vocabulary = {text: token for token, text in enumerate(["a", "b", "c", "bc", "ab", "abc"])}
    merges = [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]
    spelling = spelling_of({"model": {"type": "BPE", "vocab": vocabulary, "merges": merges}})
    assert spelling.parts[5] == (0, 3)  # of "ab" + "c" it is never made: "bc" comes first


def test_a_token_that_goes_counts_for_those_that_spell_it() -> None:
    vocabulary = {text: token for token, text in enumerate(["a", "##b", "##c", "ab", "##bc", "abc"])}
    document = {"model": {"type": "WordPiece", "vocab": vocabulary, "continuing_subword_prefix": "##"}}
    spelling = spelling_of(document)
    assert spelling.parts == {3: (0, 1), 4: (1, 2), 5: (3, 2)}
    # "abc" goes first; then "ab" is worth what both were, and "##bc", as much, comes later in the vocabulary.
    assert chosen(spelling, (), {3: 2, 4: 3, 5: 1}, 4) == {0, 1, 2, 3}
    # Without "ab", "abc" would take two tokens more, not one.
    assert chosen(spelling, (), {3: 1, 4: 3, 5: 2}, 4) == {0, 1, 2, 5}


def test_words_that_nothing_spells_cannot_go() -> None:
    with pytest.raises(InputError, match="WordLevel cannot lose tokens"):
        spelling_of({"model": {"type": "WordLevel", "vocab": {"a": 0}}})


@pytest.fixture
def full(tmp_path: Path, pycode: Path) -> Path:
    """A tokenizer in all the files that there are, special tokens at the end, a template around texts."""
    document = json.loads((pycode / "tokenizer.json").read_text("utf-8"))
    model = document["model"]
    document["added_tokens"].append({**document["added_tokens"][0], "id": 4096, "content": "<|end|>"})
    document["post_processor"] = {
        "type": "Sequence",
        "processors": [
            document["post_processor"]
            | {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
            {
                "type": "TemplateProcessing",
                "single": [
                    {"Sequence": {"id": "A", "type_id": 0}},
                    {"SpecialToken": {"id": "<|end|>", "type_id": 0}},
                ],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [4096], "tokens": ["<|end|>"]}},
            },
        ],
    }
    document["padding"] = {
        "strategy": {"Fixed": 4},
        "direction": "Right",
        "pad_id": 4096,
        "pad_type_id": 0,
        "pad_token": "<|end|>",
        "pad_to_multiple_of": None,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    (tmp_path / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])), "utf-8"
    )
    (tmp_path / "added_tokens.json").write_text('{"<|end|>": 4096}')
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|end|>"}')
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}<|end|>")
    (tmp_path / "tokenizer.model").write_bytes(b"SentencePiece")
    (tmp_path / "generation_config.json").write_text(
        '{"eos_token_id": [4096, 1], "pad_token_id": 4096, "suppress_tokens": [4000, 4], "top_k": 4000}'
    )
    end = document["added_tokens"][-1]
    added = {"4096": {key: value for key, value in end.items() if key != "id"}}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "added_tokens_decoder": added,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_every_file_says_the_same(full: Path) -> None:
    source = SourceTokenizer.load(full)
    made = trimmed(source, DOMAIN, 640)
    end = made.kept.index(4096)
    assert end == 639
    assert set(made.files) == {file.name for file in full.iterdir()} - {"tokenizer.model"}
    read = {name: json.loads(content) for name, content in made.files.items() if name.endswith(".json")}
    vocabulary = read["tokenizer.json"]["model"]["vocab"]
    assert read["vocab.json"] == vocabulary
    assert list(vocabulary.values()) == list(range(639))
    assert made.files["merges.txt"].decode().split("\n")[1:-1] == [
        " ".join(pair) for pair in read["tokenizer.json"]["model"]["merges"]
    ]
    assert read["added_tokens.json"] == {"<|end|>": end}
    assert read["tokenizer_config.json"]["added_tokens_decoder"].keys() == {str(end)}
    assert read["generation_config.json"] == {
        "eos_token_id": [end, made.kept.index(1)],
        "pad_token_id": end,
        "suppress_tokens": [made.kept.index(token) for token in (4000, 4) if token in made.kept],
        "top_k": 4000,
    }
    assert read["tokenizer.json"]["padding"]["pad_id"] == end
    assert made.made.stop_ids == (end, made.kept.index(1))
    assert made.made.template == ([], [end])
    assert made.made.render_chat("hi") == "hi<|end|>"
    assert made.made.encode("a<|end|>") == [*made.made.encode("a"), end]
    assert made.files["chat_template.jinja"] == (full / "chat_template.jinja").read_bytes()


def test_transformers_reads_the_files_as_tokenizers_does(full: Path) -> None:
    made = trimmed(SourceTokenizer.load(full), DOMAIN, 640).made
    for text in ("def f(x):\n    return x\n", " héllo 日本語 🙂", "a<|end|>b"):
        assert made.encode_by_transformers(text) == made.encode(text)


def test_stop_tokens_that_config_json_alone_names_are_said_in_the_bundle(full: Path) -> None:
    (full / "generation_config.json").unlink()
    (full / "config.json").write_text('{"eos_token_id": 1}')
    source = SourceTokenizer.load(full)
    made = trimmed(source, DOMAIN, 640)
    assert source.stop_ids == (1, 4096)
    assert [made.kept[token] for token in made.made.stop_ids] == [1, 4096]


def test_a_vocabulary_file_of_words_has_a_line_per_token(minilm: Path) -> None:
    made = trimmed(SourceTokenizer.load(minilm), DOMAIN, 4096)
    lines = made.files["vocab.txt"].decode().split("\n")
    assert lines[-1] == ""
    assert len(lines) == 4097
    whole = (minilm / "vocab.txt").read_text("utf-8").split("\n")
    assert lines[:-1] == [whole[token] for token in made.kept]
    assert [made.kept[token] for token in (*made.made.template[0], *made.made.template[1])] == [101, 102]


def text_of(*documents: str) -> Calibration:
    return Calibration((), "a text", documents)


def run(source: Checkpoint, **options: Any) -> PassResult:
    return TrimVocabulary(**options).run(source, Workbench(calibration=text_of(*DOMAIN)))


@pytest.fixture(scope="module")
def source(tiny_llama: Path) -> Checkpoint:
    return load_checkpoint(tiny_llama)


@pytest.fixture(scope="module")
def result(source: Checkpoint) -> PassResult:
    return run(source, tokens=1000)


def test_the_rows_are_those_of_the_tokens_that_stay(source: Checkpoint, result: PassResult) -> None:
    made, name = result.checkpoint, "model.embed_tokens.weight"
    assert made.vocabulary is not None
    assert len(made.vocabulary.tokens) == made.config.vocab_size == 1024
    assert result.skipped.keys() == source.weights.keys() - {name}
    assert all(made.weights[other] is source.weights[other] for other in result.skipped)
    expected = source.weights[name].float32()[list(made.vocabulary.tokens)]
    assert torch.equal(made.weights[name].float32(), expected)
    assert made.bytes == source.bytes - (4096 - 1024) * 64 * 4
    assert source.config.vocab_size == 4096
    assert "1,024 of 4,096 tokens stay" in result.notes[0]


def test_of_the_tokens_that_stay_the_model_says_what_it_said(source: Checkpoint, result: PassResult) -> None:
    made = result.checkpoint
    assert made.vocabulary is not None
    ids = torch.randint(0, 1024, (1, 24), generator=torch.Generator().manual_seed(1))
    kept = torch.tensor(made.vocabulary.tokens)
    with torch.no_grad():
        expected = build_reference(source)(input_ids=kept[ids]).logits[..., kept]
        torch.testing.assert_close(build_reference(made)(input_ids=ids).logits, expected)


def test_head_and_bias_lose_the_same_rows(tmp_path: Path, pycode: Path) -> None:
    config = PhiConfig(
        vocab_size=4100,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = PhiForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pycode / name, tmp_path / name)
    source = load_checkpoint(tmp_path)
    made = run(source, keep=0.2).checkpoint
    assert made.vocabulary is not None
    kept = list(made.vocabulary.tokens)
    assert len(kept) == 832
    changed = {name for name in source.weights if made.weights[name] is not source.weights[name]}
    assert changed == {"model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"}
    for name in changed:
        assert torch.equal(made.weights[name].float32(), source.weights[name].float32()[kept])
    with torch.no_grad():
        assert build_reference(made)(input_ids=torch.tensor([[5, 6]])).logits.shape == (1, 2, 832)


def test_trimming_twice_counts_from_the_source(source: Checkpoint, result: PassResult) -> None:
    again = run(result.checkpoint, tokens=600).checkpoint
    assert again.vocabulary is not None
    kept = list(again.vocabulary.tokens)
    assert len(kept) == 608
    name = "model.embed_tokens.weight"
    assert torch.equal(again.weights[name].float32(), source.weights[name].float32()[kept])
    texts = source_texts = {token: text for text, token in tokenizer_of(source).backend.get_vocab().items()}
    texts = {token: text for text, token in tokenizer_of(again).backend.get_vocab().items()}
    assert [texts[row] for row in range(608)] == [source_texts[token] for token in kept]


@pytest.mark.parametrize("options", [{"keep": 0.0}, {"keep": 1.0}, {"keep": -0.1}, {"tokens": -1}])
def test_a_share_that_is_none_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="trim-vocabulary: "):
        TrimVocabulary(**options)  # type: ignore[arg-type]


def test_what_cannot_be_trimmed_is_refused(source: Checkpoint) -> None:
    quantized = GroupQuantize(bits=8).run(source).checkpoint
    with pytest.raises(
        InputError, match=r"model.embed_tokens.weight is quantized already; let this pass come before"
    ):
        run(quantized)
    with pytest.raises(InputError, match="there is nothing to take away"):
        TrimVocabulary(tokens=4096).check(source)
    with pytest.raises(InputError, match="answers token by token"):
        TrimVocabulary().check(replace(source, task=FILLING))
    with pytest.raises(InputError, match=r"tokens have to stay: .*; 64 are too few"):
        run(source, tokens=64)
    with pytest.raises(InputError, match="needs calibration text"):
        TrimVocabulary().run(source)
    own = Calibration(((1, 2),), "the model's own text")
    with pytest.raises(
        InputError, match=r"the model's own text says nothing of the texts .*--calibration FILE"
    ):
        TrimVocabulary().run(source, Workbench(calibration=own))


def test_a_model_that_counts_positions_from_its_padding_token_keeps_its_id(source: Checkpoint) -> None:
    padded = replace(
        source,
        config=LlamaConfig(vocab_size=4096, pad_token_id=4000),
        roles={**source.roles, "embeddings.position_embeddings.weight": "table"},
    )
    with pytest.raises(InputError, match="may count its positions from the padding token"):
        run(padded)


def test_passes_behind_it_are_calibrated_on_the_same_text_in_the_tokens_that_stay(
    source: Checkpoint, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "domain.txt"
    file.write_text("\n\f\n".join(DOMAIN), encoding="utf-8")
    text = read_calibration(file, SourceTokenizer.load(tiny_llama), GENERATION, 64)
    seen: list[Calibration | None] = []

    def note(self: GroupQuantize, given: Checkpoint, work: Workbench) -> PassResult:
        seen.append(work.calibration)
        return PassResult(given, dict.fromkeys(given.weights, "left alone"))

    monkeypatch.setattr(GroupQuantize, "run", note)
    made = optimize((TrimVocabulary(), GroupQuantize()), source, "0" * 64, text, None, Progress())
    (given,) = seen
    assert given is not None
    assert max(token for window in given.windows for token in window) < 1024
    assert tokenizer_of(made.checkpoint).decode(given.windows[0])[:40] == DOMAIN[0][:40]
    assert made.calibration is not None
    assert made.calibration.sha256 == text.sha256


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("another row", "2 of 1,024 tokens have the rows of others"),
        ("another stop token", "generation stops at [7]"),
        ("a lost byte", "do not read back as before"),
    ],
)
def test_a_tokenizer_that_does_not_fit_its_rows_is_noticed(
    source: Checkpoint, result: PassResult, fault: str, named: str
) -> None:
    made = result.checkpoint
    assert made.vocabulary is not None
    files, kept = dict(made.vocabulary.files), list(made.vocabulary.tokens)
    if fault == "another row":
        kept[300], kept[301] = kept[301], kept[300]
    elif fault == "another stop token":
        files["generation_config.json"] = b'{"eos_token_id": 7}'
    else:
        document = json.loads(files["tokenizer.json"])
        model = document["model"]
        model["vocab"] = {"zz" if "q" in text else text: row for text, row in model["vocab"].items()}
        model["merges"] = [pair for pair in model["merges"] if "q" not in "".join(pair)]
        files["tokenizer.json"] = json.dumps(document).encode()
    wrong = opened(made.folder, kept, files)
    check = judge_vocabulary(fewer_tokens(tokenizer_of(source), wrong, kept, 4096), DOMAIN)
    assert not check.passed
    assert named in check.detail
