"""The harness: what is run again and what is not, and that every printed number follows from the stored rows.

The arithmetic of the errors is proved in test_statistics.py; here it is recomputed from rows with plain numpy, to see
that the right rows reach it.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib
import inspect
import itertools
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM

import prefzoo
import prefzoo.worlds
from prefzoo import benchmarks
from prefzoo.algorithm import ALGORITHMS
from prefzoo.benchmarks import jobs, materials, runner, statistics, suites
from prefzoo.benchmarks.jobs import Job, Outcome, keys_of, run_jobs
from prefzoo.benchmarks.plan import plan
from prefzoo.benchmarks.suites import SUITES, Method, Suite, Task
from prefzoo.data.tokens import encode_prompts
from prefzoo.losses import LOSSES
from prefzoo.models.load import load_tokenizer
from prefzoo.registry import UsageError, with_helpers
from prefzoo.source import OUTSIDE


class Threads(concurrent.futures.ThreadPoolExecutor):
    """Threads of this process instead of new ones, which need seconds to import torch."""

    def __init__(self, workers: int, *_: Any) -> None:
        super().__init__(workers)


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Threads)


# ---------------------------------------------------------------------------------------------------------- jobs

JOBS = '''
import json, os, signal
from pathlib import Path
from prefzoo.registry import UsageError

def add(params, inputs, folder):
    """Its own number plus those of its inputs; every call leaves a line in the log."""
    with open(params["log"], "a") as log:
        log.write(folder.name.split("-")[0].lstrip(".") + "\\n")
    (folder / "kept.txt").write_text("kept")
    before = [json.loads((f / "facts.json").read_text())["sum"] for f in inputs.values()]
    return {"sum": params["number"] + sum(before)}

def moody(params, inputs, folder):
    if not Path(params["cure"]).exists():
        moods = {"words": UsageError("the pan is too hot"), "bug": KeyError("pan"), "mute": RuntimeError()}
        raise moods[params["mood"]]
    return {"sum": 1}

def die(params, inputs, folder):
    (folder / "half.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
'''


@pytest.fixture
def kitchen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Job functions in a module of this test alone, and where they leave their traces."""
    module = f"kitchen_{re.sub(r'[^a-z0-9]', '_', tmp_path.name.lower())}"
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / f"{module}.py").write_text(JOBS)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    importlib.invalidate_caches()
    log, cure, out = tmp_path / "log.txt", tmp_path / "cure", tmp_path / "out"

    def job(name: str, number: int = 1, needs: Sequence[str] = (), weight: float = 1.0, **more: Any) -> Job:
        params = {"number": number, "log": str(log)}
        return Job(name, f"{module}:add", params, {n: n for n in needs}, weight, **more)

    def moody(name: str, mood: str) -> Job:
        return Job(name, f"{module}:moody", {"mood": mood, "cure": str(cure)})

    def ran() -> list[str]:
        lines = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    def cells() -> list[str]:
        return sorted(f.name for f in (out / "cells").iterdir())

    return SimpleNamespace(job=job, moody=moody, ran=ran, cure=cure, out=out, cells=cells, module=module)


def test_jobs_run_after_what_they_need_the_longest_first_and_only_once(
    kitchen: SimpleNamespace, in_threads: None
) -> None:
    job = kitchen.job
    diamond = [
        job("a", 1, weight=1), job("b", 2, weight=5), job("c", 4, ["a"], weight=9), job("d", 8, ["b", "c"], weight=2),
        job("e", 16, weight=3),
    ]  # fmt: skip
    seen: list[tuple[str, int, int]] = []

    def report(outcome: Outcome, done: int, total: int) -> None:
        seen.append((outcome.name, done, total))

    outcomes = run_jobs(diamond, kitchen.out, report=report)
    assert kitchen.ran() == ["b", "e", "a", "c", "d"]
    assert {n: o.facts["sum"] for n, o in outcomes.items()} == {"a": 1, "b": 2, "c": 5, "d": 15, "e": 16}
    assert seen == [(n, i, 5) for i, n in enumerate("beacd", 1)]
    assert not any(o.reused or o.error for o in outcomes.values())
    assert all((o.folder / "kept.txt").exists() for o in outcomes.values())
    assert all(o.facts["seconds"] >= 0 and o.facts["peak_memory"] > 2**20 for o in outcomes.values())

    again = run_jobs(diamond, kitchen.out)
    assert kitchen.ran() == [] and all(o.reused for o in again.values())
    assert {n: o.facts for n, o in again.items()} == {n: dict(o.facts) for n, o in outcomes.items()}

    changed = [dataclasses.replace(j, params={**j.params, "number": 5}) if j.name == "c" else j for j in diamond]
    assert run_jobs(changed, kitchen.out)["d"].facts["sum"] == 16
    assert kitchen.ran() == ["c", "d"]
    run_jobs(diamond, kitchen.out)
    assert kitchen.ran() == [], "the old results are still there"


def test_a_key_covers_what_the_job_is_made_from_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def job(name: str, *needs: str, **facts: Any) -> Job:
        return Job(**{"name": name, "call": "m:f", "params": {"x": 1}, "needs": {n: n for n in needs}, **facts})

    def changed(new: Job) -> set[str]:
        after = keys_of([new if j.name == new.name else j for j in line])
        return {name for name in keys if keys[name] != after[name]}

    line = [job("a"), job("b"), job("c", "a"), job("d", "c", "b")]
    keys = keys_of(line)
    assert keys["a"] == keys["b"], "jobs made from the same have one key; their folders are told apart by the name"
    assert changed(job("a", params={"x": 2})) == {"a", "c", "d"}
    assert changed(job("b", sources={"my_loss": "0123"})) == {"b", "d"}
    assert changed(job("c")) == {"c", "d"}
    assert changed(job("d", "c", "b", call="m:g")) == {"d"}
    assert changed(job("d", "c", "b", needs={"other": "c", "b": "b"})) == {"d"}
    assert changed(job("a", weight=9.0)) == set()
    assert changed(job("a", params={"x": 1})) == set()

    monkeypatch.setattr(jobs, "everything_hash", lambda: "another layer")
    assert changed(job("a")) == set("abcd")


def of(name: str) -> Any:
    """The module of a registered loss."""
    return inspect.getmodule(LOSSES.entry(name).function)


def test_the_layer_is_everything_that_no_registered_function_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shared layer, the jobs and what losses share count for all cells; a loss for the cells that use it."""
    read: set[Path] = set()
    whole = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda file: (read.add(file.resolve()), whole(file))[1])
    jobs.everything_hash.__wrapped__()
    core, losses, own = (Path(m.__file__).resolve().parent for m in (prefzoo, prefzoo.losses, benchmarks))
    layer = {file for file in core.rglob("*.py") if file.relative_to(core).parts[0] not in OUTSIDE}
    assert layer | {own / f"{n}.py" for n in ("jobs", "work", "materials", "cells", "budgets", "rewards")} <= read
    assert set((own / "judging").glob("*.py")) <= read and {f.stem for f in read if "statistics" in f.parts} == {
        "samples"
    }
    names = prefzoo.losses.list_losses()
    cells = {Path(m.__file__).resolve() for n in names for m in with_helpers(of(n))}
    for file in losses.glob("*.py"):
        assert file in read | cells or file.stem in ("__init__", "catalogue"), f"{file.name} counts for nothing"
    assert not read & {Path(of(n).__file__).resolve() for n in names}, "a loss counts for every cell"


def test_the_helpers_of_a_loss_count_for_its_cells() -> None:
    def helpers(name: str) -> set[str]:
        return {m.__name__.rpartition(".")[2] for m in with_helpers(of(name))}

    assert {"policy_sequence", "policy_gradient", "kl"} <= helpers("gspo")
    assert {"pairwise", "modifiers", "numerics"} <= helpers("rpo_nll") and "unpaired" not in helpers("rpo_nll")


def test_a_failed_job_fails_what_needs_it_and_nothing_else(kitchen: SimpleNamespace, in_threads: None) -> None:
    line = [
        kitchen.moody("words", "words"), kitchen.moody("bug", "bug"), kitchen.moody("mute", "mute"),
        kitchen.job("after", 1, ["words"]), kitchen.job("last", 2, ["after"]), kitchen.job("other", 1),
        kitchen.job("behind_mute", 1, ["mute"]),
    ]  # fmt: skip
    outcomes = run_jobs(line, kitchen.out)
    assert outcomes["other"].facts and kitchen.ran() == ["other"]
    assert outcomes["words"].error == "the pan is too hot"
    assert outcomes["bug"].error.endswith("KeyError: 'pan'\n") and "Traceback" in outcomes["bug"].error
    assert outcomes["mute"].error.strip(), "an error without words is still an error"
    assert outcomes["after"].error == "it needs words, which failed"
    assert outcomes["last"].error == "it needs after, which failed"
    assert outcomes["behind_mute"].error == "it needs mute, which failed"
    failed = next(f for f in (kitchen.out / "cells").iterdir() if f.name.startswith("words"))
    assert failed.name.endswith(".failed") and "too hot" in (failed / "error.txt").read_text()

    kitchen.cure.touch()
    outcomes = run_jobs(line, kitchen.out)
    assert not any(o.error for o in outcomes.values())
    assert sorted(kitchen.ran()) == ["after", "behind_mute", "last"]
    assert [n for n, o in outcomes.items() if o.reused] == ["other"]
    assert not [c for c in kitchen.cells() if c.endswith(".failed")], "what was cured leaves no failure behind"


# ------------------------------------------------------------------------------------- one small suite, end to end

SFT = {"max_steps": 30, "rows_per_step": 32, "learning_rate": 3e-3}
WORLD = {"demonstrations": 300, "prompts": 24, "validation_prompts": 8}
FEW = {"prompts_per_step": 4, "group_size": 4}
DPO = Method(algorithm="dpo", options={"max_steps": 2})
GRPO = Method(algorithm="grpo", options={**FEW, "max_steps": 2}, curve=True)
RLVR = Method(algorithm="rlvr", options={**FEW, "max_steps": 1})


def small_requests(*methods: Method, **more: Any) -> Task:
    reward_model = {"pooling": "mean", "centering": 0.001, "learning_rate": 1e-3, "rows_per_step": 32, "epochs": 1}
    return suites.task(
        "requests", *methods, world={**WORLD, "answers": 4}, start={"sft": SFT}, decoding={"samples": 2},
        feedback={"reward_model": reward_model}, sft_more={"rows_per_step": 32}, **more,
    )  # fmt: skip


def small_sums(*methods: Method) -> Task:
    return suites.task(
        "sums", *methods, world=WORLD, start={"sft": SFT}, decoding={"samples": 2}, sft_more={"rows_per_step": 32}
    )


def small_suite(*tasks: Task, **settings: Any) -> Suite:
    return Suite(name="small", tasks=tasks, **{"test_prompts": 16, "budget": "two steps", **settings})


def run(suite: Suite, out: Path, **more: Any) -> dict[str, Any]:
    return benchmarks.run(suite, out=out, executor="in-process", quiet=True, **more)


BOTH_WORLDS = small_suite(small_requests(DPO, GRPO), small_sums(DPO, RLVR))


@dataclasses.dataclass(frozen=True)
class Finished:
    """A suite that has run."""

    suite: Suite
    folder: Path
    results: dict[str, Any]

    def rows(self, task: str) -> dict[str, np.ndarray]:
        """Stored answers of one task by column, from ``rows.parquet`` alone."""
        table = pq.read_table(self.folder / "rows.parquet")
        table = table.filter(pa.compute.equal(table["task"], task))
        return {name: np.asarray(table[name].to_pylist()) for name in table.column_names}

    def copy(self, to: Path) -> Path:
        return Path(shutil.copytree(self.folder, to / "copy"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    folder = tmp_path_factory.mktemp("small")
    yield Finished(BOTH_WORLDS, folder, run(BOTH_WORLDS, folder))


def judged(rows: dict[str, np.ndarray], method: str, column: str) -> np.ndarray:
    """(seeds, prompts, samples), each put in its place by its labels."""
    mine = rows["method"] == method
    seed, prompt, sample = (rows[k][mine].astype(int) for k in ("seed", "prompt", "sample"))
    table = np.full((seed.max() + 1, prompt.max() + 1, sample.max() + 1), np.nan)
    table[seed, prompt, sample] = rows[column][mine].astype(float)
    assert not np.isnan(table).any()
    return table


def clusters_of(rows: dict[str, np.ndarray]) -> list[str]:
    return [dict(zip(rows["prompt"], rows["prompt_text"], strict=True))[i] for i in sorted(set(rows["prompt"]))]


def interval(y_N: np.ndarray, clusters: list[str]) -> tuple[float, float, float]:
    """Mean and 95 % interval of one run, prompts with one text together."""
    labels = sorted(set(clusters))
    where = np.array([labels.index(c) for c in clusters])
    sums = np.bincount(where, y_N - y_N.mean())
    error = np.sqrt(len(labels) / (len(labels) - 1) * (sums**2).sum()) / len(y_N)
    half = stats.t.ppf(0.975, len(labels) - 1) * error
    return y_N.mean(), y_N.mean() - half, y_N.mean() + half


def test_results_hold_everything_that_a_reader_needs(finished: Finished) -> None:
    stored = json.loads((finished.folder / "results.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert stored == json.loads(json.dumps(finished.results))
    assert {"suite", "budget", "seeds", "this_run_only", "test_prompts", "tasks", "environment", "verdict"} <= set(
        stored
    )
    assert stored["this_run_only"] is True and list(stored["tasks"]) == ["requests", "sums"]
    assert stored["environment"]["prefzoo"] == prefzoo.__version__ and stored["cost"]["reused"] == []
    for name, task in stored["tasks"].items():
        assert task["failed"] == {}
        assert set(task["methods"]) == {"start", "sft_more", *(("dpo", "grpo") if name == "requests" else ("rlvr",))}
        for method, facts in task["methods"].items():
            cost = stored["cost"]["methods"][name][method]
            assert {task["metric"], "kl", "tokens", "finished"} <= set(facts["means"])
            assert cost["peak_memory"] > 2**20 and cost["seconds"] > 0 and len(facts["cells"]) == 1
            if method != "start":
                assert facts["spent"]["trained_tokens"] > 0
    requests = stored["tasks"]["requests"]
    assert "proxy" in requests["methods"]["dpo"]["means"]
    assert 0 <= requests["shared"]["reward_model"]["accuracy_against_gold"] <= 1
    curves = {m: facts["curve"] for m, facts in requests["methods"].items() if facts["curve"]}
    assert list(curves) == ["grpo"] and curves["grpo"]["steps"][0] == 0
    assert stored["tasks"]["sums"]["not_applicable"] == {"dpo": "this world has no preference labels, only a verifier"}


def test_every_win_rate_follows_from_the_stored_rows(finished: Finished) -> None:
    decided = 0
    for name, task in finished.results["tasks"].items():
        rows = finished.rows(name)
        clusters, metric = clusters_of(rows), task["metric"]
        assert set(rows["method"]) == set(task["methods"]) and len(clusters) == 16
        scores = {m: judged(rows, m, metric) for m in task["methods"]}
        for method, baseline in itertools.permutations(scores, 2):
            a, b = scores[method], scores[baseline]
            y_N = np.where(a > b, 1.0, np.where(a == b, 0.5, 0.0)).mean(-1)[0]
            if baseline in ("start", "sft_more"):
                facts = task["methods"][method]["against"][baseline]
                found = [facts["win"]["estimate"], *facts["win"]["ci"]]
                assert found == pytest.approx(interval(y_N, clusters), abs=1e-12)
                found = [facts["difference"]["estimate"], *facts["difference"]["ci"]]
                assert found == pytest.approx(interval((a - b).mean(-1)[0], clusters), abs=1e-12)
                assert facts["ties"] == pytest.approx((a == b).mean())
                decided += (a != b).sum()
            for pair in task["pairs"]:
                if (pair["a"], pair["b"]) == (method, baseline):
                    head = [pair["head_to_head"]["estimate"], *pair["head_to_head"]["ci"]]
                    assert head == pytest.approx(interval(y_N, clusters), abs=1e-12)
        for method, facts in task["methods"].items():
            for column, mean in facts["means"].items():
                if column == "kl_per_token":  # a ratio of two columns, not the mean of one
                    continue
                assert mean["estimate"] == pytest.approx(judged(rows, method, column).mean(), abs=1e-9)
    assert decided > 50, "a test of ties alone would prove nothing"


def test_scores_in_the_rows_are_those_of_their_texts(finished: Finished) -> None:
    """The metric is the world's own verdict on the stored words, and the start's log-ratio to itself is 0."""
    for name in ("requests", "sums"):
        rows, world = finished.rows(name), prefzoo.worlds.make(name)
        asked = {r["prompt"]: r["request"] for r in world.prompts("test", 400, unique=name == "requests")}
        column = finished.results["tasks"][name]["metric"]
        for prompt, words, ended, score in zip(
            rows["prompt_text"], rows["completion"], rows["finished"], rows[column], strict=True
        ):
            assert getattr(world, column)(asked[prompt], words, bool(ended)) == score
        assert abs(rows["kl"][rows["method"] == "start"].astype(float)).max() < 1e-4


def log_prob(model: Any, asked: list[int], said: list[int]) -> float:
    """By the library's own forward pass, one sequence alone."""
    with torch.no_grad():
        logps = model(torch.tensor([asked + said])).logits[0].log_softmax(-1)
    return float(sum(logps[len(asked) + i - 1, token] for i, token in enumerate(said)))


def test_kl_and_the_likelihood_of_demonstrations_are_those_of_the_models(finished: Finished) -> None:
    cells = finished.folder / "cells"
    folders = {m: next(cells.glob(f"requests-{m}*/run/final")) for m in ("start-", "dpo-0")}
    start, dpo = (AutoModelForCausalLM.from_pretrained(f).eval() for f in folders.values())
    tokenizer = load_tokenizer(folders["start-"])
    rows = pq.read_table(folders["dpo-0"].parent.parent / "rows.parquet").to_pylist()
    for row in rows[:6]:
        asked, said = encode_prompts(tokenizer, [row["prompt_text"]])[0], row["completion_ids"]
        ratio = log_prob(dpo, list(asked), said) - log_prob(start, list(asked), said)
        assert row["kl"] == pytest.approx(ratio, abs=1e-4) and abs(ratio) > 1e-6
    held = pq.read_table(next(cells.glob("requests-start-0-*")) / "held_out.parquet").to_pydict()
    per_token = np.array(held["nll"]) / np.array(held["tokens"])
    assert len(per_token) == 256 and 0 < per_token.mean() < np.log(len(tokenizer)), "better than guessing"


def test_sft_more_has_the_largest_count_of_the_others(finished: Finished) -> None:
    spent = {m: f["spent"]["trained_tokens"] for m, f in finished.results["tasks"]["requests"]["methods"].items()
             if m in ("dpo", "grpo")}  # fmt: skip
    facts = json.loads(next((finished.folder / "cells").glob("requests-sft_more-0-*/facts.json")).read_text())
    assert facts["matched_tokens"] == max(spent.values()) > min(spent.values())


def test_the_start_ties_with_itself(finished: Finished) -> None:
    for name, task in finished.results["tasks"].items():
        rows = finished.rows(name)
        scores = judged(rows, "start", task["metric"])
        win = statistics.win_rate(statistics.win(scores, scores).mean(-1))
        assert (win.estimate, win.se, win.ci, win.p) == (0.5, 0.0, (0.5, 0.5), 1.0)
        kl = judged(rows, "start", "kl").mean(-1)
        gap = statistics.difference(kl, kl, paired_seeds=True, clusters=clusters_of(rows))
        assert (gap.estimate, gap.se, gap.p) == (0.0, 0.0, 1.0)


def test_verdicts_are_holms_over_all_pairs_of_trained_methods(finished: Finished) -> None:
    for task in finished.results["tasks"].values():
        trained = [m for m in task["methods"] if m != "start"]
        assert {frozenset((p["a"], p["b"])) for p in task["pairs"]} == {
            frozenset(pair) for pair in itertools.combinations(trained, 2)
        }
        raw = sorted((p["difference"]["p"], p["p_holm"]) for p in task["pairs"])
        steps = [min(1.0, (len(raw) - k) * p) for k, (p, _) in enumerate(raw)]
        assert [holm for _, holm in raw] == pytest.approx(np.maximum.accumulate(steps).tolist())
    assert len(finished.results["tasks"]["requests"]["pairs"]) == 3  # dpo, grpo, sft_more


def test_the_report_is_written_and_the_table_names_everybody(finished: Finished) -> None:
    text = benchmarks.report(finished.folder)
    page = (finished.folder / "report.md").read_text()
    assert (finished.folder / "report.png").read_bytes().startswith(b"\x89PNG")
    for task in finished.results["tasks"].values():
        for method, facts in task["methods"].items():
            assert re.search(rf"^\s*{method} .*", text, re.M)
            assert method in page
            if method != "start":
                assert f"{100 * facts['win']['estimate']:.1f}" in page
    assert "dpo: not applicable, this world has no preference labels" in text
    assert "this world has no preference labels" in page
    assert "this run only" in text.lower() and "this run only" in page.lower()
    assert str(finished.folder / "report.html") in text and "two steps" in page


def without_cost(results: dict[str, Any]) -> str:
    return json.dumps({k: v for k, v in results.items() if k != "cost"})


def test_the_second_run_keeps_every_cell(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is trained, also after the folder was moved; all but the cost is the same."""
    monkeypatch.setattr("prefzoo.benchmarks.work._finish", lambda *_: pytest.fail("a job was run again"))
    again = run(finished.suite, finished.copy(tmp_path))
    cells = {n for task in plan(finished.suite).cells.values() for names in task.values() for n in names}
    assert cells <= set(again["cost"]["reused"])
    assert without_cost(again) == without_cost(finished.results)


def test_a_deleted_cell_is_run_again_alone_and_comes_out_the_same(
    finished: Finished, tmp_path: Path, in_threads: None
) -> None:
    folder = finished.copy(tmp_path)
    cell = next((folder / "cells").glob("requests-dpo-0-*"))
    before = pq.read_table(cell / "rows.parquet")
    others = {f: f.stat().st_mtime_ns for f in (folder / "cells").glob("*/facts.json") if f.parent != cell}
    shutil.rmtree(cell)
    again = run(finished.suite, folder)
    assert {f: f.stat().st_mtime_ns for f in others} == others
    assert {j.name for j in plan(finished.suite).jobs} - set(again["cost"]["reused"]) == {"requests/dpo/0"}
    after = pq.read_table(cell / "rows.parquet")
    assert after["completion"].to_pylist() == before["completion"].to_pylist()
    assert np.allclose(np.asarray(after["kl"]), np.asarray(before["kl"]), atol=1e-5)


def test_two_seeds_give_crossed_errors_and_no_stamp(finished: Finished, tmp_path: Path, in_threads: None) -> None:
    folder = finished.copy(tmp_path)
    suite = small_suite(small_requests(DPO))
    results = run(suite, folder, seeds=2)
    task = results["tasks"]["requests"]
    kept = {n for n in results["cost"]["reused"] if n.count("/") == 2}
    assert kept == {"requests/start/0", "requests/dpo/0"}, "the first seed's cells are those of before"
    assert results["seeds"] == 2 and results["this_run_only"] is False
    rows = Finished(suite, folder, results).rows("requests")
    a, b = judged(rows, "dpo", "gold"), judged(rows, "start", "gold")
    assert not np.array_equal(a[0], a[1])
    y_SN = np.where(a > b, 1.0, np.where(a == b, 0.5, 0.0)).mean(-1)
    facts = task["methods"]["dpo"]["against"]["start"]
    for found, table in ((facts["win"], y_SN), (facts["difference"], (a - b).mean(-1))):
        n, s = table.shape[1], 2
        prompts = s * ((table.mean(0) - table.mean()) ** 2).sum() / (n - 1)
        seeds = n * ((table.mean(1) - table.mean()) ** 2).sum() / (s - 1)
        rest = table - table.mean(0) - table.mean(1)[:, None] + table.mean()
        residual = (rest**2).sum() / ((n - 1) * (s - 1))
        error = np.sqrt(max(prompts + seeds - residual, prompts, seeds) / (n * s))
        assert found["estimate"] == pytest.approx(table.mean()) and found["se"] == pytest.approx(error)
        assert found["se_seeds"] is not None and found["this_run_only"] is False
    assert facts["win_range"] == pytest.approx([y_SN.mean(1).min(), y_SN.mean(1).max()])
    text, page = benchmarks.report(folder), (folder / "report.md").read_text()
    assert "this run only" not in (text + page).lower() and "2 seeds" in text


def test_no_prompt_is_used_for_two_purposes(finished: Finished) -> None:
    """Demonstrations, training, validation and test: as the cells stored them, by meaning and not by words."""
    world = prefzoo.worlds.make("requests")

    def meanings(split: str, texts: set[str], n: int, unique: bool) -> set[Any]:
        known = {r["prompt"]: world.meaning(r["request"]) for r in world.prompts(split, n, unique=unique)}
        assert texts and texts <= set(known), f"not all from the split {split}"
        return {known[t] for t in texts}

    cells = finished.folder / "cells"
    labelled = [json.loads(x) for x in next(cells.glob("requests-data-*/data.jsonl")).read_text().split("\n") if x]
    curve = pq.read_table(next(cells.glob("requests-grpo-*/curve.parquet")))
    used = {
        "sft": {world.meaning(r["request"]) for r in world.demonstrations(WORLD["demonstrations"] + 200)},
        "train": meanings("train", {r["prompt"] for r in labelled}, 24, False),
        "validation": meanings("validation", set(curve["prompt_text"].to_pylist()), 256, True),
        "test": meanings("test", set(finished.rows("requests")["prompt_text"]), 16, True),
    }
    assert used["train"] == {world.meaning(r["request"]) for r in labelled}
    for one, other in itertools.combinations(used, 2):
        assert not used[one] & used[other], (one, other)

    sums = prefzoo.worlds.make("sums")
    trained = [json.loads(x) for x in next(cells.glob("sums-data-*/data.jsonl")).read_text().split("\n") if x]
    asked = {r["prompt"]: r["request"] for r in sums.prompts("test", 100)}
    tested = {sums.meaning(asked[p]) for p in set(finished.rows("sums")["prompt_text"])}
    taught = {sums.meaning(r["request"]) for r in (*trained, *sums.demonstrations(WORLD["demonstrations"] + 200))}
    assert tested and not tested & taught


def test_a_reward_algorithm_on_a_world_with_a_verifier_alone_gets_the_verifier(
    finished: Finished, tmp_path: Path, in_threads: None
) -> None:
    suite = small_suite(small_sums(GRPO.but(curve=False)))
    task = run(suite, finished.copy(tmp_path))["tasks"]["sums"]
    assert task["failed"] == {} and task["methods"]["grpo"]["spent"]["reward_calls"] > 0


def test_sft_more_has_nothing_to_match_where_nothing_was_trained(finished: Finished, tmp_path: Path) -> None:
    suite = small_suite(small_sums(DPO))
    assert list(plan(suite).not_applicable["sums"]) == ["dpo", "sft_more"]
    task = run(suite, finished.copy(tmp_path))["tasks"]["sums"]
    assert task["failed"] == {} and list(task["methods"]) == ["start"]


def test_a_file_is_refused_by_a_suite_that_brings_its_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "run_jobs", lambda *_, **__: pytest.fail("work began"))
    (tmp_path / "hh.jsonl").write_text(json.dumps(dialogue(0, 0)) + "\n")
    with pytest.raises(UsageError, match="brings its own data"):
        benchmarks.run("quick", data=tmp_path / "hh.jsonl", algorithms=["dpo"], out=tmp_path / "out")


# ------------------------------------------------------------------------------------------------- a user's own loss

MY_SUITE = f"""
name: small
test_prompts: 16
like: requests
world: {json.dumps({**WORLD, "answers": 4})}
start: {{sft: {json.dumps(SFT)}}}
feedback:
  reward_model: {{pooling: mean, centering: 0.001, learning_rate: 1e-3, rows_per_step: 32, epochs: 1}}
sft_more: {{rows_per_step: 32}}
decoding: {{samples: 2}}
algorithms: [{{algorithm: dpo, options: {{max_steps: 2}}}}]
"""
MY_LOSS = """import torch
from prefzoo.losses import register_loss
from prefzoo.records import LossOut, Pairs
@register_loss
def my_hinge(batch: Pairs, *, beta: float = 0.1) -> LossOut:
    "A margin of one on the scaled difference of log-ratios."
    gap_B = beta * (batch.chosen_ratio_B - batch.rejected_ratio_B)
    return LossOut(torch.relu(1 - gap_B))
"""


def test_an_edited_loss_is_trained_again_and_its_neighbour_is_kept(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command trains it beside dpo, in new processes that import the file themselves."""
    for registry in (LOSSES, ALGORITHMS, SUITES):  # what the files register is forgotten after the test
        registry.names()
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    suite, loss, folder = tmp_path / "my_suite.yaml", tmp_path / "my_loss.py", finished.copy(tmp_path)
    suite.write_text(MY_SUITE)
    loss.write_text(MY_LOSS)
    assert len(MY_LOSS.splitlines()) == 8

    def bench() -> tuple[str, list[str], pa.Table]:
        from prefzoo.cli import main

        words = ["bench", str(suite), "--algorithms", "dpo,my_hinge", "--import", str(loss)]
        assert main([*words, "--out", str(folder), "--workers", "1"]) == 0
        shown = capsys.readouterr()
        ran = re.findall(r"requests/(\S+): done", shown.err)
        key = json.loads((folder / "results.json").read_text())["tasks"]["requests"]["methods"]["my_hinge"]["cells"][0]
        return shown.out, ran, pq.read_table(folder / "cells" / f"requests-my_hinge-0-{key}" / "rows.parquet")

    table, ran, first = bench()
    assert ran == ["my_hinge/0", "sft_more/0"], "start, data, reward model and dpo are there already"
    assert re.search(r"^\s*my_hinge ", table, re.M) and re.search(r"^\s*dpo ", table, re.M)
    prefzoo.testing.check_loss("my_hinge")

    loss.write_text(
        MY_LOSS.replace(
            "batch.chosen_ratio_B - batch.rejected_ratio_B", "batch.rejected_ratio_B - batch.chosen_ratio_B"
        )
    )
    _, ran, second = bench()
    assert ran == ["my_hinge/0", "sft_more/0"], "sft_more reads how much the others trained"
    assert first["prompt_text"] == second["prompt_text"]
    assert not np.allclose(np.asarray(first["kl"]), np.asarray(second["kl"])), "the old model was kept"

    loss.write_text(MY_LOSS)
    _, ran, third = bench()
    assert ran == [] and third.equals(first), "edited back: the first result is still there"


# ---------------------------------------------------------------------------------------------------- a file of pairs


def dialogue(topic: int, turn: int) -> dict[str, str]:
    """HH-like: an implicit prompt; several pairs of a topic share their first turn."""
    asked = f"\n\nHuman: what about number {topic} ?\n\nAssistant:"
    if turn:
        asked += f" well {topic}\n\nHuman: more ?\n\nAssistant:"
    return {"chosen": f"{asked} yes {turn} , gladly .", "rejected": f"{asked} no {turn} !"}


TRAINED_ON = {"pooling": "mean", "centering": 0.001, "learning_rate": 5e-4, "rows_per_step": 16, "epochs": 1}


def pairs_task(data: Path, *methods: Method) -> Task:
    return suites.task(
        "files", *methods, name="pairs", data={"train": str(data), "max_length": 96, "vocabulary": 300},
        start={"sft": {"max_steps": 3, "rows_per_step": 8}}, feedback={"reward_model": TRAINED_ON},
        decoding={"max_new_tokens": 8, "samples": 2}, options=FEW, recipes={"rollouts": {"max_steps": 1}},
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished_pairs(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("pairs")
    rows = [dialogue(topic, turn) for topic in range(60) for turn in range(1 + topic % 3)]
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    (folder / "hh.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    methods = (DPO, GRPO.but(options={**FEW, "max_steps": 1}, curve=False), RLVR)
    suite = small_suite(pairs_task(folder / "hh.jsonl", *methods))
    return Finished(suite, folder / "out", run(suite, folder / "out"))


def test_parts_share_no_first_turn_and_lose_no_row(finished_pairs: Finished) -> None:
    data = next((finished_pairs.folder / "cells").glob("pairs-data-*"))
    parts = {
        t: [json.loads(x) for x in (data / f"{t}.jsonl").read_text().split("\n") if x]
        for t in ("train", "validation", "held_out", "test")
    }
    topics = {t: {int(re.search(r"number (\d+) \?", r["prompt"])[1]) for r in rows} for t, rows in parts.items()}
    assert sum(map(len, topics.values())) == 60 and set().union(*topics.values()) == set(range(60))
    assert min(len(topics[t]) for t in ("train", "held_out", "test")) >= 8 and topics["validation"]
    assert sum(map(len, parts.values())) == 120
    asked = set(finished_pairs.rows("pairs")["prompt_text"])
    assert asked <= {r["prompt"] for r in parts["test"]}
    clusters = set(finished_pairs.rows("pairs")["cluster"])
    assert all(re.fullmatch(r"what about number \d+ \?", c) for c in clusters) and len(clusters) < len(asked) <= 16


def test_pairs_end_to_end(finished_pairs: Finished) -> None:
    task = finished_pairs.results["tasks"]["pairs"]
    assert task["failed"] == {} and set(task["methods"]) == {"start", "dpo", "grpo", "sft_more"}
    assert "no answers that a verifier could check" in task["not_applicable"]["rlvr"]
    shared = task["shared"]
    assert shared["held_out"]["test_pairs"] == shared["data"]["test"]["rows"]
    assert shared["held_out"] != shared["reward_model"]
    rows = finished_pairs.rows("pairs")
    assert not np.allclose(rows["proxy"].astype(float), rows["held_out"].astype(float)), "the judge is not the proxy"
    a, b = judged(rows, "dpo", "held_out"), judged(rows, "start", "held_out")
    clusters = dict(zip(rows["prompt"], rows["cluster"], strict=True))
    expected = interval(((a > b) + 0.5 * (a == b)).mean(-1)[0], [clusters[i] for i in range(a.shape[1])])
    win = task["methods"]["dpo"]["win"]
    assert [win["estimate"], *win["ci"]] == pytest.approx(expected, abs=1e-12)


def test_rows_survive_every_line_separator(tmp_path: Path) -> None:
    """JSON escapes control characters, but not U+2028, U+2029 and U+0085, at which str.splitlines breaks a line."""
    rows = [{"prompt": f"one{c}line"} for c in "\n\r\x0b\x0c\x1c\x85\u2028\u2029"]
    materials.write_rows(tmp_path / "rows.jsonl", rows)
    assert materials.read_rows(tmp_path / "rows.jsonl") == rows


def test_the_judge_has_its_own_part_and_seed(tmp_path: Path) -> None:
    file = tmp_path / "hh.jsonl"
    file.write_text(json.dumps(dialogue(0, 0)) + "\n")
    suite = small_suite(pairs_task(file, DPO))
    by_name = {j.name: j for j in plan(suite).jobs}
    assert by_name["pairs/held_out"].params["part"] == "held_out"
    assert by_name["pairs/reward_model"].params["part"] == "train"
    assert materials.derive_seed(0, "reward model", "held_out") != materials.derive_seed(0, "reward model", "train")
    assert "held_out" not in by_name["pairs/dpo/0"].needs, "no method sees the judge"
    keys = keys_of(plan(suite).jobs)
    assert keys["pairs/held_out"] != keys["pairs/reward_model"]
    file.write_text(json.dumps(dialogue(1, 0)) + "\n")
    assert set(keys_of(plan(suite).jobs).items()).isdisjoint(keys.items()), "other data, other results"


@pytest.mark.parametrize(
    "ask, words",
    [
        (dict(suite="quikc"), "did you mean 'quick'"),
        (dict(suite="pairs"), "--data FILE"),
        (dict(suite="pairs", data="nowhere.jsonl"), "no such file"),
        (dict(suite="quick", seeds=0), "at least 1"),
        (dict(suite="quick", algorithms=["dpi"]), "did you mean 'dpo'"),
        (dict(suite="quick", algorithms=["sft_more"]), "no algorithm is left"),
        (dict(suite="quick", imports=["nowhere.py"]), "no such file"),
    ],
)
def test_refusals_come_before_any_work(ask: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        benchmarks.run(**ask, out=tmp_path / "out")
    cells = tmp_path / "out" / "cells"
    assert not cells.exists() or not list(cells.iterdir())


def test_choosing_algorithms_keeps_the_baselines() -> None:
    quick = benchmarks.get_suite("quick").choose(["ipo", "sft"])
    assert [[m.name for m in t.methods] for t in quick.tasks] == [["start", "ipo", "sft", "sft_more"]]
    assert quick.tasks[0].method("ipo") in benchmarks.get_suite("quick").tasks[0].methods, "with the suite's settings"
    assert quick.tasks[0].method("sft") == Method(algorithm="sft")
    both = benchmarks.get_suite("quick").choose(["rlvr"])
    assert [t.name for t in both.tasks] == ["requests", "sums"]


@pytest.mark.parametrize("suite", ["quick", "verifiable", "pairs"])
def test_budgets_are_what_the_suite_says(suite: str) -> None:
    """Sampled completions of every rollout method, counted from its own composition."""
    changes = {"data.train": "pairs.jsonl"} if suite == "pairs" else {}
    numbers = {int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\d", benchmarks.get_suite(suite, changes).budget)}
    for task in benchmarks.get_suite(suite, changes).tasks:
        for method in task.methods:
            if method.baseline:
                continue
            options, training = task.resolve(method)
            stage = prefzoo.create_algorithm(method.algorithm, **options).stages[0]
            if stage.on_policy:
                sampled = training["max_steps"] * stage.schedule.prompts * stage.source.group_size
                assert sampled <= max(numbers), (method.name, sampled, numbers)


def test_a_suite_where_everything_failed_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> dict[str, Any]:
        raise RuntimeError("the oven [kitchen] is cold")

    monkeypatch.setattr(materials, "world_start", broken)
    task = run(small_suite(small_requests(DPO)), tmp_path)["tasks"]["requests"]
    assert task["pairs"] == []
    assert set(task["failed"]) >= {"requests/start/0", "requests/dpo/0", "requests/sft_more/0"}
    assert "cold" in json.dumps(task["failed"]), "the cause is told, not only that something before it failed"
    assert "the oven [kitchen] is cold" in benchmarks.report(tmp_path), "brackets are words, not colours"
