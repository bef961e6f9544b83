"""Every composition on a small world with a small transformer: more gold reward than the start and than a run with
permuted feedback; and a run that is stopped in the middle goes on to the same bits.

Losses that are algorithms share their composition, so one of each family stands for it; on a table they are all proved
in ``test_algorithms.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

import prefzoo
from prefzoo.algorithm import ALGORITHMS, Algorithm, algorithm_entry, create_algorithm
from prefzoo.algorithm_checks import weights
from prefzoo.data.tokens import tokenise
from prefzoo.feedback import Judge
from prefzoo.models.load import load_policy, tiny_model
from prefzoo.models.roles import Policy
from prefzoo.models.tree import TreeBatch
from prefzoo.parts.product import Draw
from prefzoo.parts.roles import TEACHER
from prefzoo.parts.source import Rollouts
from prefzoo.rollout import Sampling
from prefzoo.seeds import generator
from prefzoo.theory.enumerable_lm import EnumerableWorld
from prefzoo.theory.runs import CLAIMS, with_stages
from prefzoo.training import Run, Steps
from prefzoo.worlds import make

pytestmark = pytest.mark.long

FAMILIES = ("dpo", "clipped_surrogate", "apo_zero_unpaired", "pl_dpo", "bradley_terry", "plackett_luce",
            "reward_regression", "weighted_sft", "forward_kl")  # fmt: skip
# Proved in test_algorithms.py alone: words that are none of a world; heads and step scores, which need longer runs.
ELSEWHERE = {"quark", "constitutional", "ilql", "process_reward_model"}
NAMES = sorted({*FAMILIES, *ALGORITHMS.names()} - ELSEWHERE)
PROMPTS, ANSWERS, LENGTH, SHOWN = 12, 8, 24, 16
SETTINGS: dict[str, Any] = {
    "warmup_steps": 2, "schedule": "constant", "logging_steps": 1000, "quiet": True, "learning_rate": 1e-3,
    "max_steps": 24, "seed": 1,
}  # fmt: skip
OFFLINE = {"rows_per_step": 64}  # few steps: a hundred answers are soon learned by heart
# What shows in so few steps, where the defaults do not.
OPTIONS: dict[str, dict[str, Any]] = {
    "csft": {"words": ("tape . ", "hat . ")},
    "rso": {"accepted": 2},  # of the four samples
    "seqkd": {"samples_per_prompt": 1},
}
OTHER: dict[str, dict[str, Any]] = {"reward_regression": {"learning_rate": 3e-3}}  # settings
RISE, APART = 0.2, 0.5  # gold points, of 10: above the start, and above the control


@dataclass(frozen=True)
class Setting:
    """A start that half knows the world, prompts, and what it answers to them, with its gold reward."""

    world: Any
    words: Any
    start: Any
    teacher: Any
    permuted: bool = False

    @cached_property
    def requests(self) -> dict[str, Any]:
        return {row["prompt"]: row["request"] for row in self.world.prompts("train", PROMPTS, unique=True)}

    def gold(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Gold reward; of the control, those of the batch in another order."""
        said = zip(prompts, completions, strict=True)
        scores = [self.world.gold(self.requests[p], c, ended=True) for p, c in said]
        order = generator(0, "control", len(scores)).permutation(len(scores)) if self.permuted else range(len(scores))
        return [scores[i] for i in order]

    @cached_property
    def at_start(self) -> float:
        return self.value(load_policy(self.start))

    @cached_property
    def answers(self) -> list[dict[str, Any]]:
        """Rankings of the start's own answers by the told reward."""
        found = self.drawn(load_policy(self.start), ANSWERS)
        rows = []
        for prompt, texts in found.items():
            texts = sorted(set(texts))
            rows.append({"prompt": prompt, "completions": texts, "scores": self.gold([prompt] * len(texts), texts)})
        return rows

    def drawn(self, policy: Policy, count: int) -> dict[str, list[str]]:
        prompts, _ = tokenise([{"prompt": p} for p in self.requests], self.words, "prompts")
        draw = Draw(policy, self.words, Sampling(1.0, 1.0, LENGTH), seed=7)
        product = getattr(policy, "product", None)
        samples = draw(prompts, count) if product is None else product.answer(draw, prompts, count)
        texts = self.words.batch_decode([ids.tolist() for ids in samples.completions], skip_special_tokens=True)
        found: dict[str, list[str]] = {p: [] for p in self.requests}
        for place, text in zip(samples.prompt_B.tolist(), texts, strict=True):
            found[[*self.requests][place]].append(text)
        return found

    def value(self, policy: Policy) -> float:
        """Mean gold reward of its answers."""
        found = self.drawn(policy, SHOWN)
        true = replace(self, permuted=False)
        return sum(sum(true.gold([p] * SHOWN, texts)) for p, texts in found.items()) / (SHOWN * len(found))

    def order(self, run: Run, steps: bool) -> float:
        """Share of pairs of the start's answers that a reward model puts in the order of gold; by their last step."""
        true, right = replace(self, permuted=False), []
        for row in true.answers:
            rows = [{"prompt": row["prompt"], "completion": c} for c in row["completions"]]
            samples, _ = tokenise(rows, self.words, "completions")
            tree = TreeBatch.of(samples)
            with torch.no_grad():
                found = run.scorer(tree, steps=steps)  # type: ignore[misc]
            scores = found.steps_C[tree.mask_BT.sum(-1).cumsum(0) - 1] if steps else found.rewards_B
            gold = torch.tensor(row["scores"])
            apart = gold[:, None] > gold
            right.append((scores[:, None] > scores)[apart].float())
        return float(torch.cat(right).mean())

    def rows(self, algorithm: Algorithm) -> list[dict[str, Any]]:
        if algorithm.data == "prompts":
            return [{"prompt": p} for p in self.requests]
        read = {column for s in algorithm.stages for column in getattr(s.credit, "reads", ())}
        if algorithm.data == "unpaired" and "score" in read:
            return [
                {"prompt": row["prompt"], "completion": c, "score": s, "label": s > 5}
                for row in self.answers for c, s in zip(row["completions"], row["scores"], strict=True)
            ]  # fmt: skip
        if algorithm.data == "steps":
            return [
                {"prompt": row["prompt"], "completions": [c[:9], c[9:]], "labels": [s > 5, s > 5]}
                for row in self.answers for c, s in zip(row["completions"], row["scores"], strict=True) if len(c) > 9
            ]  # fmt: skip
        return self.answers

    def judge(self) -> Judge:
        def better(prompts: list[str], first: list[str], second: list[str]) -> list[float]:
            gaps = zip(self.gold(prompts, first), self.gold(prompts, second), strict=True)
            return [1 / (1 + 2.718 ** (b - a)) for a, b in gaps]

        return Judge(better)

    def steps(self, name: str, **settings: Any) -> Steps:
        claim = CLAIMS.get(name)
        known = algorithm_entry(name).options
        sizes = {"group_size": 4, "prompts_per_step": 12, "samples_per_prompt": 4, "prompts_per_round": 12,
                 "rows_per_update": 12, "max_new_tokens": LENGTH, "kl": 0.02, "epochs_per_round": 1}  # fmt: skip
        options = {k: v for k, v in {**sizes, **OPTIONS.get(name, {})}.items() if k in known}
        algorithm = with_stages(create_algorithm(name, **options), _short)
        given: dict[str, Any] = {} if algorithm.on_policy else dict(OFFLINE)
        if algorithm.asks_for_reward:
            given["reward"] = self.gold
            if claim is not None and isinstance(claim.reward(WORLD), Judge):
                given["reward"] = self.judge()
            elif claim is not None and isinstance(claim.reward(WORLD), list):
                given["reward"] = [self.gold, claim.reward(WORLD)[1]]
        if TEACHER in algorithm.needs:
            given["teacher"] = self.teacher
        if any(s.critics for s in algorithm.stages):
            given["critic_learning_rate"] = SETTINGS["learning_rate"]
        arguments = {**SETTINGS, **given, **OTHER.get(name, {}), **settings}
        return Steps(algorithm, model=self.start, tokenizer=self.words, dataset=self.rows(algorithm), **arguments)


WORLD = EnumerableWorld.make()


def _short(stage: Any) -> Any:
    if not isinstance(stage.source, Rollouts):
        return stage
    return replace(stage, source=replace(stage.source, max_new_tokens=LENGTH))


def whole(steps: Steps) -> tuple[Run, dict[str, str]]:
    """The finished run, and hashes of its weights."""
    engines: dict[int, Any] = {}
    with steps.stopping, steps:
        for step in steps:
            engines[step.stage] = steps.engine
        run = steps.finish()
    hashes = {} if not engines else weights(_Ended(tuple(engines.values())))  # type: ignore[arg-type]
    return run, hashes


@dataclass(frozen=True)
class _Ended:
    engines: tuple[Any, ...]


@pytest.fixture(scope="module")
def setting() -> Setting:
    world = make("requests", seed=0)
    words = world.tokenizer()
    start = prefzoo.train(
        "sft", model=tiny_model(words), tokenizer=words, dataset=world.demonstrations(1500), max_steps=150,
        rows_per_step=48, learning_rate=3e-3, quiet=True,
    ).model  # fmt: skip
    asked = world.prompts("train", PROMPTS, unique=True)
    best = [{"prompt": row["prompt"], "completion": world.oracle(row["request"])} for row in asked]
    teacher = prefzoo.train("sft", model=start, tokenizer=words, dataset=best, max_steps=30, rows_per_step=12,
                            learning_rate=1e-3, warmup_steps=0, quiet=True).model  # fmt: skip
    return Setting(world, words, start, teacher)


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_on_a_world_and_goes_on_where_it_was_stopped(name: str, setting: Setting, tmp_path: Path) -> None:
    run, hashes = whole(setting.steps(name, output_dir=tmp_path / "whole"))
    stopped = setting.steps(name, output_dir=tmp_path / "resumed")
    with stopped.stopping, stopped:
        for step in stopped:
            if step.number >= step.total // 2:
                break
    _, resumed = whole(setting.steps(name, output_dir=tmp_path / "resumed", resume=True))
    assert all(resumed[role] == hashes[role] for role in resumed), "a resumed run ends elsewhere"
    told = TEACHER in create_algorithm(name).needs  # a teacher is no feedback
    control = None if told else whole(replace(setting, permuted=True).steps(name))[0]
    if run.scorer is not None:
        assert control is not None
        steps = create_algorithm(name).data == "steps"
        right, wrong = setting.order(run, steps), setting.order(control, steps)
        print(f"{name}: {right:.2f} of the pairs in the right order, {wrong:.2f} in the control")
        assert right >= 0.65 and wrong < right - 0.1, (right, wrong)
        return
    assert run.policy is not None
    start, value = setting.at_start, setting.value(run.policy)
    other = start if control is None else setting.value(control.policy)  # type: ignore[arg-type]
    print(f"{name}: gold {start:.2f} at the start, {value:.2f} at the end, {other:.2f} in the control")
    assert value > start + RISE and value > other + APART, (start, value, other)
