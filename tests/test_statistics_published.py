"""The page of published numbers is what its script prints."""

import os
import runpy
from pathlib import Path

import pytest

DATA = Path(os.environ.get("PREFZOO_DATA", "../shared/data"))
RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"


@pytest.mark.long
def test_the_page_is_what_the_data_give() -> None:
    missing = [name for name in ("alpaca_eval_winrates", "pandalm_human", "llmbar") if not (DATA / name).exists()]
    if missing:
        pytest.skip(f"no {', '.join(missing)} in {DATA}")
    page = runpy.run_path(str(RESULTS / "published.py"))["page"](DATA)
    assert page == (RESULTS / "published.md").read_text(encoding="utf-8")
