"""The report in a headless Chromium: it opens from disk, asks for nothing, and its tools work."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
import reports

from prefzoo.benchmarks import report

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="needs chromium or google-chrome on the PATH")

COLOURS = ("ink", "soft", "accent", "better", "worse", "equal", "quiet", *(f"s{k}" for k in range(8)))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    started = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("report")
    results = reports.finished(made)
    task = results["tasks"]["requests"]
    task["methods"] |= {f"copy {k}": task["methods"]["kto"] for k in range(20)}  # enough for a filter
    reports.write(made, results)
    report(made)
    return made


@pytest.fixture
def opened(chromium: browser.Browser, folder: Path) -> Iterator[browser.Browser]:
    """The page, freshly opened; afterwards it has logged nothing and asked for nothing but itself."""
    chromium.console.clear()
    chromium.requests.clear()
    chromium.size(1280, 900)
    chromium.scheme("light")
    url = (folder / "report.html").as_uri()
    chromium.open(url)
    yield chromium
    assert chromium.console == [] and set(chromium.requests) == {url}


def names(page: browser.Browser) -> list[str]:
    """Methods of the leaderboard that are seen, in order."""
    rows = "[...document.querySelector('.data').tBodies[0].rows]"
    return page.run(f"{rows}.filter(r => !r.hidden).map(r => r.cells[0].querySelector('.main').textContent)")


def typed(page: browser.Browser, selector: str, text: str) -> None:
    """Text put into a field."""
    field = f"document.querySelector({json.dumps(selector)})"
    page.run(f"{{ const f = {field}; f.value = {json.dumps(text)}; f.dispatchEvent(new Event('input')) }}")


def test_opens_from_disk_with_all_sections(opened: browser.Browser) -> None:
    titles = opened.run("[...document.querySelectorAll('main section > h2')].map(h => h.textContent)")
    assert titles[0] == "Verdict" and len(titles) == 14
    anchors = "[...document.querySelectorAll('nav a')]"
    assert opened.run(f"{anchors}.length") == 14
    assert opened.run(f"{anchors}.every(a => document.getElementById(a.hash.slice(1)))") is True


def test_sorting_by_a_column_and_back(opened: browser.Browser) -> None:
    before = names(opened)
    column = "document.querySelectorAll('.data thead th')[0]"
    opened.run(f"{column}.querySelector('button').click()")
    assert names(opened) == sorted(before) and opened.run(f"{column}.getAttribute('aria-sort')") == "ascending"
    opened.run(f"{column}.querySelector('button').click()")
    assert names(opened) == sorted(before, reverse=True)
    win = "document.querySelectorAll('.data thead th')[1]"
    opened.run(f"{win}.querySelector('button').click()")
    assert opened.run(f"{win}.getAttribute('aria-sort')") == "descending"
    assert opened.run(f"{column}.getAttribute('aria-sort')") == "none"
    shown = opened.run("[...document.querySelector('.data').tBodies[0].rows].map(r => r.cells[1].dataset.sort)")
    values = [float(v) for v in shown if v]
    assert values == sorted(values, reverse=True) and shown[-1] == "", "what is missing stays below"


def test_filtering_rows(opened: browser.Browser) -> None:
    everybody = names(opened)
    typed(opened, "[data-filter]", "COPY  17")
    assert names(opened) == ["copy 17"]
    assert opened.run("document.querySelector('.filter .count').textContent") == "1 of 26"
    typed(opened, "[data-filter]", "")
    assert names(opened) == everybody


def test_curves_over_another_unit(opened: browser.Browser) -> None:
    shown = "[...document.querySelectorAll('.options > div')].map(d => !d.hidden)"
    assert opened.run(shown) == [True, False]
    opened.run("document.querySelectorAll('.choice button')[1].click()")
    assert opened.run(shown) == [False, True]
    assert opened.run("document.querySelectorAll('.choice button')[1].getAttribute('aria-checked')") == "true"


def press(page: browser.Browser, key: str) -> None:
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key=key)


def test_the_matrix_tells_its_numbers_by_keyboard_and_pointer(opened: browser.Browser, folder: Path) -> None:
    opened.run("document.querySelector('.matrix button').focus({focusVisible: true})")
    first = opened.run("document.activeElement.dataset.tip")
    press(opened, "ArrowRight")
    press(opened, "ArrowDown")
    second = opened.run("document.activeElement.dataset.tip")
    assert first != second and "against" in second and opened.run("document.getElementById('tip').innerText") == second
    press(opened, "Escape")
    assert opened.run("document.getElementById('tip').hidden") is True
    opened.run("document.activeElement.blur()")
    box = opened.run("(b => [b.x + 5, b.y + 5])(document.querySelector('.matrix td button').getBoundingClientRect())")
    opened.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    assert opened.run("document.getElementById('tip').innerText") == first
    opened.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    assert opened.run("document.getElementById('tip').hidden") is True


def test_searching_answers(opened: browser.Browser) -> None:
    prompt = json.loads(opened.run("document.querySelector('.answers script').textContent"))["prompts"][7]
    wanted = prompt["answers"]["ppo"][1]
    typed(opened, ".answers input", wanted["text"].upper())
    listed = opened.run("[...document.querySelectorAll('.list button')].map(b => b.innerText)")
    assert any(prompt["text"] in text and "ppo" in text for text in listed), "found in a method that is not shown"
    opened.run("[...document.querySelectorAll('.list button')].find(b => b.value === '7').click()")
    opened.run("document.querySelector('.answers .plain').click()")
    cards = "[...document.querySelectorAll('article')]"
    card = opened.run(f"{cards}.find(a => a.querySelector('h5').textContent === 'ppo').innerText")
    assert wanted["text"] in card and re.search(rf"gold\s+{re.escape(json.dumps(wanted['scores']['gold']))}", card)
    assert wanted["text"] in opened.run("[...document.querySelectorAll('mark')].map(m => m.textContent)")
    typed(opened, ".answers input", "no such words")
    assert opened.run("document.querySelectorAll('.list li').length") == 0
    assert opened.run("document.querySelector('.answers .count').textContent") == "0 of 60 prompts"


def test_choosing_methods(opened: browser.Browser) -> None:
    shown = "[...document.querySelectorAll('article h5')].map(h => h.textContent)"
    before = opened.run(shown)
    labels = "[...document.querySelectorAll('.methods label')]"
    opened.run(f"{labels}.find(l => l.textContent.trim() === 'sft_more').querySelector('input').click()")
    assert sorted(opened.run(shown)) == sorted([*before, "sft_more"])


def luminance(page: browser.Browser, colour: str) -> float:
    """Relative luminance of a custom property, as the page resolves it (WCAG 2.2)."""
    made = f"const d = document.createElement('i'); d.style.color = 'var(--{colour})'; document.body.append(d)"
    script = f"(() => {{ {made}; const c = getComputedStyle(d).color; d.remove(); return c }})()"
    parts = [int(v) / 255 for v in re.findall(r"\d+", page.run(script))[:3]]
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_can_be_read(scheme: str, opened: browser.Browser) -> None:
    opened.scheme(scheme)
    paper = luminance(opened, "paper")
    assert (paper < 0.05) == (scheme == "dark")
    for colour in COLOURS:
        low, high = sorted((luminance(opened, colour), paper))
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"{colour} on paper, {scheme}"


def test_the_button_overrides_the_system(opened: browser.Browser) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    seen = [opened.run(background)]
    for _ in range(3):
        opened.run("document.getElementById('theme').click()")
        seen.append(opened.run(background))
    assert seen[0] == seen[1] == seen[3] and seen[2] != seen[0], "system, light, dark, system"


def test_a_narrow_window_scrolls_tables_and_not_the_page(opened: browser.Browser) -> None:
    opened.size(380, 700)
    assert opened.run("document.documentElement.scrollWidth <= innerWidth") is True
    assert opened.run("(s => s.scrollWidth > s.clientWidth)(document.querySelector('.data').parentElement)") is True


def test_it_prints_light_and_whole(opened: browser.Browser) -> None:
    opened.scheme("dark", media="print")
    assert opened.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert opened.run(
        "[...document.querySelectorAll('.options > div')].every(d => d.getBoundingClientRect().height > 0)"
    )
    assert luminance(opened, "paper") > 0.9
    printed = opened.call("Page.printToPDF", preferCSSPageSize=True, printBackground=True)["data"]
    assert printed.startswith("JVBERi0"), "base64 of %PDF-"


def test_hostile_text_runs_nothing_and_is_read_as_it_is(
    chromium: browser.Browser, folder: Path, tmp_path: Path
) -> None:
    shutil.copy(folder / "rows.parquet", tmp_path)

    def everything(text: str) -> str:
        return text + " ".join(reports.HOSTILE)

    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    reports.write(tmp_path, reports.rewritten(results, everything))
    reports.rewrite_rows(tmp_path / "rows.parquet", everything)
    report(tmp_path)
    chromium.console.clear()
    chromium.requests.clear()
    url = (tmp_path / "report.html").as_uri()
    chromium.open(url)
    chromium.run("document.querySelectorAll('.methods input:not(:checked)').forEach(i => i.click())")
    typed(chromium, ".answers input", "<img src=x")
    assert chromium.run("document.querySelectorAll('.list li').length") == 60
    for tag in ("img", "iframe", "object", "[onerror]", "[onload]"):
        assert chromium.run(f"document.querySelectorAll({json.dumps(tag)}).length") == 0
    assert chromium.run("window.stolen === undefined") is True
    text = chromium.run("document.querySelector('article .text').textContent")
    assert "</script><script>window.stolen=1;alert(1)</script>" in text and "⟨U+202E⟩" in text
    assert chromium.console == [] and set(chromium.requests) == {url}
