"""Theorems on offline Q-learning: what each head of ILQL learns from a data distribution that is enumerated."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from prefzoo.losses import create_loss
from prefzoo.records import Heads, masked_sum
from prefzoo.theory.base import Finding, Kind, theorem
from prefzoo.theory.credit import last_token, value_of
from prefzoo.theory.expectations import EXACT, difference, some_rewards
from prefzoo.theory.policies import EnumerablePolicy, Tabular


def data_policy() -> EnumerablePolicy:
    """The policy that wrote the data: 15 completions of 1 to 3 tokens."""
    return Tabular(vocabulary=3, length=3, seed=1)


def by_token(data: EnumerablePolicy, table: Tensor) -> Tensor:
    """A table by prefix and token, read at the tokens of every completion, (R, T)."""
    return table[data.prefix_RT, data.tokens_RT]


def action_values(data: EnumerablePolicy, rewards_R: Tensor) -> Tensor:
    """The mean reward of the data after each prefix and token, (prefixes, V): the truth that Q should learn, γ = 1."""
    probs_R = data.log_probs().detach().exp()
    table = torch.zeros(len(data.prefixes), data.vocabulary, dtype=torch.float64)
    for i, prefix in enumerate(data.prefixes):
        for token in range(data.vocabulary):
            path = (*prefix, token)
            goes_on = torch.tensor([s[: len(path)] == path for s in data.strings])
            table[i, token] = (probs_R * rewards_R)[goes_on].sum() / probs_R[goes_on].sum()
    return table


def after(values_RT: Tensor, mask_RT: Tensor) -> Tensor:
    """The value after each token, 0 after the last, (R, T)."""
    moved = torch.cat([values_RT[:, 1:], torch.zeros_like(values_RT[:, :1])], -1)
    return torch.where(torch.cat([mask_RT[:, 1:], torch.zeros_like(mask_RT[:, :1])], -1), moved, 0.0)


def mean_loss(entry: str, data: EnumerablePolicy, fields: dict[str, Tensor], **options: float) -> Tensor:
    """The mean over the data of a completion's loss; fields that are not given are 0."""
    zero_RT = torch.zeros(data.mask_RT.shape, dtype=torch.float64)
    names = ("q1_BT", "q2_BT", "v_BT", "next_v_BT", "target_q_BT", "rewards_BT")
    record = Heads(**{**dict.fromkeys(names, zero_RT), "mask_BT": data.mask_RT, **fields})  # type: ignore[arg-type]
    loss_R = masked_sum(create_loss(entry, **options)(record).loss, data.mask_RT)
    return (data.log_probs().detach().exp() * loss_R).sum()


def slopes(loss: Callable[[Tensor], Tensor], table: Tensor) -> Tensor:
    """The gradient of a loss by a table."""
    leaf = table.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


@theorem("ilql_q")
def bellman(entry: str) -> Iterator[Finding]:
    """The fixed point of the temporal difference."""
    data = data_policy()
    rewards_R = some_rewards(data)
    rewards_RT, values_RT = last_token(data, rewards_R), value_of(data, rewards_R)

    def both(next_RT: Tensor, gamma: float) -> Callable[[Tensor], Tensor]:
        def loss(table: Tensor) -> Tensor:
            q_RT = by_token(data, table)
            fields = {"q1_BT": q_RT, "q2_BT": q_RT, "next_v_BT": next_RT, "rewards_BT": rewards_RT}
            return mean_loss(entry, data, fields, gamma=gamma)

        return loss

    measured = slopes(both(after(values_RT, data.mask_RT), 1.0), action_values(data, rewards_R)).norm().item()
    claim = "γ = 1, V the data's true value: 0 at the data's true Q, the mean reward of what follows"
    yield Finding(entry, "optimum", claim, measured, EXACT)
    generator = torch.Generator().manual_seed(4)
    some_RT = torch.randn(len(data.prefixes), generator=generator, dtype=torch.float64)[data.prefix_RT]
    target_RT = rewards_RT + 0.9 * after(some_RT, data.mask_RT)
    table = torch.zeros(len(data.prefixes), data.vocabulary, dtype=torch.float64)
    table[data.prefix_RT[data.mask_RT], data.tokens_RT[data.mask_RT]] = target_RT[data.mask_RT]
    measured = slopes(both(after(some_RT, data.mask_RT), 0.9), table).norm().item()
    yield Finding(entry, "optimum", "any V, γ = 0.9: 0 where Q(s, a) = r + γ V(s')", measured, EXACT)


def expectile_of(values: Tensor, share: Tensor, tau: float) -> Tensor:
    """The expectile of each row of values with these probabilities, by bisection of its definition."""
    low, high = values.min(-1).values, values.max(-1).values
    for _ in range(60):
        middle = (low + high) / 2
        error = values - middle[:, None]
        above = (share * torch.where(error < 0, error * (1 - tau), error * tau)).sum(-1) < 0
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


@theorem("ilql_v")
def expectile(entry: str) -> Iterator[Finding]:
    """From the mean of the data's tokens to the best of them."""
    data = data_policy()
    rewards_R = some_rewards(data)
    table, share = action_values(data, rewards_R), data.prefix_logits().detach().softmax(-1)

    def outside(values: Tensor, q_table: Tensor, tau: float) -> float:
        """At how many prefixes the loss is not least within a millionth of these values: its slope tells."""
        q_RT = by_token(data, q_table)

        def loss(leaf: Tensor) -> Tensor:
            return mean_loss(entry, data, {"v_BT": leaf[data.prefix_RT], "target_q_BT": q_RT}, expectile=tau)

        inside = (slopes(loss, values - 1e-6) < 0) & (slopes(loss, values + 1e-6) > 0)
        return float((~inside).sum())

    words = "prefixes where the optimum is not within 1e-6 of it"
    for tau, wanted, told in (
        (0.5, (share * table).sum(-1), "τ = 0.5: the mean of Q over the data's tokens, the value of the data's policy"),
        (0.7, expectile_of(table, share, 0.7), "τ = 0.7: the expectile of Q over the data's tokens"),
        (1 - 1e-10, table.max(-1).values, "τ to 1: the best Q among the data's tokens"),
        (1e-10, table.min(-1).values, "τ to 0: the worst Q among the data's tokens"),
    ):
        kind: Kind = "limit" if "to" in told.split(":")[0] else "optimum"
        yield Finding(entry, kind, f"{told}; {words}", outside(wanted, table, tau), 0.0)

    best = torch.stack([rewards_R[[s[: len(p)] == p for s in data.strings]].max() for p in data.prefixes])
    q_RT = last_token(data, rewards_R) + after(best[data.prefix_RT], data.mask_RT)
    q_table = torch.zeros_like(table)
    q_table[data.prefix_RT[data.mask_RT], data.tokens_RT[data.mask_RT]] = q_RT[data.mask_RT]
    claim = f"τ to 1 with Q = r + V(s'): the reward of the best completion in the data that goes on so; {words}"
    yield Finding(entry, "limit", claim, outside(best, q_table, 1 - 1e-10), 0.0)


@theorem("ilql_cql")
def conservatism(entry: str) -> Iterator[Finding]:
    """Behaviour cloning, Q being the logits."""
    data = data_policy()
    probs_R = data.log_probs().detach().exp()

    def loss(table: Tensor) -> Tensor:
        q_RT, lse_RT = by_token(data, table), table.logsumexp(-1)[data.prefix_RT]
        return mean_loss(entry, data, {"q1_BT": q_RT, "q2_BT": q_RT, "q1_lse_BT": lse_RT, "q2_lse_BT": lse_RT})

    def cloning(table: Tensor) -> Tensor:
        logps_RT = by_token(data, table.log_softmax(-1))
        return -(probs_R * masked_sum(logps_RT, data.mask_RT)).sum()

    generator = torch.Generator().manual_seed(4)
    table = torch.randn(len(data.prefixes), data.vocabulary, generator=generator, dtype=torch.float64)
    measured = difference(slopes(loss, table), 2 * slopes(cloning, table))
    claim = "for each of the two Q: the gradient of behaviour cloning with softmax Q as the policy"
    yield Finding(entry, "gradient", claim, measured, EXACT)
    level = torch.arange(len(data.prefixes)).double()[:, None]
    measured = slopes(loss, data.prefix_logits().detach().log_softmax(-1) + level).norm().item()
    claim = "0 where softmax Q is the data's policy, at any level of Q"
    yield Finding(entry, "optimum", claim, measured, EXACT)
