"""federation.toml: what it may say, and that what it may not say is an error which names the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from slm_export.errors import InputError, MissingComponentError
from slm_export.federated.flower import environment, require_flower
from slm_export.federated.settings import read_federation

WHOLE = """
[model]
base = "model"

[rounds]
clients = 20
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path


def read(place: Path, text: str):
    path = place / "federation.toml"
    path.write_text(text)
    return read_federation(path)


def test_paths_are_those_beside_the_file(place: Path) -> None:
    found = read(place, WHOLE + '\n[data]\ntexts = ["a", "/b"]\n')
    assert found.model.base == str(place / "model")
    assert found.out == str(place / "federated")
    assert found.data is not None
    assert found.data.texts == (str(place / "a"), "/b")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("fractoin = 0.5", r"unknown key 'rounds.fractoin'; did you mean 'fraction'\?"),
        ("minimum = 30", r"minimum = 30 can never be met: 1 of 20 clients are 20"),
        ("fraction = 1.5", r"rounds.fraction is 1.5"),
        ('[privacy]\nunit = "user"\nepsilon = 1.0', 'unit = "user" needs a budget: give epsilon and delta'),
        ("[privacy]\nepsilon = 1.0\ndelta = 1e-5", "says how private it is but not for whom"),
        (
            '[privacy]\nunit = "user"\nepsilon = 1.0\ndelta = 1e-5\n[aggregation]\nstrategy = "median"',
            'strategy = "median" and privacy.unit = "user" do not go together',
        ),
        ('[aggregation]\nsecure = true\nstrategy = "median"', "goes with strategy"),
        (
            '[client]\nserver = "https://example.org"\nca = "a"\nkey = "b"',
            r"is no address; write host:port, as in fleet.example.org:9092",
        ),
        ("[data]\ntexts = []", "data.texts"),
    ],
)
def test_what_is_wrong_is_named(place: Path, more: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(place, WHOLE + more)


def test_a_base_that_is_none_is_named(place: Path) -> None:
    with pytest.raises(InputError, match=r"model.base: .*nowhere is no checkpoint folder"):
        read(place, WHOLE.replace('"model"', '"nowhere"'))


def test_what_is_agreed_holds_no_path_and_changes_with_everything_else(place: Path) -> None:
    first = read(place, WHOLE + '\n[data]\ntexts = ["mine"]\n')
    assert read(place, 'out = "elsewhere"\n' + WHOLE + '\n[data]\ntexts = ["yours"]\n').sha256 == first.sha256
    assert str(place) not in str(first.agreed())
    for more in ("number = 9", "[local]\nsteps = 9", "[aggregation]\nlargest = 9.0"):
        assert read(place, WHOLE + more).sha256 != first.sha256


def test_another_process_reads_the_same(place: Path) -> None:
    found = read(place, WHOLE + '\n[data]\ntexts = ["a"]\nanonymise = { how = "drop" }\n')
    assert type(found).model_validate_json(found.model_dump_json()) == found


def test_what_is_not_installed_is_said_with_what_to_do() -> None:
    with pytest.raises(MissingComponentError, match=r"pip install 'slm-export\[federated\]'") as caught:
        require_flower("flwr_that_nobody_has")
    assert caught.value.exit_code == 3


def test_nobody_is_told_and_nothing_lies_in_the_users_folder(tmp_path: Path) -> None:
    made = environment(tmp_path)
    told = ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    assert [made[name] for name in told] == ["0", "0", "0"]
    assert (made["FLWR_HOME"], made["FLWR_DISABLE_UPDATE_CHECK"]) == (str(tmp_path), "1")
