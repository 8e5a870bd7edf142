"""Bundles side by side, and one held against another: what differs is told, and a limit that is passed is a failure."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from checkpoints import normal
from forked import Forked
from sample_reports import GATES, RUNTIME, artifact_of, decoder_report, encoder_report, fill

from slm_export.bundles.bundle import staged, write_documents
from slm_export.errors import GateError, InputError
from slm_export.optimizers.group_quantize import quantize
from slm_export.progress import Progress
from slm_export.reports import difference as differing
from slm_export.reports.compared import read_bundles
from slm_export.reports.comparison import compare_bundles, to_json, to_markdown
from slm_export.reports.diff_limits import DiffLimits, parse_limits
from slm_export.reports.difference import difference, judge
from slm_export.reports.figures import BY_NAME, FIGURES
from slm_export.reports.page.comparison_page import comparison_page
from slm_export.results import Report, TokenLatency, TokenQuality
from slm_export.settings import Settings

Change = Callable[[Report], Report]


def make(out: Path, change: Change = lambda report: report, *, encoder: bool = False) -> Path:
    """Write a bundle whose report was changed."""
    with staged(out, False) as staging:
        artifact = artifact_of(fill(staging.path))
        report = encoder_report(artifact) if encoder else decoder_report(artifact)
        write_documents(staging.path, change(report), gates=GATES, runtime=RUNTIME)
        return staging.commit()


def with_quality(**figures: Any) -> Change:
    def change(report: Report) -> Report:
        (result,) = report.formats
        assert isinstance(result.quality, TokenQuality)
        made = dataclasses.replace(result, quality=dataclasses.replace(result.quality, **figures))
        return dataclasses.replace(report, formats=(made,))

    return change


def with_speed(**figures: Any) -> Change:
    def change(report: Report) -> Report:
        (result,) = report.formats
        assert isinstance(result.latency, TokenLatency)
        made = dataclasses.replace(result, latency=dataclasses.replace(result.latency, **figures))
        return dataclasses.replace(report, formats=(made,))

    return change


def compared(old: Path, new: Path, *, codes: bool = False) -> differing.Difference:
    return difference(*read_bundles((old, new)), Progress(), codes=codes)


def failing(old: Path, new: Path, **limits: float) -> set[str]:
    checks = judge(compared(old, new), DiffLimits.model_validate(limits))
    return {check.name for group in checks.values() for check in group if not check.passed}


# --- limits ------------------------------------------------------------------------------------------


def test_every_figure_has_a_limit_and_no_limit_is_of_nothing() -> None:
    of_figures = {f"max_{one.name}_{'increase' if one.better == 'lower' else 'decrease'}" for one in FIGURES}
    assert of_figures | {"max_codes_changed", "max_toolchain_changes"} == set(DiffLimits.model_fields)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_byte_increase=1", "unknown limit 'max_byte_increase'; did you mean 'max_bytes_increase'?"),
        ("max_bytes_increase", "'' is no number; write max_bytes_increase=0.02"),
        ("max_bytes_increase=2%", "'2%' is no number"),
        ("max_bytes_increase=-1", "greater than or equal to 0"),
        ("max_bytes_increase=nan", "greater than or equal to 0"),
        ("max_codes_changed=2", "less than or equal to 1"),
        ("max_toolchain_changes=0.5", "integer"),
    ],
)
def test_a_limit_that_is_wrong_is_refused(text: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_limits([text])
    assert expected in str(caught.value)


def test_options_go_over_the_file() -> None:
    settings = Settings(diff=DiffLimits(max_bytes_increase=0.1, max_codes_changed=0.5))
    assert parse_limits(["max_bytes_increase = 0.2"]).over(settings.diff) == DiffLimits(
        max_bytes_increase=0.2, max_codes_changed=0.5
    )


# --- diff --------------------------------------------------------------------------------------------


def test_bundles_that_are_alike_pass_limits_of_zero(tmp_path: Path) -> None:
    limits = dict.fromkeys(set(DiffLimits.model_fields) - {"max_codes_changed"}, 0.0)
    assert failing(make(tmp_path / "a"), make(tmp_path / "b"), **limits) == set()


@pytest.mark.parametrize(
    ("change", "limit", "inside", "outside"),
    [
        (with_quality(kl_mean=0.041), "max_kl_mean_increase", 0.0101, 0.0099),
        (with_quality(top1_agreement=0.93), "max_top1_agreement_decrease", 0.0101, 0.0099),
        (with_speed(decode_tokens_per_s=360.0), "max_decode_tokens_per_s_decrease", 0.101, 0.099),
        (with_speed(load_ms=61.0), "max_load_ms_increase", 1.01, 0.99),
    ],
)
def test_a_limit_is_a_share_of_speed_and_a_difference_of_fidelity(
    change: Change, limit: str, inside: float, outside: float, tmp_path: Path
) -> None:
    old, new = make(tmp_path / "old"), make(tmp_path / "new", change)
    assert failing(old, new, **{limit: inside}) == set()
    assert failing(old, new, **{limit: outside}) == {limit.removeprefix("max_")}
    # What got better is never too far.
    assert failing(new, old, **{limit: 0.0}) == set()


def test_a_figure_that_one_side_lacks_fails_its_limit(tmp_path: Path) -> None:
    old, new = make(tmp_path / "old"), make(tmp_path / "new", with_quality(kl_mean=None))
    assert failing(old, new, max_kl_mean_increase=1) == {"kl_mean_increase"}
    assert failing(new, old, max_kl_mean_increase=1) == {"kl_mean_increase"}


def test_a_limit_of_another_task_is_not_judged(tmp_path: Path) -> None:
    old, new = make(tmp_path / "old", encoder=True), make(tmp_path / "new", encoder=True)
    found = judge(compared(old, new), DiffLimits(max_kl_mean_increase=0, max_cosine_mean_decrease=0))
    assert [check.name for check in found["executorch"]] == ["cosine_mean_decrease"]


def test_versions_are_told_and_counted(tmp_path: Path) -> None:
    def newer(report: Report) -> Report:
        return dataclasses.replace(report, toolchain={**report.toolchain, "torch": "2.14", "onnx": "1.20"})

    old, new = make(tmp_path / "old"), make(tmp_path / "new", newer)
    assert compared(old, new).toolchain == {"onnx": (None, "1.20"), "torch": ("2.13.0+cpu", "2.14")}
    assert failing(old, new, max_toolchain_changes=2) == set()
    assert failing(old, new, max_toolchain_changes=1) == {"toolchain_changes"}


class _Reads:
    """An exporter that finds in a bundle what the test put there."""

    def __init__(self, stored: dict[str, Any]) -> None:
        self._stored = stored

    def stored(self, path: Path) -> Any:
        return self._stored[path.parent.parent.name]


def test_codes_are_read_from_the_artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"layers.0.up.weight": quantize(normal(16, 64), 4, 32)}
    others = {"layers.0.up.weight": quantize(normal(16, 64, seed=1), 4, 32)}
    reads = _Reads({"old": weights, "new": others})
    monkeypatch.setattr(differing, "exporter", lambda format: reads)
    found = compared(make(tmp_path / "old"), make(tmp_path / "new"), codes=True)
    assert found.codes is not None
    assert found.codes[0].changed > 16 * 64 // 2
    assert found.codes_from == "executorch"
    (check,) = judge(found, DiffLimits(max_codes_changed=0.1))["bundle"]
    assert not check.passed


def test_codes_of_a_damaged_bundle_are_not_compared(tmp_path: Path) -> None:
    old, new = make(tmp_path / "old"), make(tmp_path / "new")
    (old / "executorch" / "model.pte").write_bytes(b"x")
    with pytest.raises(GateError, match="--no-codes"):
        compared(old, new, codes=True)


def test_codes_that_were_left_out_fail_their_limit(tmp_path: Path) -> None:
    old, new = make(tmp_path / "old"), make(tmp_path / "new")
    assert failing(old, new, max_codes_changed=1) == {"codes_changed"}


# --- side by side ------------------------------------------------------------------------------------

HOSTILE = "<script>x</script>|*a*\n# b"


def test_markdown_has_a_column_per_artifact_and_changes_against_the_first(tmp_path: Path) -> None:
    folders = [
        make(tmp_path / "base"),
        make(tmp_path / "tuned", with_quality(kl_mean=0.021)),
        make(tmp_path / "slow", with_speed(decode_tokens_per_s=200.0)),
    ]
    lines = to_markdown(compare_bundles(read_bundles(folders))).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in table} == {5}
    rows = {
        cells[0]: cells[1:] for line in table if (cells := [cell.strip() for cell in line.split("|")[1:-1]])
    }
    assert rows[""] == ["base / executorch", "tuned / executorch", "slow / executorch"]
    assert rows["mean KL divergence"] == ["0.031 nats", "0.021 nats (-0.01)", "0.031 nats"]
    assert rows["decode"] == ["400.0 tokens/s", "400.0 tokens/s", "200.0 tokens/s (**-50.0 %**)"]


def test_what_is_not_alike_is_said(tmp_path: Path) -> None:
    def elsewhere(report: Report) -> Report:
        return dataclasses.replace(report, environment={"processor": "B"}, held_out="2")

    def here(report: Report) -> Report:
        return dataclasses.replace(report, environment={"processor": "A"}, held_out="1")

    def other_model(report: Report) -> Report:
        return dataclasses.replace(report, model=dataclasses.replace(report.model, source_sha256="cd" * 32))

    one, two, three = (
        make(tmp_path / "1", here),
        make(tmp_path / "2", elsewhere),
        make(tmp_path / "3", other_model),
    )
    assert compare_bundles(read_bundles([one])).notes == ()
    notes = " ".join(compare_bundles(read_bundles([one, two])).notes)
    assert "different texts" in notes
    assert "different machines: A, 2 threads; B, 2 threads" in notes
    assert "different source models" in " ".join(compare_bundles(read_bundles([one, three])).notes)


def test_bundles_of_one_name_are_told_apart_and_the_same_one_is_refused(tmp_path: Path) -> None:
    one, two = make(tmp_path / "a" / "out"), make(tmp_path / "b" / "out")
    assert len({bundle.label for bundle in read_bundles([one, two])}) == 2
    with pytest.raises(InputError, match="given twice"):
        read_bundles([one, tmp_path / "a" / ".." / "a" / "out"])


class _Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "style"}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_no_text_of_a_bundle_becomes_part_of_the_page_or_the_table(tmp_path: Path) -> None:
    def hostile(report: Report) -> Report:
        row = dataclasses.replace(report.passes[0], options={"x": HOSTILE})
        return dataclasses.replace(report, device_title=HOSTILE, passes=(row,), toolchain={HOSTILE: HOSTILE})

    comparison = compare_bundles(read_bundles([make(tmp_path / "1"), make(tmp_path / "2", hostile)]))
    page = _Tags(comparison_page(comparison))
    assert "script" not in page.tags
    assert page.text.count("<script>x</script>") >= 3
    markdown = to_markdown(comparison)
    assert "<script>" not in markdown.replace("\\<script\\>", "")
    assert all(
        line.replace("\\|", "").count("|") == 4 for line in markdown.splitlines() if line.startswith("|")
    )
    json.dumps(to_json(comparison), allow_nan=False)


# --- the command line --------------------------------------------------------------------------------


def test_diff_exits_with_1_beyond_a_limit_alone(tmp_path: Path, quick_cli: Forked) -> None:
    make(tmp_path / "old")
    make(tmp_path / "new", with_quality(kl_mean=0.041))
    command = ("diff", "old", "new", "--no-codes")
    (tmp_path / "slm-export.toml").write_text("[diff]\nmax_kl_mean_increase = 0.005\n")
    done = quick_cli(*command, cwd=tmp_path)
    assert done.returncode == 1
    assert "error: new is too far from old: executorch: kl_mean_increase" in done.stderr
    assert "at most 0.005" in done.stdout
    assert quick_cli(*command, "--limit", "max_kl_mean_increase=0.02", cwd=tmp_path).returncode == 0
    (tmp_path / "slm-export.toml").write_text("[diff]\nmax_kl_increase = 0.005\n")
    refused = quick_cli(*command, cwd=tmp_path)
    assert refused.returncode == 2
    assert "unknown key 'diff.max_kl_increase'" in refused.stderr


def test_diff_prints_one_document_and_writes_its_cases(tmp_path: Path, quick_cli: Forked) -> None:
    make(tmp_path / "old")
    make(tmp_path / "new", with_quality(kl_mean=0.041))
    limit = "max_kl_mean_increase=0.005"
    done = quick_cli(
        "diff", "old", "new", "--no-codes", "--json", "--limit", limit, "--junit", "diff.xml", cwd=tmp_path
    )
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert document["passed"] is False
    assert document["figures"]["executorch"]["kl_mean"]["change"] == pytest.approx(0.01)
    assert '<failure type="gate"' in (tmp_path / "diff.xml").read_text()


def test_report_writes_a_page_and_prints_markdown(tmp_path: Path, quick_cli: Forked) -> None:
    make(tmp_path / "old")
    make(tmp_path / "new")
    done = quick_cli("report", "old", "new", "--html", "page.html", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("### tiny\n")
    assert "side by side" in (tmp_path / "page.html").read_text()
    assert quick_cli("report", "old", "missing", cwd=tmp_path).returncode == 2
    nowhere = quick_cli("report", "old", "--html", "no/page.html", cwd=tmp_path)
    assert nowhere.returncode == 2
    assert "no/page.html: cannot be written" in nowhere.stderr


def test_every_figure_says_which_way_is_better() -> None:
    assert BY_NAME["bytes"].is_worse(1, 2)
    assert not BY_NAME["bytes"].is_worse(2, 1)
    assert BY_NAME["top1_agreement"].is_worse(0.9, 0.8)
    assert not BY_NAME["top1_agreement"].is_worse(None, 0.8)
