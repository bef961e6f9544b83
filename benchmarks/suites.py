"""Suites as values: what is compared, on what, at what budget. Recipe values were fixed on validation prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from prefzoo.algorithm import ALGORITHMS, algorithm_entry, create_algorithm, list_algorithms
from prefzoo.parts.feedback import Verifier
from prefzoo.parts.roles import TEACHER
from prefzoo.parts.source import Rollouts
from prefzoo.registry import Registry, UsageError

Kind = Literal["requests", "sums", "pairs"]


@dataclass(frozen=True)
class Method:
    """One line of the report. ``training`` overrides the task's recipe; ``curve``: also scored while it trains, every
    10 steps (``True``) or after these steps and the last.

    ``algorithm=None`` is a baseline: ``start`` (no training) or ``sft_more`` (as many completion tokens as the largest
    count in the task, on demonstrations not used yet).
    """

    name: str
    algorithm: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    curve: bool | tuple[int, ...] = False
    weight: float = 40.0

    @property
    def baseline(self) -> bool:
        return self.algorithm is None


START, SFT_MORE = Method("start", weight=5), Method("sft_more", weight=20)


def about(method: Method) -> dict[str, str]:
    """How a method is written, and what its training sees, for the groups of a long report."""
    if method.algorithm is None:
        return {"group": "baseline", "sees": "demonstrations" if method == SFT_MORE else "–"}
    made = create_algorithm(method.algorithm, **method.options)
    sees: list[str] = [] if made.on_policy else [made.data]
    if made.asks_for_reward:
        sees.append("exact check" if any(isinstance(s.feedback, Verifier) for s in made.stages) else "proxy")
    if TEACHER in made.needs:
        sees.append("teacher")
    return {"group": "composition" if method.algorithm in ALGORITHMS else "loss", "sees": ", ".join(sees) or "prompts"}


@dataclass(frozen=True)
class Task:
    """A start model, data, feedback and a judge. ``recipes``: training options by kind of rows, for methods that name
    none; ``options`` of rollout algorithms by option name, where the algorithm has it.

    ``completions``: a budget of sampled completions, the same for every method that samples: so many a step (or, where
    samples are drawn in rounds, eight times as many a round), and so many in all. None: what options and recipe say.
    """

    name: str
    kind: Kind
    methods: tuple[Method, ...]
    metric: str
    settings: Mapping[str, Any]
    recipes: Mapping[str, Mapping[str, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)
    completions: tuple[int, int] | None = None

    def method(self, name: str) -> Method:
        """The task's method of that name, or any registered algorithm under the task's recipe."""
        if all(name != m.name for m in self.methods):
            name = algorithm_entry(name).name  # an alias is its algorithm; an unknown name stops here, with the nearest
        return next((m for m in self.methods if m.name == name), Method(name, name))

    def resolve(self, method: Method) -> tuple[dict[str, Any], dict[str, Any]]:
        """Options of the algorithm and of its training, the task's recipe under the method's own."""
        assert method.algorithm is not None
        known = algorithm_entry(method.algorithm).options
        options = {k: v for k, v in self.options.items() if k in known} | dict(method.options)
        made = create_algorithm(method.algorithm, **options)
        kind = "rollouts" if made.on_policy else made.data
        training = dict(self.recipes.get(kind, {})) | dict(method.training)
        if self.completions is None or not made.stages or not isinstance(made.stages[0].source, Rollouts):
            return options, training
        each = made.stages[0].source.completions
        per_step, total = self.completions
        for name, completions in (("prompts_per_step", per_step), ("prompts_per_round", 8 * per_step)):
            if name in known and name not in method.options:
                options[name] = max(1, completions // each)
        stage = create_algorithm(method.algorithm, **options).stages[0]
        steps = max(1, round(total / (stage.schedule.prompts * each)))
        return options, {"max_steps": steps, **training}


@dataclass(frozen=True)
class Suite:
    """Tasks, seeds, and how answers are sampled for judging.

    ``verdicts``: between ``"all"`` pairs of methods; or ``"sft_more"``: of each method against that baseline.
    """

    name: str
    tasks: tuple[Task, ...]
    seeds: int = 1
    test_prompts: int = 512
    samples: int = 4
    budget: str = ""
    verdicts: Literal["all", "sft_more"] = "all"

    def choose(self, algorithms: list[str] | None) -> Suite:
        """Only these algorithms (baselines stay); a task that is left without any is dropped."""
        if not algorithms:
            return self
        tasks, everywhere = [], len(self.tasks) == 1
        for task in self.tasks:
            names = {m.name for m in task.methods}
            chosen = [a for a in algorithms if a in names or everywhere or task is self.tasks[0]]
            methods = tuple(task.method(a) for a in dict.fromkeys(chosen))
            if any(not m.baseline for m in methods):
                before, after = ([m for m in task.methods if m == baseline] for baseline in (START, SFT_MORE))
                tasks.append(replace(task, methods=(*before, *(m for m in methods if not m.baseline), *after)))
        if not tasks:
            raise UsageError(f"suite {self.name!r}: no algorithm is left of {', '.join(algorithms)}.")
        return replace(self, tasks=tuple(tasks))


SUITES = Registry("suite")

_ROLLOUTS = {"group_size": 8, "prompts_per_step": 32, "temperature": 1.0}


def requests_task(methods: tuple[Method, ...], **settings: Any) -> Task:
    """World 1: exact gold reward; annotators who like flattery; a reward model learned from them."""
    return Task(
        name="requests",
        kind="requests",
        metric="gold",
        methods=methods,
        settings={
            "world_seed": 0, "start_seed": 0, "demonstrations": 34_000, "start_steps": 350, "start_rows": 96,
            "start_rate": 3e-3, "prompts": 2_500, "samples": 8, "reward_rate": 1e-3, "reward_rows": 32,
            "reward_epochs": 2, "validation_prompts": 512, "sft_more_rate": 1e-3, "permuted": False, **settings,
        },
        recipes={
            "pairs": {"learning_rate": 2e-4, "rows_per_step": 32},
            "unpaired": {"learning_rate": 5e-4, "rows_per_step": 64},
            "rankings": {"learning_rate": 2e-4, "rows_per_step": 32},
            "completions": {"learning_rate": 5e-4, "rows_per_step": 64},
            "rollouts": {"learning_rate": 3e-4, "warmup_steps": 3, "final_learning_rate": 0.2, "max_steps": 40},
        },
        options={"max_new_tokens": 44, **_ROLLOUTS},
    )  # fmt: skip


def sums_task(methods: tuple[Method, ...], **settings: Any) -> Task:
    """World 2: sums and sorts with an exact verifier."""
    return Task(
        name="sums",
        kind="sums",
        metric="exact",
        methods=methods,
        settings={
            "world_seed": 0, "start_seed": 0, "demonstrations": 34_000, "start_steps": 2_000, "start_rows": 48,
            "start_rate": 3e-3, "prompts": 5_000, "validation_prompts": 512, "sft_more_rate": 1e-3, "permuted": False,
            **settings,
        },
        recipes={"rollouts": {"learning_rate": 3e-4, "warmup_steps": 3, "final_learning_rate": 0.2, "max_steps": 60}},
        options={"max_new_tokens": 40, **_ROLLOUTS},
    )  # fmt: skip


SEVEN = (
    START,
    Method("ppo", "ppo", {"kl": 0.05, "group_size": 1, "prompts_per_step": 256, "inner_epochs": 1, "value_clip": None,
                          "missing_eos_penalty": 1.0}, {"critic_learning_rate": 1e-3}, weight=90),
    Method("rejection_sampling", "rejection_sampling", {"prompts_per_round": 512},
           {"learning_rate": 5e-4, "max_steps": 3}, weight=30),
    Method("dpo", "dpo", {"beta": 0.1}),
    Method("ipo", "ipo", {"beta": 0.7}, {"learning_rate": 5e-4}),
    Method("kto", "kto", {"beta": 0.1, "baseline_rows": 16}),
    Method("grpo", "grpo", {"kl": 0.05, "count": "token", "missing_eos_penalty": 1.0}, weight=60),
    Method("rlvr", "rlvr", weight=40),
    SFT_MORE,
)  # fmt: skip
WEAK = Method(
    "grpo_kl0", "grpo", {"kl": 0.0, "count": "token", "missing_eos_penalty": 1.0},
    {"max_steps": 60, "learning_rate": 4e-4}, curve=True, weight=100,
)  # fmt: skip


@SUITES.register
def quick() -> Suite:
    """All seven algorithms on the preference world, verifiable rewards on the sums world: minutes on two cores."""
    return Suite(
        "quick",
        (requests_task((*SEVEN, WEAK)), sums_task((START, Method("rlvr", "rlvr", weight=80), SFT_MORE))),
        budget="preference data: one pass over at most 10,000 labelled pairs (20,000 completions); rollouts: at most "
        "12,288 sampled completions (grpo_kl0: 15,360; sums: 15,360); one run per method, recipes as given",
    )


@SUITES.register
def verifiable() -> Suite:
    """Verifiable rewards on the sums world, trained longer."""
    longer = {"max_steps": 140, "learning_rate": 5e-4}
    methods = (
        START,
        Method("rlvr", "rlvr", {}, longer),
        Method("rloo", "rlvr", {"estimator": "leave_one_out"}, longer),
        SFT_MORE,
    )
    return Suite("verifiable", (sums_task(methods),), budget="35,840 sampled completions per method")


@SUITES.register
def pairs() -> Suite:
    """All algorithms on your own preference pairs, from a tiny model, judged by a reward model they never saw."""
    smaller: dict[str, Any] = {
        "ppo": {"options": {**SEVEN[1].options, "prompts_per_step": 128}},
        "rejection_sampling": {"options": {"prompts_per_round": 160}, "training": {"max_steps": 2}},
        "ipo": {"training": {}},
    }
    task = Task(
        name="pairs",
        kind="pairs",
        metric="judge",
        methods=tuple(replace(m, **smaller.get(m.name, {})) for m in SEVEN),
        settings={
            "data": None, "start_seed": 0, "start_steps": 300, "start_rows": 16, "start_rate": 2e-3, "vocabulary": 2048,
            "max_length": 384, "reward_rate": 5e-4, "reward_rows": 16, "reward_epochs": 2, "sft_more_rate": 5e-4,
            "permuted": False,
        },
        recipes={
            "pairs": {"learning_rate": 2e-4, "rows_per_step": 16},
            "rankings": {"learning_rate": 2e-4, "rows_per_step": 16},
            "unpaired": {"learning_rate": 2e-4, "rows_per_step": 32},
            "completions": {"learning_rate": 2e-4, "rows_per_step": 32},
            "rollouts": {"learning_rate": 2e-4, "warmup_steps": 3, "final_learning_rate": 0.2, "max_steps": 20},
        },
        options={"max_new_tokens": 64, "group_size": 8, "prompts_per_step": 16, "temperature": 1.0},
    )  # fmt: skip
    return Suite(
        "pairs", (task,), budget="one pass over the training third's pairs; rollouts: 2,560 sampled completions"
    )


_POINTS = {"pairs": (10, 20, 40, 80, 160), "rollouts": (5, 10, 20, 30)}
_OFTEN = {"logging_steps": 5}


@SUITES.register
def replication() -> Suite:
    """The founding seven against best-of-n: gold reward and KL to the start along training."""
    own = {"rejection_sampling": {"max_steps": 5, "logging_steps": 1}, "rlvr": {"max_steps": 40}}
    places: dict[str, bool | tuple[int, ...]] = {
        "dpo": _POINTS["pairs"], "ipo": _POINTS["pairs"], "kto": _POINTS["pairs"], "rejection_sampling": True,
    }  # fmt: skip
    methods = tuple(
        replace(m, training={**_OFTEN, **m.training, **own.get(m.name, {})},
                curve=places.get(m.name, _POINTS["rollouts"]))
        for m in SEVEN if not m.baseline
    )  # fmt: skip
    line = {"best_of_n": tuple(2**i for i in range(9)), "curve_prompts": 512}
    checked = Method("rlvr", "rlvr", {}, {**_OFTEN, "max_steps": 60}, curve=(5, 10, 20, 30, 40, 50))
    return Suite(
        "replication",
        (requests_task((START, *methods), **line), sums_task((START, checked), **line)),
        seeds=3,
        budget="preference data: one pass over at most 10,000 labelled pairs (20,000 completions); rollouts: at most "
        "10,240 sampled completions (rejection_sampling: 20,480; sums: 15,360)",
    )


# Where a default is absurd for models of this size, or for what this world measures, and no more: everything else is
# as the papers have it. docs/zoo.md says why.
ZOO: dict[str, dict[str, Any]] = {
    "csft": {"options": {"words": ("ugh", "lovely")}},
    "quark": {"options": {"words": ("ugh", "whatever", "fine", "certainly", "lovely")}},
    "safe_rlhf": {"options": {"budget": 0.1}},
    "gdpo": {"options": {"weights": (1.0, -1.0)}},  # the second objective is a cost
    "rbr": {"options": {"rl": "ppo(max_new_tokens=44, group_size=8)"}},
}


@SUITES.register
def zoo() -> Suite:
    """Every algorithm that applies to the preference world, on the same data at the same budget."""
    methods = []
    for name in list_algorithms():
        own = ZOO.get(name, {})
        methods.append(
            Method(name, name, own.get("options", {}), own.get("training", {}), weight=own.get("weight", 30))
        )
    task = requests_task(
        (START, *methods, SFT_MORE), prompts=1_250, rated=True, teacher_rounds=2, sft_more_tokens=120_000,
        validation_prompts=256,
    )  # fmt: skip
    recipes = {k: dict(v) for k, v in task.recipes.items()}
    recipes["rankings"]["rows_per_step"] = 8  # of eight answers each: as many completions as in 32 pairs
    recipes["scored"] = {"learning_rate": 2e-4, "rows_per_step": 64}
    del recipes["rollouts"]["max_steps"]  # by the budget
    return Suite(
        "zoo",
        (replace(task, recipes=recipes, completions=(256, 6_144)),),
        budget="data: one pass over 10,000 answers to 1,250 prompts (5,000 labelled pairs, or the same answers rated "
        "one by one); rollouts: 6,144 sampled completions; one run per method, its default options",
        verdicts="sft_more",
    )


def get_suite(name: str) -> Suite:
    """The suite of that name."""
    return SUITES.entry(name).function()
