import io
import json
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from rich.console import Console

from slm_export.errors import InputError
from slm_export.profile import (
    TARGETS,
    DeviceProfile,
    Figure,
    Memory,
    default_profile,
    load_profile,
    shipped_profiles,
)
from slm_export.profile_view import print_profile, print_profiles
from slm_export.tomlfile import parse_model

HEAD = 'schema = 1\nname = "x"\ntitle = "X"\ntarget = "android"\nformats = ["onnx"]\n'

PROFILES = {profile.name: profile for profile in shipped_profiles()}


def parse(text: str) -> DeviceProfile:
    return parse_model(HEAD + text, DeviceProfile, "phone.toml")


def problem(text: str) -> str:
    with pytest.raises(InputError) as caught:
        parse(text)
    return str(caught.value)


def test_every_shipped_file_is_named_after_its_profile():
    files = {f.name for f in resources.files("slm_export.device_profiles").iterdir()}
    assert {f"{name}.toml" for name in PROFILES} == {name for name in files if name.endswith(".toml")}
    for name in PROFILES:
        assert load_profile(name).name == name


def test_shipped_profiles_are_in_natural_order():
    names = [name for name in PROFILES if name.startswith("android-")]
    assert names == ["android-4gb", "android-6gb", "android-8gb", "android-12gb"]


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_every_figure_names_a_source(profile):
    for key, value, source in profile.figures():
        assert len(source) > 10, key
        assert "TODO" not in source
        assert value


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_figures_lists_every_source_of_the_profile(profile):
    def sources(value: object) -> list[str]:
        if isinstance(value, dict):
            own = [value["source"]] if "source" in value else []
            return own + [s for item in value.values() for s in sources(item)]
        if isinstance(value, tuple | list):
            return [s for item in value for s in sources(item)]
        return []

    listed = [source for _, _, source in profile.figures()]
    assert sorted(listed) == sorted(sources(profile.model_dump(by_alias=True)))


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_profiles_survive_json(profile):
    text = json.dumps(profile.model_dump(mode="json", by_alias=True))
    assert DeviceProfile.model_validate_json(text) == profile


def test_a_tier_holds_what_its_name_says():
    for size in (4, 6, 8, 12):
        memory = PROFILES[f"android-{size}gb"].memory
        assert memory is not None
        assert memory.total_bytes == size * 2**30


def test_android_profiles_agree_on_the_store():
    assert len({str(p.limits) for p in PROFILES.values() if p.target == "android"}) == 1


def test_phones_and_tablets_of_apple_agree_on_the_store():
    # A Mac app need not come from the store.
    sold = [p for p in PROFILES.values() if p.target == "ios" and p.name != "mac-m-series"]
    assert len({str(profile.limits) for profile in sold}) == 1
    assert sold[0].limits.app_gb is not None


def test_the_host_states_no_figures():
    assert list(PROFILES["host"].figures()) == []


def test_bandwidth_is_data_rate_times_bus_width():
    # LPDDR5X at 9600 MT/s on 64 bits; LPDDR4X at 4267 MT/s on 32 bits, which the vendor rounds down
    assert PROFILES["oneplus-12"].memory.bandwidth_gb_s.value == pytest.approx(9600e6 * 64 / 8 / 1e9)
    assert PROFILES["raspberry-pi-5"].memory.bandwidth_gb_s.value == pytest.approx(
        4267e6 * 32 / 8 / 1e9, rel=0.01
    )


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("android", "android-8gb"),
        ("ios", "iphone-15-pro"),
        ("linux", "raspberry-pi-5"),
        ("host", "host"),
    ],
)
def test_default_profile_is_of_its_target(target, name):
    profile = default_profile(target)
    assert profile.name == name
    assert profile.target == target


def test_every_target_has_a_default():
    assert {default_profile(target).target for target in TARGETS} == {"android", "ios", "linux", "host"}


def test_an_unknown_target_is_explained():
    with pytest.raises(InputError, match="unknown target 'androd'; did you mean 'android'"):
        default_profile("androd")


@pytest.mark.parametrize("name", ["Pixel 8", "pixel8", "pixel_8", "PIXEL-8"])
def test_a_near_name_is_suggested(name):
    with pytest.raises(InputError, match="did you mean 'pixel-8'") as caught:
        load_profile(name)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["", "qqqqqqq"])
def test_an_unknown_name_lists_what_is_shipped(name):
    with pytest.raises(InputError, match=r"shipped: android-4gb, .*path of a \.toml file"):
        load_profile(name)


def test_a_file_is_loaded_by_its_path(tmp_path):
    path = tmp_path / "my phone.toml"
    path.write_text(HEAD.replace('"x"', '"my-phone"'))
    assert load_profile(str(path)).name == "my-phone"
    path.write_text(HEAD + "exportr = 1")
    with pytest.raises(InputError, match=r"my phone\.toml: unknown key 'exportr'"):
        load_profile(str(path))


def test_a_shipped_name_with_toml_is_explained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"the shipped profile is named 'pixel-8', without \.toml"):
        load_profile("pixel-8.toml")
    (tmp_path / "pixel-8.toml").write_text(HEAD.replace('"X"', '"Mine"').replace('"x"', '"pixel-8"'))
    assert load_profile("pixel-8.toml").title == "Mine"


@pytest.mark.parametrize(
    ("text", "where", "known"),
    [
        ("formatss = 1", "formatss", "formats"),
        ("[memory]\ntotal_bg = 1", "memory.total_bg", "total_gb"),
        (
            '[memory]\ntotal_gb = { value = 1, source = "s", sources = 1 }',
            "memory.total_gb.sources",
            "source",
        ),
        ("[limits]\npak_gb = 1", "limits.pak_gb", "pack_gb"),
        ("[gates]\nmax_kl_meen = 1", "gates.max_kl_meen", "max_kl_mean"),
        ("[cpu]\ncoers = 1", "cpu.coers", "cores"),
        (
            '[cpu.cores]\nsource = "s"\nclusters = [{core = "A", count = 1, hgz = 1}]',
            "cpu.cores.clusters[0].hgz",
            "ghz",
        ),
        ('[cpu.isa]\nfeatures = ["i8mm"]\nsource = "s"\nfeature = 1', "cpu.isa.feature", "features"),
    ],
)
def test_unknown_keys_are_refused_at_every_depth(text, where, known):
    assert problem(text) == f"phone.toml: unknown key '{where}'; did you mean '{known}'?"


def test_a_figure_needs_a_source():
    assert problem("[memory]\ntotal_gb = 16") == (
        'phone.toml: memory.total_gb: a figure names its source: { value = 16, source = "..." }'
    )
    assert "missing key 'memory.total_gb.source'" in problem("[memory]\ntotal_gb = { value = 1 }")
    assert "memory.total_gb.source" in problem('[memory]\ntotal_gb = { value = 1, source = "  " }')


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_a_figure_is_positive_and_finite(value):
    assert "memory.total_gb.value" in problem(f'[memory]\ntotal_gb = {{ value = {value}, source = "s" }}')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[recipe]]\nbits = 4", "phone.toml: missing key 'recipe[0].pass'"),
        ('[[recipe]]\npass = "ok"\n[[recipe]]\npass = 3', "phone.toml: recipe[1].pass is 3; it must be text"),
        ('[[recipe]]\npass = "A b"', "phone.toml: recipe[0].pass: 'A b' must be lower-case"),
        ("recipe = [3]", "phone.toml: recipe[0] is 3; it must be a table"),
        ("context = 0", "phone.toml: context is 0"),
    ],
)
def test_wrong_values_are_refused(text, expected):
    assert problem(text).startswith(expected)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("schema = 1", "schema = 2", "schema is 2; it must be 1"),
        ("schema = 1", "", "missing key 'schema'"),
        ('"x"', '"Pixel 8"', "name: 'Pixel 8' must be lower-case"),
        ('"android"', '"windows"', "target is \"windows\"; it must be 'android', 'ios', 'linux' or 'host'"),
        ('["onnx"]', '["onnx", "onnx"]', "formats: 'onnx' is listed twice"),
        ('["onnx"]', "[]", "formats is []; it must have at least 1 item"),
        ('["onnx"]', '["tflite"]', 'formats[0] is "tflite"; it must be'),
    ],
)
def test_the_head_of_a_profile_is_checked(old, new, expected):
    with pytest.raises(InputError) as caught:
        parse_model(HEAD.replace(old, new, 1), DeviceProfile, "phone.toml")
    assert str(caught.value).startswith(f"phone.toml: {expected}")


def test_recipe_steps_keep_their_options_and_order():
    steps = parse('[[recipe]]\npass = "b"\nbits = 4\nsearch = true\n[[recipe]]\npass = "a"').recipe
    assert [step.pass_name for step in steps] == ["b", "a"]
    assert steps[0].options == {"bits": 4, "search": True}
    assert steps[0].model_dump() == {"pass": "b", "bits": 4, "search": True}


def test_core_ml_is_set_as_documented():
    assert parse("").coreml.query_lengths == "dynamic"
    assert parse("[coreml]\nquery_lengths = [1, 64]").coreml.query_lengths == (1, 64)
    assert parse("[coreml]\nios = 17").coreml.ios == 17


@pytest.mark.parametrize("text", ["ios = 16", "query_lengths = []", "query_lengths = [64, 1]"])
def test_what_core_ml_cannot_do_is_refused(text):
    assert f"coreml.{text.split(' ')[0]}" in problem(f"[coreml]\n{text}")


def test_units_of_memory():
    memory = Memory(
        total_gb=Figure(value=8, source="s"), app_limit_gb=Figure(value=1.5, source="s"), bandwidth_gb_s=None
    )
    assert memory.total_bytes == 8 * 1024**3
    assert memory.app_limit_bytes == 1536 * 1024**2


def test_cores_are_counted():
    assert PROFILES["pixel-8"].cpu.cores.count == 9


def test_profiles_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        PROFILES["host"].name = "other"


def printed(call, argument) -> str:
    console = Console(file=io.StringIO(), width=300)
    call(console, argument)
    return console.file.getvalue()


def test_the_list_shows_every_profile_and_its_memory():
    text = printed(print_profiles, shipped_profiles())
    for profile in shipped_profiles():
        assert profile.name in text
        assert profile.title in text
    assert "76.8 GB/s" in text


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_one_profile_is_shown_with_every_source(profile):
    text = printed(print_profile, profile)
    for key, value, source in profile.figures():
        assert key in text
        assert value in text
        assert source in text
    assert "group-quantize  bits = 4, group = 32" in text


def test_a_profile_cannot_style_the_terminal():
    profile = parse('soc = "[red]chip[/red]"')
    assert "[red]chip[/red]" in printed(print_profile, profile)


def test_profiles_do_not_load_heavy_packages():
    code = "import slm_export.settings, sys; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "numpy", "rich", "transformers"}.isdisjoint(result.stdout.split())


DOCS = Path(__file__).parents[1].joinpath("docs", "devices.md").read_text("utf-8")


def test_the_documented_example_loads():
    example = re.search(r"```toml\n(.*?)```", DOCS, re.DOTALL)
    assert example is not None
    profile = parse_model(example[1], DeviceProfile, "docs/devices.md")
    assert profile.gates.max_kl_mean == 0.1


def test_the_documented_list_is_what_is_shipped():
    table = DOCS.split("## Shipped profiles")[1].split("##")[0]
    assert re.findall(r"^\| `([a-z0-9-]+)`", table, re.MULTILINE) == sorted(
        PROFILES, key=list(PROFILES).index
    )
    for profile in PROFILES.values():
        row = next(line for line in table.splitlines() if f"`{profile.name}`" in line)
        assert ("(default)" in row) == (profile == default_profile_or_none(profile.target))
        if profile.memory is not None:
            assert f"{profile.memory.total_gb.value:g} GB" in row


def default_profile_or_none(target: str) -> DeviceProfile | None:
    try:
        return default_profile(target)
    except InputError:
        return None


def test_every_key_is_documented():
    table = DOCS.split("## Every key")[1]
    for key in DeviceProfile.model_json_schema()["properties"]:
        assert re.search(rf"^\| `{key}[.`]", table, re.MULTILINE), key
