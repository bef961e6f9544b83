"""Reports of a finished suite: ``report.html``, ``report.md``, ``report.png`` and a table for the terminal.

All from ``results.json``, but for the answers side by side, which are a sample of ``rows.parquet``.
"""

from __future__ import annotations

from pathlib import Path

from prefzoo.benchmarks.reporting.html import html
from prefzoo.benchmarks.reporting.markdown import markdown
from prefzoo.benchmarks.reporting.picture import draw
from prefzoo.benchmarks.reporting.sections import page
from prefzoo.benchmarks.reporting.stored import read_results
from prefzoo.benchmarks.reporting.terminal import terminal
from prefzoo.files import replacing_file

__all__ = ["report", "write_report"]


def report(folder: str | Path, recompute: bool = False) -> str:
    """Write the report of a finished suite again; returns the terminal's table.

    Args:
        folder: the ``--out`` of ``prefzoo bench``.
        recompute: compute every number again first, from the stored rows, and write ``results.json``.

    Raises ``UsageError`` where the folder has no results, or those of another version.
    """
    folder = Path(folder)
    if recompute:
        import json

        from prefzoo.benchmarks.results import recompute as computed_again

        read_results(folder)  # says it where another version wrote them
        results = computed_again(folder)
        with replacing_file(folder / "results.json") as aside:
            aside.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return write_report(folder)


def write_report(folder: Path) -> str:
    """Write ``report.html``, ``report.md`` and ``report.png`` beside ``results.json``; returns the terminal's table."""
    results = read_results(folder)
    made = page(results, folder)
    for name, text in (("report.html", html(made)), ("report.md", markdown(made))):
        with replacing_file(folder / name) as aside:
            aside.write_text(text, encoding="utf-8")
    draw(results, folder / "report.png")
    return terminal(results) + f"\nreport: {folder / 'report.html'} (and report.md, report.png)\n"
