"""The report says everything, to programs and to people, and trusts no text that it shows."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from sample_reports import artifact_of, decoder_report, encoder_report, fill, full_report, unverified

from slm_export.reports import words
from slm_export.reports.details import Divergence, FrontierPoint, WeightRow
from slm_export.reports.report import bundled, next_commands, print_report, to_html, to_json
from slm_export.results import Artifact, Check, Report, TokenQuality

HOSTILE = "<script>alert('x')</script>\"[red]\x1b[2J"


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return artifact_of(fill(tmp_path))


@pytest.fixture(params=["decoder", "encoder", "unverified", "failed", "bare", "full"])
def report(request: pytest.FixtureRequest, artifact: Artifact, tmp_path: Path) -> Report:
    report = {
        "decoder": decoder_report(artifact),
        "encoder": encoder_report(artifact),
        "unverified": unverified(decoder_report(artifact)),
        "failed": decoder_report(artifact, kl_mean=0.5),
        "full": full_report(artifact, second=dataclasses.replace(artifact, format="onnx")),
        "bare": dataclasses.replace(
            unverified(decoder_report(artifact)), passes=(), stages={}, notes=(), toolchain={}
        ),
    }[request.param]
    return bundled(report, tmp_path)


def printed(report: Report, width: int = 100, out: Path = Path("out")) -> str:
    stream = io.StringIO()
    print_report(Console(file=stream, width=width), report, out)
    return stream.getvalue()


class Page(HTMLParser):
    """Collects the elements, the attributes and the text of a page, and its open elements."""

    VOID = frozenset({"meta", "br", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


# --- JSON --------------------------------------------------------------------------------------------


def test_json_holds_every_field_and_survives_a_round_trip(report: Report) -> None:
    document = to_json(report)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert {field.name for field in dataclasses.fields(report)} < set(document)
    assert document["passed"] == report.passed
    assert document["formats"][0]["artifact"]["path"] == "executorch/model.pte"
    assert list(document["stages"]) == list(report.stages)


def test_json_never_calls_a_bad_figure_unmeasured(artifact: Artifact) -> None:
    document = to_json(decoder_report(artifact, kl_mean=float("nan")))
    assert document["formats"][0]["quality"]["kl_mean"] == "nan"
    assert document["formats"][0]["quality"]["perplexity"] is None
    json.dumps(document, allow_nan=False)


def test_paths_become_relative_to_the_bundle(artifact: Artifact, tmp_path: Path) -> None:
    link = tmp_path.parent / f"{tmp_path.name}-link"
    link.symlink_to(tmp_path)
    once = bundled(decoder_report(artifact), link)
    assert once.formats[0].artifact.path == Path("executorch/model.pte")
    assert bundled(once, tmp_path) == once
    with pytest.raises(ValueError, match="subpath"):
        bundled(decoder_report(artifact), tmp_path / "elsewhere")


# --- the terminal ------------------------------------------------------------------------------------


def test_the_summary_says_what_how_big_how_faithful_and_how_fast(artifact: Artifact, tmp_path: Path) -> None:
    text = printed(bundled(decoder_report(artifact), tmp_path))
    for part in (
        "tiny: LlamaForCausalLM, text-generation, 5.5 M parameters",
        "OnePlus 12",
        "22.0 MB",
        "5.25 bits/weight",
        "executorch/model.pte",
        "group-quantize bits=4 group=32",
        "42 weights changed, 4 skipped",
        "skipped 2: a vector (layers.0.norm, layers.1.norm)",
        "at most 0.05",
        "at least 0.9",
        "400.0 tokens/s",
        "host CPU, 2 threads, 5 runs",
        "not on the phone",
    ):
        assert part in text, part


def test_the_last_lines_are_commands_to_copy(report: Report) -> None:
    out = Path("/very/long") / ("folder " * 20) / "it's out"
    lines = printed(report, width=60, out=out).splitlines()
    commands = [line.strip() for line in lines[-2:]]
    assert commands == list(next_commands(report, out))
    assert shlex.split(commands[0])[:4] == ["slm-export", "run", str(out), "--prompt"]
    assert shlex.split(commands[1]) == ["slm-export", "verify", str(out)]


def test_a_failed_check_says_where_the_two_sides_part(artifact: Artifact) -> None:
    text = printed(decoder_report(artifact, kl_mean=0.5))
    assert "FAIL" in text
    assert "kl_mean: the mean KL over 2,048 tokens" in text


def test_an_unverified_artifact_is_called_so(artifact: Artifact) -> None:
    report = unverified(decoder_report(artifact))
    assert "not compared with the source" in printed(report)
    assert "Not compared with the source" in to_html(report)


def test_an_encoder_shows_percentiles_and_no_token_rates(artifact: Artifact) -> None:
    text = printed(encoder_report(artifact))
    assert "p90 at 64 tokens" in text
    assert "tokens/s" not in text


def test_control_characters_and_markup_of_a_name_are_shown_not_obeyed(artifact: Artifact) -> None:
    text = printed(decoder_report(artifact, name=HOSTILE))
    assert "\x1b" not in text
    assert "[red]\\x1b[2J" in text


@pytest.mark.parametrize("width", [20, 60, 200])
def test_any_width_will_do(report: Report, width: int) -> None:
    assert "Next" in printed(report, width)


# --- the page ----------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_shows_the_figures(report: Report) -> None:
    page = Page(to_html(report))
    assert page.open == []
    for result in report.formats:
        assert result.artifact.sha256 in page.text
        for name, value in (*words.speed_rows(result), *words.quality_rows(result)):
            assert name in page.text
            assert value in page.text


def test_the_page_asks_nobody_for_anything(report: Report) -> None:
    text = to_html(report)
    page = Page(text)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "form"}
    assert not {name for name, _ in page.attributes} & {"src", "style"}
    anchors = {value for name, value in page.attributes if name == "id"}
    assert {value for name, value in page.attributes if name == "href"} == {f"#{name}" for name in anchors}
    assert not re.search(r"https?:|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text


def test_the_page_is_the_same_for_the_same_report(report: Report) -> None:
    assert to_html(report) == to_html(dataclasses.replace(report))


def hostile(report: Report) -> Report:
    """Return the report with every text that comes from outside replaced by a hostile one."""
    result = report.formats[0]
    return dataclasses.replace(
        report,
        model=dataclasses.replace(report.model, name=HOSTILE, architecture=HOSTILE, licence=HOSTILE),
        device_title=HOSTILE,
        passes=tuple(
            dataclasses.replace(row, options={"x": HOSTILE}, skipped={HOSTILE: HOSTILE})
            for row in report.passes
        ),
        formats=(
            dataclasses.replace(
                result,
                quality=TokenQuality(
                    greedy_text=HOSTILE,
                    examples=(Divergence(HOSTILE, HOSTILE, HOSTILE, 0.5, HOSTILE, 0.5, 1.0, HOSTILE),),
                ),
                checks=(Check(HOSTILE, False, HOSTILE, 1.0, 0.5),),
            ),
        ),
        notes=(HOSTILE,),
        stages={HOSTILE: 1.0},
        asked={HOSTILE: HOSTILE},
        environment={HOSTILE: HOSTILE},
        weights=(WeightRow(HOSTILE, "linear", 0, HOSTILE, 8, 8, 8, 0.1),),
        frontier=(FrontierPoint(HOSTILE, 8, 1.1, 1.2, chosen=True),),
    )


def test_no_text_of_a_model_becomes_part_of_the_page(artifact: Artifact) -> None:
    page = Page(to_html(hostile(decoder_report(artifact))))
    assert "script" not in page.tags
    assert page.text.count("<script>alert('x')</script>") >= 20
    assert page.open == []


def test_no_text_of_a_model_reaches_the_terminal_raw(artifact: Artifact) -> None:
    assert "\x1b" not in printed(hostile(decoder_report(artifact)))


@pytest.mark.parametrize("bits", [None, 5.25])
def test_bars_are_in_proportion(artifact: Artifact, bits: float | None) -> None:
    report = decoder_report(dataclasses.replace(artifact, bytes=11_000_000, bits_per_weight=bits))
    widths = [float(value) for value in re.findall(r'<rect class="bar" width="([\d.]+)"', to_html(report))]
    assert widths[:3] == pytest.approx([100.0, 100 * 3.6 / 22, 50.0], abs=0.01)


# --- words -------------------------------------------------------------------------------------------


def test_reasons_that_differ_in_numbers_only_are_one() -> None:
    skipped = {f"w{index}": f"{index} columns do not divide" for index in range(5)} | {"b": "a vector"}
    assert words.grouped_reasons(skipped) == [
        (5, "0 columns do not divide, and the like", "w0, w1, w2 and 2 more"),
        (1, "a vector", "b"),
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (3_900_000, "3.9 MB"), (1_083_000_000, "1.08 GB")],
)
def test_sizes(value: int, text: str) -> None:
    assert words.megabytes(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.42, "0.42 s"), (12.34, "12.3 s"), (200.9, "3 min 20 s")])
def test_seconds(value: float, text: str) -> None:
    assert words.seconds(value) == text


def test_a_size_that_grew_is_not_called_smaller() -> None:
    assert words.change(100, 120) == "1.2x larger"
    assert words.change(100, 50) == "2.0x smaller"
