"""The one loop on a transformer: what splits, masks and rewards may and may not change, and what a run writes.

Relations that hold of every algorithm are in ``prefzoo.algorithm_checks`` (``tests/test_algorithms.py``); here a few of
them are seen with attention and packing, by one algorithm of each kind of record and of each path of the engine.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import prefzoo
import prefzoo.rollout.loop as loop_module
import prefzoo.training.engine as engine_module
from prefzoo.algorithm import Algorithm, Schedule, algorithm_entry, create_algorithm
from prefzoo.data.tokens import tokenise
from prefzoo.models.heads import QHeads, new_heads
from prefzoo.models.load import learn_tokenizer, load_scorer, new_critic, new_scorer, save_scorer, tiny_model
from prefzoo.models.reference import weights_hash
from prefzoo.models.roles import Policy, Scorer
from prefzoo.models.tree import TreeBatch, pack_rows
from prefzoo.parts.credit import GroupRelative, LeaveOneOut
from prefzoo.parts.reference import Moving
from prefzoo.records import RankedScores, Ratings, Scores, side_of
from prefzoo.training import NonFiniteError, Run
from prefzoo.training.engine import Engine

# Ragged on both sides; two rows share a prompt; one prompt is longer than any completion.
PAIRS = [
    {"prompt": "say a:", "chosen": " a", "rejected": " b b b"},
    {"prompt": "say a:", "chosen": " a a", "rejected": " c"},
    {"prompt": "say a b c and d, one after another, please:", "chosen": " a b c d", "rejected": " d"},
    {"prompt": "hum:", "chosen": " m m m", "rejected": " n"},
    {"prompt": "count to nine:", "chosen": " 1 2 3 4 5 6 7 8 9", "rejected": " 9"},
    {"prompt": "b or c:", "chosen": " b", "rejected": " c c c c c c c"},
    {"prompt": "again:", "chosen": " b a b a", "rejected": " a b a b a"},
]
TRAINED = {"optimizer": "sgd", "learning_rate": 1e-2, "schedule": "constant", "warmup_steps": 0, "max_grad_norm": None}
QUICK = {**TRAINED, "max_steps": 2, "logging_steps": 1, "quiet": True}
# Where pairs have not what is learned from: scores, and steps.
DATA = {
    "rankings": [{"prompt": r["prompt"], "completions": [r["rejected"], r["chosen"], " a c"][: 2 + i % 2],
                  "scores": [0.1 * i, 1.0, 0.8][: 2 + i % 2]} for i, r in enumerate(PAIRS)],
    "scored": [{"prompt": r["prompt"], "completion": r[side], "score": 0.1 * i + (side == "chosen")}
               for i, r in enumerate(PAIRS) for side in ("chosen", "rejected")],
    "steps": [{"prompt": r["prompt"], "completions": [r["chosen"], r["rejected"]], "labels": [True, i % 2 == 0]}
              for i, r in enumerate(PAIRS)],
    "labelled": [{"prompt": r["prompt"], "completion": r[side], "label": side == "chosen", "score": 0.1 * i * len(side)}
                 for i, r in enumerate(PAIRS) for side in ("chosen", "rejected")],
}  # fmt: skip
SEVEN = ("dpo", "ipo", "kto", "ppo", "rejection_sampling", "grpo", "rlvr")
NAMES = (
    *SEVEN, "sft", "tdpo1", "orpo", "prompt_chosen_nll", "exo", "reward_model", "plackett_luce", "reward_regression",
    "process_reward", "aot", "rloo", "gspo", "tr_dpo", "hpo", "gkd", "ilql",
)  # fmt: skip


def with_numbers(algorithm: Algorithm) -> list[dict[str, Any]]:
    """The pairs, with the numbers that the algorithm's losses need of each."""
    needed = {column for s in algorithm.stages for t in s.terms for column in t.loss.columns}
    given = {"margin": lambda i: 0.2 * i, "probability": lambda i: 0.6 + 0.05 * i}
    return [{**row, **{k: f(i) for k, f in given.items() if k in needed}} for i, row in enumerate(PAIRS)]


def count_a(completions: list[str], **_: Any) -> list[float]:
    """A reward with differences inside most groups."""
    return [c.count("a") - 0.1 * len(c) for c in completions]


@dataclass
class Start:
    """A model that has read the chosen answers: it ends its completions, and they differ."""

    model: Any
    words: PreTrainedTokenizerBase
    other: Any  # a reference that is not the start, so that no gradient is zero by chance

    def fit(self, algorithm: str | Algorithm, dataset: Any = None, **options: Any) -> Run:
        chosen = small(algorithm) if isinstance(algorithm, str) else algorithm
        reads = {column for s in chosen.stages for column in getattr(s.credit, "reads", ())}
        kind = "labelled" if chosen.data == "unpaired" and reads else chosen.data
        dataset = DATA.get(kind, PAIRS) if dataset is None else dataset
        if chosen.asks_for_reward:
            options.setdefault("reward", count_a)
        if "teacher" in chosen.needs:
            writes = chosen.stages[0].source.needs  # one whose answers end
            options.setdefault("teacher", self.model if "teacher" in writes else self.other)
        if isinstance(chosen.stages[0].reference, Moving):  # it starts at the policy's start
            options.pop("reference", None)
        if dataset is PAIRS:
            dataset = with_numbers(chosen)
        return prefzoo.train(chosen, model=self.model, tokenizer=self.words, dataset=dataset, **{**QUICK, **options})


def small(name: str, **options: Any) -> Algorithm:
    """The algorithm, with rollouts that a test can afford."""
    algorithm = create_algorithm(name, **options)
    stage = algorithm.stages[0]
    if stage.on_policy:
        several = stage.source.share == 1 and stage.source.temperature > 0
        size = 1 if not several else max(3, stage.source.group_size) if "group_size" in options else 3
        source = replace(stage.source, group_size=size, max_new_tokens=10)
        schedule = Schedule(4, stage.schedule.inner_epochs, min(stage.schedule.minibatches, 4))
        algorithm.stages = (replace(stage, source=source, schedule=schedule),)
    return algorithm


@pytest.fixture(scope="module")
def start() -> Start:
    words = learn_tokenizer([row[k] for row in PAIRS for k in row], 270)
    model = tiny_model(words)
    run = prefzoo.train("sft", model=model, tokenizer=words, dataset=PAIRS, max_steps=12, rows_per_step=7,
                        learning_rate=3e-3, warmup_steps=0, quiet=True)  # fmt: skip
    return Start(run.model, words, tiny_model(words, seed=1))


@pytest.fixture(scope="module")
def gambler(start: Start) -> Start:
    """It answers b three times in four, c else."""
    rows = [{"prompt": "b or c:", "completion": answer} for answer in (" b", " b", " b", " c")]
    run = start.fit("sft", rows, optimizer="adamw", learning_rate=3e-3, max_steps=40, rows_per_step=4)
    return replace(start, model=run.model)


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]).clone()


def numbers(run: Run) -> list[dict[str, float]]:
    """The metrics of a run without its times."""
    return [{k: v for k, v in row.items() if k != "time"} for row in run.history]


# ------------------------------------------------------------------------------------------------ invariances


COUPLED = [name for name in NAMES if any(t.loss.whole_batch for t in create_algorithm(name).stages[0].terms)]
MODIFIED: list[tuple[str, dict[str, Any]]] = [  # what reads more of the distribution, or of the batch, than its loss
    ("dpo", {"wpo": True}),
    ("hinge", {"divergence": "js", "ld_alpha": 0.5, "label_smoothing": 0.1, "nll": 0.2}),
    ("orpo", {"likelihood": "all"}),
    ("clipped_surrogate", {"high_entropy": True}),
    ("cispo", {"correction": "sequence_truncate", "off_policy_threshold": 1.0}),
]


@pytest.mark.parametrize(("name", "options"), [*((n, {}) for n in NAMES if n not in COUPLED), *MODIFIED], ids=str)
def test_any_split_into_micro_batches_gives_the_same_weights(
    name: str, options: dict[str, Any], start: Start, engines: list[Engine]
) -> None:
    moved = []
    for budget in (100_000, 64, 1):
        algorithm = small(name, **options)
        rate = {"critic_learning_rate": 1e-2} if algorithm.stages[0].critics else {}  # papers' hardly move it
        start.fit(algorithm, tokens_per_batch=budget, reference=start.other, **rate)
        before = {"policy": flat(start.model), **{r: flat(fresh(r, start)) for r in ("reward", "critic", "heads")}}
        moved.append({role: flat(t.module) - before[role] for role, t in engines[-1].trained.items()})
    for role, whole in moved[0].items():
        assert whole.norm() > 1e-4, f"the {role} does not move: nothing is proved"
        for split in moved[1:]:
            assert (split[role] - whole).norm() <= 1e-3 * whole.norm(), role


@pytest.mark.parametrize("name", COUPLED)
def test_a_loss_that_couples_rows_is_not_split_in_silence(name: str, start: Start, engines: list[Engine]) -> None:
    start.fit(name)
    assert (flat(engines[0].policy) - flat(start.model)).norm() > 1e-4
    with pytest.raises(prefzoo.UsageError, match="couples the rows of a batch"):
        start.fit(name, tokens_per_batch=64)


def test_weights_of_rows_are_refused_where_no_loss_belongs_to_a_row(start: Start) -> None:
    heavy = [{**row, "weight": 1.0 + i} for i, row in enumerate(PAIRS)]
    start.fit("aot", dataset=heavy)
    with pytest.raises(prefzoo.UsageError, match="'aot_unpaired' takes no weights"):
        start.fit("aot_unpaired", dataset=heavy)


def test_the_kl_of_tdpo_is_to_the_given_reference(start: Start, engines: list[Engine]) -> None:
    """Its pairs' exact KL of all tokens, before the first step, against two plain forward passes."""
    logged = []
    for reference in (start.other, start.model):
        run = start.fit("tdpo1", reference=reference, rows_per_step=7, max_steps=1, learning_rate=0.0)
        logged.append(run.history[0])
    samples, _ = tokenise(PAIRS, start.words, "pairs")
    tree = TreeBatch.of(samples)
    with torch.no_grad():
        ours, theirs = (
            Policy(m).frozen_logits(tree, tree.predict_C).log_softmax(-1) for m in (start.model, start.other)
        )
    kl_C = (theirs.exp() * (theirs - ours)).sum(-1)
    kl_B = torch.zeros(len(samples.completions)).index_add(0, tree.owner_C, kl_C)
    assert logged[0]["seq_kl/chosen"] == pytest.approx(float(kl_B[0::2].mean()), rel=1e-4)
    assert logged[0]["seq_kl/rejected"] == pytest.approx(float(kl_B[1::2].mean()), rel=1e-4)
    assert logged[1]["seq_kl/chosen"] == pytest.approx(0.0, abs=1e-5)


def fresh(role: str, start: Start) -> Scorer | QHeads:
    if role == "heads":
        return new_heads(Policy(start.model))
    return (new_critic if role == "critic" else new_scorer)(Policy(start.model))


def has_cells(name: str) -> bool:
    """Whether its record has numbers of tokens: most of what reward models learn from has none."""
    return create_algorithm(name).stages[0].terms[0].loss.family not in (Scores, RankedScores, Ratings)


@pytest.mark.parametrize("name", [*filter(has_cells, NAMES)])
def test_garbage_in_masked_cells_changes_nothing(
    name: str, start: Start, engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in every cell outside the mask of every record: the same metrics, the same weights, to the bit."""
    clean = start.fit(name, reference=start.other)
    poisoned_cells = 0

    def poisoned(*args: Any) -> Any:
        nonlocal poisoned_cells
        record, fields = engine_module_build(*args), {}
        for key, value in record.tensors().items():
            if key.endswith(("_BT", "_PKT", "_BTV")) and "mask" not in key:
                side = f"{side_of(key)}_" if side_of(key) else ""
                mask_BT = getattr(record, f"{side}mask_{key.rpartition('_')[2].removesuffix('V')}")
                fields[key] = torch.where(mask_BT[..., None] if key.endswith("V") else mask_BT, value, torch.nan)
                poisoned_cells += int((~mask_BT).sum())
        return replace(record, **fields)

    engine_module_build = engine_module.build_record
    monkeypatch.setattr(engine_module, "build_record", poisoned)
    dirty = start.fit(name, reference=start.other)
    assert poisoned_cells > 0
    for role, trained in engines[0].trained.items():
        assert weights_hash(trained.module) == weights_hash(engines[1].trained[role].module), role
    assert finite(numbers(dirty)) == finite(numbers(clean))


def finite(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    assert all(math.isfinite(v) for row in rows for v in row.values())
    return rows


@pytest.mark.parametrize("name", ["ppo", "grpo", "gspo", "rejection_sampling"])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8)])
def test_learning_rate_zero_changes_nothing(
    name: str, temperature: float, top_p: float, start: Start, engines: list[Engine], tmp_path: Path
) -> None:
    """The ratio is 1 at every token, the weights stay, and the same seed samples the same texts again."""
    algorithm = small(name)
    stage = algorithm.stages[0]
    algorithm.stages = (replace(stage, source=replace(stage.source, temperature=temperature, top_p=top_p)),)
    runs = [start.fit(algorithm, learning_rate=0.0, output_dir=tmp_path / side, seed=3) for side in ("one", "two")]
    assert numbers(runs[0]) == numbers(runs[1])
    texts = [(tmp_path / side / "samples.jsonl").read_text() for side in ("one", "two")]
    assert texts[0] == texts[1] and texts[0].count("\n") == 2 * 3  # steps x log_completions
    assert torch.equal(flat(engines[0].policy), flat(start.model))
    for row in runs[0].history:
        if "ratio" in row:
            assert row["ratio"] == pytest.approx(1.0, abs=1e-5)
            assert row.get("approx_kl", 0.0) == pytest.approx(0, abs=1e-9) and row.get("clip_ratio", 0.0) == 0.0
        if "kl" in row:  # the reference is the start
            assert row["kl"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_before_the_first_step_policy_and_reference_agree(precision: str, start: Start) -> None:
    """DPO starts at log 2, also in bfloat16: both sides are computed by the same passes."""
    run = start.fit("dpo", precision=precision, rows_per_step=7, max_steps=1)
    assert run.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert run.history[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_sampler_has_the_learners_precision(precision: str, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities of two precisions differ several times more than two passes of one."""
    seen, original = set(), loop_module.choose

    def watched(logits_RV: Tensor, *rest: Any) -> Any:
        seen.add(str(logits_RV.dtype))
        return original(logits_RV, *rest)

    monkeypatch.setattr(loop_module, "choose", watched)
    run = start.fit("grpo", precision=precision, learning_rate=0.0)
    assert seen == {f"torch.{precision}"}
    assert all(row["ratio"] == pytest.approx(1.0, abs=0.02) for row in run.history)


def test_rollouts_depend_on_seed_and_step(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same prompts in the same order: other texts with another seed, and at another step; one seed, one text."""
    made: list[list[int]] = []
    original = Engine._collect

    def watched(self: Engine, *rest: Any) -> Any:
        samples = original(self, *rest)
        made.append(samples.completions.flat.tolist())
        return samples

    monkeypatch.setattr(Engine, "_collect", watched)
    data = [{"prompt": p} for p in ("say a:", "hum:", "again:", "b or c:")]
    for seed in (1, 1, 2):
        start.fit("rlvr", dataset=data, seed=seed, shuffle=False, learning_rate=0.0)
    assert made[0:2] == made[2:4] and len({str(ids) for ids in made}) == 4


# ------------------------------------------------------------------------------------------------ roles

# What each algorithm needs beside the policy, written down by hand.
BY_NEED = {
    "reference": ("dpo", "ipo", "kto", "tdpo1", "exo", "tr_dpo", "hpo", "aot", "rloo", "grpo", "ppo"),
    "reward": ("rlvr", "rejection_sampling", "gspo", "reward_model", "plackett_luce", "reward_regression",
               "process_reward", "rloo", "grpo", "ppo"),
    "critic": ("ppo",), "teacher": ("gkd",), "heads": ("ilql",),
}  # fmt: skip
HOLDS = {name: {need for need, names in BY_NEED.items() if name in names} for name in NAMES}
LIVE = ("tdpo1", "tr_dpo")  # of the reference's distribution, or of one that moves, no number can be stored


@pytest.mark.parametrize("name", NAMES)
def test_needs_are_complete_and_minimal(name: str, start: Start, engines: list[Engine]) -> None:
    algorithm = small(name)
    held = HOLDS[name]
    assert algorithm.needs - {"policy"} == held
    start.fit(algorithm)
    engine, (stage,) = engines[0], algorithm.stages
    live = "reference" in held and (stage.on_policy or stage.prelude is not None or name in LIVE)
    assert (engine.reference is not None) == ("reference" in held)
    # A stored reference is a set of numbers: no second model is held for it.
    assert engine.reference is None or (engine.reference is not engine.policy) == live
    assert ("critic" in engine.critics) == ("critic" in held)
    assert (engine.reward is not None) == (stage.on_policy and "reward" in held)


def test_grpo_without_kl_has_no_reference() -> None:
    assert create_algorithm("grpo", kl=0.0).needs == {"policy", "reward"}


# ------------------------------------------------------------------------------------------------ rewards


@pytest.mark.parametrize(
    "credit", [GroupRelative(), GroupRelative("batch"), GroupRelative("none"), LeaveOneOut()], ids=repr
)
def test_equal_rewards_have_no_advantage_whatever_their_rounding(credit: Any) -> None:
    """7.4e-5 instead of 0 for eight rewards of 0.1, 0.009 for seven of 15.7; AdamW makes full steps of it."""
    for size in range(2, 17):
        samples = pack_rows([([1], [[2]] * size)])
        for constant in (0.1, 0.7, 15.7, 1234.567, -1 / 3):
            found = credit(samples, torch.full((size,), constant)).tokens["advantages"]
            assert bool((found == 0).all()), (size, constant, found)


def test_groups_without_differences_are_counted(start: Start) -> None:
    """Two of four prompts give every sample the same reward; the rest differ by their number in the batch."""

    def half(prompts: list[str], completions: list[str]) -> list[float]:
        order = list(dict.fromkeys(prompts))
        return [0.0 if order.index(p) % 2 else float(i) for i, p in enumerate(prompts)]

    data = [{"prompt": p} for p in ("say a:", "hum:", "again:", "b or c:")]
    run = start.fit("grpo", dataset=data, reward=half, max_steps=1)
    assert run.history[0]["frac_reward_zero_std"] == 0.5


@pytest.mark.parametrize("name", ["grpo", "rlvr", "ppo", "rejection_sampling"])
def test_a_missing_reward_is_no_reward(name: str, start: Start, engines: list[Engine], tmp_path: Path) -> None:
    """Rows that a function says None about take no part: what it might have said instead does not matter."""
    options = {"kl": 0.0} if name == "grpo" else {}
    hidden = iter([[None] * 12] * 2)
    run = start.fit(small(name, **options), reward=lambda completions: next(hidden), output_dir=tmp_path / "none")
    assert torch.equal(flat(engines[0].policy), flat(start.model)), "rewards all missing, and yet the policy moved"
    assert name != "ppo" or torch.equal(flat(engines[0].critics["critic"]), flat(fresh("critic", start)))
    assert all(row["reward_missing"] == 1.0 and "reward" not in row for row in run.history)
    assert_json(tmp_path / "none" / "samples.jsonl")
    assert_json(tmp_path / "none" / "metrics.jsonl")


def assert_json(path: Path) -> None:
    """Strict JSON: NaN and Infinity are not."""
    for line in path.read_text().splitlines():
        assert "NaN" not in line and "Infinity" not in line
        json.loads(line)


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_rows_with_a_missing_reward_get_no_gradient(
    name: str, start: Start, engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"kl": 0.0} if name == "grpo" else {}
    seen: list[Tensor] = []

    def some(completions: list[str]) -> list[float | None]:
        return [None if i % 3 == 1 else float(i) for i in range(len(completions))]

    original = engine_module.build_record

    def watched(*args: Any) -> Any:
        record = original(*args)
        seen.append(record.logps_BT if hasattr(record, "logps_BT") else record.values_BT)
        seen[-1].retain_grad()
        return record

    monkeypatch.setattr(engine_module, "build_record", watched)
    start.fit(small(name, **options), reward=some, max_steps=1)
    missing_B = torch.arange(12) % 3 == 1
    for scores_BT in seen[: len(small(name).stages[0].trains)]:  # the policy's; and the critic's
        gradient_B = scores_BT.grad.abs().sum(-1)
        assert bool((gradient_B[missing_B] == 0).all()) and bool((gradient_B[~missing_B] > 0).any())


@pytest.mark.parametrize("where", ["reward", "weights"])
def test_a_step_that_is_not_finite_is_not_taken(
    where: str, start: Start, engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = engine_module.build_record
    calls = 0

    def broken(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        record = original(*args)
        if calls < 3:  # one micro-batch and one record a step: the third step is bad
            return record
        bad = torch.inf if where == "reward" else torch.nan
        return replace(record, ref_chosen_logps_BT=torch.full_like(record.ref_chosen_logps_BT, bad))

    monkeypatch.setattr(engine_module, "build_record", broken)
    with pytest.raises(NonFiniteError, match=r"step 3: loss is .*; stopped before the step"):
        start.fit("ipo", max_steps=5)
    bad = engines[0].policy
    monkeypatch.setattr(engine_module, "build_record", original)
    good = start.fit("ipo", max_steps=2)
    assert torch.equal(flat(bad), flat(good.policy)), "the weights are those of the last good step"


# ------------------------------------------------------------------------------------------------ parts in the loop


def test_ptx_rows_are_learned_beside_the_rewards(start: Start, engines: list[Engine]) -> None:
    """Without a useful reward the ptx term alone makes the demonstrations likelier, by what its weight says."""
    demonstrations = [{"prompt": "hum:", "completion": " 9 9 9"}]

    def after(weight: float) -> float:
        algorithm = small("ppo", ptx=weight, kl=0.0, inner_epochs=1) if weight else small("ppo", kl=0.0, inner_epochs=1)
        start.fit(algorithm, reward=lambda completions: [0.0] * len(completions), learning_rate=1e-3,
                  **({"ptx_dataset": demonstrations} if weight else {}))  # fmt: skip
        return loglikelihood(engines[-1].policy, start, demonstrations)

    none, little, much = (after(w) for w in (0.0, 0.5, 2.0))
    assert none + 0.05 < little < much - 0.05


def test_a_ptx_term_without_its_data_says_so(start: Start) -> None:
    with pytest.raises(prefzoo.UsageError, match="ptx_dataset="):
        start.fit(small("ppo", ptx=1.0))


def test_ptx_survives_any_split(start: Start, engines: list[Engine]) -> None:
    for budget in (100_000, 20):
        start.fit(small("ppo", ptx=0.5), ptx_dataset=PAIRS, tokens_per_batch=budget)
    whole, split = (flat(e.policy) - flat(start.model) for e in engines)
    assert (whole - split).norm() <= 1e-3 * whole.norm()


def loglikelihood(policy: Policy, start: Start, rows: list[dict[str, str]]) -> float:
    samples, _ = tokenise(rows, start.words, "completions")
    with torch.no_grad():
        return float(policy(TreeBatch.of(samples)).logps_C.mean())


def test_the_adaptive_controller_steers(start: Start, engines: list[Engine]) -> None:
    """Far from the reference the coefficient grows, at the reference it falls; and it starts at its first value."""
    far = start.fit(small("ppo", kl=0.1, kl_target=0.5, kl_horizon=100), reference=start.other, max_steps=3)
    near = start.fit(small("ppo", kl=0.1, kl_target=50.0, kl_horizon=100), learning_rate=0.0, max_steps=3)
    rising, falling = ([row["kl_coefficient"] for row in run.history] for run in (far, near))
    factor = 0.2 * 12 / 100  # the largest relative change of a step with 12 completions
    assert rising == pytest.approx([0.1 * (1 + factor) ** k for k in range(3)], rel=1e-6)
    assert falling == pytest.approx([0.1 * (1 - factor) ** k for k in range(3)], rel=1e-6)


def test_controllers_do_not_leak_between_runs(start: Start) -> None:
    algorithm = small("ppo", kl=0.1, kl_target=0.5, kl_horizon=100)
    runs = [start.fit(algorithm, reference=start.other) for _ in range(2)]
    assert numbers(runs[0]) == numbers(runs[1])
    assert algorithm.stages[0].controllers["kl"].value == 0.1


def test_the_controller_is_the_one_that_credit_uses(start: Start, engines: list[Engine]) -> None:
    start.fit(small("ppo", kl=0.1, kl_target=0.5), max_steps=1)
    stage = engines[0].stage
    assert stage.credit.kl is stage.controllers["kl"]


# ------------------------------------------------------------------------------------------------ learning


@pytest.mark.parametrize("name", ["sft", "dpo", "ipo", "ipo_sum", "kto"])
def test_the_preferred_answer_becomes_likelier(name: str, start: Start) -> None:
    """Relative to the other answer, and to the start, at every prompt."""
    adam = {"optimizer": "adamw", "learning_rate": 1e-3, "max_steps": 20, "rows_per_step": 14}
    run = start.fit(name, **adam)
    samples, _ = tokenise(PAIRS, start.words, "pairs")

    def margins(policy: Policy) -> Tensor:
        tree = TreeBatch.of(samples)
        with torch.no_grad():
            total_B = torch.zeros(len(samples.completions)).index_add(0, tree.owner_C, policy(tree).logps_C)
        return total_B[0::2] - total_B[1::2]

    gain = margins(run.policy) - margins(Policy(start.model))
    assert bool((gain > 0).all()), gain


@pytest.mark.parametrize("options", [{}, {"pooling": "mean"}, {"centering": 0.01}], ids=str)
def test_a_reward_model_learns_the_pairs(options: dict[str, Any], start: Start) -> None:
    adam = {"optimizer": "adamw", "learning_rate": 1e-3, "max_steps": 15, "logging_steps": 1, "rows_per_step": 7}
    run = start.fit(create_algorithm("reward_model", **options), **adam)
    first, last = run.history[0], run.history[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6), "a zero head knows nothing"
    assert last["rewards/accuracies"] == 1.0 and last["rewards/margins"] > 1.0
    assert run.policy is None and run.scorer is not None


@pytest.mark.parametrize(("name", "options"), [
    ("ppo", {"inner_epochs": 2, "kl": 0.0}),
    ("grpo", {"kl": 0.0}),
    ("grpo", {"kl": 0.0, "count": "token", "std": False}),
    ("rlvr", {}),
    ("rlvr", {"estimator": "leave_one_out"}),
    ("rejection_sampling", {"epochs_per_round": 1}),
], ids=str)  # fmt: skip
def test_a_bandit_is_learned(name: str, options: dict[str, Any], gambler: Start) -> None:
    """One state and two answers, a reward for the rarer one: its share rises by a quarter and more."""
    adam = {"optimizer": "adamw", "learning_rate": 2e-3, "max_steps": 25, "logging_steps": 5}
    reward = lambda completions: [float("c" in c) for c in completions]  # noqa: E731
    run = gambler.fit(small(name, **options), dataset=[{"prompt": "b or c:"}], reward=reward, **adam)
    first, last = run.history[0]["reward"], run.history[-1]["reward"]
    assert last > first + 0.25, (first, last)


# ------------------------------------------------------------------------------------------------ bookkeeping


@pytest.mark.parametrize(
    ("rows_per_step", "epochs", "steps"), [(7, 1, 1), (3, 1, 3), (3, 2, 6), (100, 1, 1), (2, 0.5, 2)]
)
def test_steps_and_ragged_last_batches(
    rows_per_step: int, epochs: float, steps: int, start: Start, engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row once an epoch, the last batch as large as what is left, divided by its own size."""
    batches: list[list[int]] = []
    original = Engine._optimizer_step

    def watched(self: Engine, main: Any, *rest: Any) -> None:
        batches.append([int(c.sum()) for c in map(main.completions.__getitem__, range(len(main.completions)))])
        original(self, main, *rest)

    monkeypatch.setattr(Engine, "_optimizer_step", watched)
    run = start.fit("sft", rows_per_step=rows_per_step, epochs=epochs, max_steps=None)
    assert run.spent.optimizer_steps == steps == len(batches) == len(run.history)
    everything = sorted(int(c.sum()) for c in map(engines[0].data.completions.__getitem__, range(len(PAIRS))))
    per_epoch = math.ceil(len(PAIRS) / rows_per_step)
    for epoch in range(steps // per_epoch):
        seen = [x for batch in batches[epoch * per_epoch : (epoch + 1) * per_epoch] for x in batch]
        assert sorted(seen) == everything
    if steps > per_epoch:
        assert batches[:per_epoch] != batches[per_epoch : 2 * per_epoch], "epochs have orders of their own"
    whole = len(engines[0].data.completions.flat)
    assert steps % per_epoch or run.spent.trained_tokens == whole * steps // per_epoch


def test_without_shuffling_rows_come_in_order(start: Start, engines: list[Engine]) -> None:
    start.fit("sft", shuffle=False)
    assert engines[0]._order("order", 3, 5).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("inner_epochs", "minibatches", "steps"), [(1, 1, 2), (3, 1, 6), (2, 2, 8)])
def test_the_schedule_of_rollouts(
    inner_epochs: int, minibatches: int, steps: int, start: Start, engines: list[Engine]
) -> None:
    run = start.fit(small("grpo", inner_epochs=inner_epochs, minibatches=minibatches))
    assert run.spent.optimizer_steps == steps and run.spent.prompts == 8 and run.spent.reward_calls == 24
    assert run.spent.generated_tokens * inner_epochs == run.spent.trained_tokens
    assert len(run.history) == 2, "one line a rollout step"


def test_prompts_are_visited_epoch_after_epoch(start: Start, engines: list[Engine]) -> None:
    """More prompts a step than rows: every row appears equally often, and never with the same random numbers."""
    start.fit("grpo", dataset=PAIRS[:4], max_steps=1)  # rows 0 and 1 are one prompt: three are left
    engine = engines[0]
    assert len(engine.data) == 3
    found = [engine._prompts(step) for step in range(3)]
    keys = np.concatenate([k for _, k in found])
    assert len(set(keys.tolist())) == 12 and np.bincount(keys % 3).tolist() == [4, 4, 4]


def test_the_learning_rate_follows_its_schedule(start: Start) -> None:
    run = start.fit("sft", max_steps=8, schedule="linear", warmup_steps=2, final_learning_rate=0.0, learning_rate=1.0)
    assert [row["learning_rate"] for row in run.history] == pytest.approx(
        [(1 - k / 8) * min(1, (k + 1) / 2) for k in range(8)]
    )


def test_gradient_checkpointing_gives_the_same_weights(start: Start) -> None:
    plain, recomputed = (start.fit("dpo", gradient_checkpointing=on) for on in (False, True))
    assert torch.allclose(flat(plain.policy), flat(recomputed.policy), atol=1e-7)


def test_clipping_bounds_the_step(start: Start) -> None:
    run = start.fit("sft", max_grad_norm=0.5, learning_rate=1.0, max_steps=1)
    assert (flat(run.policy) - flat(start.model)).norm() == pytest.approx(0.5, rel=1e-3)
    assert run.history[0]["grad_norm"] > 0.5, "the metric is the norm before clipping"


# ------------------------------------------------------------------------------------------------ what is written


def test_the_result_is_an_ordinary_folder(start: Start, tmp_path: Path) -> None:
    run = start.fit("dpo", output_dir=tmp_path / "run")
    final = tmp_path / "run" / "final"
    loaded = AutoModelForCausalLM.from_pretrained(final).eval()
    samples, _ = tokenise(PAIRS[:1], start.words, "pairs")
    ids = torch.tensor(np.concatenate([samples.prompts[0], samples.completions[0]]))[None].long()
    own = copy.deepcopy(run.model).eval()
    own.set_attn_implementation("sdpa")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, own(ids).logits)
        tree = TreeBatch.of(samples)
        ours = run.policy(tree).logps_C[: len(samples.completions[0])]
        plain = loaded(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[-len(ours) :, 0]
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    assert "prefzoo" not in (final / "config.json").read_text(), "our attention hook must not leave the house"
    again = prefzoo.train("sft", model=final, dataset=PAIRS, **QUICK)
    assert len(again.history) == 2


def test_a_run_folder_tells_what_was_done(start: Start, tmp_path: Path) -> None:
    start.fit("grpo", output_dir=tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["algorithm"] == "grpo" and record["options"]["clip"] == 0.2
    assert record["config"]["optimizer"] == "sgd" and record["spent"]["optimizer_steps"] == 2
    assert set(record["sources"]) >= {"grpo", "loss:clipped_surrogate", "loss:kl_penalty"}
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert_json(tmp_path / "run" / name)
    with pytest.raises(prefzoo.UsageError, match="holds another run"):
        start.fit("grpo", output_dir=tmp_path / "run")


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_reward_model_survives_its_folder(pooling: str, start: Start, tmp_path: Path) -> None:
    run = start.fit(create_algorithm("reward_model", pooling=pooling), output_dir=tmp_path / "rm", learning_rate=0.1)
    assert run.scorer is not None
    run.scorer.offset.fill_(0.3)
    run.scorer.scale.fill_(2.0)
    save_scorer(run.scorer, start.words, tmp_path / "standardised")
    samples, _ = tokenise(PAIRS, start.words, "pairs")
    tree = TreeBatch.of(samples)
    with torch.no_grad():
        ours = run.scorer(tree).rewards_B
        for folder, expected in ((tmp_path / "standardised", ours), (tmp_path / "rm" / "final", ours * 2.0 + 0.3)):
            loaded = load_scorer(folder)
            assert loaded.pooling == pooling
            torch.testing.assert_close(loaded(tree).rewards_B, expected, atol=1e-6, rtol=1e-5)
    assert ours.std() > 1e-3
    tuned = start.fit("grpo", reward=tmp_path / "standardised")
    assert math.isfinite(tuned.history[-1]["reward"])


def test_all_seven_names_run_in_one_loop(start: Start, tmp_path: Path) -> None:
    """The promise of the front page: same model, same data, same reward, only the name changes."""
    data = [{**row, "answer": row["chosen"]} for row in PAIRS]

    def right(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return [float(c.strip() == a.strip()) for c, a in zip(completions, answer, strict=True)]

    affordable = {"max_new_tokens": 8, "prompts_per_step": 8, "prompts_per_round": 8, "group_size": 4}
    for name in SEVEN:
        options = {k: v for k, v in affordable.items() if k in algorithm_entry(name).options}
        run = prefzoo.train(name, model=start.model, tokenizer=start.words, dataset=data, reward=right,
                            output_dir=tmp_path / name, max_steps=2, quiet=True, **options)  # fmt: skip
        assert (tmp_path / name / "final" / "model.safetensors").exists() and run.spent.optimizer_steps > 0
        assert all(math.isfinite(v) for row in run.history for v in row.values())
