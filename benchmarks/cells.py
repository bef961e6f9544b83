"""What a cell does: train a method from the start, answer prompts, and write down all that is known of each answer.

Judging, as far as it needs more than the task's own truth and proxy, is done by jobs of its own, which a new judge adds
without training anything again.
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
from prefzoo.benchmarks.budgets import Meter, steps_of
from prefzoo.benchmarks.judging import Answers, JudgeSpec, PairJudge, ScoreJudge, make_judge
from prefzoo.benchmarks.materials import (
    SEPARATOR,
    Facts,
    Inputs,
    Params,
    Rows,
    demonstrations_of,
    device,
    ended,
    first_turn,
    load_reward_model,
    load_start,
    open_world,
    prompts_of,
    read_rows,
    reward_model_folder,
    start_model,
    world_scores,
    write_rows,
)  # fmt: skip
from prefzoo.benchmarks.rewards import reward_of
from prefzoo.benchmarks.suites.spec import Budget
from prefzoo.data.samples import Ragged, Samples
from prefzoo.data.tokens import encode_prompts, tokenise
from prefzoo.feedback import resolve_reward
from prefzoo.feedback.verifiers import KEYWORDS
from prefzoo.files import replacing_file
from prefzoo.generation import sample, texts
from prefzoo.models.load import load_tokenizer
from prefzoo.models.reference import token_scores
from prefzoo.models.roles import Policy
from prefzoo.rollout import Finish, Sampling
from prefzoo.seeds import derive_seed, generator
from prefzoo.training import steps, train
from prefzoo.worlds.base import stream

HELD_OUT = 256  # demonstrations that measure what alignment costs


def cell(params: Params, inputs: Inputs, folder: Path) -> Facts:
    """One method, one seed: train from the start, answer the test prompts, score the answers."""
    method, seed = params["method"], params["seed"]
    start, tokenizer = load_start(inputs)
    policy, facts = trained(params, inputs, folder, start, tokenizer)
    rows = prompts_of(params, inputs, "test", params["test_prompts"])
    answers = draw(params, policy, tokenizer, rows, params["samples"], f"test {seed}")
    table = described(params, inputs, rows, answers, tokenizer, start)
    table = table.append_column("method", pa.array([method["name"]] * len(table)))
    table = table.append_column("seed", pa.array([seed] * len(table)))
    pq.write_table(table, folder / "rows.parquet")
    likeliest = draw(params, policy, tokenizer, rows, 1, "greedy", temperature=0.0)
    pq.write_table(described(params, inputs, rows, likeliest, tokenizer), folder / "greedy.parquet")
    held_out(params, inputs, policy, tokenizer, folder / "held_out.parquet")
    return {"method": method["name"], "seed": seed, **facts}


def trial(params: Params, inputs: Inputs, folder: Path) -> Facts:
    """One candidate of a method's options: trained as a cell is, scored on validation prompts; no model is kept."""
    start, tokenizer = load_start(inputs)
    policy, facts = trained(params, inputs, folder, start, tokenizer)
    rows = prompts_of(params, inputs, "validation", params["test_prompts"])
    answers = draw(params, policy, tokenizer, rows, params["samples"], "tuning")
    judge = JudgeSpec.model_validate(params["judge"])
    scores = judge_scores(params, inputs, folder.parent.parent / "cache", judge, answered(rows, answers, tokenizer))
    score_P = scores.reshape(len(rows), -1).mean(1)
    error = float(score_P.std(ddof=1)) / math.sqrt(len(rows))
    shutil.rmtree(folder / "run", ignore_errors=True)
    return {**facts, "options": params["candidate"], "score": float(score_P.mean()), "se": error}


def choice(params: Params, inputs: Inputs, folder: Path) -> Facts:
    """The best trial of a method; a trial that failed is not missed."""
    trials = []
    for index, candidate in enumerate(params["candidates"]):
        made = inputs.get(f"trial {index}")
        found = json.loads((made / "facts.json").read_text()) if made is not None else {"error": True}
        trials.append({"options": candidate, **{k: found[k] for k in ("score", "se", "error") if k in found}})
    best = max(range(len(trials)), key=lambda i: trials[i].get("score", -math.inf))
    if "score" not in trials[best]:
        raise RuntimeError(f"all {len(trials)} trials failed, so nothing can be chosen.")
    return {"trials": trials, "chosen": best, "options": trials[best]["options"]}


def judgement(params: Params, inputs: Inputs, folder: Path) -> Facts:
    """What one judge says of a cell's answers: a score of each, or who wins against a baseline, in both orders."""
    tokenizer = load_tokenizer(start_model(inputs["start"]))
    spec = JudgeSpec.model_validate(params["how"])
    rows = prompts_of(params, inputs, "test", params["test_prompts"])
    cache = folder.parent.parent / "cache"
    mine = stored(inputs["cell"] / "rows.parquet", rows, tokenizer)
    if not spec.pairs:
        for name, found in (
            ("scores", mine),
            ("scores_greedy", stored(inputs["cell"] / "greedy.parquet", rows, tokenizer)),
        ):
            scores = judge_scores(params, inputs, cache, spec, found)
            pq.write_table(pa.table({**places(rows, found.per_prompt), spec.name: scores}), folder / f"{name}.parquet")
        return {}
    judge = make_judge(spec, world=open_world(params), tokenizer=tokenizer, inputs=inputs, cache=cache, device=device())
    assert isinstance(judge, PairJudge)
    tables, spent = [], {}
    for baseline in params["against"]:
        theirs = stored(inputs[f"against:{baseline}"] / "rows.parquet", rows, tokenizer)
        said = judge.compare(mine, theirs)
        columns = {**places(rows, mine.per_prompt), "against": [baseline] * len(mine.texts)}
        tables.append(pa.table({**columns, "forward": said.forward_B, "backward": said.backward_B}))
        spent[baseline] = said.spent
    pq.write_table(pa.concat_tables(tables), folder / "judgements.parquet")
    return {"judging": spent}


# ------------------------------------------------------------------------------------------ training


def trained(params: Params, inputs: Inputs, folder: Path, start: Policy, tokenizer: Any) -> tuple[Policy, Facts]:
    """The policy of a method, and what it was made with and has cost."""
    method, seed = params["method"], params["seed"]
    common: dict[str, Any] = {
        "model": start_model(inputs["start"]), "output_dir": folder / "run", "resume": True, "seed": seed,
        "quiet": True, "cache_dir": folder.parent.parent / "cache", "max_length": params["max_length"],
    }  # fmt: skip
    if method["name"] == "start":
        return start, {"spent": None}
    if method["name"] == "sft_more":
        return sft_more(params, inputs, common, tokenizer)
    options, training = dict(method["options"]), {"logging_steps": 10, **method["training"]}
    if "choice" in inputs:
        chosen = json.loads((inputs["choice"] / "facts.json").read_text())["options"]
        options |= {k: v for k, v in chosen.items() if k in params["method"]["known"]}
        training |= {k: v for k, v in chosen.items() if k not in params["method"]["known"]}
    made = create_algorithm(method["algorithm"], **options)
    if made.asks_for_reward:
        proxy = reward_model_folder(inputs["reward_model"]) if "reward_model" in inputs else None
        reward = reward_of(made, proxy, open_world(params), tokenizer, params["verifier"])
        if method["control"] == "permuted":
            reward = Permuted(reward, tokenizer, derive_seed(seed, "permuted rewards"))
        common["reward"] = reward
    if "teacher" in inputs:
        common["teacher"] = inputs["teacher"] / "run" / "final"

    parameters = sum(p.numel() for p in start.parameters())
    meter = Meter(made, training, parameters)
    budget = None if params["budget"] is None else Budget.model_validate(params["budget"])
    if budget is not None and training.get("max_steps") is None:
        tokens = json.loads((inputs["data"] / "facts.json").read_text()).get(
            "answer_tokens", params["max_new_tokens"] / 2
        )
        expected = steps_of(budget, made, training, tokens, parameters)
        training |= {} if expected is None else {"max_steps": expected}

    curve = Curve(folder, lambda step, policy: curve_point(params, inputs, policy, start, tokenizer, step))

    def spent() -> dict[str, float]:
        return meter.read(going.spent.to_dict())

    def scored(step: int, policy: Policy, metrics: dict[str, float]) -> None:
        if method["curve"] is True or (method["curve"] and step in method["curve"]):
            curve.add(step, policy, spent())

    def is_spent(step: int, policy: Policy, metrics: dict[str, float]) -> bool:
        return meter.reached(budget, going.spent.to_dict())

    if method["curve"]:
        curve.add(0, start, {})
    if budget is not None:
        training["logging_steps"] = 1  # where a run may end
    going = steps(
        method["algorithm"], dataset=training_data(params, inputs, folder, made.data), callback=[scored, is_spent],
        **(common | training), **options,
    )  # fmt: skip
    with going.stopping, going:
        for _ in going:
            pass
        run = going.finish()
    assert run.policy is not None, f"{method['algorithm']} trains a reward model; a suite compares policies"
    if method["curve"]:
        if method["curve"] is not True:
            curve.add(run.history[-1]["step"], run.policy, spent())
        curve.gather()
    cost = {k: v for k, v in meter.read(run.spent.to_dict()).items() if k != "seconds"}
    return run.policy, {"spent": cost, "options": options, "training": training}


def training_data(params: Params, inputs: Inputs, folder: Path, kind: str) -> Path:
    """The rows that a method trains on; for a control, with labels that say nothing."""
    data = inputs["data"]
    other = {"rankings": "rankings", "scored": "rankings", "unpaired": "unpaired"}.get(kind, "data")
    names = ("train",) if "world" not in params else (other, "data")
    file = next(f for f in (data / f"{n}.jsonl" for n in names) if f.exists())
    if params["method"]["control"] != "permuted":
        return file
    permuted = folder / "permuted.jsonl"
    write_rows(permuted, without_meaning(read_rows(file), generator(params["seed"], "permuted labels")))
    return permuted


def without_meaning(rows: Rows, random: np.random.Generator) -> Rows:
    """The same rows with labels by chance: sides of a pair tossed, scores of a ranking dealt anew, and labels of single
    answers dealt to other rows."""
    if rows and "chosen" in rows[0]:
        coin = random.random(len(rows)) < 0.5
        return [
            {**r, "chosen": r["rejected"], "rejected": r["chosen"]} if c else r for r, c in zip(rows, coin, strict=True)
        ]
    if rows and "scores" in rows[0]:
        return [{**r, "scores": random.permutation(r["scores"]).tolist()} for r in rows]
    dealt = random.permutation(len(rows))
    told = [k for k in ("label", "score") if rows and k in rows[0]]
    return [{**r, **{k: rows[d][k] for k in told}} for r, d in zip(rows, dealt, strict=True)]


def sft_more(params: Params, inputs: Inputs, common: dict[str, Any], tokenizer: Any) -> tuple[Policy, Facts]:
    """The start trained on: as many completion tokens as the largest trained count of this seed's other cells, on
    demonstrations the start has not seen; where there are none left, on the old ones again."""
    training = dict(params["sft_more"])
    counts = [
        json.loads((folder / "facts.json").read_text())["spent"]["trained_tokens"]
        for name, folder in inputs.items()
        if name.startswith("cell:")
    ]
    tokens = training.pop("tokens", None) or max(counts, default=0)
    if not tokens:
        raise RuntimeError("no other method of this seed has trained on any token, so there is no count to match.")
    world, rows_per_step = open_world(params), training["rows_per_step"]
    if world is not None:
        few = world.demonstrations(1000, skip=params["demonstrations"])
        mean = np.mean([len(i) for i in tokenizer([r["completion"] for r in few])["input_ids"]])  # BOS stands for EOS
        data: Any = world.demonstrations(math.ceil(1.05 * tokens / mean), skip=params["demonstrations"])
    else:
        data = demonstrations_of(inputs["data"])
        chosen, _ = tokenise(data, tokenizer, "completions", max_length=params["max_length"])
        mean = chosen.completions.lengths.mean()
    run = train(
        "sft", dataset=data, max_steps=math.ceil(tokens / (mean * rows_per_step)), logging_steps=50, 
        **(common | training),
    )  # fmt: skip
    assert run.policy is not None
    cost = {k: v for k, v in run.spent.to_dict().items() if k != "seconds"}
    return run.policy, {"spent": cost, "matched_tokens": tokens, "training": training}


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
        samples = samples_of(prompts, completion_ids, self._tokenizer, columns)
        scores = self._reward(samples).numpy()
        # By the step, not by a count of calls: a run that was stopped and goes on counts anew.
        return generator(self._seed, trainer_state.global_step + 1).permutation(scores).tolist()


def samples_of(
    prompts: Sequence[str], completion_ids: list[list[int]], tokenizer: Any, columns: Mapping[str, Any]
) -> Samples:
    ids = Ragged.of(tokenizer(list(prompts))["input_ids"])
    extra = {"prompt": list(prompts), **{k: v for k, v in columns.items() if k not in KEYWORDS}}
    return Samples("completions", ids, Ragged.of(completion_ids), np.arange(len(prompts)), extra=extra)


# ------------------------------------------------------------------------------------------ answers


def draw(
    params: Params, policy: Policy, tokenizer: Any, rows: Rows, n: int, purpose: str, temperature: float | None = None
) -> Samples:
    """Answers of a policy to prompts; the same random numbers for every method."""
    decoding = params["decoding"]
    heat = decoding["temperature"] if temperature is None else temperature
    sampling = Sampling(heat, decoding["top_p"], params["max_new_tokens"])
    seed = 0 if heat == 0 else derive_seed(params["start_seed"], purpose)
    return sample(policy, tokenizer, rows, n, sampling, seed)


def places(rows: Rows, n: int) -> dict[str, Any]:
    return {"prompt": np.repeat(np.arange(len(rows)), n), "sample": np.tile(np.arange(n), len(rows))}


def described(
    params: Params, inputs: Inputs, rows: Rows, answers: Samples, tokenizer: Any, start: Policy | None = None
) -> pa.Table:
    """Answers with everything known about each: scores, log-ratio to the start, length, text."""
    n = len(answers.completions) // len(rows)
    columns: dict[str, Any] = {**places(rows, n), **own_scores(params, inputs, rows, answers, tokenizer)}
    if start is not None:
        columns["kl"] = log_ratio(answers, start).numpy().astype(np.float64)
    columns |= {
        "tokens": answers.completions.lengths,
        "finished": ended(answers),
        "cluster": [cluster_of(rows[i]) for i in range(len(rows)) for _ in range(n)],
        "prompt_text": [str(rows[i]["prompt"]) for i in range(len(rows)) for _ in range(n)],
        "completion": texts(answers, tokenizer),
        "completion_ids": [answers.completions[b].tolist() for b in range(len(answers.completions))],
    }
    return pa.table(columns)


def log_ratio(answers: Samples, start: Policy) -> torch.Tensor:
    """Of every answer the log of its probability over that of the start, in nats."""
    where = next(start.parameters()).device
    ref = token_scores(lambda tree: start(tree).logps_C, answers, 16_384, where, start.packed)
    owner = torch.from_numpy(np.repeat(np.arange(len(answers.completions)), answers.completions.lengths))
    ratio = torch.zeros(len(answers.completions)).index_add(0, owner, answers.tokens["old_logps"] - ref)
    if "decoding_kl" in answers.columns:  # the weights are the start's, and the way to answer is not
        ratio += answers.columns["decoding_kl"]
    return ratio


def own_scores(params: Params, inputs: Inputs, rows: Rows, answers: Samples, tokenizer: Any) -> dict[str, Any]:
    """The truth of a world with its parts, and the proxy that training sees."""
    columns: dict[str, Any] = {}
    world = open_world(params)
    if world is not None:
        columns |= world_scores(world, rows, answers, tokenizer)
    if "reward_model" in inputs:
        columns["proxy"] = load_reward_model(inputs["reward_model"])(answers).numpy().astype(np.float64)
    return columns


def cluster_of(row: Mapping[str, Any]) -> str:
    """Prompts of one cluster are not independent: dialogues that begin alike, requests drawn twice."""
    prompt = row["prompt"]
    return first_turn(prompt) if not isinstance(prompt, str) or SEPARATOR in prompt else prompt


def answered(rows: Rows, answers: Samples, tokenizer: Any) -> Answers:
    return Answers(
        rows=rows, per_prompt=len(answers.completions) // len(rows), samples=answers, texts=texts(answers, tokenizer),
        ended=np.asarray(ended(answers)), tokenizer=tokenizer,
    )  # fmt: skip


def stored(file: Path, rows: Rows, tokenizer: Any) -> Answers:
    """Answers as a cell wrote them."""
    table = pq.read_table(file)
    ids = Ragged.of(table["completion_ids"].to_pylist())
    flags = np.asarray(table["finished"])
    samples = Samples(
        "completions", Ragged.of(encode_prompts(tokenizer, [r["prompt"] for r in rows])), ids,
        np.asarray(table["prompt"]), extra={k: [r.get(k) for r in rows] for k in rows[0]},
        columns={"finish": torch.from_numpy(np.where(flags, Finish.STOP, Finish.LENGTH))},
    )  # fmt: skip
    return Answers(
        rows=rows, per_prompt=len(table) // len(rows), samples=samples, texts=table["completion"].to_pylist(),
        ended=flags, tokenizer=tokenizer,
    )  # fmt: skip


def judge_scores(params: Params, inputs: Inputs, cache: Path, spec: JudgeSpec, answers: Answers) -> np.ndarray:
    """One judge's score of every answer."""
    judge = make_judge(
        spec, world=open_world(params), tokenizer=answers.tokenizer, inputs=inputs, cache=cache, device=device()
    )
    assert isinstance(judge, ScoreJudge), f"judge {spec.name!r} compares answers"
    return judge.score(answers)


def held_out(params: Params, inputs: Inputs, policy: Policy, tokenizer: Any, file: Path) -> None:
    """Negative log-likelihood of demonstrations to validation prompts, which nobody has trained on: what alignment
    costs."""
    world = open_world(params)
    if world is not None:
        rng = stream(world.name, world.seed, "held-out demonstrations")
        prompts = world.prompts("validation", HELD_OUT, unique=True)
        rows = [{"prompt": r["prompt"], "completion": world.demonstrate(r["request"], rng=rng)[0]} for r in prompts]
    else:
        rows = read_rows(inputs["data"] / "validation.jsonl")[:HELD_OUT]
        if not rows or not ({"chosen", "completion"} & set(rows[0])):
            return
    kept, _ = tokenise(rows, tokenizer, "completions", max_length=params["max_length"])
    where = next(policy.parameters()).device
    logps = token_scores(lambda tree: policy(tree).logps_C, kept, 16_384, where, policy.packed)
    lengths = kept.completions.lengths
    owner = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
    nll = -torch.zeros(len(lengths)).index_add(0, owner, logps)
    pq.write_table(pa.table({"row": np.arange(len(lengths)), "nll": nll.numpy(), "tokens": lengths}), file)


# ------------------------------------------------------------------------------------------ curves


class Curve:
    """``curve.parquet`` of a cell, point by point. Until the run has ended each has its own file: a killed process
    has no memory, and the next one goes on behind them."""

    def __init__(self, folder: Path, point: Callable[[int, Policy], pa.Table]) -> None:
        self._whole = folder / "curve.parquet"
        self._pieces = folder / "curve"
        self._point = point

    def add(self, step: int, policy: Policy, spent: Mapping[str, float]) -> None:
        """Score the policy at this step, if that was not done before."""
        file = self._pieces / f"{step:06}.parquet"
        if not file.exists() and not self._whole.exists():
            self._pieces.mkdir(exist_ok=True)
            table = self._point(step, policy)
            for unit in ("generated_tokens", "trained_tokens", "prompts"):
                table = table.append_column(unit, pa.array([float(spent.get(unit, 0.0))] * len(table)))
            with replacing_file(file) as aside:
                pq.write_table(table, aside)

    def gather(self) -> None:
        """All points in one file."""
        if not self._whole.exists():
            points = [pq.read_table(f) for f in sorted(self._pieces.glob("[0-9]*.parquet"))]
            with replacing_file(self._whole) as aside:
                pq.write_table(pa.concat_tables(points), aside)
        shutil.rmtree(self._pieces, ignore_errors=True)


def curve_point(params: Params, inputs: Inputs, policy: Policy, start: Policy, tokenizer: Any, step: int) -> pa.Table:
    """Scores on fixed validation prompts at this step."""
    rows = prompts_of(params, inputs, "validation", params["curve_prompts"])
    answers = draw(params, policy, tokenizer, rows, 2, "curve")
    table = described(params, inputs, rows, answers, tokenizer, start)
    return table.append_column("step", pa.array([step] * len(table)))
