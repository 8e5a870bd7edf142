"""What a file of delegates may say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT
from delegating import delegates, written

from slm_export.delegates.config import load_delegates
from slm_export.delegates.triggers import duration_s
from slm_export.errors import InputError

GOOD = """
[delegates.sorter]
bundle  = "a-bundle"
trigger = { watch = "inbox", match = "*.txt" }
output  = { file = "out/sorted.jsonl" }
"""
REMOTE = 'remote = { url = "https://api.example/v1", model = "m" }\n'


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    found = delegates(tmp_path, GOOD)
    one = found.delegates["sorter"]
    assert one.trigger.watch == str(tmp_path / "inbox")
    assert one.output.file == str(tmp_path / "out" / "sorted.jsonl")
    assert one.bundle == str(tmp_path / "a-bundle")
    assert found.state == str(tmp_path / "delegates.sqlite")
    assert one.where == "local"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("trigger", "triger", "unknown key 'delegates.sorter.triger'; did you mean 'trigger'?"),
        ('match = "*.txt"', 'mach = "*.txt"', "did you mean 'match'?"),
        ('watch = "inbox", match = "*.txt"', 'every = "10 minutes"', "'10 minutes' is no duration"),
        ('watch = "inbox", match = "*.txt"', 'cron = "61 * * * *"', "is no cron expression of five fields"),
        ('watch = "inbox", match = "*.txt"', 'cron = "0 7 * * 1"', "write days of the week as names"),
        ('watch = "inbox", match = "*.txt"', 'every = "1h", stdin = true', "it has every, stdin"),
        ('watch = "inbox", match = "*.txt"', "webhook = false", "it has none"),
        ('watch = "inbox"', "stdin = true", "match and existing are of use with watch alone"),
        ('match = "*.txt"', 'missed = "all"', "missed is of use with cron and every alone"),
        ('watch = "inbox", match = "*.txt"', "webhook = true", "[webhook] and a delegate with trigger"),
        ('bundle  = "a-bundle"\n', "", "where = 'local' needs a bundle"),
        ("[delegates.sorter]\n", "[delegates.sorter]\n" + REMOTE, "belong together"),
        ("[delegates.sorter]\n", '[delegates.sorter]\nwhere = "remote"\n', "belong together"),
        (
            "[delegates.sorter]\n",
            f'[delegates.sorter]\nwhere = "remote"\nprivate = true\n{REMOTE}',
            "private = true and where = 'remote' contradict each other",
        ),
        (
            "[delegates.sorter]\n",
            f'[delegates.sorter]\nwhere = "local-then-remote"\n{REMOTE}',
            "[rule] and where = 'local-then-remote' belong together",
        ),
        (
            "[delegates.sorter]\n",
            f'[delegates.sorter]\nwhere = "local-then-remote"\nrule = {{}}\n{REMOTE}',
            "says nothing",
        ),
        (
            "[delegates.sorter]\n",
            '[delegates.sorter]\npersonal_data = "send"\n',
            "personal_data is of use where inputs could leave alone",
        ),
        ("[delegates.sorter]\n", '[delegates.sorter]\nprompt = "{txt}"\n', "prompt: unknown {txt}"),
        ('file = "out/sorted.jsonl"', 'command = "echo"', "must be a list"),
        ('file = "out/sorted.jsonl"', 'webhook = "ftp://x/y"', "is no http or https address"),
        ('file = "out/sorted.jsonl"', 'stdout = true, file = "x"', "it has file, stdout"),
        ("a-bundle", "another", "is no bundle; export a model to it"),
        ("[delegates.sorter]", "[delegates.Sorter]", "delegates"),
    ],
)
def test_what_makes_no_sense_is_named(old: str, new: str, words: str, tmp_path: Path) -> None:
    assert old in GOOD
    with pytest.raises(InputError) as caught:
        delegates(tmp_path, GOOD.replace(old, new))
    assert words in str(caught.value)


def test_private_answers_go_to_this_machine_alone(tmp_path: Path) -> None:
    text = GOOD.replace("[delegates.sorter]\n", "[delegates.sorter]\nprivate = true\n")
    delegates(tmp_path, text.replace('file = "out/sorted.jsonl"', 'webhook = "http://127.0.0.1:9/x"'))
    with pytest.raises(InputError, match=r"private = true, but the answers would go to example\.org"):
        delegates(tmp_path, text.replace('file = "out/sorted.jsonl"', 'webhook = "https://example.org/x"'))


def test_one_delegate_reads_standard_input(tmp_path: Path) -> None:
    one = GOOD.replace('watch = "inbox", match = "*.txt"', "stdin = true")
    with pytest.raises(InputError, match="other and sorter both read standard input; one can"):
        load_delegates(written(tmp_path, one.replace("sorter", "other") + one))


def test_the_example_of_the_page_is_one(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "delegates.md").read_text(encoding="utf-8")
    example = re.search(r"<!-- example -->\n```toml\n(.*?)```", page, re.DOTALL)
    assert example
    for name in ("note-sorter", "log-reader"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    found = load_delegates(written(tmp_path, example[1]))
    assert set(found.delegates) == {"sorter", "report"}
    keys = set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE))
    assert {"bundle", "prompt", "trigger", "where", "private", "sampling", "remote", "rule", "output"} <= keys


def test_durations() -> None:
    assert [duration_s(text) for text in ("90s", "10m", "1.5h", "2d")] == [90, 600, 5400, 172800]
    for text in ("", "5", "-1s", "0.1s", "1w", "1 h 2"):
        with pytest.raises(ValueError, match="no duration"):
            duration_s(text)
