"""Relations of the likelihood losses, the distribution losses and the terms of ILQL."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prefzoo.losses.base import create_loss
from prefzoo.losses.distribution import entropy, log_sum_squares, token_logps
from prefzoo.losses.kl import exact
from prefzoo.parts.count import Count
from prefzoo.records import Distribution, Heads, Likelihood, Record
from prefzoo.registry import UsageError
from prefzoo.testing import check_loss, random_record

R = TypeVar("R", bound=Record)
SEEDS = range(3)
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("weighted_sft", {"temperature": 0.3, "cap": 2.0}),
    ("filtered_sft", {"threshold": 0.5}),
    ("awr", {"beta": 0.1}),
    ("hpo", {"beta": 5.0, "cap": 1.0}),
    ("gkd", {"beta": 0.0}),
    ("gkd", {"beta": 1.0}),
    ("gkd", {"beta": 0.1, "temperature": 0.7}),
    ("forward_kl", {"temperature": 2.0}),
    ("reverse_kl", {"temperature": 0.5}),
    ("ilql_q", {"gamma": 1.0}),
    ("ilql_v", {"expectile": 0.5}),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_contract_of_variants(name: str, options: dict[str, Any]) -> None:
    check_loss(name, **options)


def loss_of(name: str, batch: Record, **options: Any) -> Tensor:
    return create_loss(name, **options)(batch).loss


def gradient_of(name: str, batch: Record, field: str, **options: Any) -> Tensor:
    leaf = getattr(batch, field).detach().clone().requires_grad_()
    values = loss_of(name, replaced(batch, **{field: leaf}), **options)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return gradient


def replaced(batch: R, **fields: Tensor) -> R:
    return type(batch)(**{**batch.tensors(), **fields})


# -- likelihood -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_without_contrast_in_the_weights_all_are_sft(seed: int) -> None:
    """Scores and advantages of 0, a threshold below all, a temperature without end."""
    batch = random_record(Likelihood, seed)
    assert batch.scores_B is not None and batch.advantages_BT is not None
    plain_BT = torch.where(batch.mask_BT, loss_of("sft", batch), 0.0)
    flat = replaced(batch, scores_B=0 * batch.scores_B, advantages_BT=0 * batch.advantages_BT)
    for name in ("weighted_sft", "filtered_sft", "awr", "hpo"):
        torch.testing.assert_close(loss_of(name, flat), plain_BT)
    for name, option in (("weighted_sft", "temperature"), ("awr", "beta"), ("hpo", "beta")):
        limit_BT = loss_of(name, batch, **{option: 1e9})
        torch.testing.assert_close(limit_BT, plain_BT, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(loss_of("filtered_sft", batch, threshold=-1e9), plain_BT)
    assert not loss_of("filtered_sft", batch, threshold=1e9).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_gradient_of_dft_is_minus_the_gradient_of_the_probability(seed: int) -> None:
    batch = random_record(Likelihood, seed)
    found_BT = gradient_of("dft", batch, "logps_BT")
    torch.testing.assert_close(found_BT, torch.where(batch.mask_BT, -batch.logps_BT.exp(), 0.0))
    found_BT = loss_of("dft", batch)
    torch.testing.assert_close(found_BT, torch.where(batch.mask_BT, -batch.logps_BT.exp() * batch.logps_BT, 0.0))
    assert float(found_BT.max()) <= math.exp(-1)


@pytest.mark.parametrize("seed", SEEDS)
def test_weights_are_the_exponential_up_to_the_cap(seed: int) -> None:
    batch = random_record(Likelihood, seed)
    assert batch.scores_B is not None and batch.advantages_BT is not None
    weight_BT = (batch.advantages_BT / 0.7).exp().clamp(max=1.5)
    expected_BT = torch.where(batch.mask_BT, weight_BT, 0.0)
    for name in ("awr", "hpo"):
        out = create_loss(name, beta=0.7, cap=1.5)(batch)
        torch.testing.assert_close(out.metrics["weight"], expected_BT)
        torch.testing.assert_close(out.loss, torch.where(batch.mask_BT, -weight_BT * batch.logps_BT, 0.0))
    per_row = replaced(batch, advantages_BT=batch.scores_B[:, None].expand_as(batch.logps_BT))
    torch.testing.assert_close(
        loss_of("weighted_sft", batch, temperature=0.7, cap=1.5), loss_of("awr", per_row, beta=0.7, cap=1.5)
    )


@pytest.mark.parametrize("name", ["weighted_sft", "filtered_sft", "awr", "hpo"])
def test_missing_scores_weigh_nothing(name: str) -> None:
    batch = random_record(Likelihood, 1)
    assert batch.scores_B is not None and batch.advantages_BT is not None
    hole_B = torch.arange(5) == 2
    missing = replaced(
        batch,
        scores_B=batch.scores_B.masked_fill(hole_B, math.nan),
        advantages_BT=batch.advantages_BT.masked_fill(hole_B[:, None], math.nan),
    )
    found_BT, gradient_BT = loss_of(name, missing), gradient_of(name, missing, "logps_BT")
    assert not found_BT[2].any() and not gradient_BT[2].any()
    torch.testing.assert_close(found_BT[~hole_B], loss_of(name, batch)[~hole_B])


def test_weights_say_what_is_missing() -> None:
    batch = random_record(Likelihood)
    bare = Likelihood(logps_BT=batch.logps_BT, mask_BT=batch.mask_BT)
    for name, field in (("weighted_sft", "scores_B"), ("filtered_sft", "scores_B"), ("awr", "advantages_BT")):
        with pytest.raises(UsageError, match=f"'{name}' needs Likelihood.{field}"):
            create_loss(name)(bare)
        assert create_loss(name).extras == (field,)


def test_count_of_filtered_rows() -> None:
    """The rows left out stay in the denominator of ``token``; with weights and their count only the kept divide."""
    batch = random_record(Likelihood, 2)
    scores_B = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])
    loss_BT = loss_of("filtered_sft", replaced(batch, scores_B=scores_B), threshold=0.5)
    kept, mask_BT = scores_B > 0, batch.mask_BT
    share = mask_BT[kept].sum() / mask_BT.sum()
    alone = Count("token").mean(-batch.logps_BT[kept], mask_BT[kept])
    torch.testing.assert_close(Count("token").mean(loss_BT, mask_BT), alone * share)
    by_weight = Count("weight").mean(-batch.logps_BT, mask_BT, scores_B)
    torch.testing.assert_close(by_weight, Count("row_sum").mean(-batch.logps_BT[kept], mask_BT[kept]))


def test_awr_of_exact_advantages_finds_the_policy_it_is_derived_from() -> None:
    """Over all actions of the data's policy μ the optimum of E[exp(A / β) log π] is μ exp(A / β) / Z."""
    generator = torch.Generator().manual_seed(0)
    logits, advantages = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    data = logits.softmax(0)
    target = (data.log() + advantages / 0.5).softmax(0)
    policy = target.log().clone().requires_grad_()
    for name in ("awr", "hpo"):
        batch = Likelihood(
            logps_BT=policy.log_softmax(0)[:, None],
            mask_BT=torch.ones(6, 1) > 0,
            advantages_BT=advantages[:, None],
        )
        loss = (data * loss_of(name, batch, beta=0.5, cap=1e9)[:, 0]).sum()
        (gradient,) = torch.autograd.grad(loss, policy)
        assert float(gradient.abs().max()) < 1e-12


# -- distribution -----------------------------------------------------------------------------------------------------

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("seed", SEEDS)
def test_gkd_is_zero_only_at_the_teacher_and_positive_elsewhere(seed: int, beta: float) -> None:
    batch = random_record(Distribution, seed)
    assert bool((loss_of("gkd", batch, beta=beta)[batch.mask_BT] > 1e-4).all())
    same = replaced(batch, teacher_logits_BTV=batch.logits_BTV + 3.0)  # logits do not know a shift
    assert float(loss_of("gkd", same, beta=beta).abs().max()) < 1e-14
    assert float(gradient_of("gkd", same, "logits_BTV", beta=beta).abs().max()) < 1e-14


@pytest.mark.parametrize("seed", SEEDS)
def test_gkd_exchanged_has_the_other_beta(seed: int) -> None:
    batch = random_record(Distribution, seed)
    other = replaced(batch, logits_BTV=batch.teacher_logits_BTV, teacher_logits_BTV=batch.logits_BTV)
    for beta in BETAS:
        torch.testing.assert_close(loss_of("gkd", batch, beta=beta), loss_of("gkd", other, beta=1 - beta))
    assert float(loss_of("gkd", batch).max()) < math.log(2)


@pytest.mark.parametrize("seed", SEEDS)
def test_ends_of_gkd_are_the_two_kl(seed: int) -> None:
    """Exactly at 0 and 1; and near them, divided by beta or by 1 - beta."""
    batch = random_record(Distribution, seed)
    for end, name in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        kl_BT = loss_of(name, batch)
        assert torch.equal(loss_of("gkd", batch, beta=end), kl_BT)
        near_BT = loss_of("gkd", batch, beta=abs(end - 1e-6)) / 1e-6
        torch.testing.assert_close(near_BT, kl_BT, rtol=1e-4, atol=1e-6)
        near_BTV = gradient_of("gkd", batch, "logits_BTV", beta=abs(end - 1e-6)) / 1e-6
        torch.testing.assert_close(near_BTV, gradient_of(name, batch, "logits_BTV"), rtol=1e-3, atol=1e-5)
    out = create_loss("gkd")(batch)
    torch.testing.assert_close(out.metrics["kl/forward"], loss_of("forward_kl", batch))
    torch.testing.assert_close(out.metrics["kl/reverse"], loss_of("reverse_kl", batch))


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_gkd_is_the_textbook_divergence(beta: float) -> None:
    batch = random_record(Distribution, 4)
    p, q = batch.teacher_logits_BTV.softmax(-1), batch.logits_BTV.softmax(-1)
    m = beta * p + (1 - beta) * q
    expected_BT = (beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()).sum(-1)
    torch.testing.assert_close(loss_of("gkd", batch, beta=beta)[batch.mask_BT], expected_BT[batch.mask_BT])


@pytest.mark.parametrize("seed", SEEDS)
def test_forward_kl_is_cross_entropy_less_entropy(seed: int) -> None:
    batch = random_record(Distribution, seed)
    for heat in (1.0, 2.0):
        teacher_BTV = (batch.teacher_logits_BTV / heat).softmax(-1)
        cross_BT = -(teacher_BTV * (batch.logits_BTV / heat).log_softmax(-1)).sum(-1)
        expected_BT = cross_BT - entropy(batch.teacher_logits_BTV, temperature=heat)
        found_BT = loss_of("forward_kl", batch, temperature=heat)
        torch.testing.assert_close(found_BT[batch.mask_BT], expected_BT[batch.mask_BT])
        torch.testing.assert_close(
            found_BT[batch.mask_BT],
            exact(batch.logits_BTV, batch.teacher_logits_BTV, direction="forward", temperature=heat)[batch.mask_BT],
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["gkd", "forward_kl", "reverse_kl"])
def test_distribution_losses_are_finite_at_logits_of_5000(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BTV, teacher_BTV = (5000.0 * (torch.randint(0, 3, (2, 4, 5, 6), generator=generator) - 1)).to(dtype)
    teacher_BTV[0, 0, :3] = -torch.inf  # tokens that cannot be chosen
    logits_BTV[0, 0, :2] = -torch.inf
    batch = Distribution(logits_BTV=logits_BTV, teacher_logits_BTV=teacher_BTV, mask_BT=torch.ones(4, 5) > 0)
    found_BT, gradient_BTV = loss_of(name, batch), gradient_of(name, batch, "logits_BTV")
    assert bool(found_BT.isfinite().all()) and bool(gradient_BTV.isfinite().all())
    assert found_BT.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("beta", BETAS)
def test_low_precision_logits_lose_no_more_than_their_own_rounding(beta: float, dtype: torch.dtype) -> None:
    batch = random_record(Distribution, 3)
    low = replaced(batch, logits_BTV=batch.logits_BTV.to(dtype), teacher_logits_BTV=batch.teacher_logits_BTV.to(dtype))
    high = replaced(low, **{k: v.double() for k, v in low.tensors().items() if v.is_floating_point()})
    found, expected = loss_of("gkd", low, beta=beta), loss_of("gkd", high, beta=beta)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_functions_of_logits_agree_with_each_other() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = torch.arange(5)
    every = torch.stack([token_logps(logits, torch.full((5,), v), temperature=0.7) for v in range(7)], -1)
    torch.testing.assert_close(every.exp().sum(-1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(entropy(logits, temperature=0.7), -(every.exp() * every).sum(-1))
    torch.testing.assert_close(log_sum_squares(logits, temperature=0.7), every.exp().square().sum(-1).log())
    torch.testing.assert_close(token_logps(logits, tokens), -F.cross_entropy(logits, tokens, reduction="none"))
    uniform = torch.zeros(1, 7)
    torch.testing.assert_close(exact(logits, uniform.expand(5, 7).double()), math.log(7) - entropy(logits))
    for function in (entropy, log_sum_squares, lambda x: token_logps(x, tokens.expand(x.shape[:-1]))):
        torch.testing.assert_close(function(logits.expand(2, 3, 5, 7)), function(logits).expand(2, 3, 5))


def test_a_forbidden_token_beside_an_enormous_logit_is_finite() -> None:
    """The difference of the two is beyond float32."""
    logits = torch.tensor([[1e38, -torch.inf, 0.0]], requires_grad=True)
    for value in (entropy(logits), exact(logits, logits), log_sum_squares(logits)):
        assert value.tolist() == [0.0]
        assert bool(torch.autograd.grad(value.sum(), logits)[0].isfinite().all())


# -- offline Q-learning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_expectile_of_a_half_is_half_the_squared_error(seed: int) -> None:
    batch = random_record(Heads, seed)
    half_BT = 0.5 * (batch.target_q_BT - batch.v_BT).square()
    found_BT = loss_of("ilql_v", batch, expectile=0.5)
    torch.testing.assert_close(found_BT[batch.mask_BT], half_BT[batch.mask_BT])


@pytest.mark.parametrize("expectile", [0.5, 0.7, 0.95])
def test_value_of_least_loss_is_the_expectile(expectile: float) -> None:
    """At it, τ E[(Q - V)+] = (1 - τ) E[(V - Q)+]; it rises from the mean to the maximum with τ."""
    q = torch.tensor([-1.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    v = torch.zeros((), dtype=torch.float64)
    for _ in range(200):  # fixed point of V = Σ w Q / Σ w
        weight = (expectile - (q < v).double()).abs()
        v = (weight * q).sum() / weight.sum()
    zero_BT, one_BT = torch.zeros(1, 4, dtype=torch.float64), torch.ones(1, 4) > 0
    batch = Heads(
        q1_BT=zero_BT, q2_BT=zero_BT, v_BT=v.expand(1, 4), next_v_BT=zero_BT, target_q_BT=q[None], rewards_BT=zero_BT,
        mask_BT=one_BT,
    )  # fmt: skip
    assert abs(float(gradient_of("ilql_v", batch, "v_BT", expectile=expectile).sum())) < 1e-12
    assert float(q.mean()) - 1e-12 <= float(v) < float(q.max())


def test_gradient_of_ilql_q_is_zero_at_the_fixed_point_of_bellman() -> None:
    """A tree of two tokens with three choices each; V is the mean over choices, so Q = r + γ V' has one solution."""
    generator = torch.Generator().manual_seed(0)
    first_A, second_AA = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((3,), (3, 3)))
    gamma = 0.9
    q2_AA = second_AA  # after the second token it ends
    q1_A = first_A + gamma * q2_AA.mean(-1)
    rows = [(a, b) for a in range(3) for b in range(3)]
    q_BT = torch.stack([torch.stack([q1_A[a], q2_AA[a, b]]) for a, b in rows])
    rewards_BT = torch.stack([torch.stack([first_A[a], second_AA[a, b]]) for a, b in rows])
    zero = q_BT.new_zeros(())
    next_BT = torch.stack([torch.stack([q2_AA[a].mean(), zero]) for a, _ in rows])
    batch = Heads(
        q1_BT=q_BT, q2_BT=q_BT, v_BT=q_BT, next_v_BT=next_BT, target_q_BT=q_BT, rewards_BT=rewards_BT,
        mask_BT=torch.ones(9, 2) > 0,
    )  # fmt: skip
    for field in ("q1_BT", "q2_BT"):
        assert float(gradient_of("ilql_q", batch, field, gamma=gamma).abs().max()) < 1e-12
        assert float(gradient_of("ilql_q", batch, field, gamma=0.5).abs().max()) > 0.1
    assert not create_loss("ilql_q", gamma=gamma)(batch).metrics["td_error"].abs().gt(1e-12).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_ilql_q_is_the_squared_errors_of_both(seed: int) -> None:
    batch = random_record(Heads, seed)
    target_BT = batch.rewards_BT + 0.5 * batch.next_v_BT
    expected_BT = (target_BT - batch.q1_BT).square() + (target_BT - batch.q2_BT).square()
    torch.testing.assert_close(loss_of("ilql_q", batch, gamma=0.5)[batch.mask_BT], expected_BT[batch.mask_BT])
    for field in ("next_v_BT", "rewards_BT"):
        leaf_BT = getattr(batch, field).clone().requires_grad_()
        assert not loss_of("ilql_q", replaced(batch, **{field: leaf_BT})).requires_grad


def test_ilql_q_logs_the_mean_of_both() -> None:
    batch = random_record(Heads)
    opposite = replaced(batch, q2_BT=-batch.q1_BT)
    assert not create_loss("ilql_q")(opposite).metrics["q"].any()


@pytest.mark.parametrize("seed", SEEDS)
def test_ilql_cql_is_the_cross_entropy_of_both(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q1_BTV, q2_BTV = torch.randn(2, 5, 4, 6, generator=generator, dtype=torch.float64)
    tokens_BT = torch.randint(0, 6, (5, 4), generator=generator)
    fields = {
        f"{name}_BT": q.gather(-1, tokens_BT[..., None])[..., 0] for name, q in (("q1", q1_BTV), ("q2", q2_BTV))
    } | {f"{name}_lse_BT": q.logsumexp(-1) for name, q in (("q1", q1_BTV), ("q2", q2_BTV))}
    batch = replaced(random_record(Heads, seed), **fields)
    one_BT, two_BT = (
        F.cross_entropy(q.flatten(0, 1), tokens_BT.flatten(), reduction="none").view(5, 4) for q in (q1_BTV, q2_BTV)
    )
    found_BT = loss_of("ilql_cql", batch)
    torch.testing.assert_close(found_BT, torch.where(batch.mask_BT, one_BT + two_BT, 0.0))
    assert bool((found_BT >= 0).all())


def test_ilql_cql_says_what_is_missing() -> None:
    fields = random_record(Heads).tensors()
    del fields["q2_lse_BT"]
    with pytest.raises(UsageError, match=r"needs Heads\.q2_lse_BT"):
        create_loss("ilql_cql")(Heads(**fields))
