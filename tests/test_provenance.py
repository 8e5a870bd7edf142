"""What is read of a model's author and licence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import checkpoint

from slm_export.source.licences import licence_of
from slm_export.source.provenance import author_of


@pytest.mark.parametrize(
    ("front", "author"),
    [
        ("author: Ada Lovelace", "Ada Lovelace"),
        ("license: mit\nauthors: ['Ada', \"Bob\"]\ntags: []", "Ada, Bob"),
        ("authors:\n  - Ada Lovelace\n  - Bob\nlicense: mit", "Ada Lovelace, Bob"),
        ("authors:\n- Ada\n- 'Bob'", "Ada, Bob"),
        ("author:\nlicense: mit", None),
        ("license: mit", None),
        ("tags:\n- author: none", None),
    ],
)
def test_the_author_is_whom_the_card_names(front: str, author: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\nauthor: not in the front matter\n")
    source = replace(checkpoint({}), folder=tmp_path)
    assert author_of(source) == author
    assert licence_of(source.folder) == ("mit" if "license" in front else None)


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ("license: 'llama3.2'", "llama3.2"),
        ("license: other\nlicense_name: qwen-research\nlicense_link: LICENSE", "qwen-research"),
        ("license: other", "other"),
        ("license:\n- mit\n- apache-2.0", "mit, apache-2.0"),
        ("license_link: x", None),
        ("license:", None),
    ],
)
def test_the_licence_is_what_the_card_says(front: str, licence: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\nlanguage: en\n{front}\n---\nlicense: not here\n")
    assert licence_of(tmp_path) == licence


def test_the_configuration_goes_first(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nauthor: card\n---\n")
    source = replace(checkpoint({}), folder=tmp_path, config=SimpleNamespace(author="config"))
    assert author_of(source) == "config"
    assert author_of(replace(source, config=SimpleNamespace(authors=["a", "b"]))) == "a, b"


def test_without_a_card_nobody_is_named(tmp_path: Path) -> None:
    source = replace(checkpoint({}), folder=tmp_path)
    assert (author_of(source), licence_of(source.folder)) == (None, None)
