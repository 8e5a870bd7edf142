"""A client's round: what learns, by how much, and what its privacy costs."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from slm_export.errors import InputError
from slm_export.federated.accounting import Ledger
from slm_export.federated.base import Base, open_base, put, save, start, taken
from slm_export.federated.examples import Examples, read_examples
from slm_export.federated.local import difference, losses, measure, train
from slm_export.federated.private_steps import _clip_and_sum, _noised, gradients_by_example, poisson
from slm_export.federated.settings import Local, Model, Privacy
from slm_export.federated.updates import Tensors, norm_of
from slm_export.learning.trainer import collate

TEXTS = (
    "def f(x):\n    return x + 1\n",
    "class A:\n    pass\n",
    "for i in range(10):\n    print(i, i * i, i ** 3)\n",
)
LABELLED = (("a good thing", "yes"), ("a bad thing, and a long one too", "no"), ("good", "yes"))
LOCAL = Local(steps=6, batch=2, length=32, rate=1e-2)
PLAIN = Privacy()
Made = tuple[Base, Examples]


@pytest.fixture(scope="module")
def decoder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An adapter on a Llama of one layer, and three texts."""
    folder = tmp_path_factory.mktemp("texts")
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.py").write_text(text)
    base = open_base(Model(base=str(tiny_llama), rank=2))
    return base, read_examples(base, [folder], 32)


@pytest.fixture(scope="module")
def classifier(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The head of a BERT of one layer, and three labelled texts."""
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("classifier")
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        id2label={0: "no", 1: "yes"},
        label2id={"no": 0, "yes": 1},
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(minilm / name, folder / "model" / name)
    lines = [json.dumps({"text": text, "label": label}) for text, label in LABELLED]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    base = open_base(Model(base=str(folder / "model"), learns="head"))
    return base, read_examples(base, [folder / "texts.jsonl"], 32)


@pytest.fixture(params=["decoder", "classifier"])
def made(request: pytest.FixtureRequest) -> Made:
    """Either."""
    found: Made = request.getfixturevalue(request.param)
    put(found[0], start(found[0]))
    return found


def gradient(base: Base, example: Examples) -> dict[str, torch.Tensor]:
    """Return what autograd says of one example alone, unpadded."""
    base.module.zero_grad()
    losses(base, collate(example.rows, 0)).sum().backward()
    return {name: value.grad.clone() for name, value in base.parameters.items() if value.grad is not None}


def moved(base: Base, seed: int = 1) -> dict[str, np.ndarray]:
    """Return tensors at which no gradient is zero, as that of lora_A is where all begins."""
    chance = np.random.default_rng(seed)
    return {
        name: (value + 0.1 * chance.standard_normal(value.shape)).astype(np.float32)
        for name, value in start(base).items()
    }


def test_gradients_by_example_are_those_of_each_alone(made: Made) -> None:
    base, examples = made
    put(base, moved(base))
    alone = [gradient(base, examples.take([index])) for index in range(len(examples))]
    assert len({len(row["input_ids"]) for row in examples.rows}) > 1, "padding is to be among them"
    with gradients_by_example(base):
        losses(base, collate(examples.rows, base.tokenizer.pad_id)).sum().backward()
        together = {name: value.grad_sample for name, value in base.parameters.items()}
    for name, found in together.items():
        wanted = torch.stack([one[name] for one in alone])
        assert wanted.abs().max() > 0, name
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


def test_a_step_is_the_sum_of_clipped_gradients_over_what_was_expected(made: Made) -> None:
    base, examples = made
    put(base, moved(base))
    alone = [gradient(base, examples.take([index])) for index in range(len(examples))]
    norms = [norm_of({name: value.numpy() for name, value in one.items()}) for one in alone]
    clip = float(np.median(norms))
    wanted = {
        name: sum(one[name] * min(1.0, clip / size) for one, size in zip(alone, norms, strict=True)) / 2
        for name in alone[0]
    }
    with gradients_by_example(base):
        optimizer = _noised(base, LOCAL, clip, 1e-12, expected=2, entropy=0)
        _clip_and_sum(base, examples.rows, LOCAL, optimizer)  # three examples, two at a time
        optimizer.step()
        for name, value in base.parameters.items():
            torch.testing.assert_close(value.grad, wanted[name], rtol=1e-4, atol=1e-6 * clip)


def test_a_step_of_no_example_is_noise_alone_and_as_loud_as_it_says(made: Made) -> None:
    base, _ = made
    with gradients_by_example(base):
        optimizer = _noised(base, LOCAL, clip=0.5, noise=3.0, expected=2, entropy=None)
        _clip_and_sum(base, [], LOCAL, optimizer)
        optimizer.step()
        drawn = torch.cat([value.grad.flatten() for value in base.parameters.values()]) * 2 / (0.5 * 3.0)
    # Seven standard errors.
    assert abs(float(drawn.var()) - 1) < 7 * (2 / len(drawn)) ** 0.5
    assert abs(float(drawn.mean())) < 7 / len(drawn) ** 0.5


def test_every_example_takes_part_by_itself_and_as_often_as_is_counted() -> None:
    rows = [{"input_ids": [number]} for number in range(20)]
    chance = random.Random(0)
    steps = [{row["input_ids"][0] for row in poisson(rows, 5, chance)} for _ in range(4000)]
    for number in (0, 7, 19):
        assert abs(np.mean([number in step for step in steps]) - 0.25) < 7 * (0.25 * 0.75 / 4000) ** 0.5
    together = np.mean([{0, 19} <= step for step in steps])
    assert abs(together - 0.25**2) < 7 * (0.0625 * 0.9375 / 4000) ** 0.5
    # A fixed number in every step is another mechanism, and not the one that is counted.
    assert len({len(step) for step in steps}) > 8
    assert len(poisson(rows, 20, chance)) == 20


def test_it_learns_and_nothing_but_what_learns_changes(made: Made) -> None:
    base, examples = made
    learning = {id(value) for value in base.parameters.values()}
    frozen = [value for value in base.module.parameters() if id(value) not in learning]
    before = [value.clone() for value in frozen]
    learned = train(base, start(base), examples, LOCAL, PLAIN, seed=3)
    assert learned.steps == LOCAL.steps
    assert learned.examples == 3
    assert learned.loss_before is not None
    assert learned.loss_after is not None
    assert learned.loss_after < learned.loss_before
    assert learned.ledger is None
    assert norm_of(difference(learned.tensors, start(base))) > 0
    assert all(torch.equal(value, was) for value, was in zip(frozen, before, strict=True))
    assert measure(base, learned.tensors, examples).value < measure(base, start(base), examples).value


def test_a_round_is_decided_by_its_seed(made: Made) -> None:
    base, examples = made
    first, again, other = (train(base, start(base), examples, LOCAL, PLAIN, seed) for seed in (3, 3, 4))
    assert all((first.tensors[name] == again.tensors[name]).all() for name in first.tensors)
    assert any((first.tensors[name] != other.tensors[name]).any() for name in first.tensors)


def test_what_privacy_leaves_behind_does_not_change_what_comes_later(made: Made) -> None:
    base, examples = made
    before = train(base, start(base), examples, LOCAL, PLAIN, seed=3)
    private = Privacy(unit="example", epsilon=5, delta=1e-3, noise=1.0, accountant="rdp")
    train(base, start(base), examples, LOCAL, private, seed=0)
    after = train(base, start(base), examples, LOCAL, PLAIN, seed=3)
    assert all((before.tensors[name] == after.tensors[name]).all() for name in before.tensors)
    assert not any(module.training for module in base.module.modules())


def test_private_steps_are_counted_and_end_with_the_budget(made: Made) -> None:
    base, examples = made
    private = Privacy(unit="example", epsilon=9, delta=1e-3, noise=1.5, accountant="rdp")
    ledger, steps, tensors = Ledger(), 0, start(base)
    for _ in range(30):
        learned = train(base, tensors, examples, LOCAL, private, seed=0, ledger=ledger, entropy=steps)
        assert learned.ledger is not None
        assert learned.ledger.epsilon(1e-3, "rdp") <= 9
        assert learned.loss_before is None, "an exact loss tells of the examples"
        assert learned.loss_after is None
        changed = norm_of(difference(learned.tensors, tensors)) > 0
        assert changed == (learned.steps > 0)
        assert learned.exhausted == (learned.steps < LOCAL.steps)
        ledger, tensors, steps = learned.ledger, learned.tensors, steps + learned.steps
        if not learned.steps:
            break
    assert learned.steps == 0, "the budget has an end"
    assert ledger.events == ((1.5, 2 / 3, steps),)
    assert ledger.plus(1.5, 2 / 3).epsilon(1e-3, "rdp") > 9


def test_noise_that_is_not_given_lasts_for_all_rounds(classifier: Made) -> None:
    base, examples = classifier
    private = Privacy(unit="example", epsilon=4, delta=1e-3, accountant="rdp")
    ledger, tensors = Ledger(), start(base)
    for _ in range(3):
        learned = train(base, tensors, examples, LOCAL, private, 0, ledger, rounds=3)
        assert learned.steps == LOCAL.steps
        assert learned.ledger is not None
        ledger, tensors = learned.ledger, learned.tensors
    assert 3.8 < ledger.epsilon(1e-3, "rdp") <= 4


def test_nobody_can_foresee_the_noise_unless_it_is_a_test(classifier: Made) -> None:
    base, examples = classifier
    private = Privacy(unit="example", epsilon=9, delta=1e-3, noise=2.0, accountant="rdp")
    tensors = [
        train(base, start(base), examples, LOCAL, private, seed=5, entropy=entropy).tensors[
            "classifier.weight"
        ]
        for entropy in (None, None, 1, 1)
    ]
    assert (tensors[0] != tensors[1]).any()
    assert (tensors[2] == tensors[3]).all()


def test_what_was_learned_is_an_adapter_of_peft(decoder: Made, tiny_llama: Path, tmp_path: Path) -> None:
    import peft
    import transformers

    base, examples = decoder
    learned = train(base, start(base), examples, LOCAL, PLAIN, seed=3)
    save(base, learned.tensors, tmp_path / "adapter")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    batch = collate(examples.rows, base.tokenizer.pad_id)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(
            adapted(**inputs).logits, base.module(**inputs).logits, rtol=1e-4, atol=1e-5
        )
    again = open_base(Model(base=str(tiny_llama), rank=2, start=str(tmp_path / "adapter")))
    assert all((start(again)[name] == learned.tensors[name]).all() for name in learned.tensors)


def test_what_a_head_learned_is_a_checkpoint(classifier: Made, tmp_path: Path) -> None:
    import transformers

    base, examples = classifier
    learned = train(base, start(base), examples, LOCAL, PLAIN, seed=3)
    save(base, learned.tensors, tmp_path / "taught")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "taught").eval()
    batch = collate(examples.rows, base.tokenizer.pad_id)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, base.module(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert set(learned.tensors) == {"classifier.weight", "classifier.bias"}
    again = open_base(Model(base=str(base.folder), learns="head", start=str(tmp_path / "taught")))
    assert all((start(again)[name] == learned.tensors[name]).all() for name in learned.tensors)


def test_a_base_on_the_grid_has_the_values_that_ship(tiny_llama: Path) -> None:
    from slm_export.optimizers.group_quantize import quantize

    floats, grid = (open_base(Model(base=str(tiny_llama), rank=2, bits=bits)).module for bits in (32, 4))
    path = "base_model.model.model.layers.0.mlp.down_proj.weight"
    wanted = quantize(floats.get_parameter(path).detach(), 4, 32).float32()
    assert torch.equal(grid.get_parameter(path), wanted)
    assert not torch.equal(grid.get_parameter(path), floats.get_parameter(path))


def broken(tensors: Tensors, how: str) -> dict[str, np.ndarray]:
    """Return tensors with something wrong."""
    made = {name: value.copy() for name, value in tensors.items()}
    name = next(iter(made))
    if how == "missing":
        del made[name]
    elif how == "strange":
        made["model.embed_tokens.weight"] = made[name]
    elif how == "shape":
        made[name] = made[name][:-1]
    else:
        made[name].flat[0] = float(how)
    return made


@pytest.mark.parametrize("how", ["missing", "strange", "shape", "nan", "inf"])
def test_tensors_that_are_not_the_bases_change_nothing(made: Made, how: str) -> None:
    base, examples = made
    with pytest.raises(InputError):
        train(base, broken(moved(base), how), examples, LOCAL, PLAIN, seed=0)
    assert all((value == start(base)[name]).all() for name, value in taken(base).items())


def test_texts_are_rewritten_before_anything_is_learned(made: Made, tmp_path: Path) -> None:
    base, _ = made
    secret, open_to_all = "jane.doe@example.com writes", "somebody writes"
    for name, text in (("a", secret), ("b", open_to_all)):
        line = json.dumps({"text": text, "label": "yes"} if base.labels else {"text": text})
        (tmp_path / f"{name}.jsonl").write_text(line)
    rewritten = read_examples(
        base, [tmp_path / "a.jsonl"], 32, lambda text: text.replace(secret, open_to_all)
    )
    assert rewritten == read_examples(base, [tmp_path / "b.jsonl"], 32)


def test_topics_are_files_or_classes(decoder: Made, classifier: Made) -> None:
    assert decoder[1].topics == (0, 1, 2)
    assert classifier[1].topics == (1, 0, 1)
    assert classifier[1].take([1, 2]).topics == (0, 1)


def test_a_class_that_the_base_does_not_have_is_refused(classifier: Made, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "so", "label": "perhaps"}))
    with pytest.raises(InputError, match="no class 'perhaps'; it has no, yes"):
        read_examples(classifier[0], [tmp_path / "a.jsonl"], 32)


def test_texts_longer_than_the_base_can_take_are_refused(classifier: Made, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="512 positions"):
        read_examples(classifier[0], [tmp_path], 1024)


def test_a_client_without_examples_is_told_so(classifier: Made) -> None:
    base, examples = classifier
    with pytest.raises(InputError, match="nothing to learn from"):
        train(base, start(base), examples.take([]), LOCAL, PLAIN, seed=0)


def test_a_loss_that_is_not_finite_is_an_error(classifier: Made) -> None:
    base, examples = classifier
    huge = {name: np.full_like(value, 3e38) for name, value in start(base).items()}
    with pytest.raises(InputError, match="lower rate"):
        train(base, huge, examples, LOCAL, PLAIN, seed=0)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_layers_without_gradients_by_example_are_refused(tiny_llama: Path, decoder: Made) -> None:
    base = open_base(Model(base=str(tiny_llama), rank=2, targets=("embed_tokens",)))
    private = Privacy(unit="example", epsilon=9, delta=1e-3, noise=2.0, accountant="rdp")
    assert train(base, start(base), decoder[1], LOCAL, PLAIN, seed=0).steps == LOCAL.steps
    with pytest.raises(InputError, match=r"embed_tokens.* is no linear layer.*leave it out of targets"):
        train(base, start(base), decoder[1], LOCAL, private, seed=0)
