"""What a suite is: tasks, each with a start, data, feedback, judges and algorithms, at a stated budget.

A suite is written in YAML or in Python; both are these models, and everything is checked before anything runs.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from prefzoo.algorithm import ALGORITHMS, algorithm_entry, create_algorithm
from prefzoo.benchmarks.judging import JudgeSpec
from prefzoo.benchmarks.suites.reading import changed, like, said_of, varied
from prefzoo.parts.feedback import Verifier
from prefzoo.parts.roles import TEACHER
from prefzoo.registry import UsageError, suggest
from prefzoo.training import TrainConfig
from prefzoo.yaml_numbers import read_yaml

Options = Mapping[str, Any]
Unit = Literal["prompts", "completions", "generated_tokens", "trained_tokens", "optimizer_steps", "flops", "seconds"]
BASELINES = ("start", "sft_more")
OF_THE_SUITE = {"seed": "seeds, or first_seed", "cache_dir": "--out"}  # options of training that a suite decides
COLUMNS = ("gold", "exact", "proxy", "kl", "tokens", "finished", "prompt", "sample", "cluster", "seed", "run", "method")
NAME = re.compile(r"[\w.+=,@ -]+")  # names of methods and tasks are parts of file names


class Section(BaseModel):
    """A part of a suite: immutable, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def but(self, **changes: Any) -> Any:
        """This section with other values, checked again."""
        return type(self).model_validate({**{k: getattr(self, k) for k in self.model_fields_set}, **changes})


class World(Section):
    """An embedded task with known truth: its facts, its annotators, and how much of it is used."""

    name: Literal["requests", "sums"] = Field(description="requests (preferences) or sums (verifiable answers)")
    seed: int = Field(0, description="of its facts and splits")
    bias: Literal["flattery", "length", "none"] | None = Field(None, description="what its annotators like too well")
    strength: float | None = Field(None, description="how much they do")
    temperature: float | None = Field(None, ge=0, description="their noise: P(a over b) = σ(difference / temperature)")
    noise: float = Field(0.0, ge=0, le=0.5, description="share of their labels that are turned round afterwards")
    demonstrations: PositiveInt = Field(34_000, description="rows of the start's fine-tuning")
    prompts: PositiveInt = Field(2_500, description="prompts of the training data")
    answers: PositiveInt = Field(8, description="of the start to each; annotators judge disjoint pairs")
    rated: bool = Field(False, description="answers are rated one by one, not only compared")
    validation_prompts: PositiveInt = Field(512, description="prompts that measure the reward model")

    @model_validator(mode="after")
    def _has_annotators(self) -> World:
        told = {k for k in ("bias", "strength", "temperature", "noise", "rated") if k in self.model_fields_set}
        if self.name == "sums" and told:
            raise ValueError(f"the world 'sums' has no annotators: leave out {', '.join(sorted(told))}")
        return self

    def annotators(self) -> dict[str, Any]:
        """What is told of the annotators; the world has defaults for the rest."""
        told = {"bias": self.bias, "strength": self.strength, "temperature": self.temperature}
        return {k: v for k, v in told.items() if v is not None}


class Data(Section):
    """Files, folders or hub data sets. Parts that are not given are split off ``train`` by the prompt's first turn."""

    train: Any = Field(None, description="what methods train on: pairs, prompts with answers to verify, ... ")
    validation: Any = Field(None, description="prompts for tuning and curves; None: a twelfth of train")
    test: Any = Field(None, description="prompts that are judged; None: three twelfths of train")
    held_out: Any = Field(None, description="pairs of the judge 'held_out'; None: three twelfths of train")
    demonstrations: Any = Field(None, description="of the start's fine-tuning and of sft_more; None: train's answers")
    columns: Mapping[str, str] | None = Field(None, description="what the data calls its columns")
    rows: PositiveInt | None = Field(None, description="at most so many rows of train")
    max_length: PositiveInt = Field(1024, description="tokens of prompt + answer")
    vocabulary: PositiveInt = Field(2048, description="of the tokenizer that a random start learns")


class Start(Section):
    """The model that every method starts from."""

    model: str = Field("tiny", description="'tiny' or 'small' (random weights), a folder, or a hub id")
    seed: int = Field(0, description="of its weights, its fine-tuning, the labels and the reward model")
    sft: Options | None = Field(None, description="training options of its fine-tuning; None: the model as it is")
    lora: bool = Field(False, description="methods train adapters of it")

    @field_validator("sft")
    @classmethod
    def _trains(cls, value: Options | None) -> Options | None:
        return None if value is None else _training(value, "sft")

    @property
    def random(self) -> bool:
        return self.model in ("tiny", "small")


class Feedback(Section):
    """What methods are told besides the labels of the data."""

    reward_model: Options | str | None = Field(
        None, description="training options of a reward model of the pairs, or the folder or hub id of one"
    )
    verifier: str | None = Field(None, description="exact, numeric, FILE.py:function; a world has its own")
    teacher_rounds: int = Field(0, ge=0, description="rounds of training of a teacher, on the world's gold reward")

    @field_validator("reward_model")
    @classmethod
    def _trains(cls, value: Options | str | None) -> Options | str | None:
        return _training(value, "reward_model") if isinstance(value, Mapping) else value


class Budget(Section):
    """The same for every method: stated before, logged after.

    ``prompts`` and ``completions`` count what is drawn or read, ``optimizer_steps`` updates. Runs end at the first
    logged step at which the amount is spent. ``flops`` are estimated: 2 a parameter for a generated token, 6 for a
    trained one, 2 more where a reference is asked. ``seconds`` make results depend on the machine.
    """

    unit: Unit
    amount: float = Field(gt=0)
    per_step: PositiveInt | None = Field(None, description="completions a step, where the unit is completions")
    of: Literal["all", "rollouts"] = Field("all", description="rollouts: others pass over the data as they say")

    @model_validator(mode="after")
    def _fits(self) -> Budget:
        if self.per_step is not None and self.unit != "completions":
            raise ValueError("per_step goes with the unit 'completions'")
        return self


class Tuning(Section):
    """The same number of trials for every method, on validation prompts; the best is run with every seed.

    Trial 0 is the method as it is written; the others are drawn from its search space without repetition. Values are a
    list, ``{scale: [0.5, 2]}`` (times what the method has), or ``{low: 1e-5, high: 1e-3, log: true}``.
    """

    trials: PositiveInt
    search: Options = Field({}, description="search space of methods that declare none")
    prompts: PositiveInt = Field(256, description="validation prompts")
    samples: PositiveInt = Field(2, description="answers to each")


class Decoding(Section):
    """How answers are drawn for judging; the same random numbers for every method."""

    max_new_tokens: PositiveInt = 256
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    samples: PositiveInt = Field(4, description="answers to each test prompt; averaged within a prompt first")


class Method(Section):
    """One line of the report: an algorithm with options of its mathematics and of its training, or a baseline."""

    name: str = ""
    algorithm: str | None = Field(None, description="None: a baseline, start or sft_more")
    options: Options = Field({}, description="of the algorithm and of its training, as prefzoo train takes them")
    grid: Mapping[str, Sequence[Any]] = Field({}, description="one method for each combination of these values")
    search: Options | None = Field(None, description="values among which its trials are drawn, see tuning")
    curve: bool | tuple[int, ...] = Field(False, description="scored every 10 steps, or after these and the last")
    control: Literal["permuted"] | None = Field(None, description="permuted: its labels and rewards say nothing")
    first_seed: int = Field(0, ge=0, description="added to its training seeds; others share theirs")
    weight: float = Field(40.0, gt=0, description="expected seconds")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"algorithm": value}
        if isinstance(value, Mapping) and not value.get("name") and value.get("algorithm"):
            control = value.get("control")
            value = {**value, "name": value["algorithm"] + (f" {control}" if control else "")}
        return value

    @field_validator("name")
    @classmethod
    def _names_a_file(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError(f"{value!r} cannot be part of a file name; use letters, digits and . + = , @ - _")
        return value

    @property
    def baseline(self) -> bool:
        return self.algorithm is None

    def each(self) -> Iterator[Method]:
        """This method, or one for each combination of its grid."""
        for values in itertools.product(*self.grid.values()):
            chosen = dict(zip(self.grid, values, strict=True))
            said = " ".join(f"{k}={v}" for k, v in chosen.items())
            yield self.but(name=f"{self.name} {said}".strip(), options={**self.options, **chosen}, grid={})

    @cached_property
    def split_options(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Options of the algorithm, and of its training."""
        return split_options(self.algorithm or "sft", self.options, f"method {self.name!r}")


START, SFT_MORE = Method(name="start", weight=5), Method(name="sft_more", weight=20)


class Task(Section):
    """One start, one body of data, one set of judges; several methods.

    ``like``: the name of a ready task (requests, sums, files) whose values stand where this one says nothing; a plain
    name among ``algorithms`` is the ready task's method of that name, if it has one.

    ``recipes``: training options by kind of rows (pairs, unpaired, rankings, completions, scored, rollouts), under the
    methods' own. ``options``: of algorithms, where they have them. The first judge decides; the others are shown.
    """

    name: str = "task"
    world: World | None = None
    data: Data | None = None
    start: Start = Start()
    feedback: Feedback = Feedback()
    judges: tuple[JudgeSpec, ...] = ()
    algorithms: tuple[Method, ...] = ()
    baselines: tuple[Literal["start", "sft_more"], ...] = ("start", "sft_more")
    recipes: Mapping[str, Options] = {}
    options: Options = {}
    decoding: Decoding = Decoding()
    budget: Budget | None = None
    tuning: Tuning | None = None
    sft_more: Options = Field({}, description="training options of that baseline; tokens: instead of the largest count")
    best_of_n: tuple[PositiveInt, ...] = Field((), description="the line that best-of-n draws, for these n")
    curve_prompts: PositiveInt = Field(256, description="validation prompts that curves are measured on")

    @model_validator(mode="before")
    @classmethod
    def _judged(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "like" in value:
            value = like(value)
        if isinstance(value, Mapping) and not value.get("judges") and value.get("world"):
            world = value["world"]
            name = world.get("name") if isinstance(world, Mapping) else getattr(world, "name", None)
            value = {**value, "judges": ["gold" if name == "requests" else "exact"]}
        return value

    @field_validator("algorithms", mode="after")
    @classmethod
    def _each(cls, value: tuple[Method, ...]) -> tuple[Method, ...]:
        return tuple(itertools.chain.from_iterable(m.each() for m in value))

    @field_validator("name")
    @classmethod
    def _names_a_file(cls, value: str) -> str:
        return Method._names_a_file(value)

    @model_validator(mode="after")
    def _fits(self) -> Task:
        if (self.world is None) == (self.data is None):
            raise ValueError("a task has either a world or data")
        if not self.judges:
            raise ValueError("judges: name at least one, such as held_out, {verifier: numeric} or {llm: ...}")
        if self.data is not None and self.data.train is None:
            raise ValueError("data.train: name a file, a folder or a hub id (prefzoo bench SUITE --data FILE)")
        if self.start.random and self.start.sft is None:
            raise ValueError(
                f"start.model: {self.start.model!r} has random weights; fine-tune it (start.sft: {{max_steps: 300}}), "
                "or give a model that is trained"
            )
        names = [j.name for j in self.judges]
        for judge in self.judges:
            if names.count(judge.name) > 1:
                raise ValueError(f"judges: two are called {judge.name!r}; give one another name: {{..., name: other}}")
            if (why := self._cannot_judge(judge)) is not None:
                raise ValueError(f"judges: {judge.name!r} {why}")
            if judge.name in COLUMNS and judge.name != judge.kind and not judge.builtin:
                raise ValueError(f"judges: {judge.name!r} is a column of the answers; give the judge another name")
        seen: set[str] = set()
        for method in self.algorithms:
            if method.name in seen or method.name in BASELINES:
                raise ValueError(f"algorithms: two methods are called {method.name!r}; give one another name")
            seen.add(method.name)
            assert method.algorithm is not None
            algorithm_entry(method.algorithm)
            for option in {*method.split_options[1], *(method.search or ())} & set(OF_THE_SUITE):
                raise ValueError(f"method {method.name!r}: {option} is the suite's to decide ({OF_THE_SUITE[option]})")
        return self

    def _cannot_judge(self, judge: JudgeSpec) -> str | None:
        """What a judge lacks in this task."""
        told = self.feedback.reward_model
        if self.world is None and judge.worldly:
            return "knows the truth of an embedded world, and the task has data"
        if "reward_model" in judge.needs and told is None:
            return "is the proxy, and the task has none (feedback.reward_model)"
        if "held_out" in judge.needs and (self.data is None or not isinstance(told, Mapping)):
            return "is trained on data that no method sees: it needs data, and how (feedback.reward_model: {...})"
        return None

    @property
    def kind(self) -> str:
        """The world's name, or files."""
        return "files" if self.world is None else self.world.name

    @property
    def metric(self) -> str:
        """The judge that decides."""
        return self.judges[0].name

    @property
    def methods(self) -> tuple[Method, ...]:
        """All lines of the report: the start, the algorithms, sft_more."""
        first = (START,) if "start" in self.baselines else ()
        return (*first, *self.algorithms, *((SFT_MORE,) if "sft_more" in self.baselines else ()))

    def method(self, name: str) -> Method:
        """The task's method of that name, or any registered algorithm under the task's recipes."""
        if all(name != m.name for m in self.methods):
            name = algorithm_entry(name).name  # an alias is its algorithm; an unknown name stops here, with the nearest
        return next((m for m in self.methods if m.name == name), Method(algorithm=name))

    def resolve(self, method: Method) -> tuple[dict[str, Any], dict[str, Any]]:
        """Options of the algorithm and of its training: the task's under the method's own, at the task's budget."""
        from prefzoo.benchmarks.budgets import fitted

        assert method.algorithm is not None
        own, training = method.split_options
        known = algorithm_entry(method.algorithm).options
        given = {"max_new_tokens": self.decoding.max_new_tokens, **self.options}
        options = {k: v for k, v in given.items() if k in known} | own
        made = create_algorithm(method.algorithm, **options)
        kind = "rollouts" if made.on_policy else made.data
        training = dict(self.recipes.get(kind, {})) | training
        return fitted(self.budget, method, options, training)


class Suite(Section):
    """Tasks, seeds, and the statistics.

    One task may be written flat, without ``tasks``. ``vary`` makes a task of each value of one key:
    ``vary: {world.noise: [0, 0.2, 0.4]}``. ``start_seeds``: so many starts (with data and reward model of their own);
    seed s begins from start s mod k, and runs of one start are averaged before any error is taken over starts.
    ``verdicts``: between ``all`` pairs of methods, or of each method against ``sft_more``.
    """

    name: str
    about: str = ""
    tasks: tuple[Task, ...]
    seeds: PositiveInt = Field(1, description="training runs of every method")
    start_seeds: PositiveInt = 1
    test_prompts: PositiveInt = 512
    budget: str = Field("", description="the budget in words, where methods state it themselves")
    verdicts: Literal["all", "sft_more"] = "all"
    margin: float = Field(0.02, gt=0, description="win rates that differ by less are equivalent")

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        """Keys of a task beside those of the suite are one task's; ``vary`` multiplies tasks."""
        if not isinstance(value, Mapping):
            return value
        value = dict(value)
        vary = value.pop("vary", None)
        known = {*Task.model_fields, "like"} - set(cls.model_fields)
        own = {k: value.pop(k) for k in list(value) if k in known}
        if isinstance(value.get("budget"), Mapping):
            own["budget"] = value.pop("budget")
        if own:
            if value.get("tasks"):
                raise ValueError(f"beside 'tasks' there are keys of a task: {', '.join(own)}; move them into one")
            world = own.get("world")
            named = world.get("name") if isinstance(world, Mapping) else getattr(world, "name", None)
            ready = own.get("like") if own.get("like") != "files" else None
            value["tasks"] = [{"name": named or ready or str(value.get("name", "task")), **own}]
        if vary is not None:
            value["tasks"] = [t for task in value.get("tasks", ()) for t in varied(task, vary)]
        return value

    @model_validator(mode="after")
    def _fits(self) -> Suite:
        names = [t.name for t in self.tasks]
        twice = next((n for n in names if names.count(n) > 1), None)
        if twice is not None:
            raise ValueError(f"two tasks are called {twice!r}; give each its own 'name'")
        if self.seeds % self.start_seeds:
            raise ValueError(
                f"seeds = {self.seeds} cannot be shared out evenly among start_seeds = {self.start_seeds} starts"
            )
        return self

    def choose(self, algorithms: Sequence[str] | None) -> Suite:
        """Only these algorithms (baselines stay); a task that is left without any is dropped."""
        if not algorithms:
            return self
        tasks, everywhere = [], len(self.tasks) == 1
        for task in self.tasks:
            names = {m.name for m in task.methods}
            chosen = [a for a in dict.fromkeys(algorithms) if a in names or everywhere or task is self.tasks[0]]
            methods = tuple(m for m in map(task.method, chosen) if not m.baseline)
            if methods:
                tasks.append(task.but(algorithms=methods))
        if not tasks:
            raise UsageError(f"suite {self.name!r}: no algorithm is left of {', '.join(algorithms)}.")
        return self.but(tasks=tuple(tasks))


# Keys that a section has besides its fields.
EXTRA: dict[Any, Sequence[str]] = {Suite: ("vary", "like", *Task.model_fields), Task: ("like",)}


def read_suite(source: str | Path | Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> Suite:
    """A suite from a YAML file or a mapping, with values changed by dotted keys (``start.model``); mistakes are told by
    the key at fault.

    >>> suite = read_suite({"name": "mine", "like": "requests", "algorithms": ["dpo", "kto"]})
    >>> [m.name for m in suite.tasks[0].methods]
    ['start', 'dpo', 'kto', 'sft_more']
    """
    shipped = not isinstance(source, Mapping) and Path(source).parent == Path(__file__).parent
    where = "suite" if isinstance(source, Mapping) else f"suite {Path(source).stem!r}" if shipped else str(source)
    found = dict(source) if isinstance(source, Mapping) else {"name": Path(source).stem, **read_yaml(source)}
    for key, value in (changes or {}).items():
        found = changed(found, key.split("."), value)
    return checked(Suite, found, where, flat="tasks" not in found)


def checked(model: type[Section], found: Mapping[str, Any], where: str, flat: bool = False) -> Any:
    """The section, or its first mistake in words; ``flat``: the keys of the only task stand beside the suite's."""
    try:
        return model.model_validate(found)
    except ValidationError as error:
        said = said_of(model, error, EXTRA)
        said = re.sub(r"^tasks[.]0[.:] ?", "", said.replace(" in tasks.0.", " in ")) if flat else said
        raise UsageError(f"{where}: {said}") from None


def split_options(algorithm: str, options: Options, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of the options belongs to the algorithm, and what to its training.

    >>> split_options("dpo", {"beta": 0.2, "learning_rate": 1e-4}, "method 'dpo'")
    ({'beta': 0.2}, {'learning_rate': 0.0001})
    """
    known = algorithm_entry(algorithm).options
    mine, training = {}, {}
    for key, value in options.items():
        if key in known:
            mine[key] = value
        elif key in TrainConfig.model_fields:
            training[key] = value
        else:
            raise UsageError(f"{where}: no option {key!r}{suggest(key, [*known, *TrainConfig.model_fields])}")
    TrainConfig.of(training)
    return mine, training


def about(method: Method) -> dict[str, str]:
    """How a method is written, and what its training sees, for the groups of a long report."""
    if method.algorithm is None:
        return {"group": "baseline", "sees": "demonstrations" if method == SFT_MORE else "–"}
    made = create_algorithm(method.algorithm, **method.split_options[0])
    sees: list[str] = [] if made.on_policy else [made.data]
    if made.asks_for_reward:
        sees.append("exact check" if any(isinstance(s.feedback, Verifier) for s in made.stages) else "proxy")
    if TEACHER in made.needs:
        sees.append("teacher")
    if method.control is not None:
        sees = [method.control]
    return {"group": "composition" if method.algorithm in ALGORITHMS else "loss", "sees": ", ".join(sees) or "prompts"}


def _training(value: Options, algorithm: str) -> Options:
    """Options of a shared run, as its algorithm and ``TrainConfig`` know them."""
    split_options(algorithm, value, f"options of {algorithm}")
    return value
