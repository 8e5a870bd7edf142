"""A rewritten tokenizer.json reads text as the original does, in ExecuTorch's own tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from slm_export.exporters.executorch import ExecuTorchExporter
from slm_export.fidelity import judge_tokenizer
from slm_export.gates import Gates
from slm_export.tokenization.conformance import Conformance, cases, compare
from slm_export.tokenization.phone_tokenizer import for_executorch
from slm_export.tokenization.runtime_tokenizers import ExecuTorchTokenizer, TokenizerLoadError
from slm_export.tokenization.tokenizer import SourceTokenizer
from slm_export.tokenization.tokenizer_bundle import write_tokenizer

BOUNDARY = "\u2581"
SPECIAL = ("<unk>", "<s>", "</s>")
PIECES = decoders.Replace(BOUNDARY, " "), decoders.ByteFallback(), decoders.Fuse()
STRIPPED = decoders.Sequence([*PIECES, decoders.Strip(" ", 1, 0)])


def sentencepiece_like() -> Tokenizer:
    """BPE over words with U+2581 before them, and bytes for what is in no word, as Llama 2's and Gemma's are."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(BOUNDARY, "always")
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=list(SPECIAL), show_progress=False)
    trained.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    model = json.loads(trained.to_str())["model"]
    vocabulary = model["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    merges = [tuple(pair) for pair in model["merges"]]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return made


def llama_2() -> Tokenizer:
    made = sentencepiece_like()
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend(BOUNDARY), normalizers.Replace(" ", BOUNDARY)]
    )
    made.decoder = STRIPPED
    return made


def llama_2_of_transformers_5(scheme: str) -> Tokenizer:
    made = sentencepiece_like()
    made.pre_tokenizer = pre_tokenizers.Metaspace(BOUNDARY, scheme, split=False)
    made.decoder = STRIPPED
    return made


def gemma() -> Tokenizer:
    made = sentencepiece_like()
    made.normalizer = normalizers.Replace(" ", BOUNDARY)
    made.decoder = decoders.Sequence(list(PIECES))
    return made


def read_by_executorch(tokenizer: Tokenizer, folder: Path, *, rewritten: bool = True) -> Conformance:
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    made = (for_executorch(document) if rewritten else None) or document
    (folder / "tokenizer.json").write_text(json.dumps(made), encoding="utf-8")
    runtime = ExecuTorchTokenizer(folder / "tokenizer.json")
    return compare(
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        runtime.encode,
        lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False),
        runtime.decode,
        cases(SPECIAL),
    )


@pytest.mark.parametrize("made", [llama_2, lambda: llama_2_of_transformers_5("always"), gemma])
def test_ids_and_text_are_the_same(made: Any, tmp_path: Path) -> None:
    result = read_by_executorch(made(), tmp_path)
    assert result.agreed, result.summary()


def test_behind_special_tokens_a_boundary_may_be_too_many(tmp_path: Path) -> None:
    result = read_by_executorch(llama_2_of_transformers_5("first"), tmp_path)
    parted = {kind for kind, (wrong, _) in result.by_kind.items() if wrong}
    assert parted == {"special-tokens", "mixtures"}
    assert result.mismatches < 0.01 * result.total


def test_as_published_every_space_is_lost(tmp_path: Path) -> None:
    """Why the decoder is rewritten: token by token, Strip takes the space off every word."""
    assert not read_by_executorch(llama_2(), tmp_path, rewritten=False).agreed
    runtime = ExecuTorchTokenizer(tmp_path / "tokenizer.json")
    assert " " not in runtime.decode(runtime.encode("as published every space"))


def test_what_the_runtime_reads_is_left_alone(pycode: Path) -> None:
    assert for_executorch(json.loads((pycode / "tokenizer.json").read_text(encoding="utf-8"))) is None
    assert for_executorch(json.loads(gemma().to_str())) is None


@pytest.mark.parametrize(
    "model", [models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0), models.WordPiece()]
)
def test_what_it_cannot_read_is_said(model: Any, tmp_path: Path) -> None:
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    with pytest.raises(TokenizerLoadError, match="ExecuTorch's tokenizer cannot load it"):
        read_by_executorch(made, tmp_path)


def test_where_transformers_parts_from_the_file_is_said(tmp_path: Path) -> None:
    llama_2().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}'
    )
    source = SourceTokenizer.load(tmp_path)
    assert source.encode("  a") != source.encode_by_transformers("  a")
    bundle = tmp_path / "bundle"
    write_tokenizer(source, bundle / "tokenizer")
    assert ExecuTorchExporter().runner_tokenizer(bundle) == "executorch/tokenizer/tokenizer.json"
    runner = ExecuTorchTokenizer(bundle / "executorch" / "tokenizer")
    verdict = judge_tokenizer(source, lambda: runner, "text-generation", Gates(min_tokenizer_agreement=1.0))
    assert [check.passed for check in verdict.checks] == [True]
    assert [("transformers reads" in note) for note in verdict.notes] == [True]
