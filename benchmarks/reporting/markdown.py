"""The report as Markdown: the same page, its charts as tables of their numbers."""

from __future__ import annotations

import re
from html import escape

from prefzoo.benchmarks.reporting.page import Answers, Block, Cell, Choice, Code, Column, Matrix, Page, Table, Words
from prefzoo.benchmarks.reporting.page import Chart as ChartBlock

SHOWN, METHODS = 5, 12  # prompts and methods of the answers; the HTML has all


def escaped(text: str) -> str:
    """Text that every Markdown shows letter by letter, on one line: entities where not all know the backslash.

    >>> escaped("sft_more <img> [x](y) | 1.5 to 2"), escaped("# no heading, _this_")
    ('sft_more &lt;img&gt; \\\\[x\\\\](y) &#124; 1.5 to 2', '&#35; no heading, \\\\_this\\\\_')
    """
    line = re.sub(r"([\\`*{}\[\]]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", _line(text))
    line = escape(line, quote=False)
    line = re.sub(r"[|$~^]", _entity, line)
    line = re.sub(r":(?=//)|(?<=www)\.|@", _entity, line, flags=re.I)  # nor does an address become a link
    line = re.sub(r"^(?:[#=:]|[+-](?=[\s+-]|$))", _entity, line)
    return re.sub(r"^(\d+)([.)])(?=\s|$)", lambda found: f"{found[1]}&#{ord(found[2])};", line)


def _entity(found: re.Match[str]) -> str:
    return f"&#{ord(found[0])};"


def raw(text: str, *, table: bool = False) -> str:
    """Text as code, between more backticks than it holds in a row."""
    text = _line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    room = " " if text[:1] in ("`", "") or text[-1:] == "`" else ""
    code = f"{fence}{room}{text}{room}{fence}"
    return code.replace("|", "\\|") if table else code


def fenced(text: str, language: str = "") -> str:
    """Lines of code, between more backticks than they hold in a row."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _line(text: str) -> str:
    return " ".join(text.split())


def markdown(page: Page) -> str:
    """The page as Markdown."""
    parts = [f"# {escaped(page.title)}: which method is better, and how sure is that?"]
    parts += [escaped(page.about)] if page.about else []
    parts.append(" · ".join(escaped(f) for f in page.facts))
    for index, section in enumerate(page.sections):
        lead = f"{escaped(section.task)}: " if section.task and page.tasks else ""
        parts.append(f"## {lead}{section.title}")
        if index == 0:
            parts += [_block(section.blocks[0]), escaped(section.how), *map(_block, section.blocks[1:])]
            parts.append(f"![Win rates, reward against KL, curves]({page.picture})")
        else:
            parts += [escaped(section.how), *map(_block, section.blocks)]
    return "\n\n".join(p for p in parts if p) + "\n"


def _block(block: Block) -> str:
    match block:
        case Words(sentences=sentences, lead=lead):
            lines = [escaped(s) for s in sentences]
            return "\n".join([f"**{lines[0]}**\n", *(f"- {s}" for s in lines[1:])]) if lead else " ".join(lines)
        case Table():
            return _table(block)
        case ChartBlock(title=title, numbers=numbers):
            return _table(numbers, title)
        case Choice(options=options):
            return "\n\n".join(_block(chart) for chart in options.values())
        case Code(text=text, language=language, title=title):
            return f"**{escaped(title)}**\n\n{fenced(text, language)}"
        case Matrix():
            return ""  # the table of pairs has all of it
        case Answers():
            return _answers(block)


def _table(table: Table, title: str = "") -> str:
    head = "| " + " | ".join(_head(c) for c in table.columns) + " |"
    rule = "|" + "|".join("---:" if c.number else "---" for c in table.columns) + "|"
    rows = ["| " + " | ".join(_cell(c) for c in row) + " |" for row in table.rows]
    return "\n".join([f"**{escaped(title or table.title)}**", "", head, rule, *rows])


def _head(column: Column) -> str:
    return escaped(column.title)


def _cell(cell: Cell) -> str:
    text = raw(cell.text, table=True) if cell.raw and cell.text else escaped(cell.text)
    text = f"**{text}**" if cell.tone in ("better", "worse") and text and not cell.raw else text
    return f"{text} ({escaped(cell.note)})" if cell.note else text


def _answers(answers: Answers) -> str:
    """A few prompts; Markdown has no search."""
    methods = answers.methods[:METHODS]
    parts = [f"The first {min(SHOWN, len(answers.prompts))} prompts; all of them are in `report.html`."]
    for prompt in answers.prompts[:SHOWN]:
        parts += [f"**Prompt {prompt['prompt']}**", fenced(prompt["text"] or " ")]
        for method in methods:
            for answer in prompt["answers"].get(method, ())[:1]:
                score = ", ".join(f"{k} {v:g}" for k, v in answer["scores"].items() if k in ("gold", "exact", "proxy"))
                parts += [f"{escaped(method)}{f' ({escaped(score)})' if score else ''}:", fenced(answer["text"] or " ")]
    return "\n\n".join(parts)
