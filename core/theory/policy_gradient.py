"""Theorems on policy-gradient losses: whose gradient each follows, on the policy's own samples and on older ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from prefzoo.losses import create_loss
from prefzoo.theory.base import Finding, theorem
from prefzoo.theory.credit import policies, wrong_values
from prefzoo.theory.divergences import visited
from prefzoo.theory.expectations import (
    EXACT,
    bias,
    difference,
    draws,
    expected_loss,
    moved,
    nats,
    objective_gradient,
    record_of,
    some_rewards,
)
from prefzoo.theory.policies import EnumerablePolicy, Tabular

# Weight per token: the sum over a completion's tokens is the objective, and a baseline may differ from token to token.
TOKEN = ("reinforce", "a2c", "clipped_surrogate", "cispo", "sapo", "vespo")
# Weight per completion, summed over its tokens: the advantage is the completion's.
SEQUENCE = ("sequence_surrogate", "luspo")
# Weight per completion that is a mean over its tokens.
MEAN = ("gspo", "gmpo")
SURROGATES = (*TOKEN, *SEQUENCE, *MEAN)

NO_CLIP = 1e9  # no ratio of these policies comes near it
PLAIN: Mapping[str, Mapping[str, Any]] = {"a2c": {"entropy": 0.0}}  # without what is no policy gradient
UNCLIPPED: Mapping[str, Mapping[str, Any]] = {
    "clipped_surrogate": {"clip": NO_CLIP},
    "cispo": {"clip_high": NO_CLIP},
    "sequence_surrogate": {"clip": NO_CLIP},
    "gspo": {"clip": NO_CLIP},
    "gmpo": {"clip": NO_CLIP},
    "luspo": {"clip": NO_CLIP},
}
BASELINE = 0.7
OFF = 0.3  # how far the older policy is: standard deviation of the change of its logits


def ascent(
    entry: str,
    policy: EnumerablePolicy,
    advantages: Tensor,
    *,
    old: EnumerablePolicy | None = None,
    sampling: EnumerablePolicy | None = None,
    unit: str = "row_sum",
    entropy_floor: float | None = None,
    **options: Any,
) -> Tensor:
    """The mean policy gradient of a loss over all responses of whichever policy sampled; advantages by response."""
    drawn = draws(sampling or old or policy)
    record = record_of(
        policy, drawn.index_B, advantages[drawn.index_B], old=old, sampling=sampling, entropy_floor=entropy_floor
    )
    loss = create_loss(entry, **{**PLAIN.get(entry, {}), **options})
    return -policy.gradient(expected_loss(loss, record, drawn, unit))


def per_token(policy: EnumerablePolicy, rewards_R: Tensor) -> Tensor:
    """Objective of a length-normalised gradient: (R - b) / length, R being what a response earns, b the baseline."""
    return (rewards_R - BASELINE) / policy.mask_RT.sum(-1)


@theorem(*SURROGATES)
def on_policy(entry: str) -> Iterator[Finding]:
    """While the policy is the one that sampled: the gradient of the mean reward, or of which other objective."""
    unit = "row" if entry in MEAN else "row_sum"
    worst, worst_prefix = 0.0, 0.0
    for policy in policies():
        rewards_R = some_rewards(policy)
        exact = objective_gradient(policy, per_token(policy, rewards_R) if entry in MEAN else rewards_R)
        worst = max(worst, difference(ascent(entry, policy, rewards_R - BASELINE, unit=unit), exact))
        if entry in TOKEN:
            credit_RT = rewards_R[:, None] - wrong_values(policy)
            worst_prefix = max(worst_prefix, difference(ascent(entry, policy, credit_RT), exact))
    if entry in MEAN:
        claim = "on the policy's own samples: the gradient of the mean of (R - b) / length, b any baseline"
        yield Finding(entry, "gradient", claim, worst, EXACT)
        policy = policies()[0]
        rewards_R = some_rewards(policy)
        probs_R = policy.log_probs().exp().detach()
        each, mean = (probs_R * policy.mask_RT.sum(-1)).sum(), (probs_R * rewards_R).sum()
        found = each * ascent(entry, policy, rewards_R - mean, unit=unit)
        claim = "b the mean reward, against the gradient of the mean reward per token"
        yield bias(entry, claim, found, objective_gradient(policy, rewards_R))
    else:
        claim = "on the policy's own samples, any baseline: the exact gradient of the mean reward"
        yield Finding(entry, "expectation", claim, worst, EXACT)
    if entry in TOKEN:
        claim = "the same with a baseline for every prefix"
        yield Finding(entry, "expectation", claim, worst_prefix, EXACT)


@theorem(*SURROGATES)
def off_policy(entry: str) -> Iterator[Finding]:
    """On samples of an older policy: exact where the ratio is whole and unclipped, and by how much it is not else."""
    for policy, words in ((Tabular(vocabulary=4, seed=1), "one token"), (policies()[0], "1 to 3 tokens")):
        rewards_R = some_rewards(policy)
        old = moved(policy, OFF)
        centred_R = rewards_R - (old.log_probs().detach().exp() * rewards_R).sum()
        exact = objective_gradient(policy, rewards_R)
        one = words == "one token"
        unit = "row" if entry in MEAN else "row_sum"
        words = f"{words}, samples of a policy {nats(old, policy):.2f} nats away"
        found = ascent(entry, policy, centred_R, old=old, unit=unit)
        if entry in UNCLIPPED:
            free = ascent(entry, policy, centred_R, old=old, unit=unit, **UNCLIPPED[entry])
            if one or entry == "sequence_surrogate":
                claim = f"{words}, not clipped: the exact gradient of the mean reward"
                yield Finding(entry, "expectation", claim, difference(free, exact), EXACT)
            elif entry in TOKEN:
                claim = f"{words}, not clipped: the gradient of Σ_s d_old(s) Σ_a π(a|s) Q_old(s, a)"
                yield Finding(entry, "gradient", claim, difference(free, local_gradient(policy, old, centred_R)), EXACT)
                yield bias(entry, f"{words}, not clipped, against the mean reward", free, exact)
            elif entry not in MEAN:
                yield bias(entry, f"{words}, not clipped", free, exact)
        if entry in ("reinforce", "a2c"):
            old_R = old.log_probs().detach().exp()
            imitated = policy.gradient((old_R * centred_R * policy.log_probs()).sum())
            claim = f"{words}: the gradient of Σ old(y) (R(y) - b) log π(y), a weighted likelihood"
            yield Finding(entry, "gradient", claim, difference(found, imitated), EXACT)
        if one or entry not in MEAN:
            yield bias(entry, f"{words}, the defaults", found, exact)
    yield from limits(entry)


def local_gradient(policy: EnumerablePolicy, old: EnumerablePolicy, rewards_R: Tensor) -> Tensor:
    """The gradient of the policy's advantage over an older one at the prefixes that the older one visits."""
    old_R = old.log_probs().detach().exp()
    total = torch.zeros((), dtype=torch.float64)
    logps = policy.prefix_logits().log_softmax(-1)
    for number, prefix in enumerate(policy.prefixes):
        for token in range(policy.vocabulary):
            path = (*prefix, token)
            goes_on = torch.tensor([s[: len(path)] == path for s in policy.strings])
            before = torch.tensor([s[: len(prefix)] == prefix for s in policy.strings])
            value = (old_R * rewards_R)[goes_on].sum() / old_R[goes_on].sum()
            total = total + old_R[before].sum() * logps[number, token].exp() * value
    return policy.gradient(total)


def limits(entry: str) -> Iterator[Finding]:
    """Where one loss becomes another."""
    policy = policies()[0]
    rewards_R, old = some_rewards(policy), moved(policy, 0.5)
    if entry == "sapo":
        found = ascent(entry, policy, rewards_R, old=old, temperature_pos=1e-5, temperature_neg=1e-5)
        free = ascent("clipped_surrogate", policy, rewards_R, old=old, clip=NO_CLIP)
        claim = "temperatures to 0: the gradient of the unclipped surrogate"
        yield Finding(entry, "limit", claim, difference(found, free), 1e-6)
    if entry == "cispo":
        found = ascent(entry, policy, rewards_R, old=old, clip_high=NO_CLIP)
        free = ascent("clipped_surrogate", policy, rewards_R, old=old, clip=NO_CLIP)
        claim = "without the clip: the gradient of the unclipped surrogate"
        yield Finding(entry, "identity", claim, difference(found, free), EXACT)
        found = ascent(entry, policy, rewards_R, old=old, clip=0.0, clip_high=0.0)
        plain = ascent("reinforce", policy, rewards_R, old=old)
        yield Finding(entry, "limit", "both clips 0: the gradient of reinforce", difference(found, plain), EXACT)
        single = Tabular(vocabulary=4, seed=1)
        rewards_R, old = some_rewards(single), moved(single, OFF)
        found = ascent(entry, single, rewards_R, old=old, clip=0.2, clip_high=0.2)
        yield bias(entry, "one token, clip=0.2, clip_high=0.2", found, objective_gradient(single, rewards_R))
    if entry in MEAN:
        found, other = (
            ascent(name, policy, rewards_R, old=old, unit="row", **UNCLIPPED[name]) for name in ("gmpo", "gspo")
        )
        claim = "without the clip: GMPO and GSPO have one gradient, of the geometric mean of the ratios times A"
        yield Finding(entry, "identity", claim, difference(found, other), EXACT)
    if entry in ("gspo", "gmpo", "sequence_surrogate", "luspo"):
        single = Tabular(vocabulary=4, seed=1)
        rewards_R, old = some_rewards(single), moved(single, 0.5)
        same: dict[str, Any] = {"clip": 0.2, "clip_high": 0.28}
        # GMPO's range is one of logarithms.
        logs: dict[str, Any] = {"clip": -math.log1p(-0.2), "clip_high": math.log1p(0.28)} if entry == "gmpo" else same
        unit = "row" if entry in MEAN else "row_sum"
        found = ascent(entry, single, rewards_R, old=old, unit=unit, **logs)
        token = ascent("clipped_surrogate", single, rewards_R, old=old, **same)
        claim = "completions of one token, the same range: the gradient of the clipped surrogate"
        yield Finding(entry, "limit", claim, difference(found, token), EXACT)


@theorem("a2c")
def actor_with_entropy(entry: str) -> Iterator[Finding]:
    """What the bonus adds."""
    policy = policies()[0]
    rewards_R = some_rewards(policy)
    wanted = objective_gradient(policy, rewards_R) + 0.3 * policy.gradient(visited(policy, entropy_of(policy)))
    found = ascent(entry, policy, rewards_R, entropy=0.3)
    claim = (
        "with the bonus c: the gradient of the mean reward and c times that of the entropies at the prefixes visited"
    )
    yield Finding(entry, "gradient", claim, difference(found, wanted), EXACT)


def entropy_of(policy: EnumerablePolicy) -> Tensor:
    """Entropy of the next token, (R, T), in nats."""
    distributions = policy.distributions()
    return -(distributions.exp() * distributions).sum(-1)


@theorem("entropy_bonus")
def entropy_bonus(entry: str) -> Iterator[Finding]:
    """Whose gradient the bonus has."""
    policy = policies()[0]
    found = ascent(entry, policy, torch.zeros(len(policy.strings)).double())
    wanted = policy.gradient(visited(policy, entropy_of(policy)))
    claim = "on average the gradient of the entropies at the prefixes that the policy now visits"
    yield Finding(entry, "gradient", claim, difference(found, wanted), EXACT)

    def whole(model: EnumerablePolicy) -> Tensor:
        return -(model.log_probs().exp() * model.log_probs()).sum()

    drawn = draws(policy)
    record = record_of(policy, drawn.index_B, torch.zeros(len(drawn.index_B)).double())
    value = -expected_loss(create_loss(entry), record, drawn)
    claim = "summed over the completion, its mean value is the entropy of whole responses"
    yield Finding(entry, "expectation", claim, (value - whole(policy)).abs().item(), EXACT)
    claim = "against the gradient of the entropy of whole responses (prefixes yet to come are not reached)"
    yield bias(entry, claim, found, policy.gradient(whole(policy)))
    single = Tabular(vocabulary=4, seed=1)
    found = ascent(entry, single, torch.zeros(4).double())
    measured = difference(found, single.gradient(whole(single)))
    yield Finding(entry, "gradient", "completions of one token: the exact gradient of the entropy", measured, EXACT)
    flat = Tabular(vocabulary=4, spread=0.0)
    size = ascent(entry, flat, torch.zeros(4).double()).norm().item()
    yield Finding(entry, "optimum", "0 at the uniform policy", size, EXACT)


@theorem("a2po")
def optimal_advantage(entry: str) -> Iterator[Finding]:
    """Where the regression ends, and whose gradient it has on the way."""
    policy, reference = policies()[0], moved(policies()[0], 0.5, seed=3)
    rewards_R, beta = some_rewards(policy), 0.7
    value = beta * (reference.log_probs().detach() + rewards_R / beta).logsumexp(0)
    best = Tabular(policy.vocabulary, policy.length).become(reference.log_probs().detach() + rewards_R / beta)
    drawn = draws(best)
    record = record_of(best, drawn.index_B, (rewards_R - value)[drawn.index_B], reference=reference)
    loss_B = create_loss(entry, beta=beta)(record).loss
    claim = "with A = R - V* it is 0 at the KL-regularised optimum ref exp(R / β), for every response"
    yield Finding(entry, "optimum", claim, loss_B.detach().abs().max().item(), EXACT)
    drawn = draws(policy)
    for baseline, words in ((value, "V*"), (torch.tensor(3.0), "any baseline")):
        record = record_of(policy, drawn.index_B, (rewards_R - baseline)[drawn.index_B], reference=reference)
        found = -policy.gradient(expected_loss(create_loss(entry, beta=beta), record, drawn)) / (2 * beta)
        log_R = policy.log_probs()
        objective = (log_R.exp() * (rewards_R - beta * (log_R - reference.log_probs().detach()))).sum()
        claim = f"on the policy's own completions, with {words}: -2β times the gradient of E[R] - β KL(π ‖ ref)"
        yield Finding(entry, "gradient", claim, difference(found, policy.gradient(objective)), EXACT)


# -- modifiers --------------------------------------------------------------------------------------------------------


def corrected(entry: str, policy: EnumerablePolicy, words: str) -> Iterator[Finding]:
    """Every kind of weight, on the samples of one other policy."""
    sampling, rewards_R = moved(policy, OFF), some_rewards(policy)
    exact = objective_gradient(policy, rewards_R)
    centred_R = rewards_R - (sampling.log_probs().detach().exp() * rewards_R).sum()
    words = f"{words}, the sampler {nats(sampling, policy):.2f} nats away"

    def found(correction: str, **bound: Any) -> Tensor:
        return ascent("reinforce", policy, centred_R, sampling=sampling, correction=correction, **bound)

    free = {"correction_max": NO_CLIP}
    yield bias(entry, f"{words}, without correction", found("none"), exact)
    claim = f"{words}, weights per sequence, not bounded: the exact gradient of the mean reward"
    yield Finding(entry, "expectation", claim, difference(found("sequence_truncate", **free), exact), EXACT)
    per_token = found("token_truncate", **free)
    if policy.length == 1:
        claim = f"{words}, weights per token, not bounded: the exact gradient of the mean reward"
        yield Finding(entry, "expectation", claim, difference(per_token, exact), EXACT)
        return
    claim = f"{words}, weights per token, not bounded: the gradient of Σ_s d_sampler(s) Σ_a π(a|s) Q_sampler(s, a)"
    measured = difference(per_token, local_gradient(policy, sampling, centred_R))
    yield Finding(entry, "gradient", claim, measured, EXACT)
    yield bias(entry, f"{words}, weights per token, not bounded, against the mean reward", per_token, exact)
    for correction in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        yield bias(entry, f"{words}, {correction} at 1.2", found(correction, correction_max=1.2), exact)


@theorem("sampler_correction")
def sampler_correction(entry: str) -> Iterator[Finding]:
    """Which weights make up for a sampler that is another policy than the learner's model."""
    yield from corrected(entry, Tabular(vocabulary=4, seed=1), "one token")
    policy = policies()[0]
    yield from corrected(entry, policy, "1 to 3 tokens")
    sampling, rewards_R = moved(policy, OFF), some_rewards(policy)
    exact, centred_R = objective_gradient(policy, rewards_R), rewards_R - BASELINE
    old = moved(policy, OFF, seed=4)
    whole = ascent(
        "sequence_surrogate", policy, centred_R, old=old, sampling=sampling,
        clip=NO_CLIP, correction="sequence_mask", correction_max=NO_CLIP,
    )  # fmt: skip
    claim = (
        "sampler, old policy and policy all different, weights and ratio per sequence, not bounded: the exact gradient"
    )
    yield Finding(entry, "expectation", claim, difference(whole, exact), EXACT)


@theorem("off_policy_mask")
def off_policy_mask(entry: str) -> Iterator[Finding]:
    """What dropping bad completions that the policy has left behind does to an exact estimator."""
    policy = policies()[0]
    old, rewards_R = moved(policy, OFF), some_rewards(policy)
    centred_R = rewards_R - (old.log_probs().detach().exp() * rewards_R).sum()
    exact = objective_gradient(policy, rewards_R)

    def found(credit_R: Tensor, **options: Any) -> Tensor:
        return ascent("sequence_surrogate", policy, credit_R, old=old, sampling=old, clip=NO_CLIP, **options)

    measured = difference(found(centred_R, off_policy_threshold=NO_CLIP), exact)
    claim = "no limit, the ratio of whole completions not clipped: the exact gradient of the mean reward"
    yield Finding(entry, "limit", claim, measured, EXACT)
    for threshold in (0.1, 0.0):
        claim = f"samples of a policy {nats(old, policy):.2f} nats away, dropped above {threshold:g} nats per token"
        yield bias(entry, claim, found(centred_R, off_policy_threshold=threshold), exact)
    good_R = rewards_R - rewards_R.min()
    measured = difference(found(good_R, off_policy_threshold=0.0), found(good_R))
    yield Finding(entry, "identity", "where no advantage is negative, it drops nothing", measured, EXACT)


@theorem("high_entropy")
def high_entropy(entry: str) -> Iterator[Finding]:
    """What the mask of tokens does to an exact estimator."""
    policy = policies()[0]
    rewards_R = some_rewards(policy)
    credit_RT = rewards_R[:, None] - wrong_values(policy)
    exact = objective_gradient(policy, rewards_R)
    entropies = entropy_of(policy).detach()[policy.mask_RT].unique()

    def found(floor: float) -> Tensor:
        return ascent("reinforce", policy, credit_RT, entropy_floor=floor, high_entropy=True)

    claim = "a floor of 0, which keeps every token: the exact gradient of the mean reward"
    yield Finding(entry, "limit", claim, difference(found(0.0), exact), EXACT)
    half = entropies[len(entropies) // 2].item()
    claim = f"prefixes with an entropy below {half:.2f} nats dropped, the lower half"
    yield bias(entry, claim, found(half), exact)
    kept = torch.zeros_like(policy.get_parameter("table"))
    certain = entropy_of(policy).detach() < half
    kept[policy.prefix_RT[certain & policy.mask_RT]] = 1.0
    measured = (found(half) * kept.flatten()).abs().max().item()
    yield Finding(entry, "gradient", "at the prefixes dropped, no gradient", measured, 0.0)
