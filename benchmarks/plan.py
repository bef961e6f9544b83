"""From a suite to its jobs: what is shared appears once, what cannot apply has a reason."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefzoo.algorithm import algorithm_entry, create_algorithm
from prefzoo.benchmarks.jobs import Job
from prefzoo.benchmarks.judging import JudgeSpec
from prefzoo.benchmarks.suites import Method, Suite, Task
from prefzoo.parts.feedback import Verifier
from prefzoo.parts.roles import TEACHER
from prefzoo.registry import UsageError, suggest
from prefzoo.seeds import generator
from prefzoo.source import content_hash
from prefzoo.training import TrainConfig

MATERIALS, CELLS = "prefzoo.benchmarks.materials", "prefzoo.benchmarks.cells"
TUNING_SEED = 1_000_003  # of trials: no seed of a report

Names = dict[str, dict[str, list[str]]]


@dataclass
class Plan:
    """The jobs of a suite, each after what it needs, and where in the suite each belongs."""

    jobs: list[Job] = field(default_factory=list)
    shared: Names = field(default_factory=dict)  # task -> artifact -> job names by start
    cells: Names = field(default_factory=dict)  # task -> method -> job names by seed
    trials: Names = field(default_factory=dict)  # task -> method -> job names
    choices: dict[str, dict[str, str]] = field(default_factory=dict)  # task -> method -> job name
    judgements: dict[str, Names] = field(default_factory=dict)  # task -> judge -> method -> job names by seed
    not_applicable: dict[str, dict[str, str]] = field(default_factory=dict)  # task -> method -> reason
    _names: dict[str, str] = field(default_factory=dict, repr=False)  # content -> the job that does it

    def add(self, job: Job) -> str:
        """The name of the job that does this: an earlier one, where the content is the same."""
        content = json.dumps([job.call, job.params, job.needs, job.sources], sort_keys=True)
        if content not in self._names:
            self._names[content] = job.name
            self.jobs.append(job)
        return self._names[content]


def plan(suite: Suite) -> Plan:
    """All jobs of a suite."""
    made = Plan()
    for task in suite.tasks:
        made.not_applicable[task.name] = _not_applicable(task)
        starts = [_shared(made, suite, task, index) for index in range(suite.start_seeds)]
        methods = [m for m in task.methods if m.name not in made.not_applicable[task.name]]
        choices = {m.name: _tuned(made, task, m, starts[0]) for m in methods if _space(task, m)}
        made.choices[task.name] = choices
        made.cells[task.name], made.judgements[task.name] = {}, {}
        for seed in range(suite.seeds):
            inputs = starts[seed % suite.start_seeds]
            cells: dict[str, str] = {}
            for method in sorted(methods, key=lambda m: m.name == "sft_more"):
                needs = dict(inputs) | ({"choice": choices[method.name]} if method.name in choices else {})
                if method.name == "sft_more" and not task.sft_more.get("tokens"):
                    needs |= {f"cell:{n}": job for n, job in cells.items() if n != "start"}
                job = Job(
                    f"{task.name}/{method.name}/{seed}", f"{CELLS}:cell", _cell(suite, task, method, seed),
                    _needed(task, method, needs), method.weight, _sources(method, task), role="cell",
                    optional=tuple(k for k in needs if k.startswith("cell:")), on_device=True,
                )  # fmt: skip
                cells[method.name] = made.add(job)
                made.cells[task.name].setdefault(method.name, []).append(cells[method.name])
            for judge in (j for j in task.judges if not j.builtin):
                _judged(made, suite, task, judge, seed, cells, inputs)
    return made


def _shared(made: Plan, suite: Suite, task: Task, index: int) -> dict[str, str]:
    """The shared jobs of one start; the inputs that they give to a cell."""
    seed, suffix = task.start.seed + index, f"-{index}" if suite.start_seeds > 1 else ""
    start = task.start.model_dump(mode="json", include={"model", "sft"})
    start["model"] = _absolute(start["model"])
    base: dict[str, Any] = {"start_seed": seed, "max_new_tokens": task.decoding.max_new_tokens}
    sft, reward = create_algorithm("sft").sources, create_algorithm("reward_model").sources
    found: dict[str, str] = {}

    def job(artifact: str, function: str, params: Mapping[str, Any], needs: tuple[str, ...] = (), **more: Any) -> None:
        inputs = {n: found[n] for n in needs if n in found}
        name = made.add(
            Job(
                f"{task.name}/{artifact}{suffix}",
                f"{MATERIALS}:{function}",
                dict(params),
                inputs,
                on_device=True,
                **more,
            )
        )
        found[artifact] = name
        made.shared.setdefault(task.name, {}).setdefault(artifact, []).append(name)

    model = task.feedback.reward_model
    if task.world is not None:
        world, place = task.world, {"world": {"name": task.world.name, "seed": task.world.seed}}
        if start["sft"] is None:
            job("start", "files_start", {**base, "start": start}, sources=_model_hash(task.start.model))
        else:
            given = {**place, "start_seed": seed, "start": start, "demonstrations": world.demonstrations}
            job("start", "world_start", given, weight=500, sources=sft | _model_hash(task.start.model))
        told = {**place["world"], "annotators": world.annotators()}
        if world.name == "sums":
            job("data", "world_prompts", {**place, "prompts": world.prompts}, weight=5)
        else:
            answers = {k: getattr(world, k) for k in ("prompts", "answers", "rated", "noise")}
            job("data", "world_preferences", {**base, **answers, "world": told}, ("start",), weight=500)
        if isinstance(model, Mapping):
            params = {**base, **place, "validation_prompts": world.validation_prompts, "reward_model": dict(model)}
            job("reward_model", "world_reward_model", params, ("start", "data"), weight=500, sources=reward)
        if task.feedback.teacher_rounds:
            params = {**base, **place, "prompts": world.prompts, "rounds": task.feedback.teacher_rounds}
            taught = create_algorithm("rejection_sampling").sources
            job("teacher", "world_teacher", params, ("start",), weight=100, sources=taught)
        if task.best_of_n:
            params = {**base, **place, "best_of_n": list(task.best_of_n), "curve_prompts": task.curve_prompts}
            job("best_of_n", "world_best_of_n", params, ("start", "data", "reward_model"), weight=150)
    else:
        data = task.data
        assert data is not None
        held_out = any("held_out" in j.needs for j in task.judges)
        parts_given = {k: _absolute(v) for k, v in data.model_dump(mode="json").items()}
        given = {**base, "data": parts_given, "start": start, "held_out": held_out}
        job("data", "files_data", given, weight=30, sources=_data_hashes(task))
        files = {**base, "max_length": data.max_length}
        job("start", "files_start", {**files, "start": start}, ("data",), weight=500,
            sources=sft | _model_hash(task.start.model))  # fmt: skip
        parts = {"reward_model": "train", **({"held_out": "held_out"} if held_out else {})}
        trained = dict(model) if isinstance(model, Mapping) else None
        for artifact, part in parts.items() if trained is not None else ():
            params = {**files, "part": part, "reward_model": trained}
            job(artifact, "files_reward_model", params, ("data", "start"), weight=400, sources=reward)
    if isinstance(model, str):
        job("reward_model", "given_reward_model", {"model": _absolute(model)}, sources=_model_hash(model))
    found.pop("best_of_n", None)
    return found


def _cell(suite: Suite, task: Task, method: Method, seed: int) -> dict[str, Any]:
    """All that a cell is made from."""
    options: dict[str, Any] = {}
    training: dict[str, Any] = {}
    known: list[str] = []
    if method.algorithm is not None:
        options, training = task.resolve(method)
        known = list(algorithm_entry(method.algorithm).options)
        training |= {"lora": True} if task.start.lora else {}
    place: dict[str, Any] = {}
    if task.world is not None:
        place = {
            "world": {"name": task.world.name, "seed": task.world.seed}, "demonstrations": task.world.demonstrations,
        }  # fmt: skip
    return {
        **place,
        "start_seed": task.start.seed + seed % suite.start_seeds,
        "method": {
            "name": method.name, "algorithm": method.algorithm, "options": options, "training": training,
            "known": known, "control": method.control,
            "curve": method.curve if isinstance(method.curve, bool) else list(method.curve),
        },
        "seed": method.first_seed + seed,
        "samples": task.decoding.samples,
        "test_prompts": suite.test_prompts,
        "decoding": {"temperature": task.decoding.temperature, "top_p": task.decoding.top_p},
        "max_new_tokens": task.decoding.max_new_tokens,
        "max_length": task.data.max_length if task.data is not None else 1024,
        "curve_prompts": task.curve_prompts,
        "verifier": _absolute_function(task.feedback.verifier),
        "budget": None if task.budget is None else task.budget.model_dump(),
        "sft_more": dict(task.sft_more) if method.name == "sft_more" else {},
    }  # fmt: skip


def _needed(task: Task, method: Method, needs: Mapping[str, str]) -> dict[str, str]:
    """Without the teacher, where nobody learns from it, and without a reward model that judges only."""
    taught = (
        method.algorithm is not None and TEACHER in create_algorithm(method.algorithm, **method.split_options[0]).needs
    )
    return {k: v for k, v in needs.items() if (k != "teacher" or taught) and k != "held_out"}


def _sources(method: Method, task: Task) -> dict[str, str]:
    """The registered functions that a method is made of, and the user's verifier."""
    if method.algorithm is None:
        return dict(create_algorithm("sft").sources) if method.name == "sft_more" else {}
    found = dict(create_algorithm(method.algorithm, **task.resolve(method)[0]).sources)
    return found | _file_hash(task.feedback.verifier)


def _judged(
    made: Plan,
    suite: Suite,
    task: Task,
    judge: JudgeSpec,
    seed: int,
    cells: Mapping[str, str],
    inputs: Mapping[str, str],
) -> None:
    """The jobs of one judge for all cells of a seed."""
    given = _cell(suite, task, Method(name="start"), seed)
    params: dict[str, Any] = {k: given[k] for k in ("world", "test_prompts", "max_length", "start_seed") if k in given}
    if judge.kind == "annotators" and task.world is not None:  # as strong and as noisy as those of the labels
        params["world"] = {**params["world"], "annotators": task.world.annotators()}
    for name, cell in cells.items():
        against = [b for b in task.baselines if b in cells and b != name] if judge.pairs else []
        if judge.pairs and not against:
            continue
        needs = {k: inputs[k] for k in ("start", "data", *judge.needs) if k in inputs} | {"cell": cell}
        job = Job(
            f"{task.name}/{name}/{seed}/{judge.name}", f"{CELLS}:judgement",
            {**params, "judge": judge.in_key(), "how": judge.model_dump(mode="json"), "against": against},
            needs | {f"against:{b}": cells[b] for b in against}, 10, judge.sources(), role="judgement", on_device=True,
        )  # fmt: skip
        names = made.judgements[task.name].setdefault(judge.name, {}).setdefault(name, [])
        names.append(made.add(job))


# ------------------------------------------------------------------------------------------ tuning


def _space(task: Task, method: Method) -> Mapping[str, Any]:
    """Where a method's trials are drawn from; empty: it is not tuned."""
    if task.tuning is None or method.algorithm is None or method.control is not None:
        return {}
    return method.search if method.search is not None else task.tuning.search


def candidates(task: Task, method: Method) -> list[dict[str, Any]]:
    """The trials of a method: as it is written, then draws from its search space, none twice."""
    assert task.tuning is not None and method.algorithm is not None
    options, training = task.resolve(method)
    here = {**TrainConfig().model_dump(), **algorithm_entry(method.algorithm).options, **options, **training}
    space: dict[str, Any] = {}
    for key, told in _space(task, method).items():
        where = f"task {task.name!r}, method {method.name!r}, search"
        if key not in here:
            raise UsageError(f"{where}: no option {key!r}{suggest(key, here)}")
        space[key] = _values(told, here[key], f"{where}.{key}")
    random, trials = generator(0, "tuning", task.name, method.name), task.tuning.trials
    if all(isinstance(values, list) for values in space.values()):
        grid = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
        grid = [g for g in grid if any(here[k] != v for k, v in g.items())]
        drawn = [grid[i] for i in random.permutation(len(grid))[: trials - 1]]
    else:
        drawn = []
        for _ in range(100 * trials):
            one = {k: v[int(random.integers(len(v)))] if isinstance(v, list) else v(random) for k, v in space.items()}
            drawn += [one] if one not in drawn and len(drawn) < trials - 1 else []
    if len(drawn) + 1 < trials:
        raise UsageError(
            f"task {task.name!r}, method {method.name!r}: its search space has {len(drawn)} values besides its own, "
            f"and every method gets {trials} trials; give it more values, or the suite fewer trials."
        )
    return [{}, *drawn]


def _values(told: Any, here: Any, where: str) -> Any:
    """A list of values, or a function that draws one."""
    if isinstance(told, Mapping) and set(told) == {"scale"}:
        if not isinstance(here, int | float):
            raise UsageError(f"{where}: scale multiplies what the method has, which is {here!r}; give values instead.")
        return [type(here)(here * factor) for factor in told["scale"]]
    if isinstance(told, Mapping) and {"low", "high"} <= set(told) <= {"low", "high", "log"}:
        low, high = float(told["low"]), float(told["high"])
        if told.get("log"):
            return lambda random: float(f"{low * (high / low) ** random.random():.3g}")
        return lambda random: float(f"{random.uniform(low, high):.3g}")
    if isinstance(told, list | tuple) and told:
        return list(told)
    raise UsageError(
        f"{where}: expected a list of values, {{scale: [...]}} or {{low:, high:, log:}}, got {told!r:.60}."
    )


def _tuned(made: Plan, task: Task, method: Method, inputs: Mapping[str, str]) -> str:
    """The trials of a method, and the job that chooses; its name."""
    tuning = task.tuning
    assert tuning is not None
    judge = next((j for j in task.judges if not j.pairs), None)
    if judge is None:
        raise UsageError(
            f"task {task.name!r}: tuning needs a judge that scores single answers, and all of its judges compare two."
        )
    drawn = candidates(task, method)
    names = made.trials.setdefault(task.name, {}).setdefault(method.name, [])
    known = set(algorithm_entry(method.algorithm or "").options)
    for index, candidate in enumerate(drawn):
        tried = method.but(options={**method.options, **candidate}, curve=False)
        params = _cell(Suite(name="tuning", tasks=(task,)), task, tried, 0)
        params |= {
            "seed": TUNING_SEED, "samples": tuning.samples, "test_prompts": tuning.prompts, "candidate": candidate,
            "judge": judge.in_key(),
        }  # fmt: skip
        needs = _needed(task, tried, inputs) | {n: inputs[n] for n in judge.needs if n in inputs}
        sources = _sources(tried, task) | judge.sources()
        name = f"{task.name}/{method.name}/trial-{index}"
        names.append(made.add(
            Job(name, f"{CELLS}:trial", params, needs, method.weight, sources, role="trial", on_device=True)
        ))  # fmt: skip
    needs = {f"trial {i}": n for i, n in enumerate(names)}
    params = {"candidates": drawn, "known": sorted(known)}
    return made.add(
        Job(f"{task.name}/{method.name}/choice", f"{CELLS}:choice", params, needs, role="choice", optional=tuple(needs))
    )


# ------------------------------------------------------------------------------------------ what cannot apply


def _not_applicable(task: Task) -> dict[str, str]:
    found = {m.name: reason for m in task.methods if (reason := _reason(task, m))}
    left = [m for m in task.algorithms if m.name not in found]
    if "sft_more" in task.baselines and not left and not task.sft_more.get("tokens"):
        found["sft_more"] = "no other method is trained here, so there is no count of tokens to match"
    return found


def _reason(task: Task, method: Method) -> str | None:
    """Why a method cannot be run on a task; read off the parts that it is made of."""
    if method.algorithm is None:
        return None
    try:
        made = create_algorithm(method.algorithm, **task.resolve(method)[0])
    except UsageError as error:
        return f"it cannot be made with these options: {error}"
    if made.trains_reward:
        return "it trains a reward model, not a policy"
    if made.data == "steps":
        return "it learns from rated steps, and the task has pairs"
    world = task.world
    rated = world is not None and world.rated
    terms = [t for s in made.stages for t in s.terms]
    verifies = any(isinstance(s.feedback, Verifier) for s in made.stages)
    pairs_world = world is not None and world.name == "requests"
    if (made.data == "scored" or any("scores_PK" in t.loss.extras for t in terms)) and not rated and pairs_world:
        return "it learns from scores, and the task's answers are compared only"
    if world is None and verifies and task.feedback.verifier is None:
        return "the data has preferences but no answers that a verifier could check"
    if world is not None and world.name == "sums" and (made.data != "prompts" or not made.on_policy):
        return "this world has no preference labels, only a verifier"
    told = task.feedback.reward_model is not None or task.feedback.verifier is not None
    if world is None and made.asks_for_reward and not told:
        return "it asks for a reward, and the task has neither a reward model nor a verifier (feedback)"
    if TEACHER in made.needs and not task.feedback.teacher_rounds:
        return "it learns from a teacher, and the task has none"
    if any(getattr(s.feedback, "revises", False) for s in made.stages):
        return "its answers are revised in words, which the language of this task does not have"
    given = {"margin", "probability", "score", "scores"} if rated else set()
    missing = {c for t in terms for c in t.loss.columns} - given
    if missing and not made.on_policy and pairs_world:
        return f"it learns from a {min(missing)} of each row, which the task's annotators do not give"
    return None


# ------------------------------------------------------------------------------------------ what is outside


def _absolute(source: Any) -> Any:
    """A path as every process finds it; what is no path here is left as it is."""
    if isinstance(source, Mapping) and "path" in source:
        return {**source, "path": _absolute(source["path"])}
    if isinstance(source, list) and any(isinstance(s, str | Mapping) for s in source):
        return [_absolute(s) for s in source]
    return str(Path(source).resolve()) if isinstance(source, str) and Path(source).exists() else source


def _model_hash(model: str) -> dict[str, str]:
    """The content of a model's folder; a hub id is its own name."""
    return {} if model in ("tiny", "small") or not Path(model).is_dir() else {"model": content_hash(Path(model))}


def _data_hashes(task: Task) -> dict[str, str]:
    """The content of every local file of the data; what is missing is told before anything runs."""
    assert task.data is not None
    found = {}
    for part in ("train", "validation", "test", "held_out", "demonstrations"):
        source = getattr(task.data, part)
        path = source.get("path") if isinstance(source, Mapping) else source
        if isinstance(path, str | Path) and Path(path).exists():
            found[part] = content_hash(Path(path))
        elif isinstance(path, str) and ("\\" in path or path.startswith((".", "/")) or Path(path).suffix in SUFFIXES):
            raise UsageError(f"data.{part} {path!r}: no such file.")
    return found


SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".gz", ".arrow", ".tsv")


def _absolute_function(name: str | None) -> str | None:
    """FILE.py:function with the whole path of its file."""
    file, colon, function = (name or "").partition(":")
    return f"{Path(file).resolve()}:{function}" if colon and file.endswith(".py") else name


def _file_hash(name: str | None) -> dict[str, str]:
    """The content of a user's file, of FILE.py:function."""
    path = Path((name or "").partition(":")[0])
    return {str(path): content_hash(path)} if path.suffix == ".py" and path.exists() else {}
