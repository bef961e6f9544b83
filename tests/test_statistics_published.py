"""The page of published numbers is what its script prints."""

import runpy
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"


@pytest.mark.long
def test_the_page_is_what_the_data_give(data_dir: Path) -> None:
    missing = [name for name in ("alpaca_eval_winrates", "pandalm_human", "llmbar") if not (data_dir / name).exists()]
    if missing:
        pytest.skip(f"no {', '.join(missing)} in {data_dir}")
    page = runpy.run_path(str(RESULTS / "published.py"))["page"](data_dir)
    assert page == (RESULTS / "published.md").read_text(encoding="utf-8")
