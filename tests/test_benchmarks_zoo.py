"""The suite of everything, and the replications: nobody is dropped, budgets are the same, tables follow from rows."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import prefzoo.worlds
from prefzoo import benchmarks
from prefzoo.algorithm import create_algorithm, list_algorithms
from prefzoo.benchmarks import replication
from prefzoo.benchmarks.cells import samples_of
from prefzoo.benchmarks.plan import plan
from prefzoo.benchmarks.rewards import manners, proxy_judge, reward_of
from prefzoo.benchmarks.suites import START, Method, Suite, about, get_suite, task
from prefzoo.feedback import resolve_reward
from prefzoo.registry import UsageError

WORLD = {"demonstrations": 300, "prompts": 16, "validation_prompts": 8, "answers": 4}
SMALL: dict[str, Any] = {
    "start": {"sft": {"max_steps": 30, "rows_per_step": 32}}, "feedback": {"reward_model": {"epochs": 1}},
}  # fmt: skip


# ---- the plan


@pytest.fixture(scope="module")
def zoo() -> SimpleNamespace:
    suite = get_suite("zoo")
    return SimpleNamespace(suite=suite, task=suite.tasks[0], plan=plan(suite))


def test_every_algorithm_is_a_cell_or_has_a_reason(zoo: SimpleNamespace) -> None:
    cells, refused = zoo.plan.cells["requests"], zoo.plan.not_applicable["requests"]
    assert set(cells) | set(refused) == {*list_algorithms(), "start", "sft_more"} and not set(cells) & set(refused)
    assert all(len(reason.split()) > 4 for reason in refused.values())
    assert len(cells) > 60, "most apply"
    trains_reward = {n for n in list_algorithms() if create_algorithm(n).trains_reward}
    assert trains_reward == {n for n, why in refused.items() if "trains a reward model" in why} != set()


def test_all_share_start_data_and_reward_model(zoo: SimpleNamespace) -> None:
    jobs = {job.name: job for job in zoo.plan.jobs}
    shared = {"start": "requests/start", "data": "requests/data", "reward_model": "requests/reward_model"}
    for name, cells in zoo.plan.cells["requests"].items():
        needs = dict(jobs[cells[0]].needs)
        taught = "teacher" in create_algorithm(name).needs if name in list_algorithms() else False
        assert needs == shared | ({"teacher": "requests/teacher"} if taught else {}), name


def test_all_that_sample_have_the_same_budget(zoo: SimpleNamespace) -> None:
    per_step, total = zoo.task.budget.per_step, zoo.task.budget.amount
    for method in zoo.task.methods:
        if method.baseline or method.name in zoo.plan.not_applicable["requests"]:
            continue
        options, training = zoo.task.resolve(method)
        made = create_algorithm(method.algorithm, **options)
        if not made.on_policy or not made.stages:
            assert training.get("max_steps") is None, method.name
            continue
        stage = made.stages[0]
        each = stage.schedule.prompts * stage.source.completions
        assert total / 1.5 <= training["max_steps"] * each <= 1.5 * total, method.name
        adapts = {"prompts_per_step", "prompts_per_round"} & options.keys()
        assert not adapts or per_step / 2 < each <= 8 * per_step, (method.name, each)


def test_what_training_sees_is_read_off_the_parts() -> None:
    seen = {n: about(Method(algorithm=n))["sees"] for n in ("dpo", "kto", "pl_dpo", "ppo", "rlvr", "sft", "gkd")}
    assert seen == {
        "dpo": "pairs", "kto": "unpaired", "pl_dpo": "rankings", "ppo": "proxy", "rlvr": "exact check",
        "sft": "completions", "gkd": "teacher",
    }  # fmt: skip
    assert [about(Method(algorithm=n))["group"] for n in ("dpo", "ppo")] == ["loss", "composition"]
    assert about(START)["group"] == "baseline"


def test_the_budget_may_be_left_to_the_method() -> None:
    budget = {"unit": "completions", "amount": 640, "per_step": 64}
    stated = task("requests", "dpo", budget=budget)
    options, training = stated.resolve(Method(algorithm="grpo", options={"group_size": 4}))
    assert (options["prompts_per_step"], training["max_steps"]) == (16, 10), "the recipe's 40 steps give way"
    left = stated.but(recipes={"rollouts": {}})
    assert left.resolve(Method(algorithm="grpo", options={"group_size": 4}))[1] == {"max_steps": 10}
    options, training = left.resolve(Method(algorithm="grpo", options={"prompts_per_step": 2, "group_size": 4}))
    assert (options["prompts_per_step"], training["max_steps"]) == (2, 80)
    assert left.resolve(Method(algorithm="rejection_sampling"))[1] == {"max_steps": 1}
    assert left.but(budget=None).resolve(Method(algorithm="grpo"))[1] == {}


# ---- the annotators' ratings


def test_of_two_ratings_the_higher_is_what_the_annotators_prefer() -> None:
    world = prefzoo.worlds.make("requests", seed=0)
    request = world.prompts("train", 1)[0]["request"]
    good, bad = world.oracle(request), "ugh , apple ."
    rng = random.Random(1)
    gap = world.utility(request, good, True) - world.utility(request, bad, True)
    flatter = dataclasses.replace(world, temperature=gap)  # so that the chance is σ(1)
    n = 4000
    wins = sum(flatter.rate(request, good, True, rng=rng) > flatter.rate(request, bad, True, rng=rng) for _ in range(n))
    chance = 1 / (1 + math.exp(-1))
    assert abs(wins / n - chance) < 4 * math.sqrt(chance * (1 - chance) / n)
    ties = sum(flatter.rate(request, bad, True, rng=rng) > flatter.rate(request, bad, True, rng=rng) for _ in range(n))
    assert abs(ties / n - 0.5) < 4 * math.sqrt(0.25 / n)


# ---- who judges


def test_parts_get_the_judge_that_they_accept(finished: SimpleNamespace) -> None:
    world = prefzoo.worlds.make("requests", seed=0)
    proxy = next((finished.folder / "cells").glob("requests-reward_model-*")) / "run" / "final"
    tokenizer = world.tokenizer()

    def given(name: str, **options: Any) -> Any:
        return reward_of(create_algorithm(name, **options), proxy, world, tokenizer)

    assert given("grpo") == proxy and given("rlvr").score == "exact"
    assert given("rlaif").compares and given("canonical_rlaif").compares
    first, second = given("safe_rlhf")
    assert first == proxy
    row = world.prompts("train", 1)[0]
    said = ["of course ! apple .", "what a great question ! apple ."]
    assert second(completions=said, request=[row["request"]] * 2) == [0.0, 1.0]
    assert given("rbr")[0] == proxy and given("rbr")[1].names == manners().names
    assert reward_of(create_algorithm("grpo"), None, world, tokenizer).score == "exact"

    judge = proxy_judge(proxy, tokenizer)
    ahead, behind = judge.function([row["prompt"]] * 2, said, said[::-1])
    ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in said]
    high, low = resolve_reward(proxy, tokenizer)(samples_of([row["prompt"]] * 2, ids, tokenizer, {})).tolist()
    assert ahead == pytest.approx(1 / (1 + math.exp(low - high)), rel=1e-4) and ahead + behind == pytest.approx(1)
    (even,) = judge.function([row["prompt"]], said[:1], said[:1])
    assert even == pytest.approx(0.5)


# ---- a small zoo, end to end


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Rankings, labelled answers, a judge, a product, and one method that breaks while it trains."""
    methods = (
        Method(algorithm="pl_dpo", options={"max_steps": 1}), Method(algorithm="rlaif", options={"max_steps": 1}),
        Method(algorithm="kto", options={"max_steps": 3, "logging_steps": 1}, curve=(2,)),
        Method(algorithm="best_of_n", options={"n": 2}), Method(algorithm="reward_model"),
        Method(name="diverges", algorithm="dpo", options={"learning_rate": 1e30, "max_steps": 4}),
    )  # fmt: skip
    few = task(
        "requests", *methods, world={**WORLD, "rated": True}, best_of_n=(1, 2, 4), curve_prompts=6, **SMALL,
        baselines=["start"], decoding={"samples": 2},
        budget={"unit": "completions", "amount": 16, "per_step": 16, "of": "rollouts"},
    )  # fmt: skip
    suite = Suite(name="small zoo", tasks=(few,), test_prompts=8, verdicts="sft_more")
    folder = tmp_path_factory.mktemp("zoo")
    results = benchmarks.run(suite, out=folder, executor="in-process", quiet=True)
    yield SimpleNamespace(folder=folder, results=results["tasks"]["requests"])


def test_nobody_is_dropped(finished: SimpleNamespace) -> None:
    task = finished.results
    assert set(task["methods"]) == {"start", "pl_dpo", "kto", "rlaif", "best_of_n"}, task["failed"]
    assert set(task["failed"]) == {"requests/diverges/0"} and "finite" in task["failed"]["requests/diverges/0"]
    assert set(task["not_applicable"]) == {"reward_model"}
    page, text = (finished.folder / "report.md").read_text(), benchmarks.report(finished.folder)
    assert "All runs failed, so no numbers: diverges" in page and "it trains a reward model" in page
    assert "requests/diverges/0 FAILED" in text and "reward_model: not applicable" in text


def test_places_follow_the_win_rates(finished: SimpleNamespace) -> None:
    page = (finished.folder / "report.md").read_text().replace("\\_", "_")
    rows = re.findall(r"^\| (\w+) \(place (\d+)\) \| ([^|]+) \|", page, re.M)
    wins = {m: x["win"]["estimate"] for m, x in finished.results["methods"].items() if m != "start"}
    places = {name: int(place) for name, place, _ in rows}
    assert sorted(places.values()) == [1, 2, 3, 4, 5]
    assert all(wins[a] >= wins[b] for a, b in itertools.pairwise(sorted(wins, key=lambda m: places[m])))
    sees = {name: sees for name, _, sees in rows if name != "start"}
    assert sees == {"pl_dpo": "rankings", "kto": "unpaired", "rlaif": "proxy", "best_of_n": "proxy"}


def test_the_rows_of_all_kinds_are_the_same_answers(finished: SimpleNamespace) -> None:
    folder = next((finished.folder / "cells").glob("requests-data-*"))
    pairs, rankings, sides = (
        [json.loads(line) for line in (folder / f"{n}.jsonl").read_text().splitlines()]
        for n in ("data", "rankings", "unpaired")
    )
    world = prefzoo.worlds.make("requests", seed=0)
    rated = {(r["prompt"], c): s for r in rankings for c, s in zip(r["completions"], r["scores"], strict=True)}
    for pair in pairs:
        assert pair["margin"] == pytest.approx(pair["score_chosen"] - pair["score_rejected"]) and pair["margin"] > 0
        assert rated[pair["prompt"], pair["chosen"]] == pair["score_chosen"]
        better, worse = (world.utility(pair["request"], pair[side], True) for side in ("chosen", "rejected"))
        chance = 1 / (1 + math.exp((worse - better) / world.temperature))
        assert pair["probability"] == pytest.approx(chance)
    assert len(sides) == 2 * len(pairs) and sum(s["label"] for s in sides) == len(pairs)
    assert {(s["prompt"], s["completion"], s["score"]) for s in sides} <= {(*k, v) for k, v in rated.items()}


def test_the_kl_of_a_choice_is_that_of_choosing(finished: SimpleNamespace) -> None:
    kl = finished.results["methods"]["best_of_n"]["means"]["kl"]["estimate"]
    assert kl == pytest.approx(math.log(2) - 0.5, abs=1e-5), "the weights are the start's; the choice is not"
    assert finished.results["methods"]["start"]["means"]["kl"]["estimate"] == pytest.approx(0, abs=1e-5)


# ---- replications


@pytest.fixture(scope="module")
def replicated(finished: SimpleNamespace) -> SimpleNamespace:
    names = replication.write_tables(finished.folder, finished.folder / "tables")
    return SimpleNamespace(folder=finished.folder, tables=finished.folder / "tables", names=names)


def test_the_table_follows_from_the_stored_answers(replicated: SimpleNamespace) -> None:
    assert replicated.names == ["kto"]
    with (replicated.tables / "kto.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["world"], r["seed"], r["step"], r["n"]) for r in rows] == [
        ("requests", "0", step, "12") for step in ("0", "2", "3")
    ], "the start, the step that was asked for, and the last"
    stored = pq.read_table(next((replicated.folder / "cells").glob("requests-kto-0-*/curve.parquet"))).to_pandas()
    for row in rows:
        for name in ("gold", "proxy", "kl", "exact", "tokens"):
            mean_N = stored[stored.step == int(row["step"])].groupby("prompt")[name].mean()
            assert float(row[name]) == pytest.approx(mean_N.mean(), rel=1e-4, abs=1e-5)
            error = mean_N.std(ddof=1) / math.sqrt(len(mean_N))
            assert float(row[f"{name}_se"]) == pytest.approx(error, rel=1e-3, abs=1e-5)


def test_the_line_of_best_of_n_begins_at_the_start_and_rises(replicated: SimpleNamespace) -> None:
    points = replication.read(replicated.tables / "best_of_n.csv")
    assert {(p["world"], p["judge"]) for p in points} == {("requests", j) for j in ("proxy", "exact", "gold")}
    for judge in ("proxy", "gold"):
        line = [p for p in points if p["world"] == "requests" and p["judge"] == judge]
        assert [p["n"] for p in line] == [1, 2, 4] and line[0]["kl"] == 0
        assert line[1]["kl"] == pytest.approx(math.log(2) - 0.5, rel=1e-4)
        assert line[0][judge] < line[1][judge] < line[2][judge], "the judge likes the best of more"
    gold = {p["judge"]: p["gold"] for p in points if p["world"] == "requests" and p["n"] == 4}
    assert gold["gold"] >= max(gold["proxy"], gold["exact"]), "nobody chooses better by gold than gold itself"
    assert len({round(p["gold"], 6) for p in points if p["world"] == "requests" and p["n"] == 1}) == 1


def test_the_figure_needs_the_tables_alone(replicated: SimpleNamespace, tmp_path: Path) -> None:
    from matplotlib.image import imread

    for file in replicated.tables.glob("*.csv"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    replication.draw(tmp_path, replicated.names)
    for name in replicated.names:
        picture = imread(tmp_path / f"{name}.png")
        assert picture.shape[1] > 500 and picture[..., :3].std() > 0.02, "something is drawn"
    with pytest.raises(UsageError, match="holds no results"):
        replication.write_tables(tmp_path, tmp_path)


PAGES = Path(__file__).resolve().parent.parent / "docs"
FOUNDING = ("ppo", "rejection_sampling", "dpo", "ipo", "kto", "grpo", "rlvr")


@pytest.mark.parametrize("name", FOUNDING)
def test_every_founding_algorithm_has_its_replication(name: str) -> None:
    rows = replication.read(PAGES / "results" / "replication" / f"{name}.csv")
    assert {r["seed"] for r in rows} == {0, 1, 2}
    for world in {r["world"] for r in rows}:
        steps = {s: sorted(r["step"] for r in rows if (r["world"], r["seed"]) == (world, s)) for s in (0, 1, 2)}
        assert steps[0] == steps[1] == steps[2] and steps[0][0] == 0 and len(steps[0]) >= 5
        assert all(abs(r["kl"]) < 1e-4 for r in rows if r["step"] == 0), "at step 0 the policy is the start"
    page = (PAGES / "replications" / f"{name}.md").read_text(encoding="utf-8")
    assert f"prefzoo bench replication --algorithms {name}" in page
    assert f"results/replication/{name}.png" in page and f"results/replication/{name}.csv" in page
    assert (PAGES / "results" / "replication" / f"{name}.png").exists()


def test_the_replication_is_of_the_founding_seven() -> None:
    suite = get_suite("replication")
    assert {m.name for t in suite.tasks for m in t.methods if not m.baseline} == set(FOUNDING) and suite.seeds == 3
    chosen = suite.choose(["ppo"])
    assert [[m.name for m in t.methods] for t in chosen.tasks] == [["start", "ppo"]], "no baseline that was not there"


# ---- every algorithm, two steps


@pytest.mark.long
def test_everything_that_applies_trains(tmp_path: Path) -> None:
    """The whole zoo at the smallest sizes: no method fails, so that what fails in the full suite has diverged."""
    suite = get_suite("zoo")
    (everything,) = suite.tasks
    smallest = everything.but(
        world=everything.world.but(**{**WORLD, "prompts": 64}),
        algorithms=tuple(m.but(options={**m.options, "max_steps": 2}) for m in everything.algorithms),
        start=everything.start.but(sft={**everything.start.sft, **SMALL["start"]["sft"]}),
        sft_more={**everything.sft_more, "tokens": 1_000},
        feedback=everything.feedback.but(
            reward_model={**everything.feedback.reward_model, "epochs": 1}, teacher_rounds=1
        ),
        decoding=everything.decoding.but(samples=1),
        budget=everything.budget.but(per_step=32, amount=64),
    )  # fmt: skip
    suite = suite.but(tasks=(smallest,), test_prompts=8)
    found = benchmarks.run(suite, out=tmp_path, quiet=True)["tasks"]["requests"]
    assert found["failed"] == {}
    assert len(found["methods"]) + len(found["not_applicable"]) == len(list_algorithms()) + 2
    kl = np.array([m["means"]["kl"]["estimate"] for n, m in found["methods"].items() if n != "start"])
    assert (np.abs(kl) > 1e-7).mean() > 0.9, "training moves almost every method"
