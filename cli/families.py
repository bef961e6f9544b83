"""The map of the zoo: a table for each family, a file of ``algos/``, between marks in a page of prose.

python -m prefzoo.cli.families docs/algorithms.md
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from prefzoo.algorithm import ALGORITHMS
from prefzoo.cli.cards import algorithm_facts

HEAD = "| name | what it is | source | feedback | credit | terms | mean over | reference | needs |"
MARK = re.compile(r"<!-- (\w+) -->\n.*?<!-- end -->", re.S)


def members() -> dict[str, list[str]]:
    """Names of the compositions by the file of ``algos/`` that they stand in."""
    found: dict[str, list[str]] = {}
    for name in ALGORITHMS.names():
        package, _, file = ALGORITHMS.entry(name).function.__module__.rpartition(".")
        if package == "prefzoo.algos":
            found.setdefault(file, []).append(name)
    return found


def family_table(names: list[str]) -> str:
    """One line for each of these algorithms; stages follow one another by arrows."""
    lines = [HEAD, "|" + "---|" * HEAD.count(" | ") + "---|"]
    for name in names:
        facts = algorithm_facts(name)
        also = f" ({', '.join(f'`{alias}`' for alias in facts['aliases'])})" if facts["aliases"] else ""
        cells = [facts[c] for c in ("source", "feedback", "credit", "terms", "count", "reference")]
        needs = ", ".join(facts["needs"]) or "–"
        line = facts["line"].removesuffix(".").replace("|", "\\|")
        lines.append(f"| [`{name}`](cards/{name}.md){also} | {line} | {' | '.join([*cells, needs])} |")
    return "\n".join(lines)


def filled(page: str, families: Mapping[str, list[str]]) -> str:
    """The page with every table between its marks made anew."""

    def one(found: re.Match[str]) -> str:
        return f"<!-- {found[1]} -->\n\n{family_table(families[found[1]])}\n\n<!-- end -->"

    return MARK.sub(one, page)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(filled(path.read_text(encoding="utf-8"), members()), encoding="utf-8")
