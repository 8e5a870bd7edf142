"""The JUnit file has a case per gate, whatever happens, and is as CI servers expect it."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from forked import Forked
from sample_reports import artifact_of, decoder_report, fill, make, unverified

from slm_export.errors import InputError, SlmExportError
from slm_export.proof import FailedGateError
from slm_export.reports.junit import Cases, recorded, to_xml
from slm_export.results import Check


def parsed(path: Path) -> ET.Element:
    """Return the document, after holding it against what Ant's and Jenkins' schemas of JUnit files demand."""
    root = ET.fromstring(path.read_text(encoding="utf-8"))
    assert (root.tag, root.attrib) == ("testsuites", {})
    for number, suite in enumerate(root):
        assert suite.tag == "testsuite"
        assert int(suite.attrib["id"]) == number
        assert suite.attrib["package"]
        assert suite.attrib["hostname"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.attrib["timestamp"])
        tags = [child.tag for child in suite]
        assert tags[0] == "properties"
        assert tags[-2:] == ["system-out", "system-err"]
        cases = [child for child in suite if child.tag == "testcase"]
        assert len(suite) == len(cases) + 3
        outcomes = [child.tag for case in cases for child in case]
        assert int(suite.attrib["tests"]) == len(cases)
        for tag, key in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
            assert int(suite.attrib[key]) == outcomes.count(tag)
        for case in cases:
            assert case.attrib.keys() == {"classname", "name", "time"}
            assert len(case) <= 1
            for outcome in case:
                assert outcome.attrib.keys() <= {"type", "message"}
                assert outcome.tag == "skipped" or outcome.attrib["type"]
    return root


def outcomes(root: ET.Element) -> dict[str, str]:
    return {
        f"{case.attrib['classname']}.{case.attrib['name']}": case[0].tag if len(case) else "pass"
        for case in root.iter("testcase")
    }


def test_a_case_for_every_gate(tmp_path: Path) -> None:
    report = decoder_report(artifact_of(fill(tmp_path)))
    with recorded(tmp_path / "junit.xml", "export") as cases:
        cases.of_report(report)
    names = ("kl_mean", "top1_agreement", "tokenizer")
    assert outcomes(parsed(tmp_path / "junit.xml")) == {
        f"slm-export.executorch.{name}": "pass" for name in names
    }


def test_a_failed_gate_is_a_failure_with_its_details(tmp_path: Path) -> None:
    report = decoder_report(artifact_of(fill(tmp_path)), kl_mean=0.5)
    with pytest.raises(FailedGateError), recorded(tmp_path / "junit.xml", "export"):
        raise FailedGateError("not good enough", report)
    root = parsed(tmp_path / "junit.xml")
    assert outcomes(root)["slm-export.executorch.kl_mean"] == "failure"
    (failure,) = root.iter("failure")
    assert failure.attrib["message"] == "kl_mean is 0.5 (at most 0.05): the mean KL over 2,048 tokens"
    assert not list(root.iter("error"))


@pytest.mark.parametrize("error", [InputError("model.toml: no\nsuch file"), SlmExportError("disk full")])
def test_an_error_is_a_case_of_its_own(error: SlmExportError, tmp_path: Path) -> None:
    with pytest.raises(SlmExportError), recorded(tmp_path / "junit.xml", "export"):
        raise error
    root = parsed(tmp_path / "junit.xml")
    assert outcomes(root) == {"slm-export.export.export": "error"}
    assert next(root.iter("error")).text == str(error)


def test_what_was_not_verified_is_skipped_and_not_absent(tmp_path: Path) -> None:
    report = unverified(decoder_report(artifact_of(fill(tmp_path))))
    with recorded(tmp_path / "junit.xml", "export") as cases:
        cases.of_report(report)
    assert outcomes(parsed(tmp_path / "junit.xml")) == {"slm-export.executorch.fidelity": "skipped"}


def test_an_old_verdict_does_not_outlive_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    path.write_text("<testsuites/>")
    with pytest.raises(ZeroDivisionError), recorded(path, "export"):
        raise ZeroDivisionError
    assert not path.exists()


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"), recorded(tmp_path / "no" / "junit.xml", "export"):
        pytest.fail("work was begun")


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with recorded(None, "export"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_xml_cannot_hold_is_shown() -> None:
    cases = Cases({"executorch": (Check("a<b", False, '\x00 \x1b[2J & \ud800 "q"'),)})
    root = ET.fromstring(to_xml(cases))
    (failure,) = root.iter("failure")
    assert failure.text is not None
    assert "\\x00 \\x1b[2J & \\ud800" in failure.text


def test_verify_writes_its_checks(tmp_path: Path, quick_cli: Forked) -> None:
    bundle = make(tmp_path / "out")
    (bundle / "tokenizer" / "tokenizer.json").write_text("{}")
    done = quick_cli("verify", "out", "--junit", "junit.xml", "--json", cwd=tmp_path)
    assert done.returncode == 1
    assert outcomes(parsed(tmp_path / "junit.xml")) == {"slm-export.files.checksums": "failure"}


def test_an_export_that_is_refused_writes_why(tmp_path: Path, quick_cli: Forked) -> None:
    done = quick_cli("missing-model", "--target", "android", "--junit", "junit.xml", cwd=tmp_path)
    assert done.returncode == 2
    assert outcomes(parsed(tmp_path / "junit.xml")) == {"slm-export.export.export": "error"}
