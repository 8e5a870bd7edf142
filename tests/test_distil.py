"""`slm-export distil`: what comes out of it, what it refuses, and that what it says of a child is so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TOKENIZER_FILES
from forked import Forked
from transformers import LlamaConfig, LlamaForCausalLM

from slm_export.errors import InputError
from slm_export.learning.distil import Request, distil
from slm_export.learning.distil_decoder import DIVERGENCES, decoder_loss
from slm_export.learning.distil_settings import DecoderLosses, DistilSettings, Grid
from slm_export.learning.evaluation import perplexity
from slm_export.learning.fitting import shape_within
from slm_export.learning.grid import quantization, settled
from slm_export.learning.models import load
from slm_export.learning.policies import OnPolicy
from slm_export.learning.settings import Training
from slm_export.learning.shapes import Shape, parse_shape
from slm_export.learning.teachers import LiveTeacher, numbered, write_down
from slm_export.learning.texts import read_texts
from slm_export.learning.trainer import IGNORED, collate
from slm_export.learning.windows import windows
from slm_export.optimizers.group_quantize import quantize
from slm_export.progress import Progress
from slm_export.source.learned import learned_of
from slm_export.source.load import load_checkpoint

SILENT = Progress(silent=True)
LOOP = Training(steps=6, batch=4, length=32, rate=1e-3)
TAUGHT = DecoderLosses(hard=0.0)  # a random teacher knows nothing of the text


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, pycode: Path) -> Path:
    """A decoder of four layers, random but for its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(pycode / name, folder / name)
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    (folder / "LICENSE").write_text("As you like.")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of different words."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(12):
        words = (f"def f{number}_{line}(x{line}): return x{line} * {line * number}" for line in range(20))
        (folder / f"{number:02}.py").write_text("\n".join(words))
    return folder


def asked(teacher: Path, text: Path, out: Path, shape: str = "layers=0.5", **settings: object) -> Request:
    made = DistilSettings.model_validate(
        {"training": LOOP, "shape": parse_shape(shape), "decoder": TAUGHT, **settings}
    )
    return Request(str(teacher), (text,), out, settings=made, data_licence="CC0-1.0")


def test_a_child_has_the_shape_that_was_asked_for_and_learns(
    teacher: Path, text: Path, tmp_path: Path
) -> None:
    request = asked(teacher, text, tmp_path / "child", "layers=0.5,neurons=0.75,kv_groups=0.5")
    outcome, out = distil(request, SILENT)
    config = json.loads((out / "config.json").read_text())
    assert [config[k] for k in ("num_hidden_layers", "intermediate_size", "num_key_value_heads")] == [
        2,
        192,
        1,
    ]
    assert (config["num_attention_heads"], config["head_dim"]) == (2, 32)
    names = [row.name for row in outcome.rows]
    assert names == ["teacher", "child before", "child after"]
    before, after = (row.figures["kl_to_teacher"].value for row in outcome.rows[1:])
    assert after < 0.97 * before
    # transformers itself reads it, and finds the same perplexity.
    made = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = load(out).tokenizer
    held_out = windows(read_texts([out / "held_out.txt"]).documents, tokenizer, LOOP.length)
    found = perplexity(made, held_out, tokenizer.pad_id)
    assert found.value == pytest.approx(outcome.rows[2].figures["perplexity"].value, rel=1e-4)
    assert sum(p.numel() for p in made.parameters()) == outcome.rows[2].parameters


def test_what_is_left_says_how_it_was_made(teacher: Path, text: Path, tmp_path: Path) -> None:
    _, out = distil(asked(teacher, text, tmp_path / "child"), SILENT)
    document = json.loads((out / "learning.json").read_text())
    learned = document["learned"]
    assert (learned["by"], learned["licence"], learned["data_licence"]) == ("distil", "cc-by-4.0", "CC0-1.0")
    assert learned["lineage"]["teacher"]["name"] == "teacher"
    points = learned["curves"]["distil"]["points"]
    assert [p["step"] for p in points if p["loss"] is not None] == [1, 2, 3, 4, 5, 6]
    assert any(p["measured"] for p in points)
    assert (out / "LICENSE").read_text() == "As you like."
    assert "license: cc-by-4.0" in (out / "README.md").read_text()
    assert "How it was taught" not in (out / "learning.html").read_text()
    listed = {entry["path"] for entry in document["files"]}
    assert listed | {"learning.json"} == {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    found = learned_of(out)
    assert found is not None
    assert [row.name for row in found.rows] == ["teacher", "child before", "child after"]


def test_the_same_command_gives_the_same_child(teacher: Path, text: Path, tmp_path: Path) -> None:
    made = [distil(asked(teacher, text, tmp_path / name), SILENT)[1] for name in ("a", "b")]
    assert len({(out / "model.safetensors").read_bytes() for out in made}) == 1


def test_a_child_may_be_replaced_and_a_folder_of_others_not(
    teacher: Path, text: Path, tmp_path: Path
) -> None:
    request = asked(teacher, text, tmp_path / "child")
    distil(request, SILENT)
    with pytest.raises(InputError, match="exists already; use --force"):
        distil(request, SILENT)
    weights = (tmp_path / "child" / "model.safetensors").read_bytes()
    forced = Request(**{**vars(request), "force": True})
    distil(forced, SILENT)
    assert (tmp_path / "child" / "model.safetensors").read_bytes() == weights
    (tmp_path / "child" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"it also holds mine.txt"):
        distil(forced, SILENT)


def test_what_was_trained_on_the_grid_is_what_an_export_stores(
    teacher: Path, text: Path, tmp_path: Path
) -> None:
    grid = Grid(bits=4, begins=0.5)
    _, out = distil(asked(teacher, text, tmp_path / "child", grid=grid), SILENT)
    source = load_checkpoint(out)
    exported = quantization(grid).run(source).checkpoint
    changed = [name for name in source.weights if exported.weights[name] is not source.weights[name]]
    assert len(changed) == 2 * 7 + 1
    for name in changed:
        assert torch.equal(exported.weights[name].float32(), source.weights[name].float32()), name


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (8, 256)])
def test_settled_values_are_found_again(bits: int, group: int) -> None:
    generator = torch.Generator().manual_seed(5)
    dense = torch.randn(256, 256, generator=generator) ** 3
    for values in (dense, dense * (torch.rand(256, 256, generator=generator) < 0.05), torch.zeros(4, 256)):
        made = settled(values, bits, group)
        again = quantize(made.float32(), bits, group)
        assert torch.equal(made.packed, again.packed)
        assert torch.equal(made.scales, again.scales)


def test_a_teacher_that_was_written_down_says_the_same(teacher: Path, text: Path, tmp_path: Path) -> None:
    model = load(teacher)
    examples = numbered(windows(read_texts([text]).documents, model.tokenizer, 32)[:70])
    written = write_down(model.module, examples, 4096, model.tokenizer.pad_id, tmp_path, SILENT)
    student = load(teacher).module
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    batch = collate([examples[69], examples[3]], model.tokenizer.pad_id)
    losses = [
        float(decoder_loss(source, 1.0, 0.0)(student, batch).detach())
        for source in (LiveTeacher(model.module), written)
    ]
    # float16 log-probabilities, and the remainder as one choice more
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    (tmp_path / "few").mkdir()
    few = write_down(model.module, examples, 32, model.tokenizer.pad_id, tmp_path / "few", SILENT)
    size = sum(path.stat().st_size for path in (tmp_path / "few").iterdir())
    assert size < 70 * 32 * 4096 * 4 / 100
    assert 0 < float(decoder_loss(few, 1.0, 0.0)(student, batch).detach()) < losses[0] * 1.001


def test_a_written_teacher_teaches(teacher: Path, text: Path, tmp_path: Path) -> None:
    outcome, _ = distil(
        asked(teacher, text, tmp_path / "child", decoder=DecoderLosses(top_k=64, hard=0.0)), SILENT
    )
    before, after = (row.figures["kl_to_teacher"].value for row in outcome.rows[1:])
    assert after < before


def test_a_student_is_judged_on_what_it_writes(teacher: Path) -> None:
    model, student = load(teacher), load(teacher).module
    with torch.no_grad():
        student.model.embed_tokens.weight[7:900] += 1.0
    seen: list[dict[str, torch.Tensor]] = []

    def loss(module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append(batch)
        return decoder_loss(LiveTeacher(model.module), 1.0, 0.0)(module, batch)

    policy = OnPolicy(loss, 0.5, 0, model.tokenizer)
    batch = collate([{"input_ids": list(range(4, 20))}, {"input_ids": list(range(40, 56))}], 2)
    student.train()
    drawn = []
    for step in (0, 1, 2, 3, 4, 5, 6, 7, 0):
        policy.before_step(step)
        made = policy(student, batch)
        made.backward()
        drawn.append(seen[-1]["input_ids"])
    own = [not torch.equal(ids, batch["input_ids"]) for ids in drawn]
    assert 0 < sum(own) < len(own)
    assert torch.equal(drawn[0], drawn[8])  # a step that is repeated writes the same
    written = seen[own.index(True)]
    assert torch.equal(written["input_ids"][:, :4], batch["input_ids"][:, :4])
    assert (written["labels"][:, :4] == IGNORED).all()
    assert torch.equal(written["labels"][:, 4:], written["input_ids"][:, 4:])
    assert student.training
    assert all(parameter.grad is not None for parameter in student.parameters())


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_divergences_are_none_of_equals_and_positive_of_others(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, 9, generator=generator).log_softmax(-1) for _ in range(2))
    assert DIVERGENCES[name](p, p).abs().max() < 1e-6
    assert DIVERGENCES[name](p, q).min() > 0


def test_labels_that_are_not_to_be_learned_are_not_taught(teacher: Path) -> None:
    model = load(teacher)
    loss = decoder_loss(LiveTeacher(model.module), 2.0, 0.5)
    student = load(teacher).module
    with torch.no_grad():
        student.model.embed_tokens.weight[7:9] += 1.0
    seen = collate([{"input_ids": [4, 5, 6, 7, 8]}], 2)
    hidden = collate([{"input_ids": [4, 5, 6, 7, 8], "labels": [IGNORED, 5, 6, IGNORED, IGNORED]}], 2)
    short = collate([{"input_ids": [4, 5, 6]}], 2)
    assert float(loss(student, hidden).detach()) == pytest.approx(
        float(loss(student, short).detach()), rel=1e-5
    )
    assert float(loss(student, hidden).detach()) != pytest.approx(
        float(loss(student, seen).detach()), rel=1e-3
    )


def test_a_size_becomes_the_largest_shape_that_fits(teacher: Path) -> None:
    model = load(teacher)
    small, large = (shape_within(model, size, None) for size in (400_000, 10_000_000))
    assert large == Shape()
    assert small != Shape()
    with pytest.raises(InputError, match="the smallest that is tried takes about"):
        shape_within(model, 10_000, None)


def test_a_student_with_another_tokenizer_is_refused(
    teacher: Path, text: Path, tmp_path: Path, minilm: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = "def", "return" if "return" in vocabulary else "self"
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    request = Request(
        str(teacher), (text,), tmp_path / "out", student=other, settings=DistilSettings(training=LOOP)
    )
    with pytest.raises(InputError, match=r"has another tokenizer than its teacher .*`slm-export adapt`"):
        distil(request, SILENT)
    with pytest.raises(InputError, match=r"is for sentence-embedding \(BertModel\), and its teacher"):
        distil(Request(**{**vars(request), "student": minilm}), SILENT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shrink", "layer=0.5"], "unknown part 'layer'; did you mean 'layers'?"),
        (["--shrink", "layers=2"], "layers is the share that stays, above 0 and at most 1"),
        (["--shrink", "layers"], "layers is the share that stays, above 0 and at most 1"),
        (["--shrink", "layers=0.5,layers=0.5"], "layers is given twice"),
        (
            [],
            "a student is one of --student FOLDER, --shrink SHARES and --max-size SIZE; given: none of them",
        ),
        (["--shrink", "layers=0.5", "--max-size", "3MB"], "given: --shrink and --max-size"),
        (["--shrink", "layers=0.5", "--length", "100"], "--length 100 is longer than the 64 positions"),
        (["--shrink", "layers=0.5", "--export", "andriod"], "andriod"),
        (["--shrink", "layers=0.5", "--data", "missing.txt"], "missing.txt: no such file or folder"),
        (["--max-size", "3"], "has no unit"),
        (["--shrink", "layers=0.1"], "one must stay"),
    ],
)
def test_a_mistake_is_told(
    arguments: list[str], message: str, quick_cli: Forked, teacher: Path, text: Path, tmp_path: Path
) -> None:
    command = [
        "distil",
        teacher,
        "--data",
        text,
        "--out",
        "child",
        "--steps",
        "2",
        "--length",
        "32",
        *arguments,
    ]
    done = quick_cli(*command, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_the_machines_fault(
    quick_cli: Forked, teacher: Path, text: Path, tmp_path: Path
) -> None:
    command = [
        "distil",
        teacher,
        "--data",
        text,
        "--out",
        "child",
        "--shrink",
        "layers=0.5",
        "--length",
        "32",
    ]
    done = quick_cli(*command, "--steps", "2", "--seed", "9", cwd=tmp_path, largest_file=100_000)
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_heads_that_a_configuration_cannot_say_are_refused(text: Path, tmp_path: Path, minilm: Path) -> None:
    request = asked(minilm, text, tmp_path / "out", "kv_groups=0.5")
    with pytest.raises(InputError, match="kv_groups: the configuration of bert has no width of a head"):
        distil(request, SILENT)
