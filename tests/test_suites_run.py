"""What a suite does when it runs: budgets are kept, trials choose, a diverged run is counted, judges are added."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from prefzoo import benchmarks
from prefzoo.benchmarks import cells
from prefzoo.benchmarks.executors import InProcess
from prefzoo.benchmarks.jobs import keys_of, run_jobs
from prefzoo.benchmarks.plan import plan
from prefzoo.benchmarks.suites import Method, Suite, Task, task

SMALL: dict[str, Any] = {
    "world": {"demonstrations": 300, "prompts": 24, "validation_prompts": 8, "answers": 4},
    "start": {"sft": {"max_steps": 30, "rows_per_step": 32, "learning_rate": 3e-3}},
    "feedback": {"reward_model": None}, "decoding": {"samples": 2}, "sft_more": {"rows_per_step": 32},
    "recipes": {"rollouts": {"max_steps": None}}, "options": {"group_size": 4, "prompts_per_step": 4},
}  # fmt: skip
DPO = Method(algorithm="dpo", options={"rows_per_step": 8})
RLVR = Method(algorithm="rlvr")


def small(name: str, *methods: Method, **more: Any) -> Task:
    return task("requests", *methods, name=name, **{**SMALL, **more})


def run(suite: Suite, folder: Path) -> dict[str, Any]:
    return benchmarks.run(suite, out=folder, executor="in-process", quiet=True)


# ---- budgets

AMOUNTS = {
    "prompts": 8, "completions": 32, "optimizer_steps": 2, "generated_tokens": 500, "trained_tokens": 500,
    "flops": 2e9, "seconds": 1e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def budgets(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One task for each unit; all share the start and the data."""
    tasks = [small(u, RLVR, baselines=[], budget={"unit": u, "amount": a}) for u, a in AMOUNTS.items()]
    suite = Suite(name="budgets", tasks=tuple(tasks), test_prompts=8)
    folder = tmp_path_factory.mktemp("budgets")
    planned = plan(suite)
    outcomes = run_jobs(planned.jobs, folder, executor=InProcess("cpu"))
    assert not [o.error for o in outcomes.values() if o.error]
    facts = {u: outcomes[planned.cells[u]["rlvr"][0]].facts for u in AMOUNTS}
    return SimpleNamespace(facts=facts, names=list(outcomes))


def test_a_run_ends_at_the_first_step_at_which_its_budget_is_spent(budgets: SimpleNamespace) -> None:
    for unit, amount in AMOUNTS.items():
        facts = budgets.facts[unit]
        spent, steps = facts["spent"], facts["spent"]["optimizer_steps"]
        if unit == "seconds":  # what a clock says is no result
            assert "seconds" not in spent and steps == 1
            continue
        assert spent[unit] >= amount, unit
        assert spent[unit] * (steps - 1) / steps < amount * 1.5, (unit, "about a step more, of answers of any length")
    exact = [budgets.facts[u]["spent"]["optimizer_steps"] for u in ("prompts", "completions", "optimizer_steps")]
    assert exact == [2, 2, 2]
    first, second = (budgets.facts[u]["spent"] for u in ("prompts", "completions"))
    assert first == second, "the same run, stated in two units"


def test_tasks_of_one_start_share_it(budgets: SimpleNamespace) -> None:
    assert [n for n in budgets.names if n.endswith(("/start", "/data"))] == ["prompts/start", "prompts/data"]


# ---- trials, a diverged run, a control, starts


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Two seeds from two starts; a tuned method of which a trial fails, one that diverges, a control, and sft_more."""
    methods = (
        DPO.but(options={"rows_per_step": 8, "max_steps": 2}, search={"learning_rate": [1e30, 1e-3]}),
        Method(name="diverges", algorithm="dpo", options={"max_steps": 4, "learning_rate": 1e30}),
        Method(algorithm="dpo", control="permuted", options={"rows_per_step": 8, "max_steps": 2}),
    )
    tuned = small("requests", *methods, tuning={"trials": 3, "prompts": 8, "samples": 1})
    suite = Suite(name="study", tasks=(tuned,), test_prompts=8, seeds=2, start_seeds=2)
    folder = tmp_path_factory.mktemp("study")
    results = run(suite, folder)
    yield SimpleNamespace(suite=suite, folder=folder, results=results, task=results["tasks"]["requests"])


def test_a_diverged_run_is_kept_counted_and_shown_and_the_others_go_on(study: SimpleNamespace) -> None:
    failed = study.task["failed"]
    assert {n for n in failed if "trial" not in n} == {"requests/diverges/0", "requests/diverges/1"}
    assert all("finite" in why for why in failed.values())
    assert study.task["lost"].keys() == {"diverges"} and "diverges" not in study.task["methods"]
    assert study.task["methods"]["sft_more"]["seeds"] == [0, 1], "it matches what the others trained"
    assert "diverges" in (study.folder / "report.md").read_text() and "diverges" in benchmarks.report(study.folder)
    kept = [f for f in (study.folder / "cells").iterdir() if f.name.startswith("requests-diverges-")]
    assert kept and all((f / "error.txt").exists() for f in kept)


def test_the_choice_is_by_validation_and_the_failed_trial_is_not_missed(study: SimpleNamespace) -> None:
    found = study.task["tuning"]["methods"]["dpo"]
    assert len(found["trials"]) == 3 and found["trials"][0]["options"] == {}
    scores = [t.get("score", -np.inf) for t in found["trials"]]
    assert found["chosen"] == int(np.argmax(scores)) and sum("error" in t for t in found["trials"]) == 1
    rate = found["options"].get("learning_rate", 2e-4)
    for cell in (study.folder / "cells").glob("requests-dpo-[01]-*/facts.json"):
        assert json.loads(cell.read_text())["training"]["learning_rate"] == rate, (
            "every seed is run with what was chosen"
        )
    assert list(study.task["tuning"]["methods"]) == ["dpo"], "neither baselines nor controls are tuned"


def test_a_cell_is_run_with_what_was_chosen(study: SimpleNamespace, tmp_path: Path) -> None:
    """Options of the algorithm and of its training, over those that are written."""
    planned = plan(study.suite)
    job = next(j for j in planned.jobs if j.name == "requests/dpo/0")
    keys = keys_of(planned.jobs)
    place = {n: study.folder / "cells" / f"{j.replace('/', '-')}-{keys[j]}" for n, j in job.needs.items()}
    place["choice"] = tmp_path / "choice"
    place["choice"].mkdir()
    chosen = {"options": {"beta": 0.3, "learning_rate": 7e-4}}
    (place["choice"] / "facts.json").write_text(json.dumps(chosen))
    (tmp_path / "cells" / "again").mkdir(parents=True)
    facts = cells.cell(dict(job.params), place, tmp_path / "cells" / "again")
    record = json.loads((tmp_path / "cells" / "again" / "run" / "run.json").read_text())
    assert facts["options"]["beta"] == 0.3 and facts["training"]["learning_rate"] == 7e-4
    assert record["config"]["learning_rate"] == 7e-4 and '"beta": 0.3' in json.dumps(record)


def test_choosing_never_sees_test_prompts(
    study: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial again, where no test prompt can be read: the same score."""
    planned = plan(study.suite)
    job = next(j for j in planned.jobs if j.name == "requests/dpo/trial-0")
    keys = keys_of(planned.jobs)
    place = {n: study.folder / "cells" / f"{j.replace('/', '-')}-{keys[j]}" for n, j in job.needs.items()}
    real = cells.prompts_of

    def guarded(params: Any, inputs: Any, split: str, n: int) -> Any:
        assert split != "test", "a trial reads test prompts"
        return real(params, inputs, split, n)

    monkeypatch.setattr(cells, "prompts_of", guarded)
    (tmp_path / "cells" / "again").mkdir(parents=True)
    again = cells.trial(dict(job.params), place, tmp_path / "cells" / "again")
    assert again["score"] == study.task["tuning"]["methods"]["dpo"]["trials"][0]["score"]


def test_every_seed_begins_from_its_own_start(study: SimpleNamespace) -> None:
    facts = study.task["shared"]["data"]["starts"]
    assert len(facts) == 2 and facts[0] != facts[1]
    data = sorted((study.folder / "cells").glob("requests-data-*/data.jsonl"))
    first, second = ([json.loads(line) for line in f.read_text().split("\n") if line] for f in data)
    asked = [{r["prompt"] for r in rows} for rows in (first, second)]
    assert len(asked[0] & asked[1]) > 0.7 * len(asked[0] | asked[1]), "the same prompts, but for answers that were cut"
    assert {r["chosen"] for r in first} != {r["chosen"] for r in second}, "answers of another model"
    said = json.dumps(study.results["verdict"])
    assert "start_seeds varies them" not in said, "it was varied"


def test_a_judge_that_is_added_trains_nothing_again(study: SimpleNamespace) -> None:
    pool = {"name": "people", "annotators": {"pool": ["flattery"], "noise": 0.0}}
    (judged,) = (t.but(judges=("gold", {"rule": "length"}, pool)) for t in study.suite.tasks)
    before = {f: f.stat().st_mtime_ns for f in (study.folder / "cells").glob("*/facts.json")}
    more = run(study.suite.but(tasks=(judged,)), study.folder)
    assert {f: f.stat().st_mtime_ns for f in before} == before
    new = {f.parent.name for f in (study.folder / "cells").glob("*/facts.json")} - {f.parent.name for f in before}
    assert new and all("-length-" in n or "-people-" in n for n in new)
    found, was = more["tasks"]["requests"]["methods"], study.task["methods"]
    assert set(found["dpo"]["judged"]) == {"gold", "length", "people"}
    assert found["dpo"]["win"] == was["dpo"]["win"], "the first judge decides, as before"


# ---- label noise


def test_label_noise_turns_so_many_pairs_and_no_other(tmp_path: Path) -> None:
    noisy = [small(f"n{n}", DPO, world={**SMALL["world"], "prompts": 60, "noise": n}) for n in (0.0, 0.4)]
    planned = plan(Suite(name="noisy", tasks=tuple(noisy)))
    outcomes = run_jobs([j for j in planned.jobs if j.role == "shared"], tmp_path, executor=InProcess("cpu"))
    clean, turned = (
        [json.loads(x) for x in (outcomes[planned.shared[t.name]["data"][0]].folder / "data.jsonl").open()]
        for t in noisy
    )
    sides = [(r["chosen"], r["rejected"]) for r in clean]
    flips = [(r["rejected"], r["chosen"]) == s for r, s in zip(turned, sides, strict=True)]
    assert all({r["chosen"], r["rejected"]} == set(s) for r, s in zip(turned, sides, strict=True))
    assert abs(np.mean(flips) - 0.4) < 4 * np.sqrt(0.24 / len(flips)) and 0 < sum(flips) < len(flips)
