"""What the cells of a task share: the start, the data, reward models, a teacher, the line of best-of-n.

Every job's function has the signature ``(params, inputs, folder) -> facts`` and is a pure function of its arguments.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefzoo.benchmarks import statistics
from prefzoo.data.formats import Dataset, convert, load_dataset, prompt_only
from prefzoo.data.rows import is_dialogue
from prefzoo.data.samples import Samples
from prefzoo.data.tokens import encode_prompts, tokenise
from prefzoo.feedback import ModelReward
from prefzoo.generation import sample, texts
from prefzoo.models.load import learn_tokenizer, load_policy, load_scorer, load_tokenizer, save_scorer, tiny_model
from prefzoo.models.roles import Policy
from prefzoo.models.tokenizer import prepare_tokenizer
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
PARTS = ("train",) * 5 + ("validation",) + ("held_out",) * 3 + ("test",) * 3  # twelfths of data that has no splits


def open_world(params: Params) -> Any:
    """The world of a job, or None where its task has files."""
    told = params.get("world")
    return None if told is None else make(told["name"], seed=told["seed"], **told.get("annotators", {}))


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def start_model(folder: Path) -> str:
    """The model that a start is: its fine-tuned run, or the one it points to."""
    pointer = folder / "model.txt"
    return pointer.read_text(encoding="utf-8") if pointer.exists() else str(folder / "run" / "final")


def load_start(inputs: Inputs) -> tuple[Policy, Any]:
    model = start_model(inputs["start"])
    return load_policy(model).requires_grad_(False).to(device()), load_tokenizer(model)


def reward_model_folder(folder: Path) -> str:
    return start_model(folder)


def load_reward_model(folder: Path) -> ModelReward:
    return ModelReward(load_scorer(reward_model_folder(folder)).to(device()))


def ended(samples: Samples) -> list[bool]:
    return (samples.columns["finish"] == Finish.STOP).tolist()


def write_rows(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


def read_rows(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]  # a text may hold U+2028


def prompts_of(params: Params, inputs: Inputs, part: str, limit: int) -> Rows:
    """Distinct prompts of a part (validation, test), with what the data says of each."""
    world = open_world(params)
    if world is not None:
        return world.prompts(part, limit, unique=world.name == "requests" or part == "validation")
    return read_rows(inputs["data"] / f"{part}_prompts.jsonl")[:limit]


# ------------------------------------------------------------------------------------------ worlds


def world_start(params: Params, inputs: Inputs, folder: Path) -> Facts:
    """A tiny model fine-tuned on demonstrations."""
    world, seed = open_world(params), params["start_seed"]
    tokenizer = world.tokenizer()
    size = params["start"]["model"]
    random = size in ("tiny", "small")
    model = tiny_model(tokenizer, size=size, seed=derive_seed(seed, "init") % 2**31) if random else size
    run = train(
        "sft", model=model, tokenizer=tokenizer if random else None,
        dataset=world.demonstrations(params["demonstrations"]), output_dir=folder / "run", resume=True, seed=seed,
        logging_steps=50, quiet=True, **params["start"]["sft"],
    )  # fmt: skip
    return {"spent": spent_facts(run)}


def spent_facts(run: Any) -> Facts:
    """What a run has cost, without the time, which is the job's own."""
    return {k: v for k, v in run.spent.to_dict().items() if k != "seconds"}


def world_prompts(params: Params, inputs: Inputs, folder: Path) -> Facts:
    """Prompts alone, of a world that checks answers."""
    rows = open_world(params).prompts("train", params["prompts"])
    write_rows(folder / "data.jsonl", rows)
    return {"rows": len(rows)}


def world_preferences(params: Params, inputs: Inputs, folder: Path) -> Facts:
    """Pairs of the start's own answers, labelled by the world's biased and noisy annotators."""
    world, seed, k = open_world(params), params["start_seed"], params["answers"]
    rows = world.prompts("train", params["prompts"])
    policy, tokenizer = load_start(inputs)
    sampling = Sampling(max_new_tokens=params["max_new_tokens"])
    answers = sample(policy, tokenizer, rows, k, sampling, derive_seed(seed, "preferences"))
    words, flags = texts(answers, tokenizer), ended(answers)
    lengths = {"answer_tokens": float(answers.completions.lengths.mean())}
    if params["rated"]:
        return _rated(world, rows, words, flags, params, folder) | lengths
    pairs, report = world.preferences(
        rows, [words[i : i + k] for i in range(0, len(words), k)], [flags[i : i + k] for i in range(0, len(flags), k)],
        seed=derive_seed(seed, "annotators"),
    )  # fmt: skip
    # A side that was cut at the limit cannot be told from one that ended when it is text: such pairs are left out.
    whole = [p for p in pairs if p["chosen_ended"] and p["rejected_ended"]]
    report["cut"] = len(pairs) - len(whole)
    pairs = [{k: v for k, v in p.items() if not k.endswith("_ended")} for p in whole]
    if params["noise"]:
        pairs, report["agreement"] = _noisy(world, pairs, params["noise"], seed)
    write_rows(folder / "data.jsonl", pairs)
    return {"rows": len(pairs), **report} | lengths


def _noisy(world: Any, pairs: Rows, noise: float, seed: int) -> tuple[Rows, float]:
    """Labels of which a share is turned round; and how many of all agree with gold then."""
    turned = generator(seed, "label noise").random(len(pairs)) < noise
    noisy = [_turned(p) if t else p for p, t in zip(pairs, turned, strict=True)]
    gaps = [world.gold(p["request"], p["chosen"], True) - world.gold(p["request"], p["rejected"], True) for p in noisy]
    return noisy, sum(g > 0 for g in gaps) / max(1, sum(g != 0 for g in gaps))


def _turned(pair: dict[str, Any]) -> dict[str, Any]:
    return {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}


def _rated(world: Any, rows: Rows, words: list[str], flags: list[bool], params: Params, folder: Path) -> Facts:
    """The same answers rated one by one: as rankings, and as disjoint pairs with all that pairs can say.

    Of a pair: ``score_chosen``, ``score_rejected``, their difference ``margin``, and ``probability``, how likely these
    annotators are to prefer the chosen side. Answers that were cut are left out, and so are identical ones.
    """
    rng = stream(world.name, world.seed, "ratings", derive_seed(params["start_seed"], "annotators"))
    pairs, rankings, agreed, decided, k = [], [], 0, 0, params["answers"]
    for i, row in enumerate(rows):
        request = row["request"]
        found = {words[j]: world.rate(request, words[j], True, rng=rng) for j in range(i * k, i * k + k) if flags[j]}
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
    write_rows(folder / "data.jsonl", pairs)
    write_rows(folder / "rankings.jsonl", rankings)
    sides = (({k: p[k] for k in ("prompt", "request")}, p[side], p[f"score_{side}"], side) for p in pairs
             for side in ("chosen", "rejected"))  # fmt: skip
    labelled = [{**row, "completion": y, "label": side == "chosen", "score": score} for row, y, score, side in sides]
    write_rows(folder / "unpaired.jsonl", labelled)
    return {"rows": len(pairs), "rankings": len(rankings), "agreement": agreed / max(decided, 1)}


def world_teacher(params: Params, inputs: Inputs, folder: Path) -> Facts:
    """The model that others are distilled from: the start, trained on the best of its own answers by gold reward."""
    world = open_world(params)
    run = train(
        "rejection_sampling", model=start_model(inputs["start"]), dataset=world.prompts("train", params["prompts"]),
        reward=world.gold_reward, output_dir=folder / "run", resume=True, seed=params["start_seed"],
        max_new_tokens=params["max_new_tokens"], max_steps=params["rounds"], learning_rate=5e-4, quiet=True,
    )  # fmt: skip
    return {"spent": spent_facts(run)}


def world_reward_model(params: Params, inputs: Inputs, folder: Path) -> Facts:
    """A reward model of the pairs, standardised on the start's answers to validation prompts, measured against gold."""
    world, seed = open_world(params), params["start_seed"]
    facts = _train_reward_model(params, inputs, inputs["data"] / "data.jsonl", seed, folder)
    policy, tokenizer = load_start(inputs)
    rows = world.prompts("validation", params["validation_prompts"], unique=True)
    sampling = Sampling(max_new_tokens=params["max_new_tokens"])
    answers = sample(policy, tokenizer, rows, 2, sampling, derive_seed(seed, "check"))
    scores = _standardise(folder / "run" / "final", answers, tokenizer)
    gold = np.asarray(world_scores(world, rows, answers, tokenizer)["gold"]).reshape(-1, 2)
    differ = gold[:, 0] != gold[:, 1]
    right = (scores[differ, 0] > scores[differ, 1]) == (gold[differ, 0] > gold[differ, 1])
    return {**facts, "accuracy_against_gold": float(right.mean()), "pairs_judged": int(differ.sum())}


def world_best_of_n(params: Params, inputs: Inputs, folder: Path) -> Facts:
    """What choosing the best of n of the start's answers earns, by each judge: the line to hold training against.

    Unbiased from as many samples of each validation prompt as the largest n (``statistics.best_of_n``).
    """
    world, most = open_world(params), max(params["best_of_n"])
    policy, tokenizer = load_start(inputs)
    rows = world.prompts("validation", params["curve_prompts"], unique=True)
    proxy = load_reward_model(inputs["reward_model"]) if "reward_model" in inputs else None
    scores: dict[str, list[Any]] = {}
    for i in range(0, len(rows), 32):
        some, seed = rows[i : i + 32], derive_seed(params["start_seed"], "best of n", i)
        answers = sample(policy, tokenizer, some, most, Sampling(max_new_tokens=params["max_new_tokens"]), seed)
        found: dict[str, Any] = world_scores(world, some, answers, tokenizer)
        if proxy is not None:
            found["proxy"] = proxy(answers).numpy()
        for name, values in found.items():
            scores.setdefault(name, []).append(np.asarray(values, dtype=np.float64).reshape(len(some), most))
    tables = {name: np.concatenate(parts) for name, parts in scores.items()}
    line = []
    for judge in ("proxy", "exact", "gold"):
        for n in params["best_of_n"] if judge in tables else ():
            point: dict[str, Any] = {"judge": judge, "n": n, "kl": statistics.kl_best_of_n(n).estimate}
            for name in sorted({"gold", judge}):
                earned = statistics.best_of_n(tables[judge], tables[name], n)
                point |= {name: earned.estimate, f"{name}_se": earned.se}
            line.append(point)
    return {"prompts": len(rows), "samples": most, "line": line}


def world_scores(world: Any, rows: Rows, answers: Samples, tokenizer: Any) -> dict[str, list[float]]:
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


def _train_reward_model(params: Params, inputs: Inputs, data: Path, seed: int, folder: Path) -> Facts:
    run = train(
        "reward_model", model=start_model(inputs["start"]), dataset=data, output_dir=folder / "run", resume=True,
        seed=seed, logging_steps=50, quiet=True, **params["reward_model"],
    )  # fmt: skip
    return {"spent": spent_facts(run)}


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


# ------------------------------------------------------------------------------------------ files


def first_turn(prompt: Any) -> str:
    """What decides which part a row is in: the first turn of its dialogue, so that no dialogue straddles."""
    if not isinstance(prompt, str):
        return str(prompt[0]["content"]) if prompt else ""
    return prompt.strip().removeprefix("Human:").split(SEPARATOR)[0].split("\n\nAssistant:")[0].strip()


def files_data(params: Params, inputs: Inputs, folder: Path) -> Facts:
    """The parts of a data set, one file each; and, for a start of random weights, a tokenizer learned on ``train``."""
    given = params["data"]

    def opened(source: Any) -> Dataset:
        return load_dataset(here(source), columns=given["columns"])

    whole = opened(given["train"])
    parts: dict[str, Rows] = {"train": [], "validation": [], "held_out": [], "test": []}
    absent = [p for p in ("validation", "test") if given[p] is None]
    absent += ["held_out"] if params["held_out"] and given["held_out"] is None else []
    for row in whole.rows[: given["rows"]]:
        wanted = PARTS[derive_seed("parts", first_turn(row.get("prompt", ""))) % len(PARTS)]
        parts[wanted if wanted in absent else "train"].append(row)
    facts: Facts = {"rows": whole.report.rows, "dropped": dict(whole.report.dropped), "type": whole.type}
    for part in ("validation", "test", "held_out"):
        if given[part] is not None:
            parts[part] = list(opened(given[part]).rows)
    if params["start"]["model"] in ("tiny", "small"):
        tokenizer = learn_tokenizer([t for row in parts["train"] for t in _texts_of(row)], given["vocabulary"])
        if is_dialogue(whole.rows[0], whole.type):
            prepare_tokenizer(tokenizer, chat_template="chatml")
        tokenizer.save_pretrained(str(folder / "tokenizer"))
    else:
        tokenizer = load_tokenizer(params["start"]["model"])
    room = given["max_length"] - params["max_new_tokens"]
    for part, rows in parts.items():
        kept = _fitting(rows, tokenizer, room)
        if not kept and (rows or part in ("train", "test")):
            raise UsageError(
                f"data, part {part!r}: of {len(rows)} rows none has a prompt of at most {room} tokens (max_length "
                f"{given['max_length']} less {params['max_new_tokens']} for the answer); raise data.max_length."
            )
        write_rows(folder / f"{part}.jsonl", kept)
        facts[part] = {"rows": len(kept), "prompt too long": len(rows) - len(kept)}
        if part in ("validation", "test"):
            asked = {json.dumps(p["prompt"], sort_keys=True): p for p in map(prompt_only, kept)}
            write_rows(folder / f"{part}_prompts.jsonl", list(asked.values()))
    if given["demonstrations"] is not None:
        rows = _fitting(list(convert(opened(given["demonstrations"]), "prompt_completion").rows), tokenizer, room)
        write_rows(folder / "demonstrations.jsonl", rows)
        facts["demonstrations"] = {"rows": len(rows)}
    return facts


def here(source: Any) -> Any:
    """A source without what chooses a part of a hub id, where a file or a folder stands in for one.

    >>> here({"path": "org/name", "name": "main"})
    {'path': 'org/name', 'name': 'main'}
    """
    if not isinstance(source, Mapping) or not Path(str(source.get("path", ""))).exists():
        return source
    of_the_hub = ("name", "revision", *(() if Path(source["path"]).is_dir() else ("split",)))
    return {k: v for k, v in source.items() if k not in of_the_hub}


def _texts_of(row: Mapping[str, Any]) -> list[str]:
    """All text of a row, of strings and of messages."""
    found = []
    for key in ("prompt", "chosen", "rejected", "completion", "text"):
        value = row.get(key)
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, list):
            found += [str(m["content"]) for m in value if isinstance(m, Mapping) and "content" in m]
    return found


def _fitting(rows: Rows, tokenizer: Any, limit: int) -> Rows:
    """Rows whose prompt leaves room for an answer."""
    lengths = [len(i) for i in encode_prompts(tokenizer, [r.get("prompt", "") for r in rows])] if rows else []
    return [r for r, n in zip(rows, lengths, strict=True) if n <= limit]


def demonstrations_of(folder: Path) -> Path:
    """The demonstrations of a task with files: its own, or the training part's answers."""
    own = folder / "demonstrations.jsonl"
    return own if own.exists() else folder / "train.jsonl"


def files_start(params: Params, inputs: Inputs, folder: Path) -> Facts:
    """A model of random weights or one that is given, fine-tuned on demonstrations if the suite says so."""
    size, seed, sft = params["start"]["model"], params["start_seed"], params["start"]["sft"]
    if sft is None:
        (folder / "model.txt").write_text(size, encoding="utf-8")
        return {"model": size}
    model: Any = size
    tokenizer = None
    if size in ("tiny", "small"):
        tokenizer = load_tokenizer(inputs["data"] / "tokenizer")
        model = tiny_model(tokenizer, size=size, seed=derive_seed(seed, "init") % 2**31)
    run = train(
        "sft", model=model, tokenizer=tokenizer, dataset=demonstrations_of(inputs["data"]), output_dir=folder / "run",
        resume=True, seed=seed, logging_steps=50, quiet=True, **{"max_length": params["max_length"], **sft},
    )  # fmt: skip
    return {"spent": spent_facts(run)}


def files_reward_model(params: Params, inputs: Inputs, folder: Path) -> Facts:
    """A reward model of one part (``params["part"]``), measured on the test part's pairs."""
    part, seed = params["part"], derive_seed(params["start_seed"], "reward model", params["part"]) % 2**31
    given = {"max_length": params["max_length"], **params["reward_model"]}
    facts = _train_reward_model({"reward_model": given}, inputs, inputs["data"] / f"{part}.jsonl", seed, folder)
    policy, tokenizer = load_start(inputs)
    rows = [prompt_only(r) for r in read_rows(inputs["data"] / "train.jsonl")[:256]]
    sampling = Sampling(max_new_tokens=params["max_new_tokens"])
    answers = sample(policy, tokenizer, rows, 2, sampling, derive_seed(params["start_seed"], "check"))
    _standardise(folder / "run" / "final", answers, tokenizer)
    human, _ = tokenise(inputs["data"] / "test.jsonl", tokenizer, "pairs", max_length=params["max_length"])
    scores = ModelReward(load_scorer(folder / "run" / "final"))(human).view(-1, 2)
    right = (scores[:, 0] > scores[:, 1]).sum() + 0.5 * (scores[:, 0] == scores[:, 1]).sum()
    return {**facts, "right_on_test_pairs": float(right), "test_pairs": len(scores)}


def given_reward_model(params: Params, inputs: Inputs, folder: Path) -> Facts:
    """A reward model that exists."""
    (folder / "model.txt").write_text(params["model"], encoding="utf-8")
    return {"model": params["model"]}
