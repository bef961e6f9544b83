"""Results of a suite: every number follows from the stored rows, is computed again here, and again without cells."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats
from studies import study, suite

from prefzoo.benchmarks.results import collect, recompute, tables_of
from prefzoo.benchmarks.results.frontier import curve
from prefzoo.benchmarks.results.stored import Runs, Stored
from prefzoo.benchmarks.statistics.sequel import to_decide
from prefzoo.registry import UsageError

EFFECTS = {"dpo": 0.1, "ipo": 0.4, "kto": 0.9}


def results_of(folder: Path, made: Any = None, **how: Any) -> dict[str, Any]:
    """Collected, written as the runner writes it, and read again."""
    made = made or suite()
    planned, outcomes = study(made, folder, **{"effects": EFFECTS, **how})
    found = collect(made, planned, outcomes, folder)
    (folder / "results.json").write_text(json.dumps(found, allow_nan=False))
    return json.loads((folder / "results.json").read_text())


def task_of(results: dict[str, Any]) -> dict[str, Any]:
    (task,) = results["tasks"].values()
    return task


def scores(folder: Path, method: str, column: str) -> np.ndarray:
    """(S, N, K) of the whole table, by plain pandas-free code."""
    table = pq.read_table(folder / "rows.parquet", filters=[("method", "=", method)]).sort_by(
        [("run", "ascending"), ("prompt", "ascending"), ("sample", "ascending")]
    )
    shape = [len(set(table[c].to_pylist())) for c in ("run", "prompt", "sample")]
    return np.asarray(table[column], dtype=float).reshape(shape)


def pair(task: dict[str, Any], a: str, b: str) -> dict[str, Any]:
    return next(p for p in task["pairs"] if {p["a"], p["b"]} == {a, b})


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    folder = tmp_path_factory.mktemp("known")
    shapes = {"kto": lambda t: (t / 20 if t < 40 else 4 - t / 20, t / 10), "ipo": lambda t: (t / 50, t / 50)}
    return folder, results_of(folder, curves=shapes)


# ---- one method


def test_win_rates_and_means_are_those_of_the_rows(known):
    folder, results = known
    task = task_of(results)
    gold, start = scores(folder, "kto", "gold"), scores(folder, "start", "gold")
    y_SNK = np.where(gold > start, 1.0, np.where(gold == start, 0.5, 0.0))
    found = task["methods"]["kto"]
    assert found["win"]["estimate"] == pytest.approx(y_SNK.mean(), abs=1e-12)
    assert found["against"]["start"]["win_range"] == pytest.approx([
        y_SNK.mean((1, 2)).min(), y_SNK.mean((1, 2)).max()
    ])  # fmt: skip
    assert found["against"]["start"]["difference"]["estimate"] == pytest.approx((gold - start).mean())
    for column in ("gold", "exact", "proxy", "kl", "tokens", "finished"):
        assert found["means"][column]["estimate"] == pytest.approx(scores(folder, "kto", column).mean())
    kl, tokens = scores(folder, "kto", "kl"), scores(folder, "kto", "tokens")
    assert found["means"]["kl_per_token"]["estimate"] == pytest.approx(kl.sum() / tokens.sum())
    assert found["length"]["ratio"] == pytest.approx(tokens.mean() / scores(folder, "start", "tokens").mean())
    assert (task["test_prompts"], task["clusters"], found["seeds"]) == (60, 30, [0, 1, 2])


def test_errors_are_the_crossed_ones_with_clusters(known):
    """SE² = V_prompts + V_seeds - V_cells, its parts by plain loops over clusters and runs."""
    folder, results = known
    y_SN = scores(folder, "kto", "gold").mean(-1)
    n_seeds, n = y_SN.shape
    residual_SN = y_SN - y_SN.mean(1, keepdims=True) - y_SN.mean(0) + y_SN.mean()

    def clustered(y_N):
        return 30 / 29 * sum((y_N[2 * g] + y_N[2 * g + 1]) ** 2 for g in range(30)) / n**2

    prompts = clustered(y_SN.mean(0) - y_SN.mean())
    seeds = y_SN.mean(1).var(ddof=1) / n_seeds
    cells = sum(map(clustered, residual_SN)) / (n_seeds * (n_seeds - 1))
    expected = math.sqrt(max(prompts + seeds - cells, prompts, seeds))
    assert task_of(results)["methods"]["kto"]["means"]["gold"]["se"] == pytest.approx(expected, rel=1e-9)


def test_length_control_leaves_alone_what_length_does_not_explain(known):
    """Made-up lengths are noise: the controlled rate is near the raw one, which is the win rate."""
    for name in ("dpo", "ipo", "kto"):
        found = task_of(known[1])["methods"][name]
        controlled = found["length_controlled"]
        assert controlled["raw"] == pytest.approx(found["win"]["estimate"])
        assert controlled["estimate"] == pytest.approx(controlled["raw"], abs=0.03)


def test_diversity_is_of_equally_many_texts(known):
    folder, results = known
    table = pq.read_table(folder / "rows.parquet", filters=[("method", "=", "kto"), ("run", "=", 0)])
    words = [w for text in table["completion"].to_pylist() for w in text.split()]
    found = task_of(results)["methods"]["kto"]["diversity"]
    assert found["n_texts"] == 120 and found["n_words"] == len(words)
    assert found["distinct_1"] == pytest.approx(len(set(words)) / len(words))


def test_the_start_has_no_win_rate_and_costs_nothing(known):
    start = task_of(known[1])["methods"]["start"]
    assert start["win"] is None and start["held_out"] is None and start["spent"] == {}


def test_held_out_likelihood_is_a_ratio_of_sums(known):
    folder, results = known
    table = pq.read_table(folder / "held_out.parquet")

    def per_token(method):
        mine = table.filter(pa.compute.equal(table["method"], method))
        return np.asarray(mine["nll"]).sum() / np.asarray(mine["tokens"]).sum()

    found = task_of(results)["methods"]["kto"]["held_out"]
    assert found["perplexity"] == pytest.approx(math.exp(per_token("kto")))
    assert found["estimate"] == pytest.approx(per_token("kto") - per_token("start"))


# ---- pairs


def test_pairs_are_one_family_under_holm(known):
    folder, results = known
    task, start = task_of(results), scores(folder, "start", "gold")
    assert task["family"]["size"] == len(task["pairs"]) == 6
    wins = {m: (scores(folder, m, "gold") > start).mean(-1) for m in ("dpo", "ipo", "kto", "sft_more")}
    for p in task["pairs"]:
        assert p["difference"]["estimate"] == pytest.approx((wins[p["a"]] - wins[p["b"]]).mean(), abs=1e-12)
        head = scores(folder, p["a"], "gold") > scores(folder, p["b"], "gold")
        assert p["head_to_head"]["estimate"] == pytest.approx(head.mean())
        t = p["difference"]["estimate"] / p["difference"]["se"]
        assert p["difference"]["p"] == pytest.approx(2 * stats.t.sf(abs(t), p["difference"]["df"]))
    raw = sorted(p["difference"]["p"] for p in task["pairs"])
    stepped = np.minimum(1, np.maximum.accumulate([(6 - k) * p for k, p in enumerate(raw)]))
    assert sorted(p["p_holm"] for p in task["pairs"]) == pytest.approx(stepped.tolist())
    for p in task["pairs"]:
        assert (p["verdict"] in ("better", "worse")) == (p["p_holm"] < 0.05)
        low, high = p["ci_max_t"]
        assert low < p["difference"]["ci"][0] and p["difference"]["ci"][1] < high  # of all pairs at once: wider
        assert (p["to_decide"] is not None) == (p["verdict"] == "undecided")


def test_large_suites_compare_with_sft_more_only(tmp_path):
    results = results_of(tmp_path, suite(verdicts="sft_more"))
    assert [(p["a"], p["b"]) for p in task_of(results)["pairs"]] == [(m, "sft_more") for m in ("dpo", "ipo", "kto")]


def test_one_method_twice_on_other_seeds_is_a_pair_like_any(tmp_path):
    twice = [{"algorithm": "dpo"}, {"algorithm": "dpo", "name": "dpo again", "first_seed": 100}]
    results = results_of(tmp_path, suite(*twice))
    found = pair(task_of(results), "dpo", "dpo again")
    assert found["flag"] is None and found["difference"]["n_seeds_a"] == 3
    assert set(pq.read_table(tmp_path / "rows.parquet")["seed"].to_pylist()) == {0, 1, 2, 100, 101, 102}


def test_ratings_have_the_order_of_the_battles_won(known):
    task = task_of(known[1])
    rating = {m: f["rating"]["estimate"] for m, f in task["methods"].items()}
    assert rating["start"] == 1000 and task["ratings"]["anchor"] == "start"
    assert sorted(EFFECTS, key=rating.__getitem__) == ["dpo", "ipo", "kto"]


# ---- judges of pairs


def test_both_orders_count_and_what_is_not_parsed_is_a_half(tmp_path):
    results = results_of(tmp_path, suite(judges=[{"annotators": {"pool": ["none"]}}, {"gold": None, "name": "truth"}]))
    found = task_of(results)["methods"]["kto"]
    table = pq.read_table(tmp_path / "judgements.parquet").filter(
        (pa.compute.field("method") == "kto") & (pa.compute.field("against") == "start")
    )
    forward, backward = np.asarray(table["forward"]), np.asarray(table["backward"])
    missing = np.stack([np.isnan(forward), np.isnan(backward)])
    parsed = ~missing.any(0)
    against = found["against"]["start"]
    assert found["win"]["estimate"] == pytest.approx((np.nan_to_num([forward, backward], nan=0.5)).mean())
    assert against["unparsed"] == pytest.approx(missing.mean()) and 0.05 < missing.mean() < 0.15
    assert against["flips"] == pytest.approx((forward != backward)[parsed].mean()) and against["flips"] > 0.05
    assert against["ties"] == pytest.approx((forward != backward)[parsed].mean())  # of certain judges: both are one
    assert against["difference"] is None
    worst, best = (found["sensitivity"][k]["estimate"] for k in ("unparsed_0", "unparsed_1"))
    assert best - worst == pytest.approx(missing.mean()) and worst < found["win"]["estimate"] < best
    assert found["judged"]["truth"]["start"]["estimate"] != found["win"]["estimate"]


def test_a_later_judge_scores_the_same_answers(tmp_path):
    results = results_of(tmp_path, suite(judges=["gold", {"rule": "length", "name": "held_out"}]))
    found = task_of(results)["methods"]["kto"]
    assert found["means"]["held_out"]["estimate"] == pytest.approx(scores(tmp_path, "kto", "held_out").mean())
    assert set(found["judged"]) == {"gold", "held_out"} and found["judged"]["held_out"]["start"]["estimate"] > 0.6


def test_a_judge_is_measured_against_the_truth(tmp_path):
    """The made-up judge of pairs likes the first place, sees gold with noise, and leaves a tenth unsaid."""
    task = task_of(
        results_of(tmp_path, suite(judges=[{"annotators": {"pool": ["none"]}}, {"gold": None, "name": "truth"}]))
    )
    found = task["judges"]["annotators"]["quality"]
    table = pq.read_table(tmp_path / "judgements.parquet").filter(
        (pa.compute.field("against") == "start") & (pa.compute.field("sample") == 0)
    )
    said = np.stack([np.asarray(table[c]) for c in ("forward", "backward")])
    assert found["truth"] == "gold" and found["n"] == said.shape[1] == 4 * 3 * 60
    assert found["unparsed"] == pytest.approx(np.isnan(said).mean())
    scored = np.nan_to_num(said, nan=0.5)
    assert found["position_bias"]["estimate"] == pytest.approx((scored[0] - scored[1]).mean() / 2)
    assert found["position_bias"]["p"] < 0.001 and 0.7 < found["accuracy"]["estimate"] < 0.95
    assert task["judges"]["truth"]["quality"] is None


# ---- failures


def test_failed_runs_are_counted_and_pairs_are_on_common_seeds(tmp_path):
    results = results_of(tmp_path, failed={"requests/kto/1", "requests/ipo/0", "requests/ipo/1", "requests/ipo/2"})
    task = task_of(results)
    assert task["methods"]["kto"]["failed_runs"] == 1 and task["methods"]["kto"]["seeds"] == [0, 2]
    assert "ipo" not in task["methods"] and task["lost"] == {"ipo": "it diverged."}
    assert set(task["failed"]) == {"requests/kto/1", *(f"requests/ipo/{s}" for s in range(3))}
    found = pair(task, "kto", "dpo")
    assert found["difference"]["n_seeds_a"] == found["difference"]["n_seeds_b"] == 2
    assert "2 of 3 seeds" in found["flag"] and pair(task, "dpo", "sft_more")["flag"] is None
    said = " ".join(results["verdict"])
    assert "kto (1 of 3)" in said and "All runs failed: ipo. First of all requests/ipo/0: it diverged." in said


def test_where_the_start_failed_the_rest_is_told(tmp_path):
    results = results_of(tmp_path, failed={f"requests/start/{s}" for s in range(3)})
    task = task_of(results)
    assert task["methods"]["kto"]["win"] == task["methods"]["kto"]["against"]["sft_more"]["win"]
    assert task["family"]["what"].endswith("against sft_more")


def test_where_everything_failed_there_are_words(tmp_path):
    made = suite()
    everything = {f"requests/{m.name}/{s}" for m in made.tasks[0].methods for s in range(3)}
    results = results_of(tmp_path, made, failed=everything)
    assert "nothing can be said" in results["verdict"][0] and task_of(results)["frontier"] is None
    assert recompute(tmp_path) == results


# ---- several starts


def test_runs_of_one_start_are_averaged_first(tmp_path):
    made = suite(seeds=6, start_seeds=3)
    results = results_of(tmp_path, made)
    found = task_of(results)["methods"]["kto"]["win"]
    wins_SN = (scores(tmp_path, "kto", "gold") > scores(tmp_path, "start", "gold")).mean(-1)
    by_start = np.stack([wins_SN[s::3].mean(0) for s in range(3)])
    assert found["n_seeds"] == 3 and found["estimate"] == pytest.approx(wins_SN.mean())
    seeds = by_start.mean(1).var(ddof=1) / 3
    assert found["se"] >= math.sqrt(seeds) - 1e-12
    assert "3 starts" in results["verdict"][-1]


# ---- again, and the same


def test_recomputed_without_cells_everything_is_the_same(known, tmp_path):
    folder, results = known
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("cells"))
    broken = copy.deepcopy(results)
    broken |= {"verdict": ["all are equal"], "aggregate": None}
    task = task_of(broken)
    task |= {"pairs": [], "family": None, "ratings": None, "frontier": None, "test_prompts": 1}
    for found in task["methods"].values():
        found |= {"win": None, "means": {}, "against": {}, "rating": None, "curve": None, "judged": {}, "seeds": []}
    (tmp_path / "copy" / "results.json").write_text(json.dumps(broken))
    assert json.loads(json.dumps(recompute(tmp_path / "copy"))) == results


def test_the_order_of_rows_and_the_clock_do_not_matter(known, tmp_path):
    folder, results = known
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("cells"))
    file = tmp_path / "copy" / "rows.parquet"
    table = pq.read_table(file)
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), file)
    assert json.loads(json.dumps(recompute(tmp_path / "copy"))) == results
    outside = json.dumps({k: v for k, v in results.items() if k != "cost"})
    assert "seconds" not in json.dumps(list(task_of(results)["methods"].values())) and "peak_memory" not in outside
    assert results["cost"]["methods"]["requests"]["kto"] == {"seconds": 1.5, "peak_memory": 2**20}


def test_lost_rows_are_told(known, tmp_path):
    folder, _ = known
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("cells"))
    file = tmp_path / "copy" / "rows.parquet"
    table = pq.read_table(file)
    pq.write_table(table.slice(1), file)
    with pytest.raises(UsageError, match=r"rows\.parquet, requests, start: 359 rows are not 3 runs × 60 prompts × 2"):
        recompute(tmp_path / "copy")


@pytest.mark.parametrize(
    "content, words", [(None, "holds no results.json"), ({"suite": "quick"}, "format 1"), ({"format": 99}, "format 99")]
)
def test_results_of_another_version_are_told(tmp_path, content, words):
    if content is not None:
        (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=words):
        recompute(tmp_path)


def test_too_few_prompts_are_told(tmp_path):
    with pytest.raises(UsageError, match=r"task 'requests'.*The cells are kept"):
        results_of(tmp_path, suite(test_prompts=2))  # both prompts are one cluster


# ---- curves


def curve_of(y_TSN: np.ndarray) -> dict[str, Any]:
    points = {
        10 * t: Runs(tuple(range(y_TSN.shape[1])), {"gold": y_TSN[t][..., None], "proxy": y_TSN[t][..., None]}, None)
        for t in range(len(y_TSN))
    }
    found = curve(points, "gold", Stored({}, {}, {}, {}, {}, {}))
    assert found is not None
    return found


def test_a_fall_is_seen_with_its_proxy(known):
    found = task_of(known[1])["methods"]["kto"]["curve"]
    assert found["steps"] == list(range(0, 70, 10)) and found["peak_step"] == 40
    assert found["end_minus_peak"]["estimate"] == pytest.approx(-1, abs=0.1)
    assert found["proxy_end_minus_peak"]["estimate"] == pytest.approx(2, abs=0.1)
    assert found["spent"]["generated_tokens"] == [100.0 * s for s in found["steps"]]
    said = [s for s in known[1]["verdict"] if "over-optimised" in s]
    assert len(said) == 1 and said[0].startswith("kto is over-optimised: from its peak at step 40")


def test_a_flat_curve_does_not_fall_from_the_peak_of_its_noise():
    """Chosen on all prompts the peak of 12 flat points is 1.6 standard errors too high; on the other half it is not."""
    random = np.random.default_rng(0)
    tables = [random.normal(0, 1, (12, 2, 60)) for _ in range(150)]
    falls = [curve_of(y_TSN)["end_minus_peak"] for y_TSN in tables]
    naive = [y[-1].mean() - y.mean((1, 2)).max() for y in tables]
    z = np.mean([f["estimate"] for f in falls]) / stats.sem([f["estimate"] for f in falls])
    assert abs(z) < 3 and np.mean(naive) < -0.1
    rejected = np.mean([f["p"] < 0.05 for f in falls])
    assert rejected < 0.11


def test_a_rising_curve_has_no_fall():
    y_TSN = np.arange(8.0)[:, None, None] + np.random.default_rng(1).normal(0, 0.1, (8, 2, 20))
    found = curve_of(y_TSN)
    assert found["peak_step"] == 70 and found["end_minus_peak"]["estimate"] == 0


def test_gaos_curve_goes_through_what_was_drawn_from_it(tmp_path):
    """gold = d (α - β log d) along training, d = √KL = √(step/10): both parameters are inside their intervals."""

    def shape(step):
        d = math.sqrt(step / 10)
        return (d * (1.5 - 0.9 * math.log(d)) if step else 0.0), 1.5 * d

    frontier = task_of(results_of(tmp_path, curves={"kto": shape}))["frontier"]
    fit = frontier["gao"]["kto"]
    for name, true in (("alpha", 1.5), ("beta", 0.9)):
        low, high = fit[name]["ci"]
        assert low - 0.05 < true < high + 0.05 and high - low < 0.6
    assert fit["peak"]["estimate"] == pytest.approx(math.exp(1.5 / 0.9 - 1), rel=0.25)
    assert set(frontier["area"]) == {"kto"} and frontier["area"]["kto"]["up_to_kl"] == pytest.approx(6)


def test_the_front_is_what_nothing_beats(known):
    points = task_of(known[1])["frontier"]["points"]
    for p in points:
        beaten = any(
            q["sqrt_kl"] <= p["sqrt_kl"]
            and q["gold"]["estimate"] >= p["gold"]["estimate"]
            and (q["sqrt_kl"], q["gold"]["estimate"]) != (p["sqrt_kl"], p["gold"]["estimate"])
            for q in points
        )
        assert p["on_front"] != beaten


# ---- words


def test_words_say_no_more_than_verdicts(tmp_path):
    strong = results_of(tmp_path / "strong", suite(seeds=5, test_prompts=200), effects={"kto": 1.5}, seed_sd=0.01)
    said = strong["verdict"]
    assert said[0] == "Proven better than sft_more: kto (1 of 3 methods)."
    assert any(s.startswith("kto is better than") and "Holm p < 0.001" in s for s in said)
    nothing = results_of(tmp_path / "nothing", effects={}, seed_sd=0.0)
    verdicts = {p["verdict"] for p in task_of(nothing)["pairs"]}
    assert verdicts == {"undecided"} and "No method is proven better than sft_more." in nothing["verdict"]
    assert not any(" is better than " in s for s in nothing["verdict"])
    assert "conditional" in nothing["verdict"][-1]


def test_one_seed_is_said_first(tmp_path):
    results = results_of(tmp_path, suite(seeds=1))
    assert results["this_run_only"] and results["verdict"][0].startswith("One training seed per method")
    assert all(p["difference"]["this_run_only"] for p in task_of(results)["pairs"])


def test_tasks_of_a_varied_key_make_a_table(tmp_path):
    results = results_of(tmp_path, suite(vary={"world.noise": [0.0, 0.4]}))
    varied = results["aggregate"]["vary"]
    assert varied["key"] == "noise" and varied["values"] == [0.0, 0.4]
    wins = [t["methods"]["kto"]["win"] for t in results["tasks"].values()]
    assert varied["methods"]["kto"] == wins
    runs = [t["methods"]["kto"]["against"]["start"]["by_run"] for t in results["tasks"].values()]
    scores_ST = np.array([[task[r] for task in runs] for r in ("0", "1", "2")])
    middle = np.sort(scores_ST.ravel())[1:-1].mean()  # a quarter of six from each end is one whole score
    assert results["aggregate"]["iqm"]["kto"]["estimate"] == pytest.approx(middle)
    assert results["aggregate"]["probability_of_improvement"]["dpo>kto"]["estimate"] < 0.5


# ---- what would decide it


def test_prompts_to_decide_are_those_of_the_paired_t_test():
    """One run each: n = ((z_α/2 + z_β) sd_d / δ)², and a little more for the t."""
    random = np.random.default_rng(0)
    d_N = random.normal(0.02, 0.4, 400)
    found = to_decide(d_N[None], np.zeros((1, 400)))
    normal = ((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * d_N.std(ddof=1) / d_N.mean()) ** 2
    assert found.seeds is None and normal <= found.prompts <= normal + 3


def test_a_study_of_that_size_decides_in_four_of_five():
    """Simulated: the noise of one study is known here, so the seeds it asks for must give the power it states."""
    random = np.random.default_rng(4)
    n = 300

    def d_SN(seeds, n_seeds, mean):
        return mean + seeds.normal(0, 0.03, (n_seeds, 1)) + seeds.normal(0, 0.4, (n_seeds, n))

    pilots = [d_SN(random, 40, 0.035) for _ in range(5)]
    asked = int(np.median([to_decide(d[:10] - d[:10].mean() + 0.035, np.zeros((10, n))).seeds for d in pilots]))
    assert 10 < asked < 40
    runs = random.normal(
        0.035, math.sqrt(0.03**2 + 0.4**2 / n), (4000, asked)
    )  # of the means of runs: no prompt effect
    power = (stats.ttest_1samp(runs, 0, axis=1).pvalue < 0.05).mean()
    assert 0.65 < power < 0.95


def test_a_later_study_is_planned_on_the_wins_of_trained_methods(tmp_path):
    results = results_of(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(results))
    tables, methods = tables_of(tmp_path), task_of(results)["methods"]
    assert set(tables) == set(methods) - {"start", "sft_more"}
    for name, y_SN in tables.items():
        assert y_SN.shape == (3, 60) and y_SN.mean() == pytest.approx(methods[name]["win"]["estimate"])
