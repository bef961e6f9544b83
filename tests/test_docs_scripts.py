"""The scripts under docs/scripts run as they stand, end with what they promise, and write below ``runs`` alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

SCRIPTS = Path(__file__).resolve().parent.parent / "docs" / "scripts"
PROMISED = {
    "align_on_my_pairs": (
        "type preference", "dropped 1 (chosen and rejected are identical)", "dropped 1 (an empty side)", "eval/loss",
        "trained   start", "better",
    ),
    "rl_with_my_reward": ("[0.97, -0.12]", "step 100", "eval/reward", "eval/right", "trained   start", "better"),
    "compare_on_my_data": (
        "agrees with the truth", "start", *(f"this {name} model wins" for name in ("sft", "dpo", "kto")),
    ),
    "add_a_loss": ("halves_equal_whole", "passed", "length_explained  friendly", "dpo               friendly"),
    "add_an_algorithm": ("Rollouts x Reward x LeaveOneOut", "needs ['policy', 'reward']", "rehearsed", "per answer"),
}  # fmt: skip


def test_every_script_is_tested_and_listed() -> None:
    page = SCRIPTS.with_name("scripts.md").read_text(encoding="utf-8")
    names = {path.stem for path in SCRIPTS.glob("*.py")}
    assert names == set(PROMISED)
    assert all(f"(scripts/{name}.py)" in page for name in names)


@pytest.mark.parametrize("name", PROMISED)
def test_a_script_runs_and_shows_what_it_promises(name: str, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPTS / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    missing = [words for words in PROMISED[name] if words not in done.stdout]
    assert not missing, (missing, done.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize("name", PROMISED)
def test_a_script_is_cells_of_text_and_code(name: str) -> None:
    """A text cell holds comments alone, and no two code cells follow without a word between them."""
    lines = (SCRIPTS / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# %% [markdown]" and lines[1].startswith("# # ")
    marks = [line for line in lines if line.startswith("# %%")]
    assert marks[::2] == ["# %% [markdown]"] * len(marks[::2]) and set(marks[1::2]) == {"# %%"}
    text = False
    for line in lines:
        text = line == "# %% [markdown]" if line.startswith("# %%") else text
        assert not text or not line or line.startswith("#"), line
