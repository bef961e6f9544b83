"""Theorems on credit: which objective's gradient a policy gradient follows, given who gets which advantage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from prefzoo.losses import advantages, create_loss
from prefzoo.losses.kl import ValueEstimatorName
from prefzoo.records import Values, masked_sum
from prefzoo.theory.base import Finding, theorem
from prefzoo.theory.divergences import token_kl, visited
from prefzoo.theory.expectations import (
    EXACT,
    Draws,
    alike,
    bias,
    difference,
    draws,
    expected_loss,
    kl,
    moved,
    objective_gradient,
    record_of,
    some_rewards,
)
from prefzoo.theory.policies import EnumerablePolicy, Tabular, TinyTransformer


def policies() -> tuple[EnumerablePolicy, ...]:
    """A table and a transformer; both give 15 responses of 1 to 3 tokens."""
    return Tabular(vocabulary=3, length=3, seed=1), TinyTransformer(vocabulary=3, length=3, seed=1)


def ascent(policy: EnumerablePolicy, drawn: Draws, credit: Tensor, unit: str = "row_sum") -> Tensor:
    """The mean policy gradient with these advantages, per row or per token, at ratio 1."""
    record = record_of(policy, drawn.index_B, credit)
    return -policy.gradient(expected_loss(create_loss("clipped_surrogate"), record, drawn, unit))


GroupCredit = Callable[[Tensor, Tensor], Tensor]
Ascent = Callable[[EnumerablePolicy, Tensor], Tensor]


def group_ascent(
    policy: EnumerablePolicy, rewards_R: Tensor, credit: GroupCredit, size: int, unit: str = "row_sum"
) -> Tensor:
    """The mean policy gradient over all groups of ``size`` responses, the credit being a function of a group."""
    drawn = draws(policy, size)
    return ascent(policy, drawn, credit(rewards_R[drawn.index_B], drawn.batch_B), unit)


def over_groups(credit: GroupCredit, size: int) -> Ascent:
    """``group_ascent`` as a function of policy and rewards."""
    return lambda policy, rewards_R: group_ascent(policy, rewards_R, credit, size)


def batch_ascent(policy: EnumerablePolicy, credit: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """As ``group_ascent``; the credit is called with the rows of one batch after another."""
    drawn = draws(policy, size)
    return ascent(policy, drawn, torch.cat([credit(drawn.index_B[rows]) for rows in drawn.batches()]))


def worst_difference(found: Ascent, factor: float = 1.0) -> float:
    """The largest difference from ``factor`` times the exact gradient, over the policies."""
    pairs = [(p, some_rewards(p)) for p in policies()]
    return max(difference(found(p, r), factor * objective_gradient(p, r)) for p, r in pairs)


def no_signal(entry: str, credit: GroupCredit) -> Iterator[Finding]:
    """What every comparison within a group gives where there is nothing to compare."""
    some, three = torch.tensor([0.3, -1.7, 2.0]).double(), torch.full((3,), 0.1).double()
    alone = credit(some, torch.arange(3)).abs().max().item()
    yield Finding(entry, "limit", "a group of one: the advantage is 0", alone, 0.0)
    equal = credit(three, torch.zeros(3).long()).abs().max().item()
    yield Finding(entry, "limit", "all rewards of a group equal: the advantages are 0", equal, 0.0)


@theorem("leave_one_out")
def leave_one_out(entry: str) -> Iterator[Finding]:
    """The mean over all groups against the gradient of the mean reward."""
    for size in (2, 3):
        measured = worst_difference(over_groups(advantages.leave_one_out, size))
        yield Finding(entry, "expectation", f"G = {size}: the exact gradient of the mean reward", measured, EXACT)
    yield from no_signal(entry, advantages.leave_one_out)


@theorem("group_relative")
def group_relative(entry: str) -> Iterator[Finding]:
    """The mean over all groups, with and without the standard deviation, and with the counts of GRPO and DAPO."""

    def plain(rewards_B: Tensor, group_B: Tensor) -> Tensor:
        return advantages.group_relative(rewards_B, group_B, scale="none")

    def scaled(rewards_B: Tensor, group_B: Tensor) -> Tensor:
        return advantages.group_relative(rewards_B, group_B, eps=1e-13)

    for size in (2, 3):
        measured = worst_difference(over_groups(plain, size), (size - 1) / size)
        claim = f"scale='none', G = {size}: (G - 1)/G times the exact gradient of the mean reward"
        yield Finding(entry, "expectation", claim, measured, EXACT)

    policy = policies()[0]
    rewards_R = some_rewards(policy)
    exact = objective_gradient(policy, rewards_R)
    wins_RR = (rewards_R[:, None] - rewards_R).sign()
    probs_R = policy.log_probs().exp()
    wins = policy.gradient((probs_R[:, None] * probs_R.detach() * wins_RR).sum())
    claim = "G = 2: not of the mean reward but, over √2, of P(win) - P(loss) against the policy as it now is"
    found = group_ascent(policy, rewards_R, scaled, 2)
    yield Finding(entry, "gradient", claim, difference(found, wins / math.sqrt(2)), 1e-8)
    found = group_ascent(policy, rewards_R, scaled, 3)
    yield bias(entry, "G = 3, against the mean reward, scaled to the size of its gradient", alike(found, exact), exact)
    claim = "scale='batch', a batch of one group: as scale='group'"
    batch, group = (advantages.group_relative(rewards_R, torch.zeros(15).long(), scale=s) for s in ("batch", "group"))
    yield Finding(entry, "identity", claim, (batch - group).abs().max().item(), EXACT)

    right_R = (rewards_R > 0.8).double()
    p = (probs_R * right_R).sum().item()
    found = group_ascent(policy, right_R, scaled, 3)
    weight = binary_weight(p, 3)
    claim = "rewards 0 and 1, G = 3: the exact gradient of the success rate p, times a weight that depends on p alone"
    yield Finding(entry, "gradient", claim, difference(found, weight * objective_gradient(policy, right_R)), 1e-8)
    claim = "rewards 0 and 1, G = 3: the weight is the same for every p, 2/√3; relative difference at p = 0.02"
    measured = abs(measured_weight(0.02, 3) * math.sqrt(3) / 2 - 1)
    yield Finding(entry, "identity", claim, measured, 1e-8)
    claim = "rewards 0 and 1, G = 8: how many times more a prompt with p = 0.02 weighs than one with p = 0.5"
    yield Finding(entry, "bias", claim, measured_weight(0.02, 8) / measured_weight(0.5, 8), None)
    claim = "rewards 0 and 1, G = 256, p = 0.3: the weight is 1/√(p(1 - p)), relative difference"
    measured = abs(measured_weight(0.3, 256) * math.sqrt(0.3 * 0.7) - 1)
    yield Finding(entry, "limit", claim, measured, 0.01)

    length_R = policy.mask_RT.sum(-1)
    mean = (probs_R * rewards_R).sum().item()
    shorter = objective_gradient(policy, (rewards_R - mean) / length_R)
    found = group_ascent(policy, rewards_R, plain, 2, "row")
    claim = "scale='none', count 'row' (GRPO's), G = 2: half the gradient of the mean of (R - its mean) / length"
    yield Finding(entry, "gradient", claim, difference(found, shorter / 2), EXACT)
    each = (probs_R * length_R).sum().item()
    yield bias(entry, "scale='none', count 'row', against the mean reward per token", 2 * each * found, exact)
    found = group_ascent(policy, rewards_R, plain, 2, "token")
    claim = "scale='none', count 'token' (DAPO's), G = 2, against the mean reward per token"
    yield bias(entry, claim, 2 * each * found, exact)
    yield from no_signal(entry, advantages.group_relative)


def binary_weight(p: float, size: int) -> float:
    """What GRPO makes of the gradient of a success rate p, from the advantages' formula."""

    def advantage(right: bool, wins: int) -> float:
        mean = wins / size
        deviation = math.sqrt((wins * (1 - mean) ** 2 + (size - wins) * mean**2) / (size - 1))
        return (right - mean) / deviation if deviation else 0.0

    chance = (math.comb(size - 1, k) * p**k * (1 - p) ** (size - 1 - k) for k in range(size))
    return sum(c * (advantage(True, k + 1) - advantage(False, k)) for k, c in enumerate(chance))


def measured_weight(p: float, size: int) -> float:
    """The same from the registered function: groups with every number of successes."""
    wins = torch.arange(size + 1)
    rewards = (torch.arange(size) < wins[:, None]).double()
    credit = advantages.group_relative(rewards.flatten(), wins.repeat_interleave(size), eps=1e-13).view(-1, size)
    log_chance = torch.distributions.Binomial(size - 1, torch.tensor(p, dtype=torch.float64)).log_prob(
        wins[:-1].double()
    )
    return float((log_chance.exp() * (credit[1:, 0] - credit[:-1, -1])).sum())


# -- GAE --------------------------------------------------------------------------------------------------------------


def value_of(policy: EnumerablePolicy, rewards_R: Tensor) -> Tensor:
    """The policy's true value at the prefix of every token, (R, T): the mean reward of what goes on from there."""
    probs_R = policy.log_probs().detach().exp()
    strings = policy.strings
    values = []
    for prefix in policy.prefixes:
        goes_on = torch.tensor([s[: len(prefix)] == prefix for s in strings])
        values.append((probs_R * rewards_R)[goes_on].sum() / probs_R[goes_on].sum())
    return torch.stack(values)[policy.prefix_RT]


def last_token(policy: EnumerablePolicy, rewards_R: Tensor) -> Tensor:
    """The reward of a response at its last token, (R, T)."""
    place_T = torch.arange(policy.length)
    return torch.where(place_T == policy.mask_RT.sum(-1, keepdim=True) - 1, rewards_R[:, None], 0.0)


def wrong_values(policy: EnumerablePolicy) -> Tensor:
    """A critic that knows nothing: a number for every prefix, (R, T)."""
    generator = torch.Generator().manual_seed(9)
    return torch.randn(len(policy.prefixes), generator=generator, dtype=torch.float64)[policy.prefix_RT]


@theorem("gae")
def generalised_advantages(entry: str) -> Iterator[Finding]:
    """Where the estimator is unbiased, and that it telescopes."""

    def found(policy: EnumerablePolicy, rewards_R: Tensor, values_RT: Tensor, **options: Any) -> Tensor:
        credit_RT, _ = advantages.gae(last_token(policy, rewards_R), values_RT, policy.mask_RT, **options)
        drawn = draws(policy)
        return ascent(policy, drawn, credit_RT[drawn.index_B])

    def with_right_critic(lam: float) -> Ascent:
        return lambda policy, rewards_R: found(policy, rewards_R, value_of(policy, rewards_R), lam=lam)

    measured = worst_difference(lambda p, r: found(p, r, wrong_values(p), lam=1.0))
    claim = "λ = 1, any critic: the exact gradient of the mean reward"
    yield Finding(entry, "expectation", claim, measured, EXACT)
    for lam in (0.0, 0.95):
        measured = worst_difference(with_right_critic(lam))
        claim = f"λ = {lam:g}, a critic that is right: the exact gradient of the mean reward"
        yield Finding(entry, "expectation", claim, measured, EXACT)
    policy = policies()[0]
    rewards_R = some_rewards(policy)
    exact, values_RT = objective_gradient(policy, rewards_R), wrong_values(policy)
    yield bias(entry, "λ = 0.95, a critic of random numbers", found(policy, rewards_R, values_RT), exact)
    yield bias(entry, "λ = 0, a critic of random numbers", found(policy, rewards_R, values_RT, lam=0.0), exact)
    right_RT = value_of(policy, rewards_R)
    yield bias(entry, "γ = 0.9, a critic that is right", found(policy, rewards_R, right_RT, gamma=0.9), exact)

    span_RT = torch.arange(policy.length).expand(policy.mask_RT.shape) // 2
    measured = worst_difference(lambda p, r: found(p, r, wrong_values(p), lam=1.0, span_BT=span_RT, span_value="first"))
    claim = "macro-actions of 2 tokens, span_value='first', λ = 1, any critic: the exact gradient of the mean reward"
    yield Finding(entry, "expectation", claim, measured, EXACT)
    claim = (
        "macro-actions of 2 tokens, span_value='mean' (a baseline that knows the action), λ = 1, a critic that is right"
    )
    yield bias(entry, claim, found(policy, rewards_R, right_RT, lam=1.0, span_BT=span_RT), exact)
    single = torch.arange(policy.length).expand(policy.mask_RT.shape)
    one, none = (
        advantages.gae(last_token(policy, rewards_R), values_RT, policy.mask_RT, **given)
        for given in ({"span_BT": single}, {})
    )
    measured = max((a - b).abs().max().item() for a, b in zip(one, none, strict=True))
    yield Finding(entry, "limit", "macro-actions of 1 token: those of tokens", measured, EXACT)

    generator = torch.Generator().manual_seed(3)
    reward, value = torch.randn(2, 1, 5, generator=generator, dtype=torch.float64)
    mask = torch.ones(1, 5, dtype=torch.bool)
    to_go = reward.flip(-1).cumsum(-1).flip(-1)
    credit, returns = advantages.gae(reward, value, mask, lam=1.0)
    claim = "λ = 1: the advantage is the reward to go less the value"
    yield Finding(entry, "identity", claim, (credit - (to_go - value)).abs().max().item(), EXACT)
    yield Finding(
        entry, "identity", "λ = 1: the return is the reward to go", (returns - to_go).abs().max().item(), EXACT
    )
    credit, _ = advantages.gae(reward, value, mask, lam=0.0)
    after = torch.cat([value[:, 1:], torch.zeros(1, 1).double()], -1)
    claim = "λ = 0: the advantage is the one-step error"
    yield Finding(entry, "identity", claim, (credit - (reward + after - value)).abs().max().item(), EXACT)
    measured = (credit.sum(-1) - (reward.sum(-1) - value[:, 0])).abs().item()
    yield Finding(
        entry, "identity", "γ = 1: the one-step errors add up to the return less the first value", measured, EXACT
    )


@theorem("shaped_rewards")
def kl_in_the_reward(entry: str) -> Iterator[Finding]:
    """A KL penalty in the reward, with the reward to go as advantage: whose gradient it is, estimator by estimator."""
    weight = 0.3
    policy = policies()[0]
    reference, rewards_R = moved(policy, 0.7, seed=2), some_rewards(policy)
    drawn = draws(policy)
    exact = objective_gradient(policy, rewards_R) - weight * policy.gradient(kl(policy, reference))
    backward = policy.gradient(visited(policy, token_kl(reference.distributions().detach(), policy.distributions())))

    def shaped(estimator: ValueEstimatorName) -> Tensor:
        logps_RT, mask_RT = policy.logps()
        return advantages.shaped_rewards(
            rewards_R,
            logps_RT.detach(),
            reference.logps()[0].detach(),
            mask_RT,
            kl=weight,
            estimator=estimator,
        )

    def found(estimator: ValueEstimatorName) -> Tensor:
        credit_RT, _ = advantages.gae(shaped(estimator), wrong_values(policy), policy.mask_RT, lam=1.0)
        return ascent(policy, drawn, credit_RT[drawn.index_B])

    claim = "k1, reward to go: the exact gradient of the mean reward less kl · KL(π ‖ ref) of whole responses"
    yield Finding(entry, "expectation", claim, difference(found("k1"), exact), EXACT)
    claim = "k3, reward to go: the same but for + kl times the gradient of KL(ref ‖ π) at the prefixes visited"
    yield Finding(entry, "gradient", claim, difference(found("k3"), exact + weight * backward), EXACT)
    yield bias(entry, "k3, reward to go", found("k3"), exact)
    yield bias(entry, "k2, reward to go", found("k2"), exact)
    probs_R = policy.log_probs().detach().exp()
    mean = (probs_R * rewards_R).sum() - weight * kl(policy, reference).detach()
    unbiased: tuple[ValueEstimatorName, ...] = ("k1", "k3")
    for name in unbiased:
        total = (probs_R * masked_sum(shaped(name), policy.mask_RT)).sum()
        claim = f"{name}: the rewards of a completion add up, on average, to its reward less kl · KL(π ‖ ref)"
        yield Finding(entry, "expectation", claim, (total - mean).abs().item(), EXACT)


@theorem("remax")
def remax(entry: str) -> Iterator[Finding]:
    """The baseline is one number for a prompt."""

    def found(policy: EnumerablePolicy, rewards_R: Tensor) -> Tensor:
        drawn = draws(policy)
        best = rewards_R[policy.log_probs().argmax()]  # any number would do
        return ascent(policy, drawn, advantages.remax(rewards_R[drawn.index_B], best.expand(len(drawn.index_B))))

    claim = "one sample: the exact gradient of the mean reward"
    yield Finding(entry, "expectation", claim, worst_difference(found), EXACT)
    equal = advantages.remax(torch.tensor([2.5]), torch.tensor([2.5])).abs().max().item()
    yield Finding(entry, "limit", "as good as the greedy completion: the advantage is 0", equal, 0.0)


@theorem("opo")
def opo(entry: str) -> Iterator[Finding]:
    """The baseline that is weighted by lengths contains the completion's own reward and length."""
    policy = policies()[0]
    length_R = policy.mask_RT.sum(-1)

    def found(model: EnumerablePolicy, lengths_R: Tensor, size: int) -> Tensor:
        drawn = draws(model, size)
        rewards_B = some_rewards(model)[drawn.index_B]
        return ascent(model, drawn, advantages.opo(rewards_B, drawn.batch_B, lengths_R[drawn.index_B]))

    same = Tabular(vocabulary=4, seed=1)
    measured = difference(found(same, torch.ones(4).long(), 3), 2 / 3 * objective_gradient(same, some_rewards(same)))
    claim = "all completions equally long, G = 3: (G - 1)/G times the exact gradient of the mean reward"
    yield Finding(entry, "expectation", claim, measured, EXACT)
    exact = objective_gradient(policy, some_rewards(policy))
    for size in (2, 3):
        claim = f"1 to 3 tokens, G = {size}, times G/(G - 1)"
        yield bias(entry, claim, found(policy, length_R, size) * size / (size - 1), exact)

    def lengths_apart(rewards_B: Tensor, group_B: Tensor) -> Tensor:
        return advantages.opo(rewards_B, group_B, torch.tensor([1, 5, 2]))

    yield from no_signal(entry, lengths_apart)


@theorem("gdpo")
def gdpo(entry: str) -> Iterator[Finding]:
    """Two rewards, each standardised; the batch holds the group and another prompt's two completions."""
    policy = Tabular(vocabulary=4, seed=1)
    rewards_R2 = torch.stack([some_rewards(policy, seed) for seed in (5, 6)], 1)
    exact = objective_gradient(policy, rewards_R2.sum(1))
    beside, group_B = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).double(), torch.tensor([0, 0, 0, 1, 1])

    def found(scale: float) -> Tensor:
        columns = rewards_R2 * torch.tensor([scale, 1.0])

        def credit(index_B: Tensor) -> Tensor:
            return advantages.gdpo(torch.cat([columns[index_B], beside]), group_B, eps=1e-13)[:3]

        return batch_ascent(policy, credit, 3)

    once = found(1.0)
    claim = "G = 3, against the mean of the sum of the rewards, scaled to the size of its gradient"
    yield bias(entry, claim, alike(once, exact), exact)
    claim = "one reward a thousand times as large: the same gradient, so the sum of the rewards is not what it follows"
    yield Finding(entry, "identity", claim, difference(found(1000.0), once), 1e-8)
    yield from no_signal(entry, lambda rewards_B, group_B: advantages.gdpo(rewards_B[:, None], group_B))


@theorem("reinforce_pp", "reinforce_pp_baseline")
def reinforce_pp(entry: str) -> Iterator[Finding]:
    """Batch statistics: exact for large batches, up to the scale; biased for small ones."""
    weight, size = 0.1, 2

    def credit(model: EnumerablePolicy, reference: EnumerablePolicy, index_B: Tensor, **options: Any) -> Tensor:
        sampled = (x[index_B] for x in (model.logps()[0].detach(), reference.logps()[0].detach(), model.mask_RT))
        scores_B = some_rewards(model)[index_B]
        if entry == "reinforce_pp":
            return advantages.reinforce_pp(scores_B, *sampled, kl=weight, **options)
        group_B = torch.zeros_like(index_B)
        return advantages.reinforce_pp_baseline(scores_B, group_B, *sampled, kl=weight, **options)

    # All logits equal: every response can stand in a batch exactly as often as its probability says.
    even = Tabular(vocabulary=3, length=2, spread=0.0)
    reference = moved(even, 0.5)
    times_R = (even.log_probs().exp() * 9).round().long()
    index_B = torch.arange(len(times_R)).repeat_interleave(times_R)
    weight_B = torch.full((9,), 1 / 9, dtype=torch.float64)
    drawn = Draws(1, index_B, torch.arange(9), weight_B)
    exact = objective_gradient(even, some_rewards(even)) - weight * even.gradient(kl(even, reference))
    mask_BT = even.mask_RT[index_B]
    penalty_BT = weight * (even.logps()[0] - reference.logps()[0]).detach()[index_B]
    to_go_BT = last_token(even, some_rewards(even))[index_B].sum(-1, keepdim=True) - penalty_BT.flip(-1).cumsum(
        -1
    ).flip(-1)
    deviation = to_go_BT[mask_BT].std()
    found = ascent(even, drawn, credit(even, reference, index_B, eps=0.0))
    claim = "a batch like the policy: the exact gradient of the mean reward less kl · KL(π ‖ ref), over the deviation"
    yield Finding(entry, "expectation", claim, difference(found, exact / deviation), EXACT)
    found = ascent(even, drawn, credit(even, reference, index_B, estimator="k3"))
    yield bias(entry, "the same with k3, scaled to the size of the exact gradient", alike(found, exact), exact)

    policy = Tabular(vocabulary=3, length=2, seed=1)
    reference = moved(policy, 0.5)
    exact = objective_gradient(policy, some_rewards(policy)) - weight * policy.gradient(kl(policy, reference))
    found = batch_ascent(policy, lambda index_B: credit(policy, reference, index_B), size)
    yield bias(
        entry, f"batches of {size} completions, scaled to the size of the exact gradient", alike(found, exact), exact
    )


@theorem("whiten")
def whitening(entry: str) -> Iterator[Finding]:
    """Mean and variance, and what whitening over a batch does to the gradient."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(4, 5, generator=generator, dtype=torch.float64) * 3 + 2
    mask = torch.rand(4, 5, generator=generator) < 0.7
    white = advantages.whiten(values, mask, eps=0.0)[mask]
    yield Finding(entry, "identity", "the mean over masked tokens is 0", white.mean().abs().item(), EXACT)
    yield Finding(entry, "identity", "their variance (n - 1) is 1", (white.var() - 1).abs().item(), EXACT)
    kept = advantages.whiten(values, mask, shift_mean=False, eps=0.0)[mask]
    measured = (kept.mean() - values[mask].mean()).abs().item()
    yield Finding(entry, "identity", "shift_mean=False: the mean stays", measured, EXACT)
    scaled = advantages.whiten(5 * values - 7, mask, eps=0.0)[mask]
    measured = (scaled - white).abs().max().item()
    yield Finding(entry, "identity", "shift and positive scale of the rewards do not matter", measured, EXACT)

    policy = Tabular(vocabulary=3, length=2, seed=1)
    rewards_R = some_rewards(policy)

    def whitened(index_B: Tensor) -> Tensor:
        mask_BT = policy.mask_RT[index_B]
        return advantages.whiten(rewards_R[index_B][:, None].expand(mask_BT.shape), mask_BT)

    exact = objective_gradient(policy, rewards_R)
    found = batch_ascent(policy, whitened, 2)
    claim = "rewards whitened over batches of 2 completions, scaled to the size of the exact gradient"
    yield bias(entry, claim, alike(found, exact), exact)


# -- choices among samples --------------------------------------------------------------------------------------------


def order_statistics(probs_R: Tensor, rewards_R: Tensor, n: int, rank: int) -> Tensor:
    """The probability of each response to be the ``rank``-th best of n, rewards being distinct, (R,)."""
    order = rewards_R.argsort()
    upto = probs_R[order].cumsum(0)

    def at_most(share: Tensor) -> Tensor:  # fewer than ``rank`` of n lie above
        return sum((math.comb(n, i) * (1 - share) ** i * share ** (n - i) for i in range(rank)), torch.zeros(()))

    below = torch.cat([torch.zeros(1, dtype=upto.dtype), upto[:-1]])
    found_R = torch.empty_like(upto)
    found_R[order] = at_most(upto) - at_most(below)
    return found_R


def chosen_share(drawn: Draws, rows: Tensor, responses: int) -> Tensor:
    """How likely each response is to be the one that was chosen of its batch, (R,)."""
    return torch.zeros(responses, dtype=torch.float64).index_add(0, drawn.index_B[rows], drawn.weight_B[rows])


@theorem("best_of_k")
def best_of_n(entry: str) -> Iterator[Finding]:
    """Order statistics, and how far best-of-n is from the policy."""
    policy = policies()[0]
    probs_R, rewards_R = policy.log_probs().detach().exp(), some_rewards(policy)
    drawn = draws(policy, 3)
    rows = advantages.best_of_k(rewards_R[drawn.index_B], drawn.batch_B, k=2).view(-1, 2)
    for rank in (1, 2):
        share_R = chosen_share(drawn, rows[:, rank - 1], len(probs_R))
        known_R = order_statistics(probs_R, rewards_R, 3, rank)
        claim = f"of 3 samples, the distribution of number {rank} is that of the order statistic"
        yield Finding(entry, "identity", claim, (share_R - known_R).abs().max().item(), EXACT)
    for n in (2, 3):
        drawn = draws(policy, n)
        share_R = chosen_share(drawn, advantages.best_of_k(rewards_R[drawn.index_B], drawn.batch_B), len(probs_R))
        distance = (share_R * (share_R / probs_R).log()).sum().item()
        most = math.log(n) - (n - 1) / n
        claim = f"n = {n}: KL(best of n ‖ π), here {distance:.3f} nats, is not above log n - (n - 1)/n = {most:.3f}"
        yield Finding(entry, "identity", claim, max(0.0, distance - most), 0.0)
    fine = Tabular(vocabulary=80, length=1, spread=0.0)
    drawn, values = draws(fine, 2), torch.arange(80.0)
    share_R = chosen_share(drawn, advantages.best_of_k(values[drawn.index_B], drawn.batch_B), 80)
    distance = (share_R * (share_R * 80).log()).sum().item()
    claim = "80 responses alike, n = 2: KL(best of n ‖ π) nears log n - (n - 1)/n"
    yield Finding(entry, "limit", claim, abs(distance - math.log(2) + 0.5), 1e-3)


@theorem("top_against_bottom")
def extremes(entry: str) -> Iterator[Finding]:
    """Which responses are the two sides of a pair."""
    policy = policies()[0]
    probs_R, rewards_R = policy.log_probs().detach().exp(), some_rewards(policy)
    drawn = draws(policy, 3)
    rows = advantages.top_against_bottom(rewards_R[drawn.index_B], drawn.batch_B)
    for side, rank, chosen in (("top", 1, rows[0]), ("bottom", 3, rows[1])):
        known_R = order_statistics(probs_R, rewards_R, 3, rank) - probs_R**3  # three times the same: no pair
        share_R = chosen_share(drawn, chosen, len(probs_R))
        claim = f"of 3 samples, the distribution of the {side} is that of the order statistic, where the 3 differ"
        yield Finding(entry, "identity", claim, (share_R - known_R).abs().max().item(), EXACT)
    drawn = draws(policy, 2)
    top, bottom = advantages.top_against_bottom(rewards_R[drawn.index_B], drawn.batch_B)
    pairs_RR = torch.zeros(len(probs_R), len(probs_R), dtype=torch.float64)
    pairs_RR.index_put_((drawn.index_B[top], drawn.index_B[bottom]), drawn.weight_B[top], accumulate=True)
    known_RR = 2 * probs_R[:, None] * probs_R * (rewards_R[:, None] > rewards_R)
    claim = "of 2 samples, a pair is as likely as its two responses in either order"
    yield Finding(entry, "identity", claim, (pairs_RR - known_RR).abs().max().item(), EXACT)


@theorem("clipped_value")
def value_regression(entry: str) -> Iterator[Finding]:
    """Where the expected gradient of the critic's loss is 0."""
    policy = policies()[0]
    rewards_R = some_rewards(policy)
    probs_R = policy.log_probs().detach().exp()
    right_RT = value_of(policy, rewards_R)
    returns_RT = advantages.gae(last_token(policy, rewards_R), wrong_values(policy), policy.mask_RT, lam=1.0)[1]
    number = policy.prefix_RT

    def slope(values_RT: Tensor, old_RT: Tensor, targets_RT: Tensor, **options: float | None) -> float:
        """Norm of the expected gradient by the value of each prefix."""
        first = values_RT.flatten()[[number.flatten().tolist().index(i) for i in range(len(policy.prefixes))]]
        table = first.clone().requires_grad_()
        record = Values(values_BT=table[number], mask_BT=policy.mask_RT, old_values_BT=old_RT, returns_BT=targets_RT)
        loss_B = masked_sum(create_loss(entry, **options)(record).loss, policy.mask_RT)
        return torch.autograd.grad((probs_R * loss_B).sum(), table)[0].norm().item()

    for clip in (0.2, None):
        measured = slope(right_RT, right_RT, right_RT, clip=clip)
        yield Finding(entry, "gradient", f"clip={clip}: 0 where every value equals its return", measured, EXACT)
        measured = slope(right_RT, right_RT, returns_RT, clip=clip)
        claim = f"clip={clip}, old values right: on average 0 at the policy's true value, returns being sampled (λ = 1)"
        yield Finding(entry, "optimum", claim, measured, EXACT)
    measured = slope(right_RT, wrong_values(policy), returns_RT, clip=None)
    claim = "clip=None, old values far off: on average 0 at the true value"
    yield Finding(entry, "optimum", claim, measured, EXACT)
    measured = slope(right_RT, wrong_values(policy), returns_RT)
    base = slope(wrong_values(policy), wrong_values(policy), returns_RT)
    claim = "clip=0.2, old values far off: the mean gradient at the true value, as a share of that at the old values"
    yield Finding(entry, "bias", claim, measured / base, None)
