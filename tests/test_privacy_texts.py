"""Personal data in texts: what is found, what stands in its place, and that nothing of it gets out."""

from __future__ import annotations

import json
import logging
import socket
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Cli

from slm_export.errors import InputError
from slm_export.privacy.anonymise import Anonymiser, values
from slm_export.privacy.entities import KINDS, read_entities
from slm_export.privacy.files import REPORT, anonymise_files
from slm_export.privacy.finder import Finder

sys.path.append(str(ROOT / "benchmarks" / "privacy"))
from anonymiser import labelled

TEXT = "Mail jane.doe@example.com, IBAN DE89 3704 0044 0532 0130 00, again jane.doe@example.com."
SECRETS = ("jane.doe@example.com", "DE89 3704 0044 0532 0130 00", "4111 1111 1111 1111")


@pytest.fixture(scope="module")
def finder() -> Finder:
    return Finder()


def kinds(finder: Finder, text: str) -> list[tuple[str, str]]:
    return [(span.kind, text[span.start : span.end]) for span in finder.find(text)]


def test_data_with_a_checksum_is_found_wherever_it_is_labelled(finder: Finder) -> None:
    sure = {"IBAN_CODE", "CREDIT_CARD", "EMAIL_ADDRESS", "CRYPTO_WALLET", "API_KEY", "NATIONAL_ID"}
    count = 0
    for text, labels in labelled():
        found = finder.find(text)
        for label in labels:
            if label.kind in sure:
                count += 1
                assert any(
                    s.kind == label.kind and s.start < label.end and label.start < s.end for s in found
                )
    assert count > 30


@pytest.mark.parametrize(
    "text",
    [
        "IBAN DE89 3704 0044 0532 0130 01",
        "card 4111 1111 1111 1112",
        "wallet 1BvBMSEYstWetqTFn5Au4m4GFg7xJaNVN3",
        "Litecoin LaMT348PWRnrqeeWArpwQPbuanpXDZGEUa",
        "PESEL 44051401358",
        "commit 3f786850e387550fdab836ed7e6dc881de23001b",
    ],
)
def test_a_wrong_checksum_is_no_find(finder: Finder, text: str) -> None:
    assert kinds(finder, text) == []


def test_what_overlaps_is_one_find(finder: Finder) -> None:
    key = "ghp" + "_16C7e42F292c6912E7710c838347Ae178B4a!"
    assert kinds(finder, f"password: {key}") == [("API_KEY", key)]


def test_the_same_data_has_the_same_number(finder: Finder) -> None:
    anonymiser = Anonymiser(finder)
    assert anonymiser.text(TEXT) == "Mail <EMAIL_ADDRESS_1>, IBAN <IBAN_CODE_1>, again <EMAIL_ADDRESS_1>."
    assert (
        anonymiser.text("bob@example.com or JANE.DOE@example.com") == "<EMAIL_ADDRESS_2> or <EMAIL_ADDRESS_1>"
    )
    assert anonymiser.found == {"EMAIL_ADDRESS": 4, "IBAN_CODE": 1}
    assert not any(secret in repr(anonymiser.__dict__) for secret in SECRETS)


def test_a_hash_depends_on_its_key_alone(finder: Finder) -> None:
    one, same, other = (Anonymiser(finder, "hash", key * 16).text(TEXT) for key in (b"a", b"a", b"b"))
    assert one == same
    assert one != other
    assert one.count("<EMAIL_ADDRESS_") == 2
    assert Anonymiser(finder, "drop").text(TEXT) == "Mail , IBAN , again ."


def test_texts_of_json_are_changed_and_keys_are_not(finder: Finder) -> None:
    document = {"a@example.com": ["b@example.com", {"x": 1, "y": None}], "z": "c@example.com"}
    assert values(document, Anonymiser(finder).text) == {
        "a@example.com": ["<EMAIL_ADDRESS_1>", {"x": 1, "y": None}],
        "z": "<EMAIL_ADDRESS_2>",
    }


def test_entities_of_one_s_own(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(
        "[[entity]]\nname = \"CUSTOMER\"\npattern = 'K-\\d{6}'\n\n"
        '[[entity]]\nname = "PROJECT"\nwords = ["Bluebird"]\n'
    )
    finder = Finder(["EMAIL_ADDRESS"], read_entities(path))
    text = "K-123456 and k-123456 on Bluebird, not Bluebirds; Mr John Smith"
    assert kinds(finder, text) == [("CUSTOMER", "K-123456"), ("PROJECT", "Bluebird")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[[entity]]\nname = "A"\npattern = "("', "is no regular expression"),
        ('[[entity]]\nname = "A"\npattern = "x*"', "matches the empty text"),
        ('[[entity]]\nname = "A"', "either 'pattern' or 'words'"),
        ('[[entity]]\nname = "a"\nwords = ["x"]', "name"),
        ('[[entity]]\nname = "A"\nwords = [" "]', "blank"),
        ('[[entity]]\nname = "A"\nword = ["x"]', "unknown key .*word.*; did you mean"),
        ('[[entity]]\nname = "A"\nwords = ["x"]\n[[entity]]\nname = "A"\nwords = ["y"]', "two entities"),
    ],
)
def test_a_wrong_file_of_entities_is_told(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "own.toml"
    path.write_text(content)
    with pytest.raises(InputError, match=words):
        read_entities(path)


def test_unknown_kinds_and_names_that_are_taken_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown entity 'EMAIL_ADRESS'; did you mean 'EMAIL_ADDRESS'"):
        Finder(["EMAIL_ADRESS"])
    path = tmp_path / "own.toml"
    path.write_text('[[entity]]\nname = "PERSON"\nwords = ["x"]\n')
    with pytest.raises(InputError, match="one of the built-in ones"):
        Finder(own=read_entities(path))


def test_a_pipeline_that_finds_names_is_plugged_in(tmp_path: Path) -> None:
    import spacy

    pipeline = spacy.blank("xx")
    pipeline.add_pipe("entity_ruler").add_patterns([{"label": "PERSON", "pattern": "Emma Clarke"}])
    pipeline.to_disk(tmp_path / "names")
    finder = Finder(ner=str(tmp_path / "names"))
    assert kinds(finder, "I met Emma Clarke today") == [("PERSON", "Emma Clarke")]
    assert finder.blind_to == ()
    assert kinds(Finder(["PERSON"]), "I met Emma Clarke today") == []
    with pytest.raises(InputError, match="spaCy has no such pipeline here"):
        Finder(ner="no_such_pipeline")
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(InputError, match="has no part that finds names"):
        Finder(ner=str(tmp_path / "blank"))


def test_a_pattern_that_is_given_up_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from presidio_analyzer import pattern_recognizer

    monkeypatch.setattr(pattern_recognizer, "REGEX_TIMEOUT_SECONDS", 0.01)
    path = tmp_path / "own.toml"
    path.write_text("[[entity]]\nname = \"SLOW\"\npattern = '(?:a+)+b'\n")
    with pytest.raises(InputError, match="a pattern took too long"):
        Finder(["IBAN_CODE"], read_entities(path)).find("a" * 5000)


def test_nothing_is_asked_of_the_network_and_nothing_is_logged(
    finder: Finder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*arguments: object) -> None:
        raise AssertionError(f"a socket: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    caplog.set_level(logging.DEBUG)
    assert len(finder.find(f"{TEXT} 4111 1111 1111 1111")) == 4
    assert not any(secret in caplog.text for secret in SECRETS)


def test_files_are_written_whole_and_originals_stay(finder: Finder, tmp_path: Path) -> None:
    source = tmp_path / "in"
    (source / "deep").mkdir(parents=True)
    (source / "a.txt").write_bytes(f"{TEXT}\r\n".encode())
    lines = [{"text": TEXT, "n": 3}, {"text": "nothing"}]
    (source / "deep" / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = anonymise_files([source], tmp_path / "out", Anonymiser(finder), lambda count, name: None)
    assert done.found == {"EMAIL_ADDRESS": 4, "IBAN_CODE": 2}
    assert (tmp_path / "out" / "a.txt").read_bytes().endswith(b"again <EMAIL_ADDRESS_1>.\r\n")
    first = json.loads((tmp_path / "out" / "deep" / "b.jsonl").read_text().splitlines()[0])
    assert first == {"text": "Mail <EMAIL_ADDRESS_1>, IBAN <IBAN_CODE_1>, again <EMAIL_ADDRESS_1>.", "n": 3}
    assert TEXT in (source / "a.txt").read_text()
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert report["entities"] == list(KINDS)
    assert report["not_found_by_this"]
    written = "".join(path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert not any(secret in written for secret in SECRETS)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"jane.doe@example.com \xff", "not UTF-8 at byte 21"),
        ("a.jsonl", b'{"x": 1}\njane.doe@example.com\n', "line 2: not JSON"),
        ("a.csv", b"x", "not .txt, .md, .jsonl"),
        ("anonymised.json", b"{}", "not .txt"),
    ],
)
def test_what_cannot_be_read_ends_the_work(
    finder: Finder, tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        anonymise_files([tmp_path / "in"], tmp_path / "out", Anonymiser(finder), lambda count, name: None)
    assert "jane" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_long_texts_are_searched_in_parts(finder: Finder, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 30_000 + TEXT)
    anonymise_files([tmp_path / "a.txt"], tmp_path / "out", Anonymiser(finder), lambda count, name: None)
    written = (tmp_path / "out" / "a.txt").read_text()
    assert (
        written == "word " * 30_000 + "Mail <EMAIL_ADDRESS_1>, IBAN <IBAN_CODE_1>, again <EMAIL_ADDRESS_1>."
    )


def test_the_command_tells_kinds_and_numbers_alone(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mail.txt").write_text(TEXT)
    done = cli(
        "anonymise", "mail.txt", "--out", "clean", "--how", "hash", "--key-env", "K", env={"K": "k" * 16}
    )
    assert done.returncode == 0, done.stderr
    assert "EMAIL_ADDRESS" in done.stdout
    assert "not found without a NER model" in done.stdout
    assert not any(secret in done.stdout + done.stderr for secret in SECRETS)
    again = cli("anonymise", "mail.txt", "--out", "clean")
    assert again.returncode == 2
    assert "is there already" in again.stderr
    assert cli("anonymise", "mail.txt", "--out", "other", "--how", "hash").returncode == 2
