"""Controls of the harness that need real training: nothing is learned from labels and rewards that say nothing, and
something is from those that do; and one pass over real human preferences."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from prefzoo import benchmarks
from prefzoo.benchmarks import statistics
from prefzoo.benchmarks.suites import START, Method, Suite, requests_task

pytestmark = pytest.mark.long

HH = Path("hh_rlhf", "hh_rlhf_harmless_test.jsonl.gz")
METHODS = (
    START,
    Method("dpo", "dpo", {"beta": 0.1}, {"learning_rate": 5e-4, "max_steps": 60}),
    Method("grpo", "grpo", {"kl": 0.1, "count": "row"}, {"learning_rate": 4e-4, "max_steps": 12}),
)


def medium(permuted: bool, folder: Path) -> dict[str, Any]:
    """A start, 3,600 pairs, a reward model, two methods and 256 test prompts; both runs share every seed."""
    task = requests_task(
        METHODS, demonstrations=8_000, start_steps=120, start_rows=64, prompts=900, samples=8, permuted=permuted,
        validation_prompts=128,
    )  # fmt: skip
    results = benchmarks.run(Suite("medium", (task,), test_prompts=256), out=folder, workers=1, quiet=True)
    found = results["tasks"]["requests"]
    assert found["failed"] == {} and set(found["methods"]) == {"start", "dpo", "grpo"}
    return found


def wins(task: dict[str, Any]) -> list[statistics.Estimate]:
    return [statistics.Estimate(**task["methods"][m]["against_start"]["win"]) for m in ("dpo", "grpo")]


def test_permuted_labels_and_rewards_teach_nothing(tmp_path: Path) -> None:
    """No method's lower bound, adjusted for the family, is above 50 %. Drifting away from 50 % downwards is allowed."""
    task = medium(True, tmp_path)
    bounds = statistics.holm_lower_bounds(wins(task))
    assert not bounds.exceeds_K.any() and (bounds.low_K <= 0.5).all(), (bounds, wins(task))
    assert all(w.n_prompts == 256 for w in wins(task))
    reward_model = task["shared"]["reward_model"]
    assert abs(reward_model["accuracy_against_gold"] - 0.5) < 0.15, "it was trained on coins"
    assert (
        task["methods"]["grpo"]["spent"]["reward_calls"] > 0
        and task["methods"]["dpo"]["means"]["kl"]["estimate"] > 0.05
    )


def test_the_same_suite_with_true_labels_teaches_something(tmp_path: Path) -> None:
    """So that the control above can fail: same sizes, same recipes, labels and rewards left as they are."""
    task = medium(False, tmp_path)
    bounds = statistics.holm_lower_bounds(wins(task))
    assert bounds.exceeds_K.all(), (bounds, wins(task))
    assert all(w.ci[0] > 0.5 for w in wins(task)), wins(task)
    assert task["shared"]["reward_model"]["accuracy_against_gold"] > 0.55


def test_real_human_preferences_end_to_end(data_dir: Path, tmp_path: Path) -> None:
    """The suite for users' own pairs on HH, shortened: what it says about the data and about itself is right."""
    file = data_dir / HH
    if not file.exists():
        pytest.skip(f"no {file}")
    suite = benchmarks.get_suite("pairs")
    (task,) = suite.tasks
    short = {"start_steps": 20, "reward_epochs": 0.2, "vocabulary": 512, "max_length": 192}
    steps = {"dpo": {"max_steps": 4}, "grpo": {"max_steps": 2, "logging_steps": 1}, "rlvr": {}}
    methods = tuple(
        m if m.baseline else dataclasses.replace(m, training={**m.training, **steps[m.name]})
        for m in task.methods if m.baseline or m.name in steps
    )  # fmt: skip
    options = {**task.options, "max_new_tokens": 24, "group_size": 4, "prompts_per_step": 8}
    task = dataclasses.replace(task, settings={**task.settings, **short}, methods=methods, options=options)
    suite = dataclasses.replace(suite, tasks=(task,), test_prompts=48, samples=2)

    results = benchmarks.run(suite, data=file, out=tmp_path, workers=1, quiet=True)["tasks"]["pairs"]
    assert results["failed"] == {} and set(results["methods"]) == {"start", "dpo", "grpo", "sft_more"}
    assert results["not_applicable"] == {"rlvr": "the data has preferences but no answers that a verifier could check"}
    data, accuracy = results["shared"]["data"], results["judge_accuracy"]
    thirds = [data[t]["rows"] + data[t]["prompt too long"] for t in ("train", "judge", "test")]
    assert data["rows"] + sum(data["dropped"].values()) == 2312 and sum(thirds) == data["rows"]
    assert min(thirds) > 650, "thirds of dialogues are about thirds of rows"
    assert accuracy["n"] == data["test"]["rows"] > 300
    assert 0.4 < accuracy["ci"][0] < accuracy["estimate"] < accuracy["ci"][1] < 0.75, (
        "a model this small is near a coin"
    )
    assert accuracy["ci"][1] - accuracy["ci"][0] == pytest.approx(2 * 1.96 * np.sqrt(0.25 / accuracy["n"]), rel=0.03)

    turns = {}
    for third in ("train", "judge", "test"):
        lines = next((tmp_path / "cells").glob("pairs-data-*")).joinpath(f"{third}.jsonl").read_text().split("\n")
        turns[third] = {json.loads(x)["prompt"].split("\n\nAssistant:")[0] for x in lines if x}
    assert not turns["train"] & turns["judge"] and not (turns["train"] | turns["judge"]) & turns["test"]
    asked = set(pq.read_table(tmp_path / "rows.parquet")["prompt_text"].to_pylist())
    assert len(asked) == 48 and {p.split("\n\nAssistant:")[0] for p in asked} <= turns["test"]
    page = (tmp_path / "report.md").read_text()
    assert f"{100 * accuracy['estimate']:.1f} %" in page and "nothing here says that people would prefer them" in page
    assert results["methods"]["dpo"]["against_start"]["win"]["this_run_only"] is True
