"""Adapters that stay apart: on, off and switched, as peft itself runs them, and refused where they do not fit."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from slm_export.adapters.formats import notes_on, refuse_adapters
from slm_export.adapters.gate import judge_factors, judge_places
from slm_export.adapters.low_rank import LowRank, read_low_rank
from slm_export.adapters.reference import adapted_model
from slm_export.bundles.checksums import sha256_file
from slm_export.checkpoint import Checkpoint
from slm_export.compilation import Request, make_plan
from slm_export.errors import InputError
from slm_export.exporters.onnx import OnnxExporter
from slm_export.exporters.onnx_places import fingerprint
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.registry import exporter
from slm_export.runtime import AdaptableSession, ExportOptions, Factors
from slm_export.source.adapter_files import CONFIG, WEIGHTS
from slm_export.source.adapters import parse_adapters
from slm_export.source.load import load_checkpoint
from slm_export.source.provenance import source_sha256
from slm_export.source.tasks import GENERATION

CONTEXT = 48
TOKENS = torch.randint(3, 4096, (20,), generator=torch.Generator().manual_seed(1)).tolist()
EXACT = 1e-5
"""A share of the range of the logits: the order of float sums."""


def adapter_of(base: Path, folder: Path, seed: int = 3, **options: Any) -> Path:
    """Save an adapter whose two factors are both drawn by chance; return its folder."""
    torch.manual_seed(seed)
    asked = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    config = peft.LoraConfig(init_lora_weights=False, **asked)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of choices that a test makes on purpose
        peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def read(name: str, folder: Path, base: Path) -> LowRank:
    return read_low_rank(name, folder, load_checkpoint(base), source_sha256(base))


def eager(base: Path, folder: Path | None, weights: Checkpoint) -> Tensor:
    """Return what transformers, and peft around it, say of the tokens, on a base of these weights."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    values = {name: weight.float32() for name, weight in weights.weights.items()}
    model.load_state_dict(values, strict=False)
    whole = model if folder is None else peft.PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        logits: Tensor = whole.eval()(torch.tensor([TOKENS])).logits[0, -1]
    return logits


def apart(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / (expected.max() - expected.min()))


@dataclass(frozen=True)
class Made:
    exporter: Any
    base: Path
    checkpoint: Checkpoint
    path: Path
    session: AdaptableSession
    folders: dict[str, Path]
    files: dict[str, Path]


@pytest.fixture(scope="module", params=["onnx", "executorch", "litert"])
def made(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A base in 32 bits, so that nothing hides behind rounding, with two adapters of other ranks and layers."""
    place = tmp_path_factory.mktemp("apart")
    folders = {
        "wide": adapter_of(tiny_llama, place / "wide", 3, rank_pattern={"o_proj": 2}, use_rslora=True),
        "thin": adapter_of(tiny_llama, place / "thin", 4, r=1, target_modules=["q_proj", "v_proj"]),
    }
    checkpoint = GroupQuantize(bits=32, embedding_bits=32).run(load_checkpoint(tiny_llama)).checkpoint
    linear = tuple(name for name, role in checkpoint.roles.items() if role == "linear")
    return write(request.param, tiny_llama, checkpoint, place, folders, linear)


def write(
    format: str,
    base: Path,
    checkpoint: Checkpoint,
    place: Path,
    folders: dict[str, Path],
    places: tuple[str, ...],
) -> Made:
    maker: Any = exporter(format)
    path, files = place / Path(maker.file(GENERATION)).name, {}
    maker.ready()
    options = ExportOptions(CONTEXT, stop_ids=(1,), bos_id=0, tokenizer=base, places=places, rank=4)
    maker.write(checkpoint, options, path)
    for name, folder in folders.items():
        files[name] = place / f"{name}{maker.adapter_suffix}"
        maker.write_adapter(read(name, folder, base).factors, path, files[name])
    session = maker.open(path, GENERATION)
    assert isinstance(session, AdaptableSession)
    return Made(maker, base, checkpoint, path, session, folders, files)


def of(format: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("made", [format], indirect=True)


@pytest.mark.parametrize("name", [None, "wide", "thin"])
def test_on_and_off_it_is_what_peft_runs(made: Made, name: str | None) -> None:
    made.session.adapt(made.files[name] if name else None)
    expected = eager(made.base, made.folders[name] if name else None, made.checkpoint)
    assert apart(made.session.logits(TOKENS, 0), expected) <= EXACT
    single = [made.session.logits([token], at) for at, token in enumerate(TOKENS)][-1]
    assert apart(single, expected) <= EXACT


def test_switching_leaves_no_trace(made: Made) -> None:
    order = [None, "wide", "thin", None, "thin", "wide", None]
    found: dict[str | None, Tensor] = {}
    for name in order:
        made.session.adapt(made.files[name] if name else None)
        logits = made.session.logits(TOKENS, 0)
        assert torch.equal(found.setdefault(name, logits), logits)
    assert apart(found["wide"], found[None]) > 1e-2
    assert apart(found["thin"], found[None]) > 1e-3


def test_the_runtime_s_own_loader_gives_the_same(made: Made) -> None:
    for name, file in made.files.items():
        made.session.adapt(file)
        here = made.session.logits(TOKENS, 0)
        made.session.adapt(None)
        assert apart(made.session.adapted(file, TOKENS), here) <= EXACT, name


def test_a_file_holds_what_peft_adds(made: Made) -> None:
    for name, folder in made.folders.items():
        adapter = read(name, folder, made.base)
        check = judge_factors(made.exporter.stored_factors(made.files[name], made.path), adapter)
        assert check.passed, check


FAULTS: dict[str, Callable[[Factors], Factors]] = {
    "the scale is lost": lambda each: Factors(each.down, each.up / 2),
    "the scale is there twice": lambda each: Factors(each.down, each.up * 2),
    "the second factor is not turned": lambda each: Factors(
        each.down, each.up.reshape(each.up.shape[::-1]).t()
    ),
    "the first factor is not turned": lambda each: Factors(
        each.down.reshape(each.down.shape[::-1]).t(), each.up
    ),
    "a value is no number": lambda each: Factors(
        each.down, each.up.index_fill(0, torch.tensor([3]), torch.nan)
    ),
    "one row is another's": lambda each: Factors(each.down.roll(1, 0), each.up),
}


@of("onnx")
@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_with_a_file_is_seen(made: Made, tmp_path: Path, fault: str) -> None:
    adapter = read("wide", made.folders["wide"], made.base)
    broken = {name: FAULTS[fault](each) for name, each in adapter.factors.items()}
    file = tmp_path / "broken"
    made.exporter.write_adapter(broken, made.path, file)
    assert not judge_factors(made.exporter.stored_factors(file, made.path), adapter).passed
    made.session.adapt(file)
    wrong = made.session.logits(TOKENS, 0)
    made.session.adapt(None)
    assert not apart(wrong, eager(made.base, made.folders["wide"], made.checkpoint)) <= 100 * EXACT


@of("onnx")
def test_a_matrix_that_is_left_out_is_seen(made: Made) -> None:
    adapter = read("wide", made.folders["wide"], made.base)
    some = dict(list(adapter.factors.items())[1:])
    assert not judge_factors(some, adapter).passed


class Faulty(OnnxExporter):
    """Writes an adapter's factors of one place into another's."""

    def write_adapter(self, factors: Any, base: Path, path: Path) -> None:
        one, other = list(factors)[:2]
        swapped = {one: factors[other], other: factors[one]}
        super().write_adapter({**factors, **swapped}, base, path)


def test_the_gate_sees_a_place_that_is_not_as_it_should_be(tiny_llama: Path) -> None:
    square = tuple(f"model.layers.0.self_attn.{name}.weight" for name in ("q_proj", "o_proj"))
    checkpoint = load_checkpoint(tiny_llama)
    assert judge_places(OnnxExporter(), checkpoint, square, tiny_llama).passed
    check = judge_places(Faulty(), checkpoint, square, tiny_llama)
    assert not check.passed
    assert check.value is not None
    assert check.value > 10 * EXACT


@of("onnx")
def test_the_reference_is_peft_s_own_output(made: Made) -> None:
    adapter = read("wide", made.folders["wide"], made.base)
    with torch.no_grad():
        model = adapted_model(made.checkpoint, adapter.deltas)
        logits = model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0, -1]
    assert apart(logits, eager(made.base, made.folders["wide"], made.checkpoint)) <= EXACT


@of("onnx")
def test_facts_of_an_adapter(made: Made) -> None:
    wide, thin = (read(name, made.folders[name], made.base) for name in ("wide", "thin"))
    assert (wide.rank, thin.rank) == (4, 1)
    assert thin.targets == ("q_proj", "v_proj")
    assert len(wide.targets) == 7
    # q: 64 x 64, v: 32 x 64 of rank 1
    assert thin.parameters == (64 + 64) + (64 + 32)


@pytest.mark.parametrize(
    ("format", "bits"),
    [
        ("onnx", 4),
        ("onnx", 8),
        ("executorch", 4),
        *(
            pytest.param(format, bits, marks=pytest.mark.slow)
            for format, bits in (("executorch", 8), ("litert", 4), ("litert", 8))
        ),
    ],
)
def test_the_base_s_codes_are_as_without_places(
    tiny_llama: Path, tmp_path: Path, format: str, bits: int
) -> None:
    checkpoint = GroupQuantize(bits=bits, embedding_bits=8).run(load_checkpoint(tiny_llama)).checkpoint
    places = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight")
    folder = adapter_of(tiny_llama, tmp_path / "mine", target_modules=["q_proj", "down_proj"])
    made = write(format, tiny_llama, checkpoint, tmp_path, {"mine": folder}, places)
    assert made.session.places == set(places)
    plain = tmp_path / f"plain{made.path.suffix}"
    options = ExportOptions(CONTEXT, stop_ids=(1,), bos_id=0, tokenizer=tiny_llama)
    made.exporter.write(checkpoint, options, plain)
    without = made.exporter.open(plain, GENERATION)
    assert torch.equal(made.session.logits(TOKENS, 0), without.logits(TOKENS, 0))
    stored, other = made.exporter.stored(made.path), made.exporter.stored(plain)
    assert stored.keys() == other.keys()
    assert all(torch.equal(stored[name].packed, other[name].packed) for name in stored)
    # The weights are there once, in however many methods.
    codes = sum(weight.packed.numel() for weight in stored.values())
    assert made.path.stat().st_size - plain.stat().st_size < 0.5 * codes
    made.session.adapt(made.files["mine"])
    got = made.session.logits(TOKENS, 0)
    # Activations are rounded to 8 bits before they meet the base.
    assert apart(got, eager(tiny_llama, folder, checkpoint)) <= 0.05


def test_layers_that_are_stamped_have_places_of_their_own(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    base = tmp_path / "deep"
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=5, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(base)
    folder = adapter_of(base, tmp_path / "mine", rank_pattern={r"layers\.3\.self_attn\.q_proj": 7})
    checkpoint = load_checkpoint(base)
    linear = tuple(name for name, role in checkpoint.roles.items() if role == "linear")
    made = write("onnx", base, checkpoint, tmp_path, {"mine": folder}, linear)
    made.session.adapt(made.files["mine"])
    expected = eager(base, folder, checkpoint)
    assert apart(made.session.logits(TOKENS, 0), expected) <= EXACT
    made.session.adapt(None)
    assert apart(made.session.logits(TOKENS, 0), eager(base, None, checkpoint)) <= EXACT


def test_matrices_that_a_family_holds_the_other_way_round(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    base = tmp_path / "gpt2"
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=4096, n_positions=64, n_embd=64, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(base)
    folder = adapter_of(base, tmp_path / "mine", target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True)
    checkpoint = load_checkpoint(base)
    adapter = read("mine", folder, base)
    made = write("onnx", base, checkpoint, tmp_path, {"mine": folder}, tuple(adapter.factors))
    assert judge_factors(made.exporter.stored_factors(made.files["mine"], made.path), adapter).passed
    with_it = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    with torch.no_grad():
        expected = with_it(torch.tensor([TOKENS])).logits[0, -1]
        ours = adapted_model(checkpoint, adapter.deltas)(input_ids=torch.tensor([TOKENS]), use_cache=False)
    assert apart(ours.logits[0, -1], expected) <= EXACT
    made.session.adapt(made.files["mine"])
    assert apart(made.session.logits(TOKENS, 0), expected) <= EXACT


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, r"magnitudes of its own \(DoRA\).*give it as MODEL"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "whole modules"),
        ({"bias": "all"}, "biases of its own"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
    ],
    ids=["dora", "whole modules", "biases", "embedding"],
)
def test_what_needs_more_than_two_factors_is_refused(
    tiny_llama: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    folder = adapter_of(tiny_llama, tmp_path / "mine", **options)
    with pytest.raises(InputError, match=words):
        read("mine", folder, tiny_llama)


def test_what_took_something_from_its_base_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    # PiSSA's base is what is left of the matrices, and not the one that ships.
    folder = adapter_of(tiny_llama, tmp_path / "mine")
    change(folder, init_lora_weights="pissa")
    with pytest.raises(InputError, match=r"changing the base's own matrices.*give it as MODEL"):
        read("mine", folder, tiny_llama)


def test_a_name_that_can_be_no_folder_s_says_nothing_of_the_base(tiny_llama: Path, tmp_path: Path) -> None:
    folder = adapter_of(tiny_llama, tmp_path / "mine")
    change(folder, base_model_name_or_path="x" * 5000)
    assert read("mine", folder, tiny_llama).factors


def test_another_base_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_llama, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file(
        {name: value * 1.01 for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"}
    )
    folder = adapter_of(other, tmp_path / "mine")
    with pytest.raises(InputError, match=r"was trained on .*other.*another sha256"):
        read("mine", folder, tiny_llama)
    # A name that leads to no folder says nothing of the base; then shapes decide.
    change(folder, base_model_name_or_path="someone/model")
    assert read("mine", folder, tiny_llama).rank == 4
    shutil.copytree(tiny_llama, tmp_path / "same")
    change(folder, base_model_name_or_path=str(tmp_path / "same"))
    assert read("mine", folder, tiny_llama).rank == 4


def test_factors_of_another_size_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = adapter_of(tiny_llama, tmp_path / "mine")
    tensors = load_file(folder / WEIGHTS)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name][:, :8].contiguous()}, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(InputError, match="mine"):
        read("mine", folder, tiny_llama)


def test_an_adapter_that_was_never_trained_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = adapter_of(tiny_llama, tmp_path / "mine")
    tensors = load_file(folder / WEIGHTS)
    zeros = {name: value * (".lora_B." not in name) for name, value in tensors.items()}
    save_file(zeros, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(InputError, match="adds nothing"):
        read("mine", folder, tiny_llama)
    first = next(iter(tensors))
    save_file({**tensors, first: tensors[first] * float("nan")}, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(InputError, match="no numbers"):
        read("mine", folder, tiny_llama)
    save_file(
        {name: value for name, value in tensors.items() if name != first}, folder / WEIGHTS, {"format": "pt"}
    )
    with pytest.raises(InputError, match="does not belong to"):
        read("mine", folder, tiny_llama)


def test_a_file_for_another_model_is_refused(made: Made, tmp_path: Path) -> None:
    other, file = tmp_path / made.path.name, tmp_path / "mine"
    # Bytes that are no part of the model: an unknown field of the message, or what lies behind the last segment.
    other.write_bytes(made.path.read_bytes() + b"\xfa\x7f\x00")
    made.exporter.write_adapter(read("thin", made.folders["thin"], made.base).factors, other, file)
    with pytest.raises(InputError, match="another model"):
        made.session.adapt(file)
    file.write_bytes(made.files["thin"].read_bytes()[:-200])
    with pytest.raises(InputError, match="no adapter that"):
        made.session.adapt(file)
    # Whatever was on before stays what it was.
    made.session.adapt(None)
    assert apart(made.session.logits(TOKENS, 0), eager(made.base, None, made.checkpoint)) <= EXACT


@of("onnx")
def test_factors_without_a_place_are_refused_by_the_session(made: Made, tmp_path: Path) -> None:
    file = tmp_path / "mine.onnx_adapter"
    factors = read("thin", made.folders["thin"], made.base).factors
    elsewhere = {name.replace("layers.0", "layers.9"): each for name, each in factors.items()}
    made.exporter.write_adapter(elsewhere, made.path, file)
    with pytest.raises(InputError, match="has no place"):
        made.session.adapt(file)
    narrow = {name: Factors(each.down[:, :8], each.up) for name, each in factors.items()}
    made.exporter.write_adapter(narrow, made.path, file)
    with pytest.raises(InputError, match="does not fit"):
        made.session.adapt(file)


@pytest.mark.parametrize("made", ["executorch", "litert"], indirect=True)
def test_functions_have_places_of_one_rank(made: Made, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    folder = adapter_of(made.base, tmp_path / "mine", r=5, target_modules=["q_proj"])
    with pytest.raises(InputError, match="places of rank 4, and the adapter is of rank 5; export it again"):
        made.exporter.write_adapter(read("mine", folder, made.base).factors, made.path, file)
    factors = read("thin", made.folders["thin"], made.base).factors
    elsewhere = {name.replace("layers.0", "layers.9"): each for name, each in factors.items()}
    with pytest.raises(InputError, match=r"no place for an adapter at model\.layers\.9"):
        made.exporter.write_adapter(elsewhere, made.path, file)
    assert not file.exists()
    tensors = load_file(made.files["thin"])
    save_file(dict(list(tensors.items())[1:]), file, {"version": "1", "base_sha256": sha256_file(made.path)})
    with pytest.raises(InputError, match="does not fit"):
        made.session.adapt(file)


@of("executorch")
def test_an_app_hands_over_the_file_as_it_is(made: Made) -> None:
    """And `forward` takes tokens and a position, as the stock runners call it."""
    from slm_export.exporters.executorch_session import load_runtime

    program = load_runtime()._load_program(str(made.path))
    meta = program.method_meta("forward")
    assert meta.num_inputs() == 2
    adapted = program.method_meta("forward_adapted")
    given = load_file(made.files["wide"])
    assert adapted.num_inputs() == 2 + len(given) == 2 + 2 * len(made.session.places)
    # The file's order is the program's.
    for index, matrix in enumerate(given.values()):
        assert tuple(adapted.input_tensor_meta(2 + index).sizes()) == tuple(matrix.shape)
    inputs = [torch.tensor([TOKENS]), torch.zeros(1, dtype=torch.int64), *given.values()]
    logits = program.load_method("forward_adapted")(inputs)[0][0]
    assert apart(logits, eager(made.base, made.folders["wide"], made.checkpoint)) <= EXACT


def test_a_model_s_data_is_part_of_what_an_adapter_is_for(tmp_path: Path) -> None:
    model, data = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    model.write_bytes(b"graph")
    alone = fingerprint(model)
    data.write_bytes(b"weights")
    both = fingerprint(model)
    data.write_bytes(b"others!!")
    assert len({alone, both, fingerprint(model)}) == 3


def named(folder: Path) -> Path:
    """A folder that looks like an adapter's."""
    (folder / CONFIG).write_text("{}")
    return folder


def test_a_format_that_cannot_says_so(tmp_path: Path) -> None:
    folder = [("a", named(tmp_path))]
    with pytest.raises(InputError, match=r"format coreml cannot keep adapters apart: .*MODEL"):
        refuse_adapters(folder, ["group-quantize"], [exporter("coreml")], searched=False)
    can = [exporter(format) for format in ("onnx", "executorch", "litert")]
    refuse_adapters(folder, ["group-quantize", "gptq"], can, searched=False)
    assert [note.split(":")[0] for note in notes_on(folder, can)] == ["executorch", "litert"]
    assert not notes_on([], can)


@pytest.mark.parametrize(
    "name", ["rotate", "awq", "recover", "drop-layers", "prune-neurons", "trim-vocabulary"]
)
def test_passes_that_change_what_matrices_are_given_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"pass {name} changes"):
        refuse_adapters(
            [("a", named(tmp_path))], [name, "group-quantize"], [exporter("onnx")], searched=False
        )


def test_a_plan_refuses_early(tiny_llama: Path, tmp_path: Path) -> None:
    asked = Request(
        model=str(tiny_llama), target="ios", formats=("coreml",), adapters=(("a", named(tmp_path)),)
    )
    with pytest.raises(InputError, match="format coreml cannot"):
        make_plan(asked)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["a=nowhere"], "no folder that peft saved"),
        (["a b=mine"], "cannot be a name"),
        (["a=mine", "a=mine"], "there twice"),
        (["../x=mine"], "cannot be a name"),
    ],
)
def test_names_and_folders_are_looked_over(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / CONFIG).write_text("{}")
    with pytest.raises(InputError, match=words):
        parse_adapters(asked)
    assert parse_adapters(["mine", "b=mine"]) == (("mine", Path("mine")), ("b", Path("mine")))
