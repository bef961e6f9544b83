"""What the jobs of a suite do: make a start, preferences and a reward model; train a method; judge its answers.

Every function has the signature ``(params, inputs, folder) -> facts`` and is a pure function of its arguments.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from prefzoo.algorithm import create_algorithm
from prefzoo.benchmarks import statistics
from prefzoo.benchmarks.judges import reward_of
from prefzoo.data.formats import convert, load_dataset
from prefzoo.data.samples import Ragged, Samples
from prefzoo.data.tokens import tokenise
from prefzoo.feedback import ModelReward, resolve_reward
from prefzoo.feedback.verifiers import KEYWORDS
from prefzoo.files import replacing_file
from prefzoo.generation import sample, texts
from prefzoo.models.load import learn_tokenizer, load_policy, load_scorer, load_tokenizer, save_scorer, tiny_model
from prefzoo.models.reference import token_scores
from prefzoo.models.roles import Policy
from prefzoo.registry import UsageError
from prefzoo.rollout import Finish, Sampling
from prefzoo.seeds import derive_seed, generator
from prefzoo.training import train
from prefzoo.worlds import make
from prefzoo.worlds.base import stream

Params = Mapping[str, Any]
Inputs = Mapping[str, Path]
Facts = dict[str, Any]
Rows = list[dict[str, Any]]

SEPARATOR = "\n\nHuman:"


# ------------------------------------------------------------------------------------------ sampling and scoring


def ended(samples: Samples) -> list[bool]:
    return (samples.columns["finish"] == Finish.STOP).tolist()


def _settings(params: Params) -> dict[str, Any]:
    return dict(params["task"]["settings"])


# ------------------------------------------------------------------------------------------ worlds


def world_start(params: Params, inputs: Inputs, folder: Path) -> Facts:
    """A tiny model fine-tuned on demonstrations."""
    s = _settings(params)
    world = make(params["task"]["kind"], seed=s["world_seed"])
    tokenizer = world.tokenizer()
    model = tiny_model(tokenizer, seed=derive_seed(s["start_seed"], "init") % 2**31)
    run = train(
        "sft", model=model, tokenizer=tokenizer, dataset=world.demonstrations(s["demonstrations"]),
        output_dir=folder / "run", resume=True, seed=s["start_seed"], max_steps=s["start_steps"],
        rows_per_step=s["start_rows"], learning_rate=s["start_rate"], warmup_steps=20, weight_decay=0.01,
        schedule="cosine", final_learning_rate=0.05, logging_steps=50, quiet=True,
    )  # fmt: skip
    return {"spent": run.spent.to_dict()}


def world_preferences(params: Params, inputs: Inputs, folder: Path) -> Facts:
    """Pairs of the start's own answers, labelled by the world's biased and noisy annotators; plain prompts for sums."""
    s = _settings(params)
    world = make(params["task"]["kind"], seed=s["world_seed"])
    rows = world.prompts("train", s["prompts"])
    if params["task"]["kind"] == "sums":
        _write_rows(folder / "data.jsonl", rows)
        return {"rows": len(rows)}
    policy, tokenizer = _load_start(inputs)
    answers = sample(policy, tokenizer, rows, s["samples"], Sampling(max_new_tokens=world.max_new_tokens),
                     derive_seed(s["start_seed"], "preferences"))  # fmt: skip
    k = s["samples"]
    words, flags = texts(answers, tokenizer), ended(answers)
    if s.get("rated"):
        return _rated(world, rows, words, flags, s, folder)
    pairs, report = world.preferences(
        rows, [words[i : i + k] for i in range(0, len(words), k)], [flags[i : i + k] for i in range(0, len(flags), k)],
        seed=derive_seed(s["start_seed"], "annotators"),
    )  # fmt: skip
    # A side that was cut at the limit cannot be told from one that ended when it is text: such pairs are left out.
    whole = [p for p in pairs if p["chosen_ended"] and p["rejected_ended"]]
    report["cut"] = len(pairs) - len(whole)
    pairs = [{k: v for k, v in p.items() if not k.endswith("_ended")} for p in whole]
    if s["permuted"]:  # a control: labels that say nothing
        coin = generator(s["start_seed"], "permuted labels").random(len(pairs)) < 0.5
        pairs = [
            {**p, "chosen": p["rejected"], "rejected": p["chosen"]} if c else p
            for p, c in zip(pairs, coin, strict=True)
        ]
    _write_rows(folder / "data.jsonl", pairs)
    return {"rows": len(pairs), **report}


def _rated(world: Any, rows: Rows, words: list[str], flags: list[bool], s: Mapping[str, Any], folder: Path) -> Facts:
    """The same answers rated one by one: as rankings, and as disjoint pairs with all that pairs can say.

    Of a pair: ``score_chosen``, ``score_rejected``, their difference ``margin``, and ``probability``, how likely these
    annotators are to prefer the chosen side. Answers that were cut are left out, and so are identical ones.
    """
    rng = stream(world.name, world.seed, "ratings", derive_seed(s["start_seed"], "annotators"))
    pairs, rankings, agreed, decided, k = [], [], 0, 0, s["samples"]
    for i, row in enumerate(rows):
        request = row["request"]
        found = {words[j]: world.rate(request, words[j], True, rng=rng) for j in range(i * k, i * k + k) if flags[j]}
        if s["permuted"]:  # a control: ratings that say nothing
            dealt = generator(s["start_seed"], "permuted ratings", i).permutation(list(found.values()))
            found = dict(zip(found, dealt.tolist(), strict=True))
        told = list(found.items())
        if len(told) > 1:
            answers, scores = zip(*told, strict=True)
            rankings.append({**row, "completions": list(answers), "scores": list(scores)})
        for a, b in zip(told[::2], told[1::2], strict=False):
            (chosen, high), (rejected, low) = (a, b) if a[1] > b[1] else (b, a)
            gap = world.utility(request, chosen, True) - world.utility(request, rejected, True)
            likely = 0.5 + 0.5 * math.tanh(0.5 * gap / world.temperature)
            pairs.append({
                **row, "chosen": chosen, "rejected": rejected, "score_chosen": high, "score_rejected": low,
                "margin": high - low, "probability": likely,
            })  # fmt: skip
            truth = world.gold(request, chosen, True) - world.gold(request, rejected, True)
            decided, agreed = decided + (truth != 0), agreed + (truth > 0)
    _write_rows(folder / "data.jsonl", pairs)
    _write_rows(folder / "rankings.jsonl", rankings)
    sides = (({k: p[k] for k in ("prompt", "request")}, p[side], p[f"score_{side}"], side) for p in pairs
             for side in ("chosen", "rejected"))  # fmt: skip
    labelled = [{**row, "completion": y, "label": side == "chosen", "score": score} for row, y, score, side in sides]
    _write_rows(folder / "unpaired.jsonl", labelled)
    return {"rows": len(pairs), "rankings": len(rankings), "agreement": agreed / max(decided, 1)}


def world_teacher(params: Params, inputs: Inputs, folder: Path) -> Facts:
    """The model that others are distilled from: the start, trained on the best of its own answers by gold reward."""
    s = _settings(params)
    world = make(params["task"]["kind"], seed=s["world_seed"])
    run = train(
        "rejection_sampling", model=inputs["start"] / "run" / "final", dataset=world.prompts("train", s["prompts"]),
        reward=world.gold_reward, output_dir=folder / "run", resume=True, seed=s["start_seed"],
        max_new_tokens=_new_tokens(params), max_steps=s["teacher_rounds"], learning_rate=5e-4, quiet=True,
    )  # fmt: skip
    return {"spent": run.spent.to_dict()}


def world_reward_model(params: Params, inputs: Inputs, folder: Path) -> Facts:
    """A reward model of the pairs, standardised on the start's answers to validation prompts, measured against gold."""
    s = _settings(params)
    world = make(params["task"]["kind"], seed=s["world_seed"])
    facts = _train_reward_model(inputs["start"], inputs["data"] / "data.jsonl", s, s["start_seed"], folder)
    policy, tokenizer = _load_start(inputs)
    rows = world.prompts("validation", s["validation_prompts"], unique=True)
    answers = sample(
        policy, tokenizer, rows, 2, Sampling(max_new_tokens=world.max_new_tokens), derive_seed(s["start_seed"], "check")
    )
    scores = _standardise(folder / "run" / "final", answers, tokenizer)
    gold = np.asarray(_world_judge(world, rows, answers, tokenizer)["gold"]).reshape(-1, 2)
    differ = gold[:, 0] != gold[:, 1]
    right = (scores[differ, 0] > scores[differ, 1]) == (gold[differ, 0] > gold[differ, 1])
    return {**facts, "accuracy_against_gold": float(right.mean()), "pairs_judged": int(differ.sum())}


def world_best_of_n(params: Params, inputs: Inputs, folder: Path) -> Facts:
    """What choosing the best of n of the start's answers earns, by each judge: the line to hold training against.

    Unbiased from as many samples of each validation prompt as the largest n (``statistics.best_of_n_reward``).
    """
    s = _settings(params)
    world = make(params["task"]["kind"], seed=s["world_seed"])
    policy, tokenizer = _load_start(inputs)
    rows, most = world.prompts("validation", s.get("curve_prompts", 256), unique=True), max(s["best_of_n"])
    scores: dict[str, list[Any]] = {}
    for i in range(0, len(rows), 32):
        some, seed = rows[i : i + 32], derive_seed(s["start_seed"], "best of n", i)
        answers = sample(policy, tokenizer, some, most, Sampling(max_new_tokens=_new_tokens(params)), seed)
        for name, values in _scores(params, inputs, some, answers, tokenizer).items():
            scores.setdefault(name, []).append(np.asarray(values, dtype=np.float64).reshape(len(some), most))
    tables = {name: np.concatenate(parts) for name, parts in scores.items()}
    line = []
    for judge in ("proxy", "exact", "gold"):
        for n in s["best_of_n"] if judge in tables else ():
            point: dict[str, Any] = {"judge": judge, "n": n, "kl": float(np.asarray(statistics.best_of_n_kl(n)))}
            for name in {"gold", judge}:
                earned = statistics.estimate(
                    np.asarray(statistics.best_of_n_reward(tables[judge], tables[name], n))[None]
                )
                point |= {name: earned.mean, f"{name}_se": earned.se}
            line.append(point)
    return {"prompts": len(rows), "samples": most, "line": line}


def _train_reward_model(start: Path, data: Any, s: Mapping[str, Any], seed: int, folder: Path) -> Facts:
    run = train(
        "reward_model", model=start / "run" / "final", dataset=data, output_dir=folder / "run", resume=True,
        pooling="mean", centering=0.001, seed=seed, learning_rate=s["reward_rate"], rows_per_step=s["reward_rows"],
        epochs=s["reward_epochs"], weight_decay=0.05, logging_steps=50, max_length=s.get("max_length", 1024),
        quiet=True,
    )  # fmt: skip
    return {"spent": run.spent.to_dict()}


def _standardise(folder: Path, answers: Samples, tokenizer: Any) -> np.ndarray:
    """Give the reward model mean 0 and standard deviation 1 on these answers, so that beta means the same each time."""
    scorer = load_scorer(folder)
    scorer.offset.zero_()  # a process that was killed here may have left its own
    scorer.scale.fill_(1.0)
    raw = ModelReward(scorer)(answers)
    scorer.offset.fill_(float(raw.mean()))
    scorer.scale.fill_(max(float(raw.std(correction=0)), 1e-6))
    aside = save_scorer(scorer, tokenizer, folder.with_name(".standardised.part"))
    for file in aside.iterdir():  # one by one: the two numbers are in one file, the others are as they were
        file.replace(folder / file.name)
    aside.rmdir()
    return ((raw - scorer.offset) / scorer.scale).numpy().reshape(len(answers.prompts), -1)


def _world_judge(world: Any, rows: Rows, answers: Samples, tokenizer: Any) -> dict[str, list[float]]:
    """Gold reward, exactness and their parts of every answer."""
    per = len(answers.completions) // len(rows)
    words, flags = texts(answers, tokenizer), ended(answers)
    columns: dict[str, list[float]] = {}
    for i, (text, flag) in enumerate(zip(words, flags, strict=True)):
        request = rows[i // per]["request"]
        facts = {"gold": world.gold(request, text, flag), **world.parts(request, text, flag)}
        for key, value in facts.items():
            columns.setdefault(key, []).append(float(value))
    return columns


# ------------------------------------------------------------------------------------------ preference pairs of a file


def first_turn(row: Mapping[str, Any]) -> str:
    """What decides a pair's third: the first turn of its dialogue, so that no dialogue straddles."""
    return row["prompt"].strip().removeprefix("Human:").split(SEPARATOR)[0].split("\n\nAssistant:")[0].strip()


def pairs_split(params: Params, inputs: Inputs, folder: Path) -> Facts:
    """Training, judge and test thirds by the hash of the first turn; the tokenizer is learned on the training third."""
    s = _settings(params)
    data = load_dataset(s["data"])
    if data.type != "preference":
        raise UsageError(f"bench pairs needs preference data (chosen, rejected); {data.report.source} is {data.type}.")
    if not isinstance(data.rows[0]["prompt"], str):
        raise UsageError("bench pairs learns a tokenizer from plain text; give pairs of strings, not of messages.")
    thirds: list[Rows] = [[], [], []]
    for row in data.rows:
        thirds[derive_seed("thirds", first_turn(row)) % 3].append(row)
    tokenizer = learn_tokenizer(
        [str(r["prompt"]) + str(r[side]) for r in thirds[0] for side in ("chosen", "rejected")], s["vocabulary"]
    )
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    facts: Facts = {"rows": data.report.rows, "dropped": dict(data.report.dropped), "hash": data.hash()}
    for name, rows in zip(("train", "judge", "test"), thirds, strict=True):
        kept = _fitting(rows, tokenizer, s["max_length"] - params["task"]["options"]["max_new_tokens"])
        if s["permuted"] and name == "train":
            coin = generator(s["start_seed"], "permuted labels").random(len(kept)) < 0.5
            kept = [
                {**p, "chosen": p["rejected"], "rejected": p["chosen"]} if c else p
                for p, c in zip(kept, coin, strict=True)
            ]
        _write_rows(folder / f"{name}.jsonl", kept)
        facts[name] = {"rows": len(kept), "prompt too long": len(rows) - len(kept)}
    return facts


def _fitting(rows: Rows, tokenizer: Any, limit: int) -> Rows:
    """Rows whose prompt leaves room for an answer."""
    lengths = [len(i) for i in tokenizer([str(r["prompt"]) for r in rows])["input_ids"]] if rows else []
    kept = [r for r, n in zip(rows, lengths, strict=True) if n <= limit]
    if not kept:
        raise UsageError(
            f"no prompt of at most {limit} tokens is left in one third of the data; the file is too small."
        )
    return kept


def pairs_start(params: Params, inputs: Inputs, folder: Path) -> Facts:
    """A small random model fine-tuned on the training third's chosen answers."""
    s = _settings(params)
    tokenizer = load_tokenizer(inputs["data"] / "tokenizer")
    model = tiny_model(tokenizer, size="small", seed=derive_seed(s["start_seed"], "init") % 2**31)
    run = train(
        "sft", model=model, tokenizer=tokenizer, dataset=inputs["data"] / "train.jsonl", output_dir=folder / "run",
        resume=True, seed=s["start_seed"], max_steps=s["start_steps"], rows_per_step=s["start_rows"],
        learning_rate=s["start_rate"], warmup_steps=20, weight_decay=0.01, schedule="cosine",
        final_learning_rate=0.05, max_length=s["max_length"], logging_steps=50, quiet=True,
    )  # fmt: skip
    return {"spent": run.spent.to_dict()}


def pairs_reward_model(params: Params, inputs: Inputs, folder: Path) -> Facts:
    """A reward model of one third (``params["third"]``), measured on the test third's human pairs."""
    s = _settings(params)
    third = params["third"]
    seed = derive_seed(s["start_seed"], "reward model", third) % 2**31
    facts = _train_reward_model(inputs["start"], inputs["data"] / f"{third}.jsonl", s, seed, folder)
    policy, tokenizer = _load_start(inputs)
    rows = _read_rows(inputs["data"] / "train.jsonl")[:256]
    new = params["task"]["options"]["max_new_tokens"]
    answers = sample(policy, tokenizer, rows, 2, Sampling(max_new_tokens=new), derive_seed(s["start_seed"], "check"))
    _standardise(folder / "run" / "final", answers, tokenizer)
    human, _ = tokenise(inputs["data"] / "test.jsonl", tokenizer, "pairs", max_length=s["max_length"])
    scores = ModelReward(load_scorer(folder / "run" / "final"))(human).view(-1, 2)
    right = (scores[:, 0] > scores[:, 1]).sum() + 0.5 * (scores[:, 0] == scores[:, 1]).sum()
    return {**facts, "right_on_test_pairs": float(right), "test_pairs": len(scores)}


# ------------------------------------------------------------------------------------------ cells


def cell(params: Params, inputs: Inputs, folder: Path) -> Facts:
    """One method, one seed: train from the start, answer the test prompts, score the answers."""
    method, seed = params["method"], params["seed"]
    facts: Facts = {"method": method["name"], "seed": seed, "spent": None}
    start, tokenizer = _load_start(inputs)
    policy = start
    world = _world(params)
    if method["name"] != "start":
        policy, facts["spent"] = _train_cell(params, inputs, folder, tokenizer, start)
    if world is not None:
        rows = world.prompts("test", params["test_prompts"], unique=params["task"]["kind"] == "requests")
    else:
        rows = _test_rows(inputs, params["test_prompts"])
    table = judged(params, inputs, policy, start, tokenizer, rows, params["samples"], f"test {seed}")
    table = table.append_column("method", pa.array([method["name"]] * len(table)))
    table = table.append_column("seed", pa.array([seed] * len(table)))
    pq.write_table(table, folder / "rows.parquet")
    greedy = sample(policy, tokenizer, rows, 1, Sampling(0.0, max_new_tokens=_new_tokens(params)), 0)
    facts["greedy"] = float(np.mean(_scores(params, inputs, rows, greedy, tokenizer)[params["task"]["metric"]]))
    return facts


def _train_cell(params: Params, inputs: Inputs, folder: Path, tokenizer: Any, start: Policy) -> tuple[Policy, Facts]:
    task, method, seed = params["task"], params["method"], params["seed"]
    s = task["settings"]
    common: dict[str, Any] = {
        "model": inputs["start"] / "run" / "final", "output_dir": folder / "run", "resume": True, "seed": seed,
        "quiet": True, "cache_dir": folder.parent.parent / "cache", "max_length": s.get("max_length", 1024),
    }  # fmt: skip
    if method["name"] == "sft_more":
        return _sft_more(params, inputs, common)
    made = create_algorithm(method["algorithm"], **method["options"])
    if made.asks_for_reward:
        proxy = inputs["reward_model"] / "run" / "final" if "reward_model" in inputs else None
        reward = reward_of(made, proxy, _world(params), tokenizer)
        if s["permuted"]:
            reward = Permuted(reward, tokenizer, derive_seed(seed, "permuted rewards"))
        common["reward"] = reward
    if "teacher" in inputs:
        common["teacher"] = inputs["teacher"] / "run" / "final"

    curve = Curve(folder, lambda step, policy: _curve_point(params, inputs, policy, start, tokenizer, step))
    if method["curve"]:
        curve.add(0, start)

    def callback(step: int, policy: Policy, metrics: dict[str, float]) -> None:
        if method["curve"] is True or (method["curve"] and step in method["curve"]):
            curve.add(step, policy)

    training = {"logging_steps": 10, **method["training"]}
    rated = {"rankings": "rankings", "scored": "rankings", "unpaired": "unpaired"} if s.get("rated") else {}
    file = "train" if task["kind"] == "pairs" else rated.get(made.data, "data")
    run = train(
        method["algorithm"], dataset=inputs["data"] / f"{file}.jsonl", callback=callback, **common, **training,
        **method["options"],
    )  # fmt: skip
    assert run.policy is not None, f"{method['algorithm']} trains a reward model; a suite compares policies"
    if method["curve"]:
        if method["curve"] is not True:
            curve.add(run.history[-1]["step"], run.policy)
        curve.gather()
    return run.policy, run.spent.to_dict()


def _sft_more(params: Params, inputs: Inputs, common: dict[str, Any]) -> tuple[Policy, Facts]:
    """The start trained on: as many completion tokens as the largest trained count of this seed's other cells, on
    demonstrations the start has not seen; where there are none left, on the old ones again."""
    s = params["task"]["settings"]
    counts = [
        json.loads((folder / "facts.json").read_text())["spent"]["trained_tokens"]
        for name, folder in inputs.items()
        if name.startswith("cell:")
    ]
    tokens = s.get("sft_more_tokens") or max(counts)
    world = _world(params)
    if world is not None:
        tokenizer = load_tokenizer(inputs["start"] / "run" / "final")
        few = world.demonstrations(1000, skip=s["demonstrations"])
        mean = np.mean([len(i) for i in tokenizer([r["completion"] for r in few])["input_ids"]])  # BOS stands for EOS
        data: Any = world.demonstrations(math.ceil(1.05 * tokens / mean), skip=s["demonstrations"])
    else:
        data = inputs["data"] / "train.jsonl"
        tokenizer = load_tokenizer(inputs["start"] / "run" / "final")
        chosen, _ = tokenise(data, tokenizer, "completions", max_length=s["max_length"])
        mean = chosen.completions.lengths.mean()
    steps = math.ceil(tokens / (mean * s["start_rows"]))
    run = train(
        "sft", dataset=data, max_steps=steps, rows_per_step=s["start_rows"], learning_rate=s["sft_more_rate"],
        logging_steps=50, **common,
    )  # fmt: skip
    assert run.policy is not None
    return run.policy, {**run.spent.to_dict(), "matched_tokens": tokens}


class Curve:
    """``curve.parquet`` of a cell, point by point. Until the run has ended each has its own file: a killed process
    has no memory, and the next one goes on behind them."""

    def __init__(self, folder: Path, point: Callable[[int, Policy], pa.Table]) -> None:
        self._whole = folder / "curve.parquet"
        self._pieces = folder / "curve"
        self._point = point

    def add(self, step: int, policy: Policy) -> None:
        """Score the policy at this step, if that was not done before."""
        file = self._pieces / f"{step:06}.parquet"
        if not file.exists() and not self._whole.exists():
            self._pieces.mkdir(exist_ok=True)
            with replacing_file(file) as aside:
                pq.write_table(self._point(step, policy), aside)

    def gather(self) -> None:
        """All points in one file."""
        if not self._whole.exists():
            points = [pq.read_table(f) for f in sorted(self._pieces.glob("[0-9]*.parquet"))]
            with replacing_file(self._whole) as aside:
                pq.write_table(pa.concat_tables(points), aside)
        shutil.rmtree(self._pieces, ignore_errors=True)


class Permuted:
    """A control: the rewards of a batch, dealt to other completions of the batch."""

    def __init__(self, reward: Any, tokenizer: Any, seed: int) -> None:
        self._reward = resolve_reward(reward, tokenizer)
        self._tokenizer = tokenizer
        self._seed = seed
        self.__name__ = "permuted"

    def __call__(
        self, prompts: list[str], completion_ids: list[list[int]], trainer_state: Any, **columns: Any
    ) -> list[float]:
        samples = _samples_of(prompts, completion_ids, self._tokenizer, columns)
        scores = self._reward(samples).numpy()
        # By the step, not by a count of calls: a run that was stopped and goes on counts anew.
        return generator(self._seed, trainer_state.global_step + 1).permutation(scores).tolist()


def _samples_of(
    prompts: Sequence[str], completion_ids: list[list[int]], tokenizer: Any, columns: Mapping[str, Any]
) -> Samples:
    ids = Ragged.of(tokenizer(list(prompts))["input_ids"])
    extra = {"prompt": list(prompts), **{k: v for k, v in columns.items() if k not in KEYWORDS}}
    return Samples("completions", ids, Ragged.of(completion_ids), np.arange(len(prompts)), extra=extra)


def judged(
    params: Params, inputs: Inputs, policy: Policy, start: Policy, tokenizer: Any, rows: Rows, n: int, purpose: str
) -> pa.Table:
    """Answers to prompts with everything known about each: scores, log-ratio to the start, length, text."""
    seed = derive_seed(params["task"]["settings"]["start_seed"], purpose)
    answers = sample(policy, tokenizer, rows, n, Sampling(max_new_tokens=_new_tokens(params)), seed)
    ref = token_scores(lambda tree: start(tree).logps_C, answers, 16_384, "cpu")
    owner = torch.from_numpy(np.repeat(np.arange(len(answers.completions)), answers.completions.lengths))
    log_ratio = torch.zeros(len(answers.completions)).index_add(0, owner, answers.tokens["old_logps"] - ref)
    if "decoding_kl" in answers.columns:  # the weights are the start's, and the way to answer is not
        log_ratio += answers.columns["decoding_kl"]
    columns: dict[str, Any] = {
        "prompt": np.repeat(np.arange(len(rows)), n),
        "sample": np.tile(np.arange(n), len(rows)),
        **_scores(params, inputs, rows, answers, tokenizer),
        "kl": log_ratio.numpy().astype(np.float64),
        "tokens": answers.completions.lengths,
        "finished": ended(answers),
        "cluster": [_cluster(rows[i]) for i in range(len(rows)) for _ in range(n)],
        "prompt_text": [str(rows[i]["prompt"]) for i in range(len(rows)) for _ in range(n)],
        "completion": texts(answers, tokenizer),
    }
    return pa.table(columns)


def _cluster(row: Mapping[str, Any]) -> str:
    """Prompts of one cluster are not independent: dialogues that begin alike, requests drawn twice."""
    return first_turn(row) if SEPARATOR in row["prompt"] else row["prompt"]


def _scores(params: Params, inputs: Inputs, rows: Rows, answers: Samples, tokenizer: Any) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    world = _world(params)
    if world is not None:
        columns |= _world_judge(world, rows, answers, tokenizer)
    for name, job in (("proxy", "reward_model"), ("judge", "judge")):
        if job in inputs:
            columns[name] = ModelReward(load_scorer(inputs[job] / "run" / "final"))(answers).numpy().astype(np.float64)
    return columns


def _curve_point(params: Params, inputs: Inputs, policy: Policy, start: Policy, tokenizer: Any, step: int) -> pa.Table:
    """Scores on fixed validation prompts (the training third's prompts for a file of pairs) at this step."""
    world = _world(params)
    count = params["task"]["settings"].get("curve_prompts", 256)
    rows = (
        world.prompts("validation", count, unique=True) if world else _read_rows(inputs["data"] / "train.jsonl")[:count]
    )
    table = judged(params, inputs, policy, start, tokenizer, rows, 2, "curve")
    return table.append_column("step", pa.array([step] * len(table)))


def _test_rows(inputs: Inputs, limit: int) -> Rows:
    """Distinct prompts of the test third."""
    data = convert(load_dataset(inputs["data"] / "test.jsonl"), "prompt")
    return data.rows[:limit]


def _world(params: Params) -> Any:
    kind = params["task"]["kind"]
    return None if kind == "pairs" else make(kind, seed=params["task"]["settings"]["world_seed"])


def _new_tokens(params: Params) -> int:
    return int(params["task"]["options"]["max_new_tokens"])


def _load_start(inputs: Inputs) -> tuple[Policy, Any]:
    folder = inputs["start"] / "run" / "final"
    return load_policy(folder).requires_grad_(False), load_tokenizer(folder)


def _write_rows(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


def _read_rows(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]  # a text may hold U+2028
