"""A JUnit file for CI servers: a suite for each format, a case for each gate.

Given   checks by suite, and what was not checked with the reason
Result  XML that GitHub's and GitLab's readers and Jenkins' and Ant's schemas of JUnit files take
Source  https://llg.cubic.org/docs/junit, https://github.com/windyroad/JUnit-Schema
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from slm_export.errors import InputError, MachineError, SlmExportError
from slm_export.reports.words import figure, limit, printable
from slm_export.results import Check, Report

_NAME = "slm-export"


@dataclass
class Cases:
    """What a command found, gathered while it runs."""

    checks: dict[str, tuple[Check, ...]] = field(default_factory=dict)
    """By suite."""
    skipped: dict[str, dict[str, str]] = field(default_factory=dict)
    """Suite -> case -> why it was not judged."""

    def of_report(self, report: Report) -> None:
        """Take the cases of an export; a fidelity that was not measured is a skipped case, not an absent one."""
        from slm_export.parity import judge_pairs

        for result in report.formats:
            name = result.artifact.format
            self.checks[name] = result.checks
            if result.quality is None:
                self.skipped[name] = {"fidelity": "the artifact was not compared with its source"}
        if report.parity:
            self.checks["formats"] = judge_pairs(report.parity)


@contextmanager
def recorded(path: Path | None, command: str) -> Iterator[Cases]:
    """Yield what is to be filled, and write it to ``path`` at the end, whatever that is; None: write nothing.

    An earlier file is removed first, so that no failure can leave an old verdict in its place. An error that is no
    verdict of a gate becomes a case of its own, named after the command.

    Raises:
        InputError: no file can be written there.
    """
    cases = Cases()
    if path is None:
        yield cases
        return
    _prepare(path)
    try:
        yield cases
    except SlmExportError as error:
        report = getattr(error, "report", None)
        if report is not None:
            cases.of_report(report)
        judged = any(not check.passed for group in cases.checks.values() for check in group)
        _write(path, cases, None if judged else (command, error))
        raise
    except SystemExit:
        _write(path, cases, None)
        raise
    _write(path, cases, None)


def _prepare(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
        if not path.parent.is_dir():
            raise InputError(f"{path}: there is no folder {path.parent}; make it, or name another file")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}; name another file") from None


def _write(path: Path, cases: Cases, error: tuple[str, SlmExportError] | None) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(to_xml(cases, error), encoding="utf-8", newline="\n")
        os.replace(partial, path)
    except OSError as reason:
        raise MachineError(f"{path}: cannot be written: {reason.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)


def to_xml(cases: Cases, error: tuple[str, SlmExportError] | None = None) -> str:
    """Return the document; ``error``: a command, and what ended it before there was a verdict."""
    root = ET.Element("testsuites")
    for name in dict.fromkeys((*cases.checks, *cases.skipped)):
        _suite(root, name, cases.checks.get(name, ()), cases.skipped.get(name, {}), None)
    if error is not None:
        _suite(root, error[0], (), {}, error[1])
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _suite(
    root: ET.Element,
    name: str,
    checks: Sequence[Check],
    skipped: Mapping[str, str],
    error: SlmExportError | None,
) -> None:
    suite = ET.SubElement(
        root,
        "testsuite",
        {
            "name": f"{_NAME}.{_clean(name)}",
            "package": _NAME,
            "id": str(len(root)),
            "tests": str(len(checks) + len(skipped) + (error is not None)),
            "failures": str(sum(not check.passed for check in checks)),
            "errors": str(int(error is not None)),
            "skipped": str(len(skipped)),
            "time": "0",
            "timestamp": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S"),
            "hostname": "localhost",
        },
    )
    ET.SubElement(suite, "properties")
    for check in checks:
        case = _case(suite, name, check.name)
        if not check.passed:
            value = "" if check.value is None else f" is {figure(check.value)} ({limit(check)})"
            failure = ET.SubElement(
                case, "failure", {"type": "gate", "message": _clean(f"{check.name}{value}: {check.detail}")}
            )
            failure.text = _clean(check.detail)
    for what, reason in skipped.items():
        ET.SubElement(_case(suite, name, what), "skipped", {"message": _clean(reason)})
    if error is not None:
        made = {"type": type(error).__name__, "message": _clean(str(error).splitlines()[0])}
        ET.SubElement(_case(suite, name, name), "error", made).text = _clean(str(error))
    ET.SubElement(suite, "system-out")
    ET.SubElement(suite, "system-err")


def _case(suite: ET.Element, name: str, what: str) -> ET.Element:
    return ET.SubElement(
        suite, "testcase", {"classname": f"{_NAME}.{_clean(name)}", "name": _clean(what), "time": "0"}
    )


def _clean(text: str) -> str:
    """Return text without what XML cannot hold: control characters and lone surrogates."""
    return "\n".join(printable(line) for line in text.splitlines())
