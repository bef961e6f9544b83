"""Reports: the same page twice, every number from the results, and text of others that stays text."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import reports
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt  # comes with rich

from prefzoo.benchmarks import report
from prefzoo.benchmarks.reporting import charts, stored, words
from prefzoo.benchmarks.reporting.figures import frontier, learning_curves
from prefzoo.benchmarks.reporting.html import embedded, html
from prefzoo.benchmarks.reporting.leaderboard import _matrix
from prefzoo.benchmarks.reporting.markdown import escaped, fenced, markdown, raw
from prefzoo.benchmarks.reporting.page import Chart, Choice, Page, Table
from prefzoo.benchmarks.reporting.sections import page
from prefzoo.benchmarks.reporting.terminal import terminal
from prefzoo.registry import UsageError

COMMONMARK = MarkdownIt("commonmark").enable("table")


class Tags(HTMLParser):
    """Every tag with the names of its attributes, and the text between."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("report")
    reports.finished(made)
    report(made)
    shutil.rmtree(made / "cells")
    return made


@pytest.fixture
def results(folder: Path) -> dict[str, Any]:
    return stored.read_results(folder)


@pytest.fixture
def made(folder: Path, results: dict[str, Any]) -> Page:
    return page(results, folder)


def tables(made: Page) -> list[Table]:
    """All tables of a page, those of charts too."""
    found: list[Table] = []
    for section in made.sections:
        for block in section.blocks:
            charts_of = block.options.values() if isinstance(block, Choice) else [block]
            found += [b.numbers if isinstance(b, Chart) else b for b in charts_of if isinstance(b, Table | Chart)]
    return found


def copied(folder: Path, to: Path, *names: str) -> Path:
    for name in names:
        shutil.copy(folder / name, to)
    return to


# ------------------------------------------------------------------------------------------- one page, two writers


def test_html_and_markdown_show_every_cell_of_every_table(made: Page) -> None:
    shown = " ".join(Tags(html(made)).texts)
    rendered = Tags(COMMONMARK.render(markdown(made)))
    plain = " ".join("".join(rendered.texts).split())
    for table in tables(made):
        for cell in (cell for row in table.rows for cell in row):
            assert cell.text in shown and " ".join(cell.text.split()) in plain
            assert cell.note in shown and cell.note in plain


def test_sections_come_in_the_order_of_their_weight(made: Page) -> None:
    assert [s.title for s in made.sections] == [
        "Verdict", "Leaderboard", "Who beats whom", "Reward against KL", "Gold against proxy", "Learning curves",
        "Length and diversity", "Cost", "Judges", "Tuning", "Failed and not applicable", "Answers side by side",
        "Configuration", "Versions and commands",
    ]  # fmt: skip
    assert all(s.how.endswith(".") for s in made.sections), "each says how to read it"


def test_the_verdict_is_that_of_the_results_word_by_word(made: Page, results: dict[str, Any]) -> None:
    shown = " ".join(Tags(html(made)).texts)
    at = [shown.index(sentence) for sentence in results["verdict"]]
    assert at == sorted(at) and at[-1] < shown.rindex("Leaderboard")


def test_the_same_results_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    copied(folder, tmp_path, "results.json", "rows.parquet")
    report(tmp_path)
    for name in ("report.html", "report.md", "report.png"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


# ------------------------------------------------------------------------------------------------------ numbers


def test_the_leaderboard_is_ranked_and_rounded_from_the_results(made: Page, results: dict[str, Any]) -> None:
    board = next(t for t in tables(made) if t.title == "Leaderboard")
    methods = results["tasks"]["requests"]["methods"]
    wins = [methods[row[0].text]["win"]["estimate"] for row in board.rows[:4]]
    assert wins == sorted(wins, reverse=True)
    assert [row[0].text for row in board.rows[4:]] == ["sft_more", "start"], "baselines stand below"
    assert {row[0].text for row in board.rows} == set(methods), "nobody is dropped"
    for row in board.rows[:-1]:
        win = methods[row[0].text]["win"]
        low, high = win["ci"]
        assert row[1].text == f"{100 * win['estimate']:.1f}"
        assert row[1].note == f"{max(100 * low, 0):.1f} to {min(100 * high, 100):.1f}"
        assert row[1].bar == (max(low, 0), win["estimate"], min(high, 1))
    failed = {row[0].text: row[-2].text for row in board.rows}
    assert failed["ipo"] == "1 of 3" and failed["dpo"] == "0 of 3"


def test_the_matrix_is_its_own_mirror(results: dict[str, Any]) -> None:
    task = results["tasks"]["requests"]
    matrix = _matrix(task)
    mirror = {"B": "W", "W": "B", "E": "E", "U": "U"}
    for i, row in enumerate(matrix.cells):
        for j, cell in enumerate(row):
            other = matrix.cells[j][i]
            if i == j:
                assert cell is None
                continue
            assert cell is not None and other is not None
            assert cell.sort == pytest.approx(1 - other.sort) and mirror[cell.note] == other.note  # type: ignore[operator]
    for pair in task["pairs"]:
        cell = matrix.cells[matrix.names.index(pair["a"])][matrix.names.index(pair["b"])]
        assert cell is not None and cell.tone == pair["verdict"]
        gap = pair["difference"]
        for number in (f"{100 * gap['se']:.2f} points", f"df {gap['df']:.1f}", words.p_words(pair["p_holm"])):
            assert number in cell.tip
        assert f"smallest detectable {100 * pair['smallest_detectable']:.1f} points" in cell.tip


def test_a_large_suite_has_no_matrix_and_tables_to_filter(results: dict[str, Any], folder: Path) -> None:
    task = results["tasks"]["requests"]
    task["methods"] |= {f"copy {k}": task["methods"]["dpo"] for k in range(100)}
    task["pairs"] = [p for p in task["pairs"] if p["b"] == "sft_more"]
    made = page(results | {"verdicts": "sft_more"}, folder)
    assert all(block.kind != "matrix" for s in made.sections for block in s.blocks)
    board = next(t for t in tables(made) if t.title == "Leaderboard")
    assert board.filtered and len(board.rows) == 106 and board.rows[0][0].note == "place 1"
    assert {row[0].text: row[4].text for row in board.rows}["dpo"] == "better"
    chart = frontier(task)
    assert chart is not None and chart.svg.count('class="name') < 20, "few names are written, the others are tips"


def test_failures_are_shown_with_their_last_line(results: dict[str, Any], folder: Path) -> None:
    results["tasks"]["requests"]["failed"]["requests/ipo/1"] = "Traceback …\nKeyError: 'oven [kitchen]'\n"
    reports_of = (html(page(results, folder)), markdown(page(results, folder)))
    for text in ("".join(Tags(reports_of[0]).texts), reports_of[1]):
        assert "KeyError: 'oven [kitchen]'" in text and "Traceback" not in text
        assert "All runs failed, so no numbers: grpo." in text
        assert "there is no answer to check" in text and "1 of 3" in text


def test_a_task_without_methods_says_why(results: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    task = results["tasks"]["requests"]
    task |= {"methods": {}, "pairs": [], "family": None, "frontier": None, "ratings": None, "tuning": None}
    task["failed"] = {"requests/start": "no room on the disk"}
    reports.write(tmp_path, results)
    assert "no room on the disk" in report(tmp_path)
    assert "no room on the disk" in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "report.png").exists()


def test_one_seed_is_stamped_and_needs_no_interval(results: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                k: [None, None] if k == "ci" else None if k in ("se", "df") else without(v) for k, v in value.items()
            }
        return [without(v) for v in value] if isinstance(value, list) else value

    reports.write(tmp_path, without(results) | {"this_run_only": True, "seeds": 1})
    assert "this run only" in report(tmp_path)
    assert "this run only" in (tmp_path / "report.html").read_text()


def test_terminal_names_everybody(folder: Path, results: dict[str, Any]) -> None:
    text = report(folder)
    for name, facts in results["tasks"]["requests"]["methods"].items():
        line = re.search(rf"^ *{name} .*", text, re.M)
        assert line and (name == "start" or f"{100 * facts['win']['estimate']:.1f}" in line[0])
    assert "3 seeds" in text and "rlvr, dpop: not applicable, there is no answer to check" in text
    assert "requests/ipo/1 FAILED: it diverged." in text and str(folder / "report.html") in text


def test_recompute_gives_the_same_report(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("*.parquet"):
        shutil.copy(file, tmp_path)
    copied(folder, tmp_path, "results.json")
    before = json.loads((tmp_path / "results.json").read_text())["tasks"]["requests"]
    report(tmp_path, recompute=True)
    after = json.loads((tmp_path / "results.json").read_text())["tasks"]["requests"]
    assert after["pairs"] == before["pairs"] and after["methods"] == before["methods"]


# ------------------------------------------------------------------------------------------------------ answers


def test_answers_are_those_of_the_rows(folder: Path, results: dict[str, Any]) -> None:
    found = stored.read_answers(folder, "requests", ["dpo", "ipo", "start"])
    assert found is not None and found.methods == ["dpo", "ipo", "start"] and len(found.prompts) == 60
    rows = pq.read_table(folder / "rows.parquet").to_pandas()
    ipo = rows[(rows.method == "ipo") & (rows.run == rows[rows.method == "ipo"].run.min())]
    for prompt in found.prompts[:20]:
        for answer in prompt["answers"]["ipo"]:
            row = ipo[(ipo.prompt == prompt["prompt"]) & (ipo["sample"] == answer["sample"])].iloc[0]
            assert answer["text"] == row.completion and prompt["text"] == row.prompt_text
            assert answer["scores"]["gold"] == pytest.approx(row.gold, rel=1e-3)
            assert "run" not in answer["scores"] and "seed" not in answer["scores"]


def test_long_answers_mean_fewer_prompts_still_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [{"prompt": k, "answers": {"dpo": [{"text": "x" * 100}]}} for k in range(60)]
    monkeypatch.setattr(stored, "LETTERS", 2_500)
    kept = [p["prompt"] for p in stored._within(prompts)]
    assert kept == list(range(0, 60, 3)) and 100 * len(kept) <= 2_500


def test_without_rows_the_report_has_no_answers(folder: Path, tmp_path: Path) -> None:
    report(copied(folder, tmp_path, "results.json"))
    text = (tmp_path / "report.html").read_text()
    assert "Answers side by side" not in text and "Versions and commands" in text


# ------------------------------------------------------------------------------------------------------ strangers


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"suite": "quick"}, "format 1, of an earlier prefzoo.*prefzoo bench quick --out .*still valid are kept"),
        ({"suite": "q", "format": 1, "command": "prefzoo bench q --seeds 5"}, "prefzoo bench q --seeds 5 --out "),
        ({"suite": "quick", "format": 3}, "format 3.*a newer version wrote it.*Update prefzoo"),
        ({"loss": 0.5}, "was not written by prefzoo bench"),
        ([1, 2], "was not written by prefzoo bench"),
        (None, "holds no results.json; give the --out folder"),
        ("{'suite'", "is not JSON.*finished cells are kept"),
    ],
)  # fmt: skip
def test_folders_of_others_are_refused_and_left_alone(content: Any, said: str, tmp_path: Path) -> None:
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "results.json").write_text(text)
    before = sorted(tmp_path.iterdir())
    for recompute in (False, True):
        if content is None and recompute:
            continue
        with pytest.raises(UsageError, match=f"(?s){said}"):
            report(tmp_path, recompute=recompute)
    assert sorted(tmp_path.iterdir()) == before


# ------------------------------------------------------------------------------------------------- text of others


def changed(folder: Path, to: Path, change: Callable[[str], str]) -> tuple[str, str, str]:
    """The HTML, the Markdown and the terminal's words of the study with its texts changed."""
    copied(folder, to, "results.json", "rows.parquet")
    reports.write(to, reports.rewritten(json.loads((to / "results.json").read_text()), change))
    reports.rewrite_rows(to / "rows.parquet", change)
    results = stored.read_results(to)
    made = page(results, to)
    return html(made), markdown(made), terminal(results)


@pytest.mark.parametrize("hostile", reports.HOSTILE, ids=range(len(reports.HOSTILE)))
def test_hostile_text_adds_no_tag_no_attribute_and_no_markup(hostile: str, folder: Path, tmp_path: Path) -> None:
    """The page is the one that harmless words of the same length give, but for the words."""
    harmless = re.sub(r"\S", "x", words.plain(" ".join(hostile.split())))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    page_a, marked_a, _ = changed(folder, tmp_path / "a", lambda text: f"{text} {harmless}")
    page_b, marked_b, said = changed(folder, tmp_path / "b", lambda text: f"{text} {hostile}")
    assert _tags(page_b) == _tags(page_a)
    assert "\x1b" not in said + page_b + marked_b and "\u202e" not in said + page_b + marked_b
    a, b = (COMMONMARK.parse(text) for text in (marked_a, marked_b))
    assert _kinds(b) == _kinds(a)
    assert not _kinds(b) & {"html_inline", "html_block", "link_open"}
    assert [t.attrGet("src") for t in _inline(b) if t.type == "image"] == ["report.png"]


def _tags(text: str) -> list[tuple[str, tuple[str, ...]]]:
    """All but the names on charts, of which some find no room."""
    return [tag for tag in Tags(text).tags if tag[0] != "text"]


def _kinds(tokens: Any) -> set[str]:
    """Kinds of tokens without text and line ends, of which there are more where text is longer."""
    return {t.type for t in [*tokens, *_inline(tokens)]} - {"text", "softbreak", "text_special"}


def _inline(tokens: Any) -> list[Any]:
    return [child for token in tokens for child in token.children or ()]


def test_the_page_loads_nothing_and_runs_its_own_script_alone(made: Page) -> None:
    text = html(made)
    found = Tags(text)
    links = [(name, value) for _, name, value in found.attributes if name in ("href", "src", "action", "srcset")]
    ids = [value for _, name, value in found.attributes if name == "id"]
    assert links and all(name == "href" and value[:1] == "#" and value[1:] in ids for name, value in links if value)
    assert len(ids) == len(set(ids)), "every anchor is one place"
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    policy = next(v for tag, name, v in found.attributes if tag == "meta" and name == "content" and v and "src" in v)
    script = text[text.rindex("<script>") + 8 : text.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none'")
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", text), "no address outside"
    assert re.search(r"\binnerHTML|document\.write|\beval\(|insertAdjacentHTML", script) is None


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_embedded_text_comes_back_and_never_ends_its_element(text: str) -> None:
    inside = embedded([words.plain(text)])
    assert json.loads(inside) == [words.plain(text)]
    assert not set(inside) & set("<>&\u2028\u2029")
    inside.encode()


LETTERS = st.text(st.sampled_from(list("ab \\`*_{}[]<>()#+-.!|~$&^:=\"'\n1é")) | st.characters(), max_size=40)


@given(LETTERS)
@settings(max_examples=150, deadline=None)
def test_markdown_shows_any_text_letter_by_letter(text: str) -> None:
    line = " ".join(words.plain(text).split())
    in_table = Tags(COMMONMARK.render(f"|a|\n|---|\n|x{escaped(line)}y|\n"))
    assert "".join(in_table.texts).split() == ["a", *f"x{line}y".split()]
    for before, after in (("x", "y"), ("", ""), ("- ", "")):
        found = Tags(COMMONMARK.render(f"{before}{escaped(line)}{after}"))
        assert "".join(found.texts).strip() == f"{before.strip('- ')}{line}{after}"
        assert not {tag for tag, _ in found.tags} - {"p", "ul", "li"}
    if line:
        assert "".join(Tags(COMMONMARK.render(f"x {raw(line)} y")).texts).strip() == f"x {line} y"
    body = words.plain(text).rstrip()
    if body:
        assert "".join(Tags(COMMONMARK.render(fenced(body))).texts).rstrip("\n") == body


# ------------------------------------------------------------------------------------------------------ charts


def points_of(svg: str) -> dict[str, tuple[float, float]]:
    """Centre of every circle by the first line of its tip."""
    found = re.findall(r'data-tip="([^"\n]*)[^"]*">.*?<circle cx="([\d.]+)" cy="([\d.]+)"', svg, re.S)
    return {name: (float(x), float(y)) for name, x, y in found}


def test_the_frontier_is_drawn_to_scale(results: dict[str, Any]) -> None:
    """Pixels are a linear function of √KL and of gold."""
    task = results["tasks"]["requests"]
    chart = frontier(task)
    assert chart is not None
    at = points_of(chart.svg)
    assert set(at) == set(task["methods"])
    truth = {p["method"]: (p["sqrt_kl"], p["gold"]["estimate"]) for p in task["frontier"]["points"]}
    for axis in (0, 1):
        (a, b, c) = sorted(truth, key=lambda m: truth[m][axis])[::2][:3]
        slope = (at[b][axis] - at[a][axis]) / (truth[b][axis] - truth[a][axis])
        other = (at[c][axis] - at[a][axis]) / (truth[c][axis] - truth[a][axis])
        assert slope == pytest.approx(other, rel=0.02) and (slope > 0) == (axis == 0)
    assert "best of 16 by proxy" in chart.svg


def test_learning_curves_have_a_chart_per_unit(results: dict[str, Any]) -> None:
    made = learning_curves(results["tasks"]["requests"])
    assert list(made) == ["optimizer steps", "generated tokens"], "trained tokens were not counted in this study"
    curve = results["tasks"]["requests"]["methods"]["ppo"]["curve"]
    rows = [row for row in made["generated tokens"].numbers.rows if row[0].text == "ppo"]
    assert [row[1].sort for row in rows] == curve["spent"]["generated_tokens"]
    assert [row[2].sort for row in rows] == curve["means"]["gold"]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
@settings(deadline=None)
def test_ticks_are_few_round_and_inside(low: float, width: float) -> None:
    if low + width <= low + abs(low) * 1e-9:
        return
    found = charts.ticks(low, low + width)
    assert 1 <= len(found) <= 8
    assert all(low - 1e-9 * width <= t <= low + width * (1 + 1e-9) for t in found) or abs(low) > 1e3 * width
    if len(found) > 1:
        step = found[1] - found[0]
        assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 3) in (1, 2, 5) or abs(low) > 1e3 * width


def test_names_lie_over_nothing() -> None:
    panel = charts.Panel(charts.Axis("x", 0, 1), charts.Axis("y", 0, 1))
    for k in range(40):
        panel.point(0.5 + 0.01 * (k % 7), 0.5 + 0.01 * (k // 7), "s0", "tip", name=f"method {k}")
    panel.labels()
    boxes = panel.taken[40:]
    assert 3 < len(boxes) < 40, "where there is no room a name is left out"
    for i, a in enumerate(panel.taken[40:]):
        for b in panel.taken[40:][i + 1 :]:
            assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]
