import os
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from slm_export.errors import InputError
from slm_export.tomlfile import MAX_BYTES, parse_model, read_model


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Wheel(Strict):
    inches: int = Field(default=26, ge=1)


class Bike(Strict):
    exporter: str = "none"
    schema_version: int = Field(default=1, alias="schema")
    wheels: tuple[Wheel, ...] = Field(default=(), min_length=0)
    colour: Literal["red", "green"] = "red"
    letter: Literal["aa", "bb", "cc", "dd", "ee", "ff", "long-word"] = "aa"
    speed: float | None = None
    bell: bool = False
    spare: Wheel | None = None
    tags: tuple[Literal["one", "two"], ...] = Field(default=("one",), min_length=1)


def message(text: str) -> str:
    with pytest.raises(InputError) as caught:
        parse_model(text, Bike, "phone.toml")
    return str(caught.value)


def test_values_arrive_as_written():
    bike = parse_model("schema = 2\nspeed = 3\nwheels = [{}, {inches = 28}]\n[spare]\ninches = 20", Bike, "x")
    assert bike.schema_version == 2
    assert bike.speed == 3.0
    assert [wheel.inches for wheel in bike.wheels] == [26, 28]
    assert bike.spare == Wheel(inches=20)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("exportr = 1", "phone.toml: unknown key 'exportr'; did you mean 'exporter'?"),
        ("shcema = 1", "phone.toml: unknown key 'shcema'; did you mean 'schema'?"),
        ("spare.inchs = 1", "phone.toml: unknown key 'spare.inchs'; did you mean 'inches'?"),
        (
            "[[wheels]]\n[[wheels]]\ninchs = 1",
            "phone.toml: unknown key 'wheels[1].inchs'; did you mean 'inches'?",
        ),
        ('exporter = 3\nbell = "yes"', "phone.toml: exporter is 3; it must be text in quotes"),
        ("bell = 1", "phone.toml: bell is 1; it must be true or false"),
        ('speed = "3"', 'phone.toml: speed is "3"; it must be a number'),
        ("spare.inches = true", "phone.toml: spare.inches is true; it must be a whole number"),
        ("spare.inches = 0", "phone.toml: spare.inches is 0; it must be greater than or equal to 1"),
        ("spare = 3", "phone.toml: spare is 3; it must be a table"),
        ("wheels = 3", "phone.toml: wheels is 3; it must be a list in [ ]"),
        ('colour = "rde"', "phone.toml: colour is \"rde\"; it must be 'red' or 'green'"),
        ('letter = "long-wrod"', "phone.toml: letter is \"long-wrod\"; did you mean 'long-word'?"),
        ("tags = []", "phone.toml: tags is []; it must have at least 1 item"),
    ],
)
def test_problem_names_file_key_and_remedy(text, expected):
    assert message(text).splitlines()[0] == expected


def test_unknown_key_without_a_near_one_lists_the_known_keys():
    assert "known: bell, colour, exporter" in message("zzzzzz = 1")


def test_a_failed_item_is_not_also_reported_as_missing():
    assert message('tags = ["three"]') == "phone.toml: tags[0] is \"three\"; it must be 'one' or 'two'"


def test_many_problems_are_cut_short():
    lines = message("\n".join(f"unknown{number} = 1" for number in range(9))).splitlines()
    assert len(lines) == 6
    assert lines[-1] == "phone.toml: and 4 more"


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_numbers_that_compare_with_nothing_are_refused(number):
    assert message(f"speed = {number}") == f"phone.toml: speed is {number}; it must be a finite number"


def test_syntax_error_names_the_line():
    text = message("bell = true\nspeed =\n")
    assert text.startswith("phone.toml: not valid TOML: ")
    assert "line 2" in text


@pytest.mark.parametrize("text", ["x = " + "[" * 100_000, "a" + ".a" * 3_000 + " = 1"])
def test_deep_nesting_is_an_input_error(text):
    assert message(text) == "phone.toml: nested too deeply"


def test_a_key_cannot_write_control_characters_to_the_terminal():
    assert message('"a\\u001b[31mb\\n" = 1').isprintable()


def read(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_model(path, Bike, label="phone.toml")
    return str(caught.value)


def test_missing_file(tmp_path):
    assert read(tmp_path / "no.toml") == "phone.toml: no such file"


def test_folder(tmp_path):
    assert read(tmp_path) == "phone.toml: this is a folder, not a TOML file"


def test_path_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    assert read(tmp_path / "file" / "x.toml").startswith("phone.toml: cannot be read: ")


def test_null_byte_in_the_path():
    assert read(Path("a\0b")).startswith("phone.toml: ")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert read(tmp_path / "pipe") == "phone.toml: this is not a regular file"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    path = tmp_path / "x.toml"
    path.touch(mode=0)
    assert read(path) == "phone.toml: cannot be read: Permission denied"


def test_not_utf8_names_the_line(tmp_path):
    path = tmp_path / "x.toml"
    path.write_bytes(b"bell = true\n# caf\xe9\n")
    assert read(path) == "phone.toml: not UTF-8 text: byte 0xe9 in line 2"


def test_size_limit_is_exact(tmp_path):
    path = tmp_path / "x.toml"
    path.write_bytes(b"#" * MAX_BYTES)
    assert read_model(path, Bike) == Bike()
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    assert "larger than 1 MB" in read(path)


def test_windows_files_are_read(tmp_path):
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xef\xbb\xbfbell = true\r\nspeed = 2.5\r\n")
    assert read_model(path, Bike).speed == 2.5


def test_the_label_is_the_path_as_given(tmp_path):
    path = tmp_path / "x.toml"
    with pytest.raises(InputError, match=r"x\.toml: no such file") as caught:
        read_model(path, Bike)
    assert str(caught.value).startswith(str(path))
