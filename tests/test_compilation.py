"""A request: completed from slm-export.toml, and checked before the model is read."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import checkpoint

from slm_export import compilation
from slm_export.budget.budget import Budget
from slm_export.compilation import DEFAULT_CONTEXT, Request, check_gates, context_for, make_plan
from slm_export.errors import InputError, MissingComponentError
from slm_export.gates import Gates
from slm_export.optimizers.gptq import Gptq
from slm_export.optimizers.group_quantize import GroupQuantize
from slm_export.profile import FORMATS, RecipeStep
from slm_export.recipe import QuantizationOptions
from slm_export.settings import Settings

SETTINGS = Settings(
    model="theirs",
    revision="v1",
    target="android",
    device="pixel-8",
    formats=("executorch",),
    passes=(RecipeStep.model_validate({"pass": "gptq", "group": 64}),),
    bits=4,
    group_size=64,
    embedding_bits=8,
    head_bits=16,
    context=100,
    eval_text=Path("their.txt"),
    calibration=Path("their.jsonl"),
    adapters={"code": Path("their-adapter")},
    out=Path("theirs"),
    max_size="6MB",
    gates=Gates(max_bytes=1, max_kl_mean=0.5),
)

PROFILE = 'schema = 1\nname = "mine"\ntitle = "Mine"\ntarget = "linux"\nformats = ["executorch", "onnx"]\n'


class Ready:
    """Stands for an exporter or a target that needs nothing and takes everything."""

    formats = FORMATS

    def __init__(self, name: str) -> None:
        self.name = name

    def ready(self) -> None:
        pass


@pytest.fixture
def everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "exporter", Ready)
    monkeypatch.setattr(compilation, "target", Ready)


def problem(**request: object) -> str:
    with pytest.raises(InputError) as caught:
        make_plan(Request(**{"model": "m", **request}))  # type: ignore[arg-type]
    return str(caught.value)


# --- over the settings -------------------------------------------------------------------------------


def test_what_the_command_line_leaves_open_is_the_settings():
    request = Request().over(SETTINGS)
    assert request == Request(
        model="theirs",
        revision="v1",
        target="android",
        device="pixel-8",
        formats=("executorch",),
        passes=(RecipeStep.model_validate({"pass": "gptq", "group": 64}),),
        quantization=QuantizationOptions(4, 64, 8, 16),
        context=100,
        out=Path("theirs"),
        eval_text=Path("their.txt"),
        calibration=Path("their.jsonl"),
        adapters=(("code", Path("their-adapter")),),
        budget=Budget(max_size=6_000_000),
        gates=Gates(max_bytes=1, max_kl_mean=0.5),
    )


def test_what_the_command_line_says_stays():
    asked = Request(
        model="ours",
        revision="v2",
        target="linux",
        device="raspberry-pi-5",
        formats=("onnx",),
        passes=(RecipeStep.model_validate({"pass": "rotate"}),),
        quantization=QuantizationOptions(8, 32, 16, 4),
        context=7,
        out=Path("ours"),
        eval_text=Path("our.txt"),
        calibration=Path("our.jsonl"),
        adapters=(("own", Path("our-adapter")),),
        budget=Budget(max_size=1_000_000),
        gates=Gates(max_bytes=2),
        force=True,
        verify=False,
        bench=False,
    )
    assert asked.over(SETTINGS) == replace(asked, gates=Gates(max_bytes=2, max_kl_mean=0.5))
    assert asked.over(Settings()) == asked


def test_no_field_is_forgotten():
    whole = Request().over(SETTINGS)
    switches = {"force", "verify", "bench", "locked"}  # of one run, not of a model or an app
    for field in fields(Request):
        if field.name not in switches:
            assert getattr(whole, field.name) != getattr(Request(), field.name), field.name


def test_a_revision_belongs_to_the_model_beside_it():
    assert Request(model="ours").over(SETTINGS).revision is None
    assert Request(revision="v2").over(SETTINGS).revision == "v2"


@pytest.mark.parametrize(
    ("target", "device", "expected"),
    [
        (None, None, "pixel-8"),
        ("android", None, "pixel-8"),
        ("linux", None, None),
        ("linux", "raspberry-pi-5", "raspberry-pi-5"),
        (None, "pixel-9", "pixel-9"),
    ],
)
def test_a_device_counts_for_its_own_target_only(target, device, expected):
    assert Request(target=target, device=device).over(SETTINGS).device == expected


def test_the_target_of_the_settings_device_may_be_left_out():
    settings = Settings(device="pixel-8")
    assert Request(target="android").over(settings).device == "pixel-8"
    assert Request(target="host").over(settings).device is None


# --- the plan ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("everything_installed")
def test_a_plan_has_everything_looked_up(tmp_path):
    (tmp_path / "my.toml").write_text(PROFILE)
    device = str(tmp_path / "my.toml")
    plan = make_plan(Request(model="m", device=device, quantization=QuantizationOptions(bits=8)))
    assert (plan.model, plan.profile.name, plan.target.name) == ("m", "mine", "linux")
    assert [made.name for made in plan.exporters] == ["executorch"]
    assert plan.recipe == (GroupQuantize(8, embedding_bits=8),)
    assert plan.notes == ()


@pytest.mark.usefixtures("everything_installed")
def test_what_was_not_proved_is_noted():
    plan = make_plan(Request(model="m", target="host", verify=False, bench=False))
    assert [note.rpartition(" ")[2] for note in plan.notes] == ["(--no-verify)", "(--no-bench)"]


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({"model": "", "target": "android"}, "no model: give a model folder, or name one in slm-export.toml"),
        ({}, "no target: give --target android (or ios, linux, host), or a --device"),
        ({"target": "androd"}, "unknown target 'androd'; did you mean 'android'?"),
        ({"target": "ios", "formats": ("litert",)}, "device iphone-15-pro does not run format litert"),
        ({"device": "pixel8"}, "unknown device 'pixel8'; did you mean 'pixel-8'?"),
        ({"device": "none.toml"}, "none.toml: no such file"),
        ({"target": "linux", "device": "pixel-8"}, "device pixel-8 belongs to target android, not linux"),
        (
            {"target": "android", "formats": ("coreml",)},
            "device android-8gb does not run format coreml",
        ),
        (
            {"target": "host", "formats": ("executorh",)},
            "unknown format 'executorh'; did you mean 'executorch'?",
        ),
    ],
)
def test_mistakes_are_refused(request_, expected):
    assert problem(**request_).startswith(expected)


@pytest.mark.usefixtures("everything_installed")
def test_a_wrong_recipe_is_blamed_on_its_file(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(PROFILE + '[[recipe]]\npass = "group-quantize"\nbit = 4\n')
    assert problem(device=str(path)).startswith(f"{path}: group-quantize: unknown option 'bit'")


def test_passes_of_ones_own_replace_the_profiles():
    asked = tuple(
        RecipeStep.model_validate(step) for step in ({"pass": "rotate"}, {"pass": "gptq", "bits": 4})
    )
    plan = make_plan(
        Request(model="m", device="pixel-8", passes=asked, quantization=QuantizationOptions(bits=8))
    )
    assert [step.name for step in plan.recipe] == ["rotate", "gptq"]
    assert isinstance(plan.recipe[1], Gptq)
    assert plan.recipe[1].bits == 8
    assert problem(device="pixel-8", passes=(RecipeStep.model_validate({"pass": "gptqq"}),)) == (
        "passes: unknown pass 'gptqq'; did you mean 'gptq'?"
    )


def test_a_target_without_app_code_for_a_format_says_so(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(PROFILE.replace('"linux"', '"ios"').replace('"executorch", ', ""))
    assert problem(device=str(path)).startswith(
        "target ios has no app code for format onnx; it has: coreml, executorch"
    )


@pytest.mark.usefixtures("everything_installed")
def test_formats_are_those_that_the_device_runs_each_once(tmp_path):
    (tmp_path / "my.toml").write_text(PROFILE)
    device = str(tmp_path / "my.toml")
    plan = make_plan(Request(model="m", device=device, formats=("onnx", "executorch", "onnx")))
    assert [made.name for made in plan.exporters] == ["onnx", "executorch"]
    expected = "device mine does not run format coreml; it runs executorch, onnx"
    assert problem(device=device, formats=("coreml",)) == expected


def test_a_missing_component_is_told_before_any_work(monkeypatch):
    class Missing(Ready):
        def ready(self) -> None:
            raise MissingComponentError("pip install it")

    monkeypatch.setattr(compilation, "exporter", Missing)
    with pytest.raises(MissingComponentError, match="pip install it"):
        make_plan(Request(model="m", target="host")).ready()


# --- the context -------------------------------------------------------------------------------------


def room(positions: int | None, asked: int | None, profile: int | None, task: str = "text-generation") -> int:
    plan = SimpleNamespace(request=Request(context=asked), profile=SimpleNamespace(context=profile))
    return context_for(plan, replace(checkpoint({}), positions=positions, task=task))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("positions", "asked", "profile", "expected"),
    [
        (1024, None, None, 1024),
        (4096, None, None, DEFAULT_CONTEXT),
        (4096, None, 512, 512),
        (256, None, 512, 256),
        (4096, 4096, 512, 4096),
        (None, None, 512, 512),
        (None, 9999, None, 9999),
    ],
)
def test_a_decoder_has_room_for_what_was_asked_or_the_device_holds(positions, asked, profile, expected):
    assert room(positions, asked, profile) == expected


def test_an_encoder_takes_as_much_as_it_can():
    assert room(512, None, 128, "sentence-embedding") == 512
    assert room(512, 64, None, "text-classification") == 64


def test_more_than_the_model_has_positions_is_refused():
    with pytest.raises(
        InputError, match="context 65 is longer than the 64 positions of model; ask for 64 or fewer"
    ):
        room(64, 65, None)


def test_a_gate_on_speed_is_refused_where_nothing_is_timed():
    request = Request(model="m", target="ios", formats=("coreml",), gates=Gates(min_decode_tokens_per_s=10))
    with pytest.raises(
        InputError, match=r"^gate min_decode_tokens_per_s: the speed of coreml is not measured"
    ):
        check_gates(make_plan(request))
    check_gates(make_plan(replace(request, bench=False)))
    check_gates(make_plan(replace(request, formats=("executorch",))))
