"""Relations of the losses of rankings and of reward models: pair forms, sums over outcomes, invariances, limits."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from prefzoo.losses.base import create_loss
from prefzoo.losses.ranked import lambda_weights
from prefzoo.losses.rankings import below_PKK, pairs_P
from prefzoo.losses.reward import davidson_logps, rao_kupper_logps
from prefzoo.parts.count import Count
from prefzoo.records import Pairs, Ranked, RankedScores, Ratings, Scores, StepScores, masked_mean
from prefzoo.registry import UsageError
from prefzoo.testing import check_loss, random_record

SEEDS = range(3)
RANKED = ("pl_dpo", "all_pairs_dpo", "nca", "exo", "lipo")
RANKED_REWARDS = ("all_pairs", "plackett_luce")
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *[(name, {"beta": 5.0}) for name in RANKED],
    ("nca", {"alpha": 0.3}),
    ("exo", {"reward_beta": 0.5}),
    ("exo", {"label_smoothing": 0.3}),
    ("plackett_luce", {"per_choice": True}),
    ("davidson", {"nu": 0.1}),
    ("rao_kupper", {"theta": 1.1}),
    ("reward_regression", {"huber": 0.5}),
]
SOFT: list[tuple[str, dict[str, Any]]] = [
    *[(name, {}) for name in RANKED],
    ("nca", {"alpha": 0.3}),
    ("exo", {"reward_beta": 0.5}),
]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_contract_of_variants(name: str, options: dict[str, Any]) -> None:
    check_loss(name, **options)


# -- two completions: the pair forms, value and gradient --------------------------------------------------------------


def as_ranking(pairs: Pairs) -> Ranked:
    """Each pair as a list of two, and a third place where nobody is."""

    def lists(chosen_BT: Tensor, rejected_BT: Tensor, nobody: float) -> Tensor:
        width = max(chosen_BT.shape[1], rejected_BT.shape[1])
        made = chosen_BT.new_zeros((len(chosen_BT), 3, width))
        made[:, 2] = nobody
        made[:, 0, : chosen_BT.shape[1]], made[:, 1, : rejected_BT.shape[1]] = chosen_BT, rejected_BT
        return made

    assert pairs.ref_chosen_logps_BT is not None and pairs.ref_rejected_logps_BT is not None
    nan = float("nan")
    return Ranked(
        logps_PKT=lists(pairs.chosen_logps_BT, pairs.rejected_logps_BT, nan),
        ref_logps_PKT=lists(pairs.ref_chosen_logps_BT, pairs.ref_rejected_logps_BT, nan),
        mask_PKT=lists(pairs.chosen_mask_BT, pairs.rejected_mask_BT, True),
        valid_PK=torch.tensor([True, True, False]).expand(len(pairs.chosen_B), 3),
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("beta", [0.1, 3.0])
@pytest.mark.parametrize(
    ("name", "pair_form"), [("pl_dpo", "dpo"), ("all_pairs_dpo", "dpo"), ("nca", "nca_pair"), ("exo", "exo_pair")]
)
def test_two_completions_are_a_pair(name: str, pair_form: str, beta: float, seed: int) -> None:
    pairs = random_record(Pairs, seed, spread=3.0)
    leaves = {k: getattr(pairs, k).clone().requires_grad_() for k in ("chosen_logps_BT", "rejected_logps_BT")}
    pairs = dataclasses.replace(pairs, **leaves)
    of_list, of_pair = create_loss(name, beta=beta)(as_ranking(pairs)), create_loss(pair_form, beta=beta)(pairs)
    close(of_list.loss, of_pair.loss)
    for key, value in of_list.metrics.items():
        close(value, of_pair.metrics[key])
    weight_B = torch.arange(1.0, 6.0, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad((weight_B * of_list.loss).sum(), list(leaves.values())),
        torch.autograd.grad((weight_B * of_pair.loss).sum(), list(leaves.values())),
        strict=True,
    ):
        close(ours, theirs)


@pytest.mark.parametrize("smoothing", [0.01, 0.2, 0.5])
def test_exo_of_two_is_exo_pair_at_every_smoothing(smoothing: float) -> None:
    pairs = random_record(Pairs, spread=3.0)
    of_list = create_loss("exo", label_smoothing=smoothing)(as_ranking(pairs)).loss
    close(of_list, create_loss("exo_pair", label_smoothing=smoothing)(pairs).loss)


@pytest.mark.parametrize("seed", SEEDS)
def test_lipo_of_two_is_a_weighted_dpo(seed: int) -> None:
    pairs = random_record(Pairs, seed, spread=3.0)
    scores_PK = torch.tensor([[0.9, 0.2, float("nan")]], dtype=torch.float64).expand(5, 3)
    ranking = dataclasses.replace(as_ranking(pairs), scores_PK=scores_PK)
    weight = (2**0.9 - 2**0.2) * (1 / math.log(2) - 1 / math.log(3))
    close(create_loss("lipo", beta=0.5)(ranking).loss, weight * create_loss("dpo", beta=0.5)(pairs).loss)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", RANKED_REWARDS)
def test_two_rewards_are_bradley_terry(name: str, seed: int) -> None:
    scores = random_record(Scores, seed)
    nobody_B = torch.full_like(scores.chosen_B, float("inf"))
    ranking = RankedScores(
        rewards_PK=torch.stack([scores.chosen_B, scores.rejected_B, nobody_B], -1),
        valid_PK=torch.tensor([True, True, False]).expand(5, 3),
    )
    plain = Scores(chosen_B=scores.chosen_B, rejected_B=scores.rejected_B)
    ours, theirs = create_loss(name)(ranking), create_loss("bradley_terry")(plain)
    close(ours.loss, theirs.loss)
    for key, value in ours.metrics.items():
        close(value, theirs.metrics[key])


def of_rewards(x_PK: Tensor, **fields: Tensor) -> Ranked:
    """Completions of one token whose log-ratios are these."""
    mask_PKT = torch.ones(*x_PK.shape, 1, dtype=torch.bool)
    return Ranked(
        logps_PKT=x_PK[..., None] - 1, ref_logps_PKT=-torch.ones_like(x_PK)[..., None],
        mask_PKT=mask_PKT, valid_PK=mask_PKT[..., 0], **fields,
    )  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "reward_name"), [("pl_dpo", "plackett_luce"), ("all_pairs_dpo", "all_pairs")])
def test_policies_and_reward_models_share_the_mathematics(name: str, reward_name: str, seed: int) -> None:
    ranking = random_record(RankedScores, seed)
    batch = dataclasses.replace(of_rewards(ranking.rewards_PK), valid_PK=ranking.valid_PK)
    ours, theirs = (
        create_loss(name, beta=0.7)(batch),
        create_loss(reward_name)(dataclasses.replace(ranking, rewards_PK=0.7 * ranking.rewards_PK)),
    )
    close(ours.loss, theirs.loss)


@pytest.mark.parametrize("seed", SEEDS)
def test_all_pairs_are_the_mean_of_dpo_over_the_pairs(seed: int) -> None:
    batch = random_record(Ranked, seed)
    beta, loss_P = 0.6, create_loss("all_pairs_dpo", beta=0.6)(batch).loss
    for row, (x_K, valid_K) in enumerate(zip(beta * batch.ratio_PK, batch.valid_PK, strict=True)):
        values = [math.log1p(math.exp(float(b - a))) for a, b in itertools.combinations(x_K[valid_K], 2)]
        assert float(loss_P[row]) == pytest.approx(sum(values) / len(values), rel=1e-12)
        assert len(values) == int(pairs_P(batch.valid_PK)[row]) == int(below_PKK(batch.valid_PK)[row].sum())


# -- probabilities sum to 1 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["plackett_luce", "pl_dpo"])
def test_plackett_luce_sums_to_1_over_all_orders(name: str, seed: int) -> None:
    x_K = 2 * torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x_PK = torch.stack([x_K[list(order)] for order in itertools.permutations(range(4))])
    if name == "plackett_luce":
        out = create_loss(name)(RankedScores(rewards_PK=x_PK, valid_PK=torch.ones(24, 4, dtype=torch.bool)))
    else:
        out = create_loss(name, beta=0.5)(of_rewards(2 * x_PK))
    close((-out.loss).exp().sum(), torch.ones((), dtype=torch.float64))
    likeliest_K = x_PK[out.loss.argmin()]
    assert torch.equal(likeliest_K, likeliest_K.sort(descending=True)[0])


@pytest.mark.parametrize("seed", SEEDS)
def test_plackett_luce_of_the_best_is_a_softmax(seed: int) -> None:
    """Summed over all orders of the rest, the probability that one is first is its softmax."""
    x_K = torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for first in range(4):
        rest = [k for k in range(4) if k != first]
        x_PK = torch.stack([x_K[[first, *order]] for order in itertools.permutations(rest)])
        out = create_loss("plackett_luce")(RankedScores(rewards_PK=x_PK, valid_PK=torch.ones(6, 4, dtype=torch.bool)))
        close((-out.loss).exp().sum(), x_K.softmax(-1)[first])


@pytest.mark.parametrize("difference", [-30.0, -1.0, 0.0, 0.4, 6.0])
@pytest.mark.parametrize(
    ("logps", "strength"), [(davidson_logps, v) for v in (1e-6, 0.5, 1.0, 30.0)]
    + [(rao_kupper_logps, v) for v in (1 + 1e-6, 1.5, 2.0, 30.0)],
)  # fmt: skip
def test_win_loss_and_tie_sum_to_1(logps: Any, strength: float, difference: float) -> None:
    win, lose, tie = (x.exp() for x in logps(torch.tensor(difference, dtype=torch.float64), strength))
    close(win + lose + tie, torch.ones((), dtype=torch.float64))
    mirrored = [x.exp() for x in logps(torch.tensor(-difference, dtype=torch.float64), strength)]
    close(torch.stack([win, lose, tie]), torch.stack([mirrored[1], mirrored[0], mirrored[2]]))


def test_the_models_of_ties_are_those_of_the_papers() -> None:
    """In worths: Davidson's tie is ν sqrt(π_1 π_2), Rao and Kupper's threshold multiplies a worth by θ."""
    first, second = math.exp(0.7), math.exp(-0.5)
    difference = torch.tensor(1.2, dtype=torch.float64)
    nu, total = 0.8, first + second + 0.8 * math.sqrt(first * second)
    expected = [first / total, second / total, nu * math.sqrt(first * second) / total]
    close(torch.stack(davidson_logps(difference, nu)).exp(), torch.tensor(expected, dtype=torch.float64))
    theta = 1.7
    won, lost = first / (first + theta * second), second / (theta * first + second)
    close(
        torch.stack(rao_kupper_logps(difference, theta)).exp(),
        torch.tensor([won, lost, 1 - won - lost], dtype=torch.float64),
    )


# -- limits and identities of the reward models -----------------------------------------------------------------------


def decided(seed: int) -> Scores:
    scores = random_record(Scores, seed, rows=8)
    return dataclasses.replace(scores, margin_B=None, tie_B=torch.zeros(8, dtype=torch.bool))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "options"), [("davidson", {"nu": 1e-12}), ("rao_kupper", {"theta": 1 + 1e-12})])
def test_without_room_for_ties_they_are_bradley_terry(name: str, options: dict[str, float], seed: int) -> None:
    batch = decided(seed)
    close(create_loss(name, **options)(batch).loss, create_loss("bradley_terry")(batch).loss, 1e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_rao_kupper_of_decided_pairs_is_bradley_terry_with_a_margin(seed: int) -> None:
    batch = dataclasses.replace(decided(seed), probability_B=None)
    with_margin = dataclasses.replace(batch, margin_B=torch.full((8,), math.log(1.6), dtype=torch.float64))
    close(create_loss("rao_kupper", theta=1.6)(batch).loss, create_loss("bradley_terry")(with_margin).loss)


@pytest.mark.parametrize(("name", "options"), [("davidson", {}), ("rao_kupper", {})])
def test_ties_pull_rewards_together_and_equal_rewards_have_equal_outcomes(name: str, options: dict[str, float]) -> None:
    chosen_B = torch.tensor([2.0, -2.0, 0.0], dtype=torch.float64, requires_grad=True)
    batch = Scores(chosen_B=chosen_B, rejected_B=torch.zeros(3).double(), tie_B=torch.ones(3, dtype=torch.bool))
    out = create_loss(name, **options)(batch)
    out.loss.sum().backward()
    assert chosen_B.grad is not None
    assert chosen_B.grad[0] > 0 > chosen_B.grad[1] and abs(float(chosen_B.grad[2])) < 1e-15
    close(out.loss[2].detach(), torch.tensor(3.0, dtype=torch.float64).log())
    close(out.metrics["probs/tie"], (-out.loss).exp().detach())


def test_a_threshold_without_ties_is_refused() -> None:
    with pytest.raises(UsageError, match=r"theta.*above 1.*bradley_terry"):
        create_loss("rao_kupper", theta=1.0)(random_record(Scores))


@pytest.mark.parametrize("name", ["davidson", "rao_kupper"])
def test_models_of_ties_ask_for_ties(name: str) -> None:
    with pytest.raises(UsageError, match=r"tie_B.*bradley_terry"):
        create_loss(name)(dataclasses.replace(random_record(Scores), tie_B=None))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["bradley_terry", "log_exp", "davidson", "rao_kupper"])
def test_swapped_sides_with_the_other_probability(name: str, seed: int) -> None:
    batch = dataclasses.replace(random_record(Scores, seed), margin_B=None)
    assert batch.probability_B is not None
    swapped = dataclasses.replace(
        batch, chosen_B=batch.rejected_B, rejected_B=batch.chosen_B, probability_B=1 - batch.probability_B
    )
    close(create_loss(name)(batch).loss, create_loss(name)(swapped).loss)


@pytest.mark.parametrize("seed", SEEDS)
def test_log_exp_is_bradley_terry(seed: int) -> None:
    batch = random_record(Scores, seed)
    assert torch.equal(create_loss("log_exp")(batch).loss, create_loss("bradley_terry")(batch).loss)
    plain = dataclasses.replace(batch, probability_B=None)
    assert plain.margin_B is not None
    expected_B = (1 + (-(batch.chosen_B - batch.rejected_B - plain.margin_B)).exp()).log()
    close(create_loss("log_exp")(plain).loss, expected_B)


@pytest.mark.parametrize("name", ["bradley_terry", "davidson", "rao_kupper"])
def test_metrics_of_scored_pairs(name: str) -> None:
    chosen_B, rejected_B = torch.tensor([2.0, 0.5, 1.0]), torch.tensor([0.5, 2.0, 1.0])
    metrics = create_loss(name)(Scores(chosen_B=chosen_B, rejected_B=rejected_B, tie_B=torch.zeros(3).bool())).metrics
    assert metrics["rewards/accuracies"].tolist() == [1.0, 0.0, 0.0]
    assert metrics["rewards/margins"].tolist() == [1.5, -1.5, 0.0]
    assert torch.equal(metrics["rewards/chosen"], chosen_B) and torch.equal(metrics["rewards/rejected"], rejected_B)


SHIFTED = [
    ("bradley_terry", {}), ("log_exp", {}), ("davidson", {}), ("rao_kupper", {}),
    ("all_pairs", {}), ("plackett_luce", {}), ("plackett_luce", {"per_choice": True}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), SHIFTED)
def test_a_constant_on_all_rewards_of_a_prompt_cancels(name: str, options: dict[str, Any]) -> None:
    loss = create_loss(name, **options)
    batch = random_record(loss.family, 1)
    shift_B = torch.linspace(-3, 7, 5, dtype=torch.float64)
    if isinstance(batch, RankedScores):
        moved: Any = dataclasses.replace(batch, rewards_PK=batch.rewards_PK + shift_B[:, None])
    else:
        assert isinstance(batch, Scores)
        moved = dataclasses.replace(batch, chosen_B=batch.chosen_B + shift_B, rejected_B=batch.rejected_B + shift_B)
    close(loss(batch).loss, loss(moved).loss)


def test_centering_feels_a_constant() -> None:
    batch = random_record(Scores)
    loss = create_loss("bradley_terry", centering=0.1)
    moved = dataclasses.replace(batch, chosen_B=batch.chosen_B + 1, rejected_B=batch.rejected_B + 1)
    assert bool(((loss(batch).loss - loss(moved).loss).abs() > 1e-3).any())


# -- completions that are not there -----------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [1e9, float("inf"), float("nan")])
@pytest.mark.parametrize(("name", "options"), SOFT)
def test_who_is_not_there_is_not_seen(name: str, options: dict[str, Any], poison: float) -> None:
    loss, batch = create_loss(name, **options), random_record(Ranked)
    there_PK1 = batch.valid_PK[..., None]
    out, gradient = value_and_gradient(loss, batch)
    names = ("logps_PKT", "ref_logps_PKT", "scores_PK")
    dirty = {
        k: torch.where(there_PK1 if k != "scores_PK" else batch.valid_PK, getattr(batch, k), poison) for k in names
    }
    bad = dataclasses.replace(batch, **dirty, mask_PKT=batch.mask_PKT | ~there_PK1)
    bad_out, bad_gradient = value_and_gradient(loss, bad)
    close(out.loss, bad_out.loss)
    close(gradient, bad_gradient)
    assert bool((bad_gradient[~batch.valid_PK] == 0).all())
    for key, value in out.metrics.items():
        close(value, bad_out.metrics[key])


def value_and_gradient(loss: Any, batch: Ranked) -> Any:
    leaf = batch.logps_PKT.clone().requires_grad_()
    out = loss(dataclasses.replace(batch, logps_PKT=leaf))
    return out, torch.autograd.grad(out.loss.sum(), leaf)[0]


@pytest.mark.parametrize("poison", [1e9, float("inf"), float("nan")])
@pytest.mark.parametrize("name", RANKED_REWARDS)
def test_rewards_of_nobody_are_not_seen(name: str, poison: float) -> None:
    batch = random_record(RankedScores)
    leaf = torch.where(batch.valid_PK, batch.rewards_PK, poison).requires_grad_()
    out = create_loss(name)(dataclasses.replace(batch, rewards_PK=leaf))
    expected = create_loss(name)(batch)
    close(out.loss.detach(), expected.loss)
    out.loss.sum().backward()
    assert leaf.grad is not None and bool((leaf.grad[~batch.valid_PK] == 0).all())
    assert bool(leaf.grad.isfinite().all())
    for key, value in out.metrics.items():
        close(value, expected.metrics[key])


@pytest.mark.parametrize("name", RANKED)
def test_invalid_columns_in_another_order_and_more_of_them(name: str) -> None:
    batch = random_record(Ranked)
    valid_PK = torch.tensor([True, True, False, False]).expand(5, 4)
    batch = dataclasses.replace(batch, valid_PK=valid_PK)
    order = [0, 1, 3, 2, 2]
    fields = {k: v[:, order] for k, v in batch.tensors().items() if "K" in k.rpartition("_")[2]}
    close(create_loss(name)(batch).loss, create_loss(name)(Ranked(**fields)).loss)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize(("name", "options"), [*SOFT, *[(name, {}) for name in RANKED_REWARDS]])
def test_a_list_that_compares_nothing_has_no_loss(name: str, options: dict[str, Any], count: int) -> None:
    loss = create_loss(name, **options)
    batch: Any = random_record(loss.family)
    valid_PK = batch.valid_PK.clone()
    valid_PK[2] = torch.arange(4) < count
    field = "logps_PKT" if loss.family is Ranked else "rewards_PK"
    there = valid_PK[..., None] if loss.family is Ranked else valid_PK
    leaf = torch.where(there, getattr(batch, field), float("nan")).requires_grad_()
    out = loss(dataclasses.replace(batch, valid_PK=valid_PK, **{field: leaf}))
    assert float(out.loss[2].detach()) == 0.0
    assert bool((out.loss.detach()[[0, 1, 3, 4]] > 0).all())
    out.loss.sum().backward()
    assert leaf.grad is not None and bool((leaf.grad[2] == 0).all())
    assert all(bool(v.isfinite().all()) for v in out.metrics.values())


# -- targets and weights of the ranked losses -------------------------------------------------------------------------


def test_nca_with_cold_labels_is_nca_of_the_best() -> None:
    batch = random_record(Ranked)
    close(create_loss("nca", alpha=1e-6)(batch).loss, create_loss("nca")(batch).loss)


def test_nca_with_hot_labels_only_pulls_to_the_reference() -> None:
    """Even labels: every completion is equally data and noise, and the minimum is at log-ratio 0."""
    x_PK = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    scores_PK = torch.tensor([[3.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
    create_loss("nca", alpha=1e12)(of_rewards(x_PK, scores_PK=scores_PK)).loss.sum().backward()
    assert x_PK.grad is not None
    assert float(x_PK.grad.abs().max()) < 1e-12


def test_nca_is_least_where_the_ratios_are_the_labels_over_their_mean() -> None:
    """The optimum of the classifiers: σ(x_i) = p_i / (p_i + 1/K), so x_i = log (K p_i)."""
    scores_PK = torch.tensor([[1.0, 0.4, 0.0]], dtype=torch.float64)
    target_PK = (scores_PK / 0.5).softmax(-1)
    x_PK = (3 * target_PK).log().requires_grad_()
    create_loss("nca", beta=1.0, alpha=0.5)(of_rewards(x_PK, scores_PK=scores_PK)).loss.sum().backward()
    assert x_PK.grad is not None
    assert float(x_PK.grad.abs().max()) < 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_exo_is_0_where_the_policy_has_the_preferred_distribution(seed: int) -> None:
    """x = scores / β_r plus any constant: the reverse KL and its gradient are 0; elsewhere it is above."""
    batch = random_record(Ranked, seed)
    assert batch.scores_PK is not None
    constant_P1 = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    x_PK = (batch.scores_PK / (0.5 * 0.3) + constant_P1).requires_grad_()
    at = dataclasses.replace(of_rewards(x_PK, scores_PK=batch.scores_PK), valid_PK=batch.valid_PK)
    loss = create_loss("exo", beta=0.3, reward_beta=0.5)
    loss_P = loss(at).loss
    loss_P.sum().backward()
    assert x_PK.grad is not None
    assert float(loss_P.detach().abs().max()) < 1e-12 and float(x_PK.grad.abs().max()) < 1e-12
    assert bool((loss(batch).loss > 0).all())


@pytest.mark.parametrize("count", [2, 3, 5])
def test_exo_without_scores_is_0_where_the_rest_share_the_smoothing(count: int) -> None:
    """The best has all but ε, and ε is divided among the others; places where nobody is have nothing of it."""
    shares = torch.tensor([0.7] + [0.3 / (count - 1)] * (count - 1) + [1.0] * 2, dtype=torch.float64)
    there_PK = (torch.arange(count + 2) < count)[None]
    at = dataclasses.replace(of_rewards(shares.log()[None]), valid_PK=there_PK)
    close(create_loss("exo", beta=1.0, label_smoothing=0.3)(at).loss, torch.zeros(1, dtype=torch.float64))


def test_exo_refuses_what_has_no_effect_or_no_value() -> None:
    batch = random_record(Ranked)
    for smoothing in (0.0, 1.0):
        with pytest.raises(UsageError, match=r"label_smoothing.*above 0 and below 1"):
            create_loss("exo", label_smoothing=smoothing)(batch)
    with pytest.raises(UsageError, match=r"label_smoothing=0\.1 has no effect with reward_beta"):
        create_loss("exo", label_smoothing=0.1, reward_beta=1.0)(batch)


@pytest.mark.parametrize(("name", "options"), [("lipo", {}), ("nca", {"alpha": 1.0}), ("exo", {"reward_beta": 1.0})])
def test_scores_are_asked_for_in_words(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"{name}.*Ranked\.scores_PK"):
        create_loss(name, **options)(dataclasses.replace(random_record(Ranked), scores_PK=None))


def dcg(scores: list[float], order: list[int]) -> float:
    return sum((2 ** scores[k] - 1) / math.log(1 + rank) for rank, k in enumerate(order, start=1))


@pytest.mark.parametrize("seed", SEEDS)
def test_lambda_weights_are_changes_of_dcg(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(4, generator=generator, dtype=torch.float64).sort(descending=True)[0]
    x_K = torch.randn(4, generator=generator, dtype=torch.float64)
    order = x_K.argsort(descending=True).tolist()
    weight_KK = lambda_weights(scores[None], x_K[None], torch.ones(1, 4, dtype=torch.bool))[0]
    for i, j in itertools.product(range(4), repeat=2):
        changed = [{i: j, j: i}.get(k, k) for k in order]
        expected = abs(dcg(scores.tolist(), order) - dcg(scores.tolist(), changed)) if i < j else 0.0
        assert float(weight_KK[i, j]) == pytest.approx(expected, abs=1e-12)


def test_lambda_weights_start_in_the_order_of_the_list_and_skip_equal_scores() -> None:
    scores_PK = torch.tensor([[1.0, 0.5, 0.5, 9.0]], dtype=torch.float64)
    valid_PK = torch.tensor([[True, True, True, False]])
    weight_KK = lambda_weights(scores_PK, torch.zeros(1, 4, dtype=torch.float64), valid_PK)[0]
    assert float(weight_KK[1, 2]) == 0 and bool((weight_KK[3] == 0).all()) and bool((weight_KK[:, 3] == 0).all())
    assert float(weight_KK[0, 1]) == pytest.approx((2 - 2**0.5) * (1 / math.log(2) - 1 / math.log(3)))
    assert float(weight_KK[0, 2]) == pytest.approx((2 - 2**0.5) * (1 / math.log(2) - 1 / math.log(4)))


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 57.0), (torch.float64, 504.0)])
def test_scores_are_told_apart_up_to_where_their_gains_would_overflow(dtype: torch.dtype, largest: float) -> None:
    """The card says where."""
    x_PK, there_PK = torch.tensor([[0.0, 1.0]], dtype=dtype), torch.ones(1, 2) > 0
    for scores, told in (((largest, largest - 3), True), ((largest + 3, largest + 2), False)):
        weight_PKK = lambda_weights(torch.tensor([scores], dtype=dtype), x_PK, there_PK)
        assert bool(weight_PKK.isfinite().all()) and bool(weight_PKK.any()) is told


def test_lambda_weights_carry_no_gradient() -> None:
    """The gradient of the loss is that of DPO on the pairs with the weights as constants."""
    batch = random_record(Ranked, 1)
    assert batch.scores_PK is not None
    leaf = batch.ratio_PK.clone().requires_grad_()
    weight_PKK = lambda_weights(batch.scores_PK, leaf, batch.valid_PK)
    assert not weight_PKK.requires_grad
    by_hand = (weight_PKK * (1 + (leaf[:, None, :] - leaf[:, :, None]).exp()).log()).sum()
    at = dataclasses.replace(of_rewards(leaf, scores_PK=batch.scores_PK), valid_PK=batch.valid_PK)
    loss = create_loss("lipo", beta=1.0)(at).loss.sum()
    close(loss, by_hand)
    close(torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(by_hand, leaf)[0])


@pytest.mark.parametrize(
    ("name", "start"), [("pl_dpo", math.log(24)), ("all_pairs_dpo", math.log(2)), ("nca", 2 * math.log(2))]
)
def test_where_policy_is_reference_the_loss_is_known(name: str, start: float) -> None:
    out = create_loss(name)(of_rewards(torch.zeros(2, 4, dtype=torch.float64)))
    close(out.loss, torch.full((2,), start, dtype=torch.float64))
    assert float(out.metrics["rewards/margins"].abs().max()) == 0


def test_pooled_pairs_are_a_count_and_a_weight() -> None:
    batch = random_record(RankedScores)
    loss_P, weight_P = create_loss("all_pairs")(batch).loss, pairs_P(batch.valid_PK)
    values = []
    for r_K, valid_K in zip(batch.rewards_PK, batch.valid_PK, strict=True):
        values += [math.log1p(math.exp(float(b - a))) for a, b in itertools.combinations(r_K[valid_K], 2)]
    assert float(Count("weight").mean(loss_P, weight_B=weight_P)) == pytest.approx(sum(values) / len(values))


@pytest.mark.parametrize("seed", SEEDS)
def test_per_choice_divides_by_the_choices(seed: int) -> None:
    batch = random_record(RankedScores, seed)
    plain, divided = (create_loss("plackett_luce", per_choice=p)(batch).loss for p in (False, True))
    close(divided * (batch.valid_PK.sum(-1) - 1), plain)


# -- ratings and steps ------------------------------------------------------------------------------------------------


def test_regression_is_least_at_the_target_and_huber_bends_outside() -> None:
    error_B = torch.linspace(-3, 3, 13, dtype=torch.float64)
    batch = Ratings(rewards_B=2 + error_B, targets_B=torch.full((13,), 2.0, dtype=torch.float64))
    squared_B, huber_B = (create_loss("reward_regression", huber=h)(batch).loss for h in (None, 1.0))
    close(squared_B, error_B**2)
    inside_B = error_B.abs() <= 1
    assert torch.equal(huber_B[inside_B], squared_B[inside_B])
    close(huber_B[~inside_B].diff()[[0, 1, 2]], torch.full((3,), -1.0, dtype=torch.float64))  # slope 2 δ, steps of ½


def test_the_number_that_people_gave_is_a_constant() -> None:
    batch = random_record(Ratings)
    given_B = batch.targets_B.clone().requires_grad_()
    assert not create_loss("reward_regression")(dataclasses.replace(batch, targets_B=given_B)).loss.requires_grad


@pytest.mark.parametrize("seed", SEEDS)
def test_huber_is_pytorch_s_doubled(seed: int) -> None:
    batch = random_record(Ratings, seed, rows=9)
    expected = 2 * torch.nn.functional.huber_loss(batch.rewards_B, batch.targets_B, reduction="none", delta=0.4)
    close(create_loss("reward_regression", huber=0.4)(batch).loss, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_process_reward_is_the_cross_entropy_of_two_classes(seed: int) -> None:
    """The two-class form: its logits may be any two numbers whose difference is ours."""
    batch = random_record(StepScores, seed)
    two_BT2 = torch.stack([torch.full_like(batch.scores_BT, 0.8), 0.8 + batch.scores_BT], -1)
    targets_BT2 = torch.stack([1 - batch.labels_BT, batch.labels_BT], -1)
    expected_BT = -(targets_BT2 * two_BT2.log_softmax(-1)).sum(-1)
    loss_BT = create_loss("process_reward")(batch).loss
    close(loss_BT, torch.where(batch.mask_BT, expected_BT, 0.0))
    close(Count("row").mean(loss_BT, batch.mask_BT), masked_mean(expected_BT, batch.mask_BT).mean())


def test_process_reward_is_least_at_the_log_odds_of_the_label() -> None:
    labels_BT = torch.tensor([[0.2, 0.5, 0.9]], dtype=torch.float64)
    scores_BT = labels_BT.logit().requires_grad_()
    mask_BT = torch.ones(1, 3, dtype=torch.bool)
    out = create_loss("process_reward")(StepScores(scores_BT=scores_BT, labels_BT=labels_BT, mask_BT=mask_BT))
    out.loss.sum().backward()
    assert scores_BT.grad is not None
    assert float(scores_BT.grad.abs().max()) < 1e-15
    close(out.metrics["probs"], labels_BT)
    labels_BT = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    steps = StepScores(
        scores_BT=torch.tensor([[1.0, 1.0, -1.0, -1.0]]), labels_BT=labels_BT, mask_BT=torch.ones(1, 4).bool()
    )
    assert create_loss("process_reward")(steps).metrics["accuracies"].tolist() == [[1.0, 0.0, 0.0, 1.0]]
