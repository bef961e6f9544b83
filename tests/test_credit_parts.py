"""Credits and keeps as parts: each against its function, its theorem and its promises, on samples made by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prefzoo.algorithm import Algorithm, create_algorithm
from prefzoo.data.samples import Ragged, Samples
from prefzoo.losses import advantages
from prefzoo.models.reference import weights_hash
from prefzoo.parts.baselines import Baseline, BatchNormalised, Decoupled, Greedy, LengthWeighted, MovingMean
from prefzoo.parts.controllers import FixedKL
from prefzoo.parts.credit import GroupRelative, LeaveOneOut
from prefzoo.parts.critics import GAE, MacroActions, RunningScale
from prefzoo.parts.feedback import MaskTruncated, Verifier
from prefzoo.parts.keep import InTurn, MixedGroups, SoftOverlong
from prefzoo.parts.reference import EachRound, Moving
from prefzoo.parts.replay import Replay
from prefzoo.registry import UsageError
from prefzoo.rollout import Finish
from prefzoo.theory.enumerable_lm import EnumerableWorld
from prefzoo.theory.policies import Tabular
from prefzoo.theory.runs import Ended, claim_of, fit, sized

LENGTHS, GROUPS = (2, 3, 1, 4, 2, 2), (0, 0, 0, 1, 1, 1)
SCORES = torch.tensor([1.0, 3.0, 2.0, -1.0, 0.5, 0.0])
MISSING = torch.tensor([1.0, math.nan, 2.0, -1.0, 0.5, math.nan])


def made(
    lengths: tuple[int, ...] = LENGTHS, groups: tuple[int, ...] = GROUPS, seed: int = 0, **columns: Tensor
) -> Samples:
    """Completions with log-probabilities under two policies and the values of two critics, all at random."""
    generator = torch.Generator().manual_seed(seed)
    size = sum(lengths)
    tokens = {
        name: torch.randn(size, generator=generator)
        for name in ("old_logps", "ref_logps", "values", "values:cost")
    }  # fmt: skip
    return Samples(
        "completions", Ragged.of([[1]] * (max(groups) + 1)), Ragged.of([[2] * n for n in lengths]), np.array(groups),
        columns={"finish": torch.full((len(lengths),), Finish.STOP), **columns}, tokens=tokens,
    )  # fmt: skip


def per_row(samples: Samples, name: str = "advantages") -> Tensor:
    """The number that all tokens of a completion share, (B,)."""
    lengths_B = torch.from_numpy(samples.completions.lengths)
    first_B = samples.tokens[name][lengths_B.cumsum(0) - lengths_B]
    assert torch.equal(samples.tokens[name], first_B.repeat_interleave(lengths_B))
    return first_B


def per_token(samples: Samples, name: str = "advantages") -> Tensor:
    return samples.padded(samples.tokens[name])


def penalty(samples: Samples) -> Tensor:
    """log pi/ref of each completion."""
    return (per_token(samples, "old_logps") - per_token(samples, "ref_logps")).sum(-1)


# -- against the functions --------------------------------------------------------------------------------------------

GROUP_B = torch.tensor(GROUPS)
ROWS: dict[str, tuple[Any, Callable[[Samples, Tensor], Tensor]]] = {
    "group_relative": (GroupRelative(), lambda s, r: advantages.group_relative(r, GROUP_B)),
    "leave_one_out": (LeaveOneOut(), lambda s, r: advantages.leave_one_out(r, GROUP_B)),
    "no baseline": (Baseline(), lambda s, r: r.nan_to_num()),
    "kl in the reward": (Baseline(kl=0.3), lambda s, r: (r - 0.3 * penalty(s)).nan_to_num()),
    "batch": (Baseline("batch"), lambda s, r: advantages.leave_one_out(r, torch.zeros(6))),
    "opo": (LengthWeighted(), lambda s, r: advantages.opo(r, GROUP_B, torch.tensor(LENGTHS))),
}


@pytest.mark.parametrize("scores_B", [SCORES, MISSING], ids=["all", "missing"])
@pytest.mark.parametrize("name", ROWS)
def test_a_completion_gets_the_advantage_of_its_function(name: str, scores_B: Tensor) -> None:
    credit, function = ROWS[name]
    samples = made()
    assert torch.allclose(per_row(credit(samples, scores_B)), function(samples, scores_B), atol=1e-6)


@pytest.mark.parametrize("scores_B", [SCORES, MISSING], ids=["all", "missing"])
@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("kl", [0.0, 0.2])
def test_reinforce_pp_is_its_function(kl: float, group: bool, scores_B: Tensor) -> None:
    samples = made()
    credit = BatchNormalised(group=group, kl=kl, gamma=0.9, estimator="k3")
    assert credit.needs == (frozenset({"reference"}) if kl else frozenset())
    old_BT, ref_BT = per_token(samples, "old_logps"), per_token(samples, "ref_logps")
    given = {"kl": kl, "gamma": 0.9, "estimator": "k3"}
    wanted = (
        advantages.reinforce_pp_baseline(scores_B, GROUP_B, old_BT, ref_BT, samples.mask_BT(), **given)
        if group
        else advantages.reinforce_pp(scores_B, old_BT, ref_BT, samples.mask_BT(), **given)
    )
    assert torch.allclose(per_token(credit(samples, scores_B)), wanted)
    assert wanted.abs().max() > 0.5


def test_gdpo_is_its_function_and_needs_several_rewards() -> None:
    scores_BK = torch.stack([SCORES, MISSING.flip(0)], 1)
    found = per_row(Decoupled(weights=(2.0, 1.0))(made(), scores_BK))
    assert torch.allclose(found, advantages.gdpo(scores_BK, GROUP_B, weights=(2.0, 1.0)))
    with pytest.raises(UsageError, match="Objectives"):
        Decoupled()(made(), SCORES)


# -- ReMax ------------------------------------------------------------------------------------------------------------


def test_remax_takes_the_greedy_completion_as_baseline_and_does_not_train_on_it() -> None:
    # The main completions first, then those beside, prompt by prompt.
    samples = made((2, 3, 1, 4, 2, 1), (0, 0, 1, 1, 0, 1), sampler=torch.tensor([0, 0, 0, 0, 1, 1]))
    scores_B = torch.tensor([1.0, 3.0, 2.0, math.nan, 2.5, 7.0])
    found = Greedy()(samples, scores_B)
    assert found.completions.lengths.tolist() == [2, 3, 1, 4] and len(found) == 4
    assert per_row(found).tolist() == [-1.5, 0.5, -5.0, 0.0]
    with_kl = per_row(Greedy(kl=0.1)(samples, scores_B))
    assert torch.allclose(with_kl, torch.where(scores_B[:4].isnan(), 0, per_row(found) - 0.1 * penalty(samples)[:4]))
    unknown = per_row(Greedy()(samples, scores_B.index_fill(0, torch.tensor([4]), math.nan)))
    assert unknown.tolist() == [0.0, 0.0, -5.0, 0.0], "without a baseline there is no signal"
    with pytest.raises(UsageError, match=r"Sampler\(temperature=0.0\)"):
        Greedy()(made(), SCORES)


def enumerated() -> tuple[Tabular, Tensor, Tensor]:
    policy = Tabular(3, 2, seed=1)
    rewards_R = torch.randn(len(policy.strings), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return policy, rewards_R, policy.gradient((policy.log_probs().exp() * rewards_R).sum())


def test_remax_is_unbiased() -> None:
    """Over all responses of a policy, the greedy one beside each: the mean gradient is that of the expected reward."""
    policy, rewards_R, exact = enumerated()
    count, best = len(rewards_R), int(policy.log_probs().argmax())
    lengths = policy.mask_RT.sum(-1)
    samples = made(
        (*lengths.tolist(), *[int(lengths[best])] * count), (*range(count), *range(count)),
        sampler=torch.arange(2 * count) // count,
    )  # fmt: skip
    found = per_row(Greedy()(samples, torch.cat([rewards_R, rewards_R[best].expand(count)])))
    assert abs(float(rewards_R[best])) > 0.1, "a baseline that says something"
    assert torch.allclose(weighted(policy, found), exact, atol=1e-12)
    assert not torch.allclose(weighted(policy, found.abs()), exact, atol=1e-2)


def weighted(policy: Tabular, advantage_R: Tensor) -> Tensor:
    """The expected gradient of A log π over the policy's own responses."""
    log_probs_R = policy.log_probs()
    return policy.gradient((log_probs_R.exp().detach() * advantage_R * log_probs_R).sum())


def test_the_mean_of_the_others_is_unbiased() -> None:
    """Two completions of different prompts: the mean advantage of the first over all that the other may be."""
    policy, rewards_R, exact = enumerated()
    probs_R, lengths = policy.log_probs().exp().detach(), policy.mask_RT.sum(-1).tolist()
    mean_R = torch.zeros_like(rewards_R)
    for first in range(len(rewards_R)):
        for second in range(len(rewards_R)):
            pair = made((lengths[first], lengths[second]), (0, 1))
            advantage_B = per_row(Baseline("batch")(pair, rewards_R[[first, second]]))
            mean_R[first] += probs_R[second] * advantage_B[0]
    assert torch.allclose(weighted(policy, mean_R), exact, atol=1e-12)


# -- promises ---------------------------------------------------------------------------------------------------------

SHIFT_FREE = (GroupRelative(), LeaveOneOut(), Baseline("batch"), LengthWeighted(), BatchNormalised(kl=0.0))
NOTHING_TO_COMPARE = (*SHIFT_FREE, BatchNormalised(group=True, kl=0.0))


@pytest.mark.parametrize("credit", SHIFT_FREE, ids=str)
def test_a_shift_of_all_rewards_changes_nothing(credit: Any) -> None:
    one, other = (per_token(credit(made(), SCORES + shift)) for shift in (0.0, 5.0))
    assert torch.allclose(one, other, atol=1e-5) and one.abs().max() > 0.1


@pytest.mark.parametrize("credit", NOTHING_TO_COMPARE, ids=str)
def test_equal_rewards_teach_nothing(credit: Any) -> None:
    assert not per_token(credit(made(), torch.full((6,), 0.3))).any()


def test_a_moving_baseline_knows_the_past_only() -> None:
    moving = MovingMean(decay=0.9)
    credit = Baseline(moving)
    assert torch.equal(per_row(credit(made(), SCORES)), SCORES), "the first step has no past"
    moving.update(float(SCORES.mean()), 6)
    assert torch.allclose(per_row(credit(made(), SCORES)), SCORES - SCORES.mean())
    moving.update(11.0, 6)
    twin = MovingMean(decay=0.9)
    twin.load_state_dict(moving.state_dict())
    assert twin.value == moving.value == pytest.approx(0.9 * float(SCORES.mean()) + 1.1)
    twin.update(1.0, 6)
    assert twin.value != 1.0, "the state tells that there has been a first"
    alike = MovingMean()
    for mean in (1.0, 2.0, 6.0):
        alike.update(mean, 6)
    assert alike.value == pytest.approx(3.0)


# -- critics ----------------------------------------------------------------------------------------------------------


def by_hand(samples: Samples, scores_B: Tensor, kl: float = 0.0, **options: Any) -> tuple[Tensor, Tensor]:
    mask_BT = samples.mask_BT()
    old_BT, ref_BT = per_token(samples, "old_logps"), per_token(samples, "ref_logps")
    rewards_BT = advantages.shaped_rewards(scores_B.nan_to_num(), old_BT, ref_BT, mask_BT, kl=kl)
    return advantages.gae(rewards_BT, per_token(samples, "values"), mask_BT, **options)


def test_gae_is_its_function_with_the_kl_in_the_reward() -> None:
    samples, kl = made(), FixedKL(0.2)
    found = GAE(lam=0.8, gamma=0.9, kl=kl, whiten=False)(samples, MISSING)
    wanted_BT, returns_BT = by_hand(samples, MISSING, kl=0.2, lam=0.8, gamma=0.9)
    assert torch.allclose(per_token(found), wanted_BT) and torch.allclose(per_token(found, "returns"), returns_BT)
    assert torch.equal(per_row(found, "trainable"), ~MISSING.isnan()), "a missing reward gives no signal"
    white = GAE(lam=0.8, gamma=0.9, kl=kl)(samples, MISSING)
    counted_BT = samples.mask_BT() & ~MISSING.isnan()[:, None]
    assert torch.allclose(per_token(white), advantages.whiten(wanted_BT, counted_BT))


def test_gae_without_a_kl_needs_no_reference() -> None:
    without, zero = GAE(kl=None), GAE(kl=FixedKL(0.0))
    assert without.needs == {"critic"} and zero.needs == {"critic", "reference"}
    assert torch.allclose(per_token(without(made(), SCORES)), per_token(zero(made(), SCORES)))


def test_a_named_critic_has_values_and_returns_of_its_own() -> None:
    credit = GAE(kl=None, critic="cost", whiten=False)
    assert credit.needs == {"critic:cost"}
    samples = made()
    found = credit(samples, SCORES)
    assert "returns" not in found.tokens
    renamed = replace(samples, tokens={**samples.tokens, "values": samples.tokens["values:cost"]})
    wanted_BT, returns_BT = by_hand(renamed, SCORES)
    assert torch.allclose(per_token(found), wanted_BT) and torch.allclose(per_token(found, "returns:cost"), returns_BT)


def test_macro_actions_share_value_and_advantage() -> None:
    samples = made((5, 3, 2), (0, 1, 2))
    single = GAE(kl=None, whiten=False, actions=MacroActions(length=1))(samples, SCORES[:3])
    assert torch.allclose(per_token(single), by_hand(samples, SCORES[:3])[0])
    pairs = MacroActions(length=2)
    assert pairs.spans(samples)[0].tolist() == [0, 0, 1, 1, 2]
    found = per_token(GAE(kl=None, whiten=False, actions=pairs)(samples, SCORES[:3]))
    assert found[0, 0] == found[0, 1] and found[0, 2] == found[0, 3] and found[0, 1] != found[0, 2]
    assert torch.allclose(found, by_hand(samples, SCORES[:3], span_BT=pairs.spans(samples))[0])
    first = GAE(kl=None, whiten=False, actions=MacroActions(length=2, value="first"))(samples, SCORES[:3])
    assert torch.allclose(
        per_token(first), by_hand(samples, SCORES[:3], span_BT=pairs.spans(samples), span_value="first")[0]
    )


def test_a_macro_action_begins_where_the_reference_is_surprised() -> None:
    samples = made((5, 2), (0, 1))
    surprised = [-1.0, -0.5, -2.0, -2.0, -0.1, -0.3, -0.2]
    samples = samples.with_tokens(ref_logps=torch.tensor(surprised))
    actions = MacroActions("perplexity")
    assert actions.needs == {"reference"} and GAE(kl=None, actions=actions).needs == {"critic", "reference"}
    spans_BT = actions.spans(samples)
    assert spans_BT[0].tolist() == [0, 0, 1, 1, 1] and spans_BT[1, :2].tolist() == [0, 0]


def test_the_scale_of_a_run_is_that_of_all_its_rewards() -> None:
    scale, generator = RunningScale(), torch.Generator().manual_seed(0)
    batches = [3 + 2 * torch.randn(n, generator=generator, dtype=torch.float64) for n in (1, 5, 3)]
    assert scale.value == 1.0
    for batch in batches:
        scale.see(torch.cat([batch, torch.tensor([math.nan])]))
    assert scale.value == pytest.approx(float(torch.cat(batches).std()), rel=1e-12)
    assert scale.mean == pytest.approx(float(torch.cat(batches).mean()), rel=1e-12)
    twin = RunningScale()
    twin.load_state_dict(scale.state_dict())
    assert (twin.value, twin.mean, twin.count) == (scale.value, scale.mean, scale.count)


def test_scaled_rewards_have_no_unit_and_are_bounded() -> None:
    silent = made().with_tokens(values=torch.zeros(sum(LENGTHS)))

    def credited(scores_B: Tensor, **options: Any) -> Tensor:
        return per_token(GAE(kl=None, whiten=False, lam=1.0, scale=RunningScale(), **options)(silent, scores_B))

    assert torch.allclose(credited(SCORES), credited(1000 * SCORES))
    assert torch.allclose(credited(SCORES)[:, 0], SCORES / SCORES.std())
    centred = credited(SCORES, centre=True)[:, 0]
    assert torch.allclose(centred, (SCORES - SCORES.mean()) / SCORES.std())
    assert credited(SCORES, reward_clip=0.5).abs().max() == 0.5
    white = GAE(kl=None, advantage_clip=0.25)(made(), SCORES)
    assert per_token(white).abs().max() == 0.25
    with pytest.raises(UsageError, match="scale=RunningScale"):
        GAE(centre=True)
    for wrong in ({"reward_clip": 0.0}, {"advantage_clip": -1.0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            GAE(**wrong)


def test_a_copy_of_the_credit_keeps_its_scale_and_its_controller_one() -> None:
    scale = RunningScale()
    credit, controllers = copy.deepcopy((GAE(scale=scale), {"scale": scale}))
    assert credit.scale is controllers["scale"] is not scale


# -- keep -------------------------------------------------------------------------------------------------------------


def test_only_groups_with_a_contrast_stay() -> None:
    samples = made((1, 2, 3, 4, 5, 6, 7, 8), (0, 0, 1, 1, 2, 2, 3, 3))
    scores_B = torch.tensor([1.0, 1.0, 0.0, 1.0, math.nan, 1.0, math.nan, math.nan])
    kept, scores = MixedGroups()(samples, scores_B)
    assert kept.completions.lengths.tolist() == [3, 4] and scores.tolist() == [0.0, 1.0]
    assert len(MixedGroups()(samples, torch.ones(8))[0]) == 0
    assert MixedGroups().refill == 0 and MixedGroups(8).refill == 8
    with pytest.raises(UsageError, match="refill"):
        MixedGroups(-1)


def test_the_overlong_lose_by_a_ramp() -> None:
    samples = made((4, 6, 7, 9, 10), (0, 1, 2, 3, 4))
    same, scores_B = SoftOverlong(limit=10, buffer=4)(samples, torch.full((5,), 2.0))
    assert same is samples and scores_B.tolist() == [2.0, 2.0, 1.75, 1.25, 1.0]
    assert SoftOverlong(10, 4, penalty=2.0)(samples, torch.zeros(5))[1].tolist() == [0.0, 0.0, -0.5, -1.5, -2.0]
    for buffer in (0, 11):
        with pytest.raises(UsageError, match="buffer"):
            SoftOverlong(10, buffer)


def test_parts_act_in_turn() -> None:
    """Groups are judged by what the verifier said, before the length says something too."""
    samples = made((4, 10, 4, 10), (0, 0, 1, 1), finish=torch.tensor([Finish.STOP, Finish.LENGTH] * 2))
    scores_B = torch.tensor([1.0, 1.0, 1.0, 0.0])
    both = InTurn((MixedGroups(3), MaskTruncated(), SoftOverlong(10, 4)))
    kept, scores = both(samples, scores_B)
    assert both.refill == 3 and scores.tolist() == [1.0, -1.0]
    assert per_row(kept, "trainable").tolist() == [True, False]
    assert len(InTurn((SoftOverlong(10, 4), MixedGroups()))(samples, scores_B)[0]) == 4, "order matters"
    assert InTurn((MaskTruncated(),)).refill == 0


@pytest.mark.parametrize(
    ("make", "says"),
    [(lambda: Baseline(kl=-1.0), "kl is a weight"), (lambda: Greedy(kl=-1.0), "kl is a weight"),
     (lambda: BatchNormalised(kl=-1.0), "kl is a weight"), (lambda: Baseline("moving"), "of is 'batch'"),
     (lambda: MovingMean(decay=1.0), "decay"), (lambda: MacroActions("words"), "ngram"),
     (lambda: MacroActions(length=0), "length"), (lambda: MacroActions(value="last"), "first")],
)  # fmt: skip
def test_wrong_settings_are_named(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make()


# -- in runs, on the language model whose responses can be enumerated -------------------------------------------------


@pytest.fixture(scope="module")
def world() -> EnumerableWorld:
    return EnumerableWorld.make()


def trained(world: EnumerableWorld, algorithm: Algorithm, **given: Any) -> Ended:
    settings = {"logging_steps": 1, "max_steps": 2, **given}
    claim = replace(claim_of(algorithm, {}), settings={}, reward=settings.pop("reward", lambda world: world.reward))
    return fit(world, sized(algorithm, samples=32), claim, **settings)


def equal(world: EnumerableWorld) -> Any:
    """A reward that nothing can be learned from."""
    return lambda completions: [0.5] * len(completions)


def test_dynamic_sampling_is_charged_to_the_run(world: EnumerableWorld) -> None:
    for resamplings, rounds in ((0, 1), (3, 4)):
        dapo = create_algorithm("dapo", resamplings=resamplings, overlong_share=0.0, group_size=8, max_new_tokens=4)
        ended = trained(world, dapo, reward=equal)
        prompts = ended.engines[0].stage.schedule.prompts
        spent = ended.engines[0].spent
        assert spent.prompts == 2 * rounds * prompts and spent.reward_calls == 8 * spent.prompts
        assert spent.optimizer_steps == 0
        assert [row["kept"] for row in ended.run.history] == [0.0, 0.0]
        assert weights_hash(ended.run.model) == weights_hash(world.start)
    full = trained(world, create_algorithm("dapo", group_size=8, max_new_tokens=4))
    assert full.engines[0].spent.prompts == 2 * prompts, "who differ are enough"


def test_rlvr_is_the_algorithm_that_it_is_given_with_a_verifier(world: EnumerableWorld) -> None:
    plain = weights_hash(trained(world, create_algorithm("rlvr")).run.model)
    assert plain == weights_hash(trained(world, create_algorithm("grpo", kl=0.0, count="token")).run.model)
    for name in ("dapo", "ppo", "remax"):
        over = create_algorithm("rlvr", over=name, max_new_tokens=4)
        assert isinstance(over.stages[0].feedback, Verifier) and f"{name}" in over.sources
        alone = trained(world, create_algorithm(name, max_new_tokens=4))
        assert weights_hash(trained(world, over).run.model) == weights_hash(alone.run.model) != plain
    assert create_algorithm("rlvr", over="dapo", group_size=4).stages[0].source.group_size == 4
    assert create_algorithm("rlvr", over="dapo", group_size=8).stages[0].source.group_size == 8, "as in rlvr, but given"
    assert create_algorithm("rlvr", over="dapo").stages[0].source.group_size == 16, "its own default"
    for options, says in (({"over": "sft"}, "does not sample"), ({"over": "dapo", "clip": 0.1}, "have no effect")):
        with pytest.raises(UsageError, match=says):
            create_algorithm("rlvr", **options)


def test_the_greedy_completion_is_scored_and_not_trained_on(world: EnumerableWorld) -> None:
    ended = trained(world, create_algorithm("remax"))
    spent = ended.engines[0].spent
    assert spent.reward_calls == 2 * spent.prompts and "reward/sampler_1" in ended.run.history[0]
    assert len(ended.engines[0].stage.source.beside) == 1
    trained_rows = spent.trained_tokens / ended.run.history[-1]["completions/mean_length"]
    assert trained_rows < 1.5 * spent.prompts


def test_what_credits_have_learned_is_in_the_checkpoint(world: EnumerableWorld) -> None:
    engine = trained(world, create_algorithm("ppo_max")).engines[0]
    kept = engine.state()[1]["controllers"]
    assert kept["reward_scale"]["count"] == engine.spent.reward_calls
    assert engine.stage.credit.scale is engine.stage.controllers["reward_scale"]
    baseline = trained(world, create_algorithm("reinforce"))
    means = [row["reward"] for row in baseline.run.history]
    state = baseline.engines[0].state()[1]["controllers"]["baseline"]
    assert state == {"value": pytest.approx(sum(means) / 2), "steps": 2.0}


def test_a_mask_that_follows_is_copied_after_so_many_samplings(world: EnumerableWorld) -> None:
    nlpo = create_algorithm("nlpo", mask_every=3, inner_epochs=2, minibatches=4)
    assert nlpo.stages[0].reference == Moving(alpha=1.0, every=24)
    assert nlpo.stages[0].source.mask_top_p == 0.9


# ------------------------------------------------------------------------------------- what a round begins with


def test_every_round_is_held_to_the_policy_that_begins_it(world: EnumerableWorld) -> None:
    kl = {}
    for reference in ("round", "start"):
        algorithm = create_algorithm("iterative_dpo", reference=reference)
        ended = trained(world, algorithm, max_steps=3)
        kl[reference] = [row["kl"] for row in ended.run.history]
    assert max(map(abs, kl["round"])) < 1e-6, "nobody has moved since the copy"
    assert abs(kl["start"][0]) < 1e-6 and min(map(abs, kl["start"][1:])) > 1e-3, "who is held to the start has"
    assert not any(EachRound().due(step) for step in range(3)), "between rounds it stays"


def test_a_pool_forgets_the_oldest() -> None:
    pool, scores = None, SCORES
    for seed in range(3):
        pool, found = Replay(8).add(pool, made(seed=seed), scores + seed)
        assert len(pool) == len(found) == min(8, 6 * (seed + 1))
    assert found.tolist() == [*(SCORES + 1).tolist()[4:], *(SCORES + 2).tolist()]
    kept, found = Replay(8).add(None, made(), MISSING)
    assert found.tolist() == MISSING[~MISSING.isnan()].tolist() and len(kept) == 4, "what nobody scored does not enter"


@pytest.mark.parametrize("name", ["ppo", "ppo_max", "ma_ppo", "a2c"])
def test_without_a_weight_of_the_kl_no_reference_is_loaded(name: str) -> None:
    assert "reference" in create_algorithm(name, kl=0.1).needs
    assert "reference" not in create_algorithm(name, kl=0.0).needs
