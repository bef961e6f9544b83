"""What a suite says before it runs: how it is read, what its jobs are, what every method gets, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import prefzoo
from prefzoo import benchmarks
from prefzoo.benchmarks import cells, runner
from prefzoo.benchmarks.budgets import Meter, per_step, steps_of
from prefzoo.benchmarks.jobs import keys_of
from prefzoo.benchmarks.plan import candidates, plan
from prefzoo.benchmarks.suites import Budget, Method, Suite, Task, get_suite, list_suites, read_suite, task
from prefzoo.cli import main
from prefzoo.losses import LOSSES
from prefzoo.registry import UsageError

FLAT = {"name": "mine", "like": "requests", "algorithms": ["dpo", "grpo"]}
TUNED: dict[str, Any] = {
    **FLAT, "tuning": {"trials": 3, "search": {"learning_rate": {"scale": [0.1, 0.5, 2]}}},
}  # fmt: skip


def written(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


# ---- reading


def test_a_flat_suite_is_a_suite_of_one_task(tmp_path: Path) -> None:
    flat = written(tmp_path, "like: requests\nseeds: 2\nworld: {prompts: 100}\nalgorithms: [dpo]")
    long = written(
        tmp_path, "name: mine\nseeds: 2\ntasks:\n- {like: requests, world: {prompts: 100}, algorithms: [dpo]}", "l.yaml"
    )
    assert read_suite(flat) == read_suite(long)
    assert read_suite(flat).tasks[0] == task("requests", "dpo", world={"prompts": 100})


def test_a_ready_task_stands_where_a_suite_says_nothing() -> None:
    ready = task("requests")
    mine = task("requests", "dpo", "rloo", decoding={"samples": 9}, feedback={"reward_model": None})
    assert mine.method("dpo") == ready.method("dpo"), "a plain name is the ready task's method"
    assert mine.decoding == ready.decoding.but(samples=9) and mine.start == ready.start
    assert mine.feedback.reward_model is None, "null takes a value away"
    assert mine.method("rloo") == Method(algorithm="rloo")


def test_vary_makes_a_task_of_each_value_and_grid_a_method_of_each_combination() -> None:
    suite = read_suite({**FLAT, "vary": {"world.noise": [0.0, 0.2]}})
    assert {t.name: t.world and t.world.noise for t in suite.tasks} == {"noise=0.0": 0.0, "noise=0.2": 0.2}
    grid = Method(name="g", algorithm="grpo", options={"group_size": 4}, grid={"kl": [0.0, 0.1], "max_steps": [1, 2]})
    made = task("requests", grid).algorithms
    assert [m.name for m in made] == [f"g kl={k} max_steps={n}" for k in (0.0, 0.1) for n in (1, 2)]
    assert made[3].options == {"group_size": 4, "kl": 0.1, "max_steps": 2}


def test_values_change_by_dotted_keys() -> None:
    suite = get_suite("quick", {"tasks.1.world.prompts": 7, "seeds": 3})
    assert suite.seeds == 3 and suite.tasks[1].world is not None and suite.tasks[1].world.prompts == 7
    assert suite.tasks[0] == get_suite("quick").tasks[0]
    assert get_suite("zoo", {"decoding.samples": 1}).tasks[0].decoding.samples == 1, "of a registered suite too"


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"sedes": 2}, ["no key 'sedes'", "did you mean 'seeds'"]),
        ({"world": {"nois": 0.1}}, ["no key 'nois' in world", "did you mean 'noise'"]),
        ({"start": {"modle": "tiny"}}, ["no key 'modle' in start", "did you mean 'model'"]),
        ({"like": "request"}, ["no ready task 'request'", "did you mean 'requests'"]),
        ({"algorithms": ["dpi"]}, ["dpi", "did you mean 'dpo'"]),
        ({"algorithms": [{"algorithm": "dpo", "options": {"bta": 1}}]}, ["no option 'bta'", "did you mean 'beta'"]),
        ({"judges": [{"rule": "lenght"}]}, ["lenght", "did you mean 'length'"]),
        ({"world": {"noise": 0.7}}, ["world.noise", "0.5"]),
        ({"budget": {"unit": "token", "amount": 9}}, ["budget.unit", "generated_tokens"]),
        ({"budget": {"unit": "prompts", "amount": 0}}, ["budget.amount", "greater than 0"]),
        ({"seeds": 3, "start_seeds": 2}, ["3", "start_seeds = 2"]),
        ({"algorithms": ["dpo", "dpo"]}, ["dpo"]),
        ({"vary": {"world.noise": 0.1}}, ["vary", "0.1"]),
        ({"start": {"sft": None}}, ["random weights", "start.sft"]),
        ({"start": {"sft": {"max_stps": 3}}}, ["max_stps", "did you mean 'max_steps'"]),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)  # fmt: skip
def test_mistakes_are_told_by_the_key_at_fault(wrong: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(UsageError) as told:
        read_suite({**FLAT, **wrong})
    assert all(words in str(told.value) for words in said), told.value


FILES = {"pairs": {"data.train": "someone/pairs"}}


@pytest.mark.parametrize("name", list(list_suites()))
def test_every_suite_that_comes_with_prefzoo_can_be_planned(name: str) -> None:
    suite = get_suite(name, FILES.get(name))
    assert suite.about or name in ("zoo", "replication")
    made = plan(suite)
    known: set[str] = set()
    for job in made.jobs:
        assert set(job.needs.values()) <= known, f"{job.name} stands before what it needs"
        known.add(job.name)
    for t in suite.tasks:
        assert set(made.cells[t.name]) | set(made.not_applicable[t.name]) == {m.name for m in t.methods}
        assert all(len(names) == suite.seeds for names in made.cells[t.name].values())


def test_the_suites_that_were_promised_are_there() -> None:
    worlds = "quick zoo preference verifiable overoptimization noise length sycophancy null"
    assert {*worlds.split(), "real-hh", "real-gsm8k", "ultrafeedback", "tldr"} <= set(list_suites())


def test_a_dry_run_prints_cells_shared_stages_and_estimates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, json.dumps({**TUNED, "seeds": 2, "algorithms": ["dpo", "grpo", "reward_model"]}))
    assert main(["bench", str(file), "--dry-run", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    for words in ("shared: start, 1 made", "shared: reward_model", "dpo, 2 cells after 3 trials: dpo", "beta=0.1",
                  "trials of dpo: as written; learning_rate=", "reward_model: not applicable, it trains a reward model",
                  "of one core", "MiB. Disk: about"):  # fmt: skip
        assert words in shown, words
    assert f"{len(plan(read_suite(file)).jobs)} jobs, 0 of them finished" in shown
    assert not (tmp_path / "out").exists(), "nothing was begun"


# ---- what is shared, and what a key covers


def test_what_tasks_have_in_common_is_made_once() -> None:
    noise = get_suite("noise")
    made = plan(noise)
    assert len(noise.tasks) == 5
    assert len({n for t in noise.tasks for n in made.shared[t.name]["start"]}) == 1
    assert len({n for t in noise.tasks for n in made.shared[t.name]["data"]}) == 5
    assert Counter(j.name for j in made.jobs).most_common(1)[0][1] == 1


def test_each_start_has_its_own_data_and_reward_model() -> None:
    """Seed s begins from start s mod k; nothing of another start reaches it."""
    made = plan(read_suite({**FLAT, "seeds": 4, "start_seeds": 2}))
    by_name = {j.name: j for j in made.jobs}
    for artifact in ("start", "data", "reward_model"):
        names = made.shared["requests"][artifact]
        assert len(set(names)) == 2 and [by_name[n].params["start_seed"] for n in names] == [0, 1]
    for seed, name in enumerate(made.cells["requests"]["dpo"]):
        needs = by_name[name].needs
        assert needs == {a: made.shared["requests"][a][seed % 2] for a in ("start", "data", "reward_model")}
        assert by_name[name].params["start_seed"] == seed % 2 and by_name[name].params["seed"] == seed
    assert list(plan(read_suite({**FLAT, "seeds": 4})).shared["requests"]["start"]) == ["requests/start"]


def keys(suite: Any) -> dict[str, str]:
    return keys_of(plan(suite if isinstance(suite, Suite) else read_suite(suite)).jobs)


def test_keys_change_with_what_makes_a_number_and_with_nothing_else() -> None:
    llm = {"name": "chat", "llm": {"model": "m", "endpoint": "http://localhost:1/v1"}}
    before = keys({**FLAT, "judges": ["gold", llm]})
    patient = keys({**FLAT, "judges": ["gold", {**llm, "llm": {**llm["llm"], "timeout": 9.0}}]})
    assert before == patient, "how a judge is asked is not what it is asked"
    other = keys({**FLAT, "judges": ["gold", {**llm, "llm": {**llm["llm"], "model": "n"}}]})
    changed = {n for n in before if before[n] != other[n]}
    assert changed and all(n.endswith("/chat") for n in changed), "another judge trains nothing again"
    steps = keys({**FLAT, "judges": ["gold", llm], "start": {"sft": {"max_steps": 3}}})
    assert not set(steps.values()) & set(before.values()), "everything follows from the start"


def test_keys_change_with_the_source_of_a_registered_function(monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys(FLAT)
    entry = type(LOSSES.entry("dpo"))
    real = entry.source_hash
    monkeypatch.setattr(entry, "source_hash", lambda self: real(self) + " edited" * (self.name == "dpo"))
    after = keys(FLAT)
    assert {n for n in before if before[n] != after[n]} == {"requests/dpo/0", "requests/sft_more/0"}


# ---- equal trials


def test_every_method_gets_as_many_trials_none_twice_the_first_as_written() -> None:
    own = {"algorithm": "ipo", "search": {"beta": [0.1, 1, 2, 3]}}
    suite = read_suite({**TUNED, "algorithms": ["dpo", "grpo", own]})
    (tuned,) = suite.tasks
    made = plan(suite)
    assert {m: len(n) for m, n in made.trials["requests"].items()} == {"dpo": 3, "grpo": 3, "ipo": 3}
    by_name = {j.name: j for j in made.jobs}
    for method in tuned.algorithms:
        drawn = candidates(tuned, method)
        assert drawn[0] == {} and len({json.dumps(d) for d in drawn}) == 3
        assert drawn == candidates(tuned, method), "drawn once and for all"
        own = by_name[made.cells["requests"][method.name][0]].params["method"]
        trials = [by_name[n].params["method"] for n in made.trials["requests"][method.name]]
        assert {k: own[k] for k in ("options", "training")} == {k: trials[0][k] for k in ("options", "training")}
        assert trials[1] != trials[2]
        assert by_name[made.cells["requests"][method.name][0]].needs["choice"] == made.choices["requests"][method.name]
        trained_on = {by_name[n].params["seed"] for n in made.trials["requests"][method.name]}
        assert trained_on.isdisjoint(range(1000)), "seeds of trials are no seeds of the report"
    scaled = {d["learning_rate"] for d in candidates(tuned, tuned.method("dpo"))[1:]}
    assert scaled < {2e-4 * f for f in (0.1, 0.5, 2)}


def test_a_range_is_drawn_within_its_bounds() -> None:
    ranges = {"learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}, "beta": {"low": 0, "high": 1}}
    (tuned,) = read_suite({**FLAT, "tuning": {"trials": 200, "search": ranges}}).tasks
    drawn = candidates(tuned, tuned.algorithms[0])[1:]
    rate = np.log10([d["learning_rate"] for d in drawn])
    assert len(drawn) == 199 and (rate >= -5).all() and (rate <= -2).all() and abs(rate.mean() + 3.5) < 0.25
    assert all(0 <= d["beta"] <= 1 for d in drawn)


@pytest.mark.parametrize(
    "search, said",
    [
        ({"beta": [0.1, 0.2]}, "2 trials|3 trials"),
        ({"bta": [1, 2, 3, 4]}, "did you mean 'beta'"),
        ({"beta": 0.3}, "expected a list of values"),
    ],
)
def test_a_search_space_that_cannot_be_fair_is_refused(search: dict[str, Any], said: str) -> None:
    suite = read_suite({**TUNED, "algorithms": [{"algorithm": "dpo", "options": {"beta": 0.1}, "search": search}]})
    with pytest.raises(UsageError, match=said):
        plan(suite)


def test_trials_need_a_judge_of_single_answers_and_controls_have_none() -> None:
    pool = {"name": "people", "annotators": {"pool": ["flattery"]}}
    with pytest.raises(UsageError, match="tuning needs a judge that scores single answers"):
        plan(read_suite({**TUNED, "judges": [pool]}))
    control = {"algorithm": "dpo", "control": "permuted"}
    assert "dpo permuted" not in plan(read_suite({**TUNED, "algorithms": ["dpo", control]})).trials["requests"]


def test_the_best_validation_score_is_chosen_and_a_failed_trial_is_not_missed(tmp_path: Path) -> None:
    params = {"candidates": [{}, {"beta": 1}, {"beta": 2}, {"beta": 3}]}
    inputs = {}
    for index, score in ((0, 0.2), (2, 0.7), (3, 0.6)):  # trial 1 has failed
        inputs[f"trial {index}"] = tmp_path / str(index)
        inputs[f"trial {index}"].mkdir()
        (tmp_path / str(index) / "facts.json").write_text(json.dumps({"score": score, "se": 0.1}))
    found = cells.choice(params, inputs, tmp_path)
    assert found["chosen"] == 2 and found["options"] == {"beta": 2}
    assert found["trials"][1] == {"options": {"beta": 1}, "error": True}
    with pytest.raises(RuntimeError, match="all 4 trials failed"):
        cells.choice(params, {}, tmp_path)


# ---- equal budgets


def budgeted(unit: str, amount: float, *algorithms: str, **more: Any) -> Task:
    recipes = {"rollouts": {"max_steps": None}}
    options = {"group_size": 4, "prompts_per_step": 6, "beta": 0.1}
    methods = [Method(algorithm=a) for a in algorithms]
    budget = {"unit": unit, "amount": amount, **more}
    return task("requests", *methods, budget=budget, recipes=recipes, options=options)


@pytest.mark.parametrize(
    "unit, amount, dpo, grpo",
    [("prompts", 960, 30, 160), ("completions", 1920, 30, 80), ("optimizer_steps", 40, 40, 40)],
)
def test_budgets_that_can_be_counted_are_exact_steps(unit: str, amount: float, dpo: int, grpo: int) -> None:
    made = budgeted(unit, amount, "dpo", "grpo", "kto", "rejection_sampling")
    for method in made.algorithms:
        options, training = made.resolve(method)
        algorithm = prefzoo.create_algorithm(method.algorithm or "", **options)
        step = per_step(algorithm, training, 0.0)[unit]
        assert training["max_steps"] == max(1, round(amount / step)), method.name
    assert [made.resolve(made.method(n))[1]["max_steps"] for n in ("dpo", "grpo")] == [dpo, grpo]
    stated = made.method("dpo").but(options={"max_steps": 7})
    assert made.resolve(stated)[1]["max_steps"] == 7, "what a method says itself is kept"


def test_a_meter_reads_every_unit_and_says_when_it_is_spent() -> None:
    made = budgeted("flops", 1.0, "dpo", "grpo")
    dpo, grpo = (prefzoo.create_algorithm(m.algorithm or "", **made.resolve(m)[0]) for m in made.algorithms)
    spent = {"optimizer_steps": 3, "prompts": 18, "generated_tokens": 100, "trained_tokens": 50, "seconds": 2.0}
    of_dpo, of_grpo = Meter(dpo, {"rows_per_step": 8}, 1000), Meter(grpo, {}, 1000)
    assert (of_dpo.read(spent)["prompts"], of_dpo.read(spent)["completions"]) == (24, 48), "rows read, two sides each"
    assert (of_grpo.read(spent)["prompts"], of_grpo.read(spent)["completions"]) == (18, 72)
    assert of_dpo.read(spent)["flops"] == 1000 * (2 * 100 + 8 * 50), "a reference is asked"
    for unit, value in of_grpo.read(spent).items():
        assert of_grpo.reached(Budget.model_validate({"unit": unit, "amount": value}), spent)
        assert not of_grpo.reached(Budget.model_validate({"unit": unit, "amount": value * 1.001}), spent)
    nothing = Meter(prefzoo.create_algorithm("best_of_n"), {}, 1000)
    assert nothing.read({"prompts": 0.0})["flops"] == 0 and not nothing.reached(Budget(unit="flops", amount=1), spent)
    rollouts = Budget(unit="prompts", amount=1, of="rollouts")
    assert of_grpo.reached(rollouts, spent) and not of_dpo.reached(rollouts, spent)


def test_the_decay_of_the_learning_rate_lasts_as_long_as_the_budget_is_expected_to() -> None:
    (method,) = (made := budgeted("generated_tokens", 4800, "grpo")).algorithms
    grpo = prefzoo.create_algorithm("grpo", **made.resolve(method)[0])
    assert steps_of(Budget(unit="generated_tokens", amount=4800), grpo, {}, 10.0, 1000) == 20  # 24 answers of 10 tokens
    assert steps_of(Budget(unit="seconds", amount=5), grpo, {}, 10.0, 1000) is None
    dpo = prefzoo.create_algorithm("dpo")
    assert steps_of(Budget(unit="generated_tokens", amount=5), dpo, {}, 10.0, 1000) is None, "it generates nothing"


# ---- controls


def test_a_control_keeps_the_answers_and_says_nothing_of_them() -> None:
    random = np.random.default_rng(0)
    pairs = [{"prompt": str(i), "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(2000)]
    tossed = cells.without_meaning(pairs, random)
    assert [{r["chosen"], r["rejected"]} for r in tossed] == [{r["chosen"], r["rejected"]} for r in pairs]
    assert abs(np.mean([r["chosen"].startswith("good") for r in tossed]) - 0.5) < 4 * 0.5 / np.sqrt(2000)
    sides = [{"prompt": str(i), "completion": f"c{i}", "label": i < 500, "score": float(i)} for i in range(2000)]
    dealt = cells.without_meaning(sides, random)
    assert sorted(r["score"] for r in dealt) == sorted(r["score"] for r in sides)
    assert abs(np.corrcoef([r["score"] for r in dealt], np.arange(2000))[0, 1]) < 4 / np.sqrt(2000)
    assert all(r["label"] == (r["score"] < 500) for r in dealt), "a row's label and score stay together"
    ranked = [{"prompt": "p", "completions": list("abcd"), "scores": [4.0, 3.0, 2.0, 1.0]} for _ in range(2000)]
    best = Counter(r["completions"][int(np.argmax(r["scores"]))] for r in cells.without_meaning(ranked, random))
    assert all(abs(best[c] - 500) < 4 * np.sqrt(2000 * 0.25 * 0.75) for c in "abcd")


# ---- one folder, one suite


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_run", lambda suite, *_: {"suite": suite.name})


def files(folder: Path) -> dict[str, bytes]:
    found = (f for f in folder.rglob("*") if f.is_file() and "lock" not in f.name)
    return {str(f.relative_to(folder)): f.read_bytes() for f in found}


def test_two_suites_in_one_folder_are_refused_and_nothing_changes(tmp_path: Path, untouched: None) -> None:
    mine, other = read_suite(FLAT), read_suite({**FLAT, "name": "other"})
    benchmarks.run(mine, out=tmp_path)
    before = files(tmp_path)
    with pytest.raises(UsageError, match=r"holds the suite 'mine'.*Nothing was changed"):
        benchmarks.run(other, out=tmp_path)
    assert files(tmp_path) == before
    assert benchmarks.run(mine.but(seeds=3), out=tmp_path) == {"suite": "mine"}, "the same suite may grow"


def test_a_folder_of_a_newer_version_is_refused_and_nothing_changes(tmp_path: Path, untouched: None) -> None:
    (tmp_path / "suite.json").write_text(json.dumps({"name": "mine", "format": runner.FORMAT + 1, "prefzoo": "99.0"}))
    before = files(tmp_path)
    with pytest.raises(UsageError, match=r"of a newer prefzoo .99.0.*Nothing was changed"):
        benchmarks.run(read_suite(FLAT), out=tmp_path)
    assert files(tmp_path) == before
    (tmp_path / "suite.json").write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        benchmarks.run(read_suite(FLAT), out=tmp_path)


def test_results_of_an_older_version_are_kept_aside(
    tmp_path: Path, untouched: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text('{"old": 1}')
    benchmarks.run(read_suite(FLAT), out=tmp_path)
    assert (tmp_path / "results.of-another-version.json").read_text() == '{"old": 1}'
    assert "older prefzoo" in capsys.readouterr().err and not (tmp_path / "results.json").exists()


# ---- what methods, judges and budgets may not say


@pytest.mark.parametrize("unit, amount, steps", [("optimizer_steps", 7, 7), ("prompts", 64, 2), ("flops", 1e12, None)])
def test_a_stated_budget_wins_over_the_steps_of_a_recipe(unit: str, amount: float, steps: int | None) -> None:
    """The ready recipe of rollouts says 40 steps; a method that says its own steps keeps them."""
    grpo, own = Method(algorithm="grpo"), Method(name="own", algorithm="grpo", options={"max_steps": 3})
    limited = task("requests", grpo, own, budget={"unit": unit, "amount": amount})
    assert task("requests", grpo).resolve(grpo)[1]["max_steps"] == 40
    assert limited.resolve(grpo)[1].get("max_steps") == steps
    assert limited.resolve(own)[1]["max_steps"] == 3


def test_annotators_who_judge_are_as_strong_as_those_who_labelled() -> None:
    jobs = plan(get_suite("sycophancy")).jobs
    judging = [j for j in jobs if j.role == "judgement"]
    [data] = [j for j in jobs if j.name.endswith("/data")]
    assert judging and all(j.params["world"]["annotators"] == data.params["world"]["annotators"] for j in judging)
    assert data.params["world"]["annotators"]["strength"] == 3.0


@pytest.mark.parametrize(
    "judges, feedback, words",
    [
        (["held_out"], {}, "data that no method sees"),
        (["gold", "reward_model"], {"reward_model": None}, "is the proxy, and the task has none"),
    ],
)
def test_a_judge_that_cannot_be_had_is_refused_before_anything_runs(
    judges: list[str], feedback: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        task("requests", "dpo", judges=judges, feedback=feedback)


def test_a_method_cannot_choose_its_seed() -> None:
    """All of its runs would be the same one."""
    with pytest.raises(ValueError, match="seed is the suite's to decide"):
        task("requests", {"algorithm": "dpo", "options": {"seed": 3}})


def test_two_names_of_one_method_are_trained_with_seeds_of_their_own() -> None:
    seeds = {j.name: j.params["seed"] for j in plan(get_suite("null")).jobs if j.role == "cell"}
    once, again = ([seeds[f"requests/dpo {which}/{s}"] for s in range(5)] for which in ("once", "again"))
    assert once == [0, 1, 2, 3, 4] and again == [1000, 1001, 1002, 1003, 1004]
