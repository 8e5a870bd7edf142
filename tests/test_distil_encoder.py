"""Encoders that learn from encoders: vectors, scores, layers, attention."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from slm_export.errors import InputError
from slm_export.learning.distil import Request, distil
from slm_export.learning.distil_encoder import attention_loss, contrastive_loss, hidden_loss
from slm_export.learning.distil_settings import DecoderLosses, DistilSettings, EncoderLosses
from slm_export.learning.evaluation import likeness
from slm_export.learning.settings import Training
from slm_export.learning.shapes import parse_shape
from slm_export.progress import Progress

SILENT = Progress(silent=True)
LOOP = Training(steps=8, batch=4, length=24, rate=1e-3)
SMALL = BertConfig(
    vocab_size=30522,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=64,
    initializer_range=0.2,
)


def saved(cls: Any, folder: Path, minilm: Path, **options: Any) -> Path:
    """Save a random model with MiniLM's tokenizer and, for embeddings, its pooling."""
    torch.manual_seed(0)
    cls(BertConfig(**{**SMALL.to_dict(), **options})).save_pretrained(folder)
    for path in minilm.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of sentences."""
    folder = tmp_path_factory.mktemp("text")
    names = ("parcel", "train", "letter", "boat", "river", "garden", "window", "song", "winter", "bridge")
    for number, name in enumerate(names):
        lines = (f"The {name} of day {number * 10 + day} came {day} hours late again." for day in range(8))
        (folder / f"{name}.txt").write_text("\n\n".join(lines))
    return folder


def asked(teacher: Path, text: Path, out: Path, **settings: Any) -> Request:
    made = {"training": LOOP, "shape": parse_shape("layers=0.5"), **settings}
    return Request(str(teacher), (text,), out, settings=DistilSettings.model_validate(made))


def test_a_sentence_encoder_becomes_more_like_its_teacher(minilm: Path, text: Path, tmp_path: Path) -> None:
    teacher = saved(BertModel, tmp_path / "teacher", minilm)
    outcome, out = distil(asked(teacher, text, tmp_path / "child"), SILENT)
    figures = {row.name: row.figures for row in outcome.rows}
    assert figures["teacher"]["cosine"].value == pytest.approx(1)
    assert figures["child before"]["cosine"].value < figures["child after"]["cosine"].value < 1
    assert BertModel.from_pretrained(out).config.num_hidden_layers == 1
    assert (out / "modules.json").read_bytes() == (minilm / "modules.json").read_bytes()
    assert (out / "1_Pooling" / "config.json").is_file()


def test_a_classifier_learns_its_teachers_scores(minilm: Path, text: Path, tmp_path: Path) -> None:
    labels = {0: "calm", 1: "urgent", 2: "late"}
    teacher = saved(BertForSequenceClassification, tmp_path / "teacher", minilm, id2label=labels)
    outcome, out = distil(asked(teacher, text, tmp_path / "child"), SILENT)
    before, after = (row.figures["kl_to_teacher"].value for row in outcome.rows[1:])
    assert after < before
    assert BertForSequenceClassification.from_pretrained(out).config.id2label == labels


def test_hidden_states_are_held_against_the_layer_that_is_as_deep() -> None:
    generator = torch.Generator().manual_seed(0)
    theirs = [torch.randn(2, 3, 5, generator=generator) for _ in range(7)]
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    same = [theirs[0], theirs[2], theirs[4], theirs[6]]
    assert float(hidden_loss(theirs, same, mask)) == pytest.approx(0, abs=1e-6)
    assert float(hidden_loss(theirs, same[::-1], mask)) > 0.1
    torn = [layer.clone() for layer in same]
    torn[1][1, 2] = 100.0  # padding
    assert float(hidden_loss(theirs, torn, mask)) == pytest.approx(0, abs=1e-6)


def test_attention_and_contrast_are_none_of_equals() -> None:
    generator = torch.Generator().manual_seed(0)
    attention = [torch.randn(2, 4, 3, 3, generator=generator).softmax(-1) for _ in range(2)]
    mask = torch.ones(2, 3, dtype=torch.int64)
    assert float(attention_loss(attention[0], attention[0], mask)) == pytest.approx(0, abs=1e-6)
    assert float(attention_loss(attention[0], attention[1], mask)) > 0.01
    vectors = torch.randn(5, 8, generator=generator)
    # Likeness is all that counts: turned vectors of another width are as good.
    turned = torch.cat((-vectors, torch.zeros(5, 3)), 1)
    assert float(contrastive_loss(vectors, turned, 0.1)) == pytest.approx(0, abs=1e-5)
    assert float(contrastive_loss(vectors, vectors.flip(0), 0.1)) > 0.1


def test_retrieval_overlap_is_counted_without_the_text_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(40, 8, generator=generator)
    assert likeness(vectors, vectors, list(range(40)))["top10_overlap"].value == pytest.approx(1)
    other = likeness(vectors, torch.randn(40, 8, generator=generator), list(range(40)))["top10_overlap"]
    assert 0.1 < other.value < 0.5  # 10 of 39 by chance: 0.26


def test_what_cannot_be_compared_is_refused(minilm: Path, text: Path, tmp_path: Path) -> None:
    teacher = saved(BertModel, tmp_path / "teacher", minilm)
    narrow = saved(BertModel, tmp_path / "narrow", minilm, hidden_size=16)
    settings = DistilSettings(training=LOOP)
    with pytest.raises(InputError, match="its vectors have 16 values and its teacher's 32"):
        distil(Request(str(teacher), (text,), tmp_path / "a", student=narrow, settings=settings), SILENT)
    heads = saved(BertModel, tmp_path / "heads", minilm, num_attention_heads=4)
    with pytest.raises(InputError, match="has 4 heads and its teacher 2"):
        distil(Request(str(teacher), (text,), tmp_path / "a", student=heads, settings=settings), SILENT)
    with pytest.raises(InputError, match="is no decoder: --top-k"):
        distil(asked(teacher, text, tmp_path / "a", decoder=DecoderLosses(top_k=4)), SILENT)
    alone = settings.model_copy(update={"encoder": EncoderLosses(hidden=0, embedding=0, attention=0)})
    outcome, _ = distil(
        Request(str(teacher), (text,), tmp_path / "b", student=narrow, settings=alone), SILENT
    )
    assert "top10_overlap" in outcome.rows[2].figures
