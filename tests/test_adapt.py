"""``slm-export adapt``: text and labelled examples teach, heads are put on that exports take, a kill costs nothing."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reasoning import BAD, GOOD, THINGS, WORDS, jsonl, save_child, save_encoder
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from slm_export.bundles.finished import CACHE_VARIABLE
from slm_export.bundles.staging import Staging
from slm_export.cli import cli as command
from slm_export.graph.pooling import read_pooling
from slm_export.learning import trainer
from slm_export.learning.adapt import Request, adapt
from slm_export.learning.adapt_settings import AdaptSettings, Task
from slm_export.learning.distil_settings import Grid
from slm_export.learning.models import load
from slm_export.learning.settings import Training
from slm_export.optimizers.group_quantize import quantize
from slm_export.progress import Progress
from slm_export.source.load import load_checkpoint

QUIET = Progress(silent=True)
LOOP = Training(steps=60, batch=16, together=16, length=48, rate=3e-3, checkpoint_every=20)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_child(tmp_path_factory.mktemp("models") / "decoder")


def rows(task: Task) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for word, thing, very in itertools.product((*GOOD, *BAD), THINGS, ("", "very ")):
        text, label = f"the {thing} was {very}{word}", "good" if word in GOOD else "bad"
        if task == "classify":
            made.append({"text": text, "label": label})
        elif task == "tag":
            kinds = {word: "judgement", thing: "thing"}
            made.append(
                {"tokens": text.split(), "labels": [kinds.get(each, "other") for each in text.split()]}
            )
        elif task == "embed":
            made.append(
                {"text": text, "positive": f"a {very}{word} {thing}", "negative": f"the {thing} was {very}"}
            )
        else:
            made.append({"prompt": f"{text}: ", "answer": label})
    return made


def request(folder: Path, model: Path, task: Task | None, settings: dict[str, Any] | None = None) -> Request:
    made = AdaptSettings(task=task, training=LOOP, **(settings or {}))
    asked = Request(model=str(model), out=folder / "out", settings=made)
    if task is not None:
        return replace(asked, labels=(jsonl(folder / "labels.jsonl", rows(task)),))
    luck = random.Random(0)
    texts = "\n\f\n".join(" ".join(luck.choices(WORDS, k=60)) for _ in range(24))
    (folder / "text.txt").write_text(texts, encoding="utf-8")
    return replace(asked, data=(folder / "text.txt",))


def test_classes_of_texts_are_learned_and_exported_as_transformers_reads_them(
    encoder: Path, tmp_path: Path
) -> None:
    outcome, out = adapt(request(tmp_path, encoder, "classify"), QUIET)
    before, after = (row.figures["accuracy"] for row in outcome.rows)
    assert after.value >= 0.9
    assert after.low > before.value or before.value >= 0.9
    model = AutoModelForSequenceClassification.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    with torch.no_grad():
        scores = model(**tokenizer(["the song was lovely", "the song was dull"], return_tensors="pt")).logits
    assert [model.config.id2label[int(best)] for best in scores.argmax(-1)] == ["good", "bad"]
    assert load_checkpoint(out).task == "text-classification"
    assert outcome.data["labels"] == ["bad", "good"]


def test_classes_of_words_are_learned_by_the_words_that_they_lie_on(encoder: Path, tmp_path: Path) -> None:
    outcome, out = adapt(request(tmp_path, encoder, "tag"), QUIET)
    assert outcome.rows[1].figures["word_accuracy"].value >= 0.95
    model = AutoModelForTokenClassification.from_pretrained(out)
    ids = AutoTokenizer.from_pretrained(out)("the room was very fine", return_tensors="pt")
    with torch.no_grad():
        best = model(**ids).logits.argmax(-1)[0, 1:-1]
    labels = [model.config.id2label[int(each)] for each in best]
    assert labels == ["other", "thing", "other", "other", "judgement"]


def test_embeddings_of_pairs_come_together_with_their_pooling_stored(encoder: Path, tmp_path: Path) -> None:
    outcome, out = adapt(request(tmp_path, encoder, "embed"), QUIET)
    before, after = (row.figures["found_first"] for row in outcome.rows)
    assert after.value > before.value
    pooling = read_pooling(out)
    assert pooling.stated
    assert (pooling.mode, pooling.normalize) == ("mean", True)
    assert load_checkpoint(out).task == "sentence-embedding"


def test_answers_are_learned_and_prompts_are_not(decoder: Path, tmp_path: Path) -> None:
    outcome, out = adapt(request(tmp_path, decoder, "generate"), QUIET)
    before, after = (row.figures["answer_perplexity"] for row in outcome.rows)
    assert after.high < before.low / 10
    assert "the film was" in (out / "held_out.txt").read_text()


@pytest.mark.parametrize(("kind", "figure"), [("decoder", "perplexity"), ("encoder", "masked_perplexity")])
def test_plain_text_teaches(encoder: Path, decoder: Path, tmp_path: Path, kind: str, figure: str) -> None:
    model = {"decoder": decoder, "encoder": encoder}[kind]
    outcome, out = adapt(request(tmp_path, model, None), QUIET)
    before, after = (row.figures[figure] for row in outcome.rows)
    assert after.high < before.low
    assert load(out).task == load(model).task
    first, second = load(model).module.state_dict(), load(out).module.state_dict()
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_new_head_learns_beside_adapters(encoder: Path, tmp_path: Path) -> None:
    asked = request(tmp_path, encoder, "classify", {"low_rank": 4})
    fast = LOOP.model_copy(update={"rate": 1e-2})
    asked = replace(asked, settings=asked.settings.model_copy(update={"training": fast}))
    outcome, out = adapt(asked, QUIET)
    assert outcome.rows[1].figures["accuracy"].value >= 0.9
    before, after = load(encoder).module.state_dict(), load(out).module.base_model.state_dict()
    assert torch.equal(
        before["embeddings.word_embeddings.weight"], after["embeddings.word_embeddings.weight"]
    )
    name = "encoder.layer.0.attention.self.query.weight"
    change = after[name] - before[name]
    assert int(torch.linalg.matrix_rank(change, rtol=1e-3)) <= 4


def test_what_is_trained_for_the_grid_is_on_it(encoder: Path, tmp_path: Path) -> None:
    _, out = adapt(request(tmp_path, encoder, "classify", {"grid": Grid(bits=4)}), QUIET)
    values = load_checkpoint(out).weights["bert.encoder.layer.0.intermediate.dense.weight"].float32()
    assert torch.equal(quantize(values, 4, 32).float32(), values)


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(tmp_path, encoder, None)
    whole, out = adapt(replace(asked, out=tmp_path / "whole"), QUIET)
    shutil.rmtree(tmp_path / "cache")

    class Hit(BaseException):
        """As a kill, it is caught by nobody."""

    def at_fifty(self: trainer.Teaching, step: int) -> None:
        if step == 50:
            raise Hit
        stepped(self, step)

    def commit(self: Staging) -> Path:
        raise Hit

    stepped = trainer.Teaching.stepped
    for place, name, stop in ((trainer.Teaching, "stepped", at_fifty), (Staging, "commit", commit)):
        with monkeypatch.context() as patched:
            patched.setattr(place, name, stop)
            with pytest.raises(Hit):
                adapt(asked, QUIET)
        assert not asked.out.exists()
    outcome, again = adapt(asked, QUIET)
    assert outcome.curves["adapt"].resumed_at in (40, 60)
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert outcome.rows == whole.rows


def test_the_command_prints_one_document(
    encoder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    labels = jsonl(tmp_path / "labels.jsonl", rows("classify"))
    command.main(
        [
            *(
                "adapt",
                str(encoder),
                "--task",
                "classify",
                "--labels",
                str(labels),
                "--out",
                str(tmp_path / "out"),
            ),
            *("--steps", "2", "--length", "48", "--data-licence", "CC0-1.0", "--json"),
        ],
        standalone_mode=False,
    )
    learned = json.loads(capfd.readouterr().out)["learned"]
    assert (learned["by"], learned["data_licence"], learned["settings"]["task"]) == (
        "adapt",
        "CC0-1.0",
        "classify",
    )


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classify", "tag", "embed"])
def test_a_new_head_goes_through_the_gate_of_an_export(
    task: Task, encoder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    labels = jsonl(tmp_path / "labels.jsonl", rows(task))
    command.main(
        [
            *("adapt", str(encoder), "--task", task, "--labels", str(labels), "--out", str(tmp_path / "out")),
            *(
                "--steps",
                "60",
                "--rate",
                "3e-3",
                "--length",
                "48",
                "--for-bits",
                "8",
                "--export",
                "host",
                "--json",
            ),
        ],
        standalone_mode=False,
    )
    (exported,) = json.loads(capfd.readouterr().out)["exports"]
    assert exported["model"]["learned"]["by"] == "adapt"
    assert all(check["passed"] for result in exported["formats"] for check in result["checks"])
