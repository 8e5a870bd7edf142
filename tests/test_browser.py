"""The pages in a real browser: nothing in its console, nothing asked for, plots there, both schemes readable.

Not in the default run; `pytest -m browser` (CONTRIBUTING.md) wants Chromium: `apt-get install chromium`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Page, browser, find_chromium
from sample_reports import artifact_of, decoder_report, encoder_report, fill, full_report, make, unverified

from slm_export.reports.compared import read_bundles
from slm_export.reports.comparison import compare_bundles
from slm_export.reports.page.comparison_page import comparison_page
from slm_export.reports.report import bundled, to_html

pytestmark = pytest.mark.browser

PHONE, DESK = 360, 1200
NAMES = ("full", "decoder", "encoder", "failed", "unverified", "comparison")

CONTRAST = """
(() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const found = parse(getComputedStyle(at).backgroundColor);
      if (found.length === 3 || found[3] > 0) return found.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || element.closest("svg")) continue;
    const [a, b] = [light(parse(getComputedStyle(element).color).slice(0, 3)), light(ground(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push(`${ratio.toFixed(2)}: ${walker.currentNode.textContent.trim().slice(0, 40)}`);
  }
  return poor;
})()
"""
LABELS = """
(() => {
  const poor = [];
  const light = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number).map((v) =>
    (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const text = light(getComputedStyle(document.querySelector(".treemap text")).fill);
  for (const cell of document.querySelectorAll(".treemap rect:not(.group)")) {
    const fill = light(getComputedStyle(cell).fill);
    const ratio = (Math.max(text, fill) + 0.05) / (Math.min(text, fill) + 0.05);
    if (ratio < 4.5) poor.push(`${ratio.toFixed(2)} on ${cell.getAttribute("class")}`);
  }
  return poor;
})()
"""
WIDE = """
[...document.querySelectorAll("body *")]
  .filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".wide") && !e.closest("pre"))
  .map((e) => `${e.tagName} ${e.className.baseVal ?? e.className}`)
"""
SEEN = """
(selector) => [...document.querySelectorAll(selector)].filter((e) => {
  const box = e.getBoundingClientRect();
  return box.width > 0 && box.height > 0;
}).length
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    artifact = artifact_of(fill(folder))
    reports = {
        "full": full_report(artifact, second=dataclasses.replace(artifact, format="onnx")),
        "decoder": decoder_report(artifact),
        "encoder": encoder_report(artifact),
        "failed": decoder_report(artifact, kl_mean=0.5),
        "unverified": unverified(decoder_report(artifact)),
    }
    texts = {name: to_html(bundled(report, folder)) for name, report in reports.items()}
    bundles = [make(folder / "first"), make(folder / "second", text="other")]
    texts["comparison"] = comparison_page(compare_bundles(read_bundles(bundles)))
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    command = find_chromium()
    assert command, "no Chromium: apt-get install chromium"
    with browser(command, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_complained_of_asked_for_cut_off_or_hard_to_read(
    name: str, width: int, dark: bool, pages: dict[str, Path], tab: Page
) -> None:
    tab.show(pages[name], width=width, dark=dark)
    tab.value("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    assert tab.problems == []
    assert tab.requests == [pages[name].as_uri()]
    assert tab.value(WIDE) == []
    assert tab.value("document.documentElement.scrollWidth <= innerWidth")
    assert tab.value(CONTRAST) == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_every_plot_is_there(width: int, dark: bool, pages: dict[str, Path], tab: Page) -> None:
    tab.show(pages["full"], width=width, dark=dark)

    def seen(selector: str) -> int:
        return int(tab.value(f"({SEEN})({selector!r})"))

    assert seen(".treemap rect:not(.group)") > 30
    assert seen(".treemap text") >= 5
    assert seen(".heat td") == 8 * 4 + 1
    assert seen(".plot .area") == 2  # roofline and frontier
    assert seen(".plot circle") == 4 + 7
    assert seen(".plot .line") >= 2 + 3 - 1  # a flat line has a box without height
    assert seen(".bars rect") >= 6
    assert seen(".checks .bar") == 4
    assert tab.value(LABELS) == []


def test_the_schemes_differ(pages: dict[str, Path], tab: Page) -> None:
    grounds = []
    for dark in (False, True):
        tab.show(pages["full"], width=DESK, dark=dark)
        grounds.append(tab.value("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(255, 255, 255)", "rgb(14, 19, 24)"]


def test_plots_stretch_with_the_page_and_their_text_does_not(pages: dict[str, Path], tab: Page) -> None:
    sizes = []
    for width in (PHONE, DESK):
        tab.show(pages["full"], width=width)
        sizes.append(tab.value("document.querySelector('.treemap').getBoundingClientRect().width"))
        assert tab.value("getComputedStyle(document.querySelector('.treemap text')).fontSize") == "12px"
    assert sizes[0] > PHONE * 0.9
    assert sizes[1] > DESK * 0.75
