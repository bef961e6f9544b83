"""Controls of the harness that need real training: nothing is learned from labels and rewards that say nothing, and
something is from those that do; and one pass over real human preferences."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

from prefzoo import benchmarks
from prefzoo.benchmarks import statistics
from prefzoo.benchmarks.suites import Method, Suite, task

pytestmark = pytest.mark.long

HH = Path("hh_rlhf", "hh_rlhf_harmless_test.jsonl.gz")
METHODS = (
    Method(algorithm="dpo", options={"beta": 0.1, "learning_rate": 5e-4, "max_steps": 60}),
    Method(algorithm="grpo", options={"kl": 0.1, "count": "row", "learning_rate": 4e-4, "max_steps": 12}),
)


def medium(folder: Path, control: str | None = None) -> dict[str, Any]:
    """A start, 3,600 pairs, a reward model, two methods and 256 test prompts; both runs share every seed."""
    few = task(
        "requests", *(m.but(control=control) for m in METHODS), baselines=["start"],
        world={"demonstrations": 8_000, "prompts": 900, "validation_prompts": 128},
        start={"sft": {"max_steps": 120, "rows_per_step": 64}},
    )  # fmt: skip
    suite = Suite(name="medium", tasks=(few,), test_prompts=256)
    found: dict[str, Any] = benchmarks.run(suite, out=folder, workers=1, quiet=True)["tasks"]["requests"]
    assert found["failed"] == {} and set(found["methods"]) == {"start", "dpo", "grpo"}
    return found


def wins(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [found["methods"][m]["win"] for m in ("dpo", "grpo")]


def above_half(found: dict[str, Any]) -> np.ndarray:
    """Which win rates are above 50 %, by Holm's one-sided tests of the family."""
    p_K = [stats.t.sf((w["estimate"] - 0.5) / w["se"], w["df"]) for w in wins(found)]
    return np.asarray(statistics.holm(p_K)) < 0.025


def test_permuted_labels_and_rewards_teach_nothing(tmp_path: Path) -> None:
    """No win rate is above 50 %, tested as a family. Drifting away from 50 % downwards is allowed.

    The reward model is as good as ever: a control's rewards are dealt to other answers of the batch.
    """
    found = medium(tmp_path, "permuted")
    assert not above_half(found).any(), wins(found)
    assert all(w["n_prompts"] == 256 for w in wins(found))
    dpo, grpo = (found["methods"][m] for m in ("dpo", "grpo"))
    assert dpo["sees"] == grpo["sees"] == "permuted"
    assert grpo["spent"]["reward_calls"] > 0 and dpo["means"]["kl"]["estimate"] > 0.05


def test_the_same_suite_with_true_labels_teaches_something(tmp_path: Path) -> None:
    """So that the control above can fail: same sizes, same recipes, labels and rewards left as they are."""
    found = medium(tmp_path)
    assert above_half(found).all() and all(w["ci"][0] > 0.5 for w in wins(found)), wins(found)
    assert found["shared"]["reward_model"]["accuracy_against_gold"] > 0.55


def test_real_human_preferences_end_to_end(data_dir: Path, tmp_path: Path) -> None:
    """The suite for users' own pairs on HH, shortened: what it says about the data and about itself is right."""
    file = data_dir / HH
    if not file.exists():
        pytest.skip(f"no {file}")
    few = [
        {"algorithm": "dpo", "options": {"max_steps": 4}}, {"algorithm": "grpo", "options": {"max_steps": 2}}, "rlvr",
    ]  # fmt: skip
    short = {
        "data.vocabulary": 512, "data.max_length": 192, "start.sft.max_steps": 20, "feedback.reward_model.epochs": 0.2,
        "decoding.max_new_tokens": 24, "decoding.samples": 2, "test_prompts": 48, "algorithms": few,
        "options": {"group_size": 4, "prompts_per_step": 8},
    }  # fmt: skip
    results = benchmarks.run("pairs", data=file, changes=short, out=tmp_path, workers=1, quiet=True)["tasks"]["pairs"]
    assert results["failed"] == {} and set(results["methods"]) == {"start", "dpo", "grpo", "sft_more"}
    assert results["not_applicable"] == {"rlvr": "the data has preferences but no answers that a verifier could check"}
    data, judge = results["shared"]["data"], results["shared"]["held_out"]
    parts = {}
    for part in ("train", "validation", "held_out", "test"):
        lines = next((tmp_path / "cells").glob("pairs-data-*")).joinpath(f"{part}.jsonl").read_text().split("\n")
        parts[part] = [json.loads(x)["prompt"] for x in lines if x]
    assert len(parts["train"]) > len(parts["test"]) > 200 and len(parts["held_out"]) > 200
    assert data["test"]["rows"] == len(parts["test"]) == judge["test_pairs"]
    rows = [data[part]["rows"] + data[part]["prompt too long"] for part in parts]
    assert data["rows"] + sum(data["dropped"].values()) == 2312 and sum(rows) == data["rows"]
    assert 0.4 < judge["right_on_test_pairs"] / judge["test_pairs"] < 0.75, "a model this small is near a coin"
    turns = {part: {p.split("\n\nAssistant:")[0] for p in prompts} for part, prompts in parts.items()}
    for one, other in itertools.combinations(turns, 2):
        assert not turns[one] & turns[other], (one, other)
    asked = set(pq.read_table(tmp_path / "rows.parquet")["prompt_text"].to_pylist())
    assert asked <= set(parts["test"]) and 40 < len(asked) <= 48
    assert "this run only" in (tmp_path / "report.md").read_text()
