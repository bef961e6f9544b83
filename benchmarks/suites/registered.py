"""Suites that the registry or a computation fills: everything of the zoo, and the founding seven along training."""

from __future__ import annotations

from typing import Any

from prefzoo.algorithm import list_algorithms
from prefzoo.benchmarks.suites import SUITES, Method, Suite, task

# Where a default is absurd for models of this size, or for what this world measures, and no more: everything else is
# as the papers have it. docs/zoo.md says why.
ZOO: dict[str, dict[str, Any]] = {
    "csft": {"words": ("ugh", "lovely")},
    "quark": {"words": ("ugh", "whatever", "fine", "certainly", "lovely")},
    "safe_rlhf": {"budget": 0.1},
    "gdpo": {"weights": (1.0, -1.0)},  # the second objective is a cost
    "rbr": {"rl": "ppo(max_new_tokens=44, group_size=8)"},
}
POINTS: dict[str, Any] = {
    "pairs": (10, 20, 40, 80, 160), "rollouts": (5, 10, 20, 30), "dpo": "pairs", "ipo": "pairs", "kto": "pairs",
}  # fmt: skip


@SUITES.register
def zoo() -> Suite:
    """Every algorithm that applies to the preference world, on the same data at the same budget."""
    methods = [Method(algorithm=n, options=ZOO.get(n, {}), weight=30) for n in list_algorithms()]
    everything = task(
        "requests", *methods, world={"prompts": 1_250, "rated": True, "validation_prompts": 256},
        feedback={"teacher_rounds": 2}, sft_more={"tokens": 120_000},
        budget={"unit": "completions", "amount": 6_144, "per_step": 256, "of": "rollouts"},
        recipes={
            "rankings": {"rows_per_step": 8},  # of eight answers each: as many completions as in 32 pairs
            "scored": {"learning_rate": 2e-4, "rows_per_step": 64},
            "rollouts": {"max_steps": None},  # by the budget
        },
    )  # fmt: skip
    return Suite(
        name="zoo",
        tasks=(everything,),
        budget="data: one pass over 10,000 answers to 1,250 prompts (5,000 labelled pairs, or the same answers rated "
        "one by one); rollouts: 6,144 sampled completions; one run per method, its default options",
        verdicts="sft_more",
    )


@SUITES.register
def replication() -> Suite:
    """The founding seven against best-of-n: gold reward and KL to the start along training."""
    often = {"logging_steps": 5}
    own = {"rejection_sampling": {"max_steps": 5, "logging_steps": 1}, "rlvr": {"max_steps": 40}}
    seven = task("requests").algorithms
    methods = [
        m.but(
            options={**often, **m.options, **own.get(m.name, {})},
            curve=True if m.name == "rejection_sampling" else POINTS[POINTS.get(m.name, "rollouts")],
        )
        for m in seven
    ]
    line: dict[str, Any] = {
        "best_of_n": tuple(2**i for i in range(9)), "curve_prompts": 512, "baselines": ("start",),
    }  # fmt: skip
    checked = Method(algorithm="rlvr", options={**often, "max_steps": 60}, curve=(5, 10, 20, 30, 40, 50))
    return Suite(
        name="replication",
        tasks=(task("requests", *methods, **line), task("sums", checked, **line)),
        seeds=3,
        budget="preference data: one pass over at most 10,000 labelled pairs (20,000 completions); rollouts: at most "
        "10,240 sampled completions (rejection_sampling: 20,480; sums: 15,360)",
    )
