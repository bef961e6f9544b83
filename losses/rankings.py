"""What the losses of rankings share: K numbers of one prompt, best first along K, the invalid ones masked away.

Every function takes ``x_PK``, scaled log-ratios or rewards, and ``valid_PK``, and reads only what is valid: an invalid
cell may hold anything, also NaN, and gets no gradient. Lists are compared pair by pair in (P, K, K), so only
differences of ``x_PK`` enter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prefzoo.losses.numerics import masked


def below_PKK(valid_PK: Tensor) -> Tensor:
    """Whether the second of two valid completions stands below the first in the ranking.

    >>> below_PKK(torch.tensor([[True, True, False]])).int().tolist()
    [[[0, 1, 0], [0, 0, 0], [0, 0, 0]]]
    """
    return (valid_PK[..., :, None] & valid_PK[..., None, :]).triu(1)


def pairs_P(valid_PK: Tensor) -> Tensor:
    """How many pairs each list has, C(K, 2); as ``weight_P`` of a mean over lists, it makes it a mean over all pairs.

    >>> pairs_P(torch.tensor([[True, True, True], [True, True, False], [True, False, False]])).tolist()
    [3, 1, 0]
    """
    count_P = valid_PK.sum(-1)
    return count_P * (count_P - 1) // 2


def differences_PKK(x_PK: Tensor, valid_PK: Tensor) -> Tensor:
    """x_i - x_j of all pairs, 0 where one of them is not there."""
    x_PK = masked(x_PK, valid_PK)
    return x_PK[..., :, None] - x_PK[..., None, :]


def all_pairs_P(x_PK: Tensor, valid_PK: Tensor) -> Tensor:
    """Mean over the pairs of a list of -log σ(x_i - x_j), i ranked above j; 0 for a list without pairs.

    >>> all_pairs_P(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[True, True], [True, False]]))
    tensor([0.3133, 0.0000])
    """
    loss_PKK = masked(-F.logsigmoid(differences_PKK(x_PK, valid_PK)), below_PKK(valid_PK))
    return loss_PKK.sum((-2, -1)) / pairs_P(valid_PK).clamp(min=1)


def plackett_luce_P(x_PK: Tensor, valid_PK: Tensor) -> Tensor:
    """-log of the probability that a Plackett-Luce model with log-worths ``x_PK`` ranks a list as it is ranked.

    Σ_k [log Σ_{j ≥ k} exp x_j - x_k], of which each term is -log σ(-log Σ_{j > k} exp(x_j - x_k)): so with two
    completions it is the pairwise loss, digit by digit.

    >>> plackett_luce_P(torch.zeros(1, 3), torch.tensor([[True, True, True]])).exp()  # one of 3! orders
    tensor([6.])
    """
    below = below_PKK(valid_PK)
    # The smallest finite number stands where nobody is: its exp is 0, and unlike -inf it has a gradient, which is 0.
    behind_PKK = torch.where(below, -differences_PKK(x_PK, valid_PK), torch.finfo(x_PK.dtype).min)
    return masked(-F.logsigmoid(-behind_PKK.logsumexp(-1)), below.any(-1)).sum(-1)


def log_softmax_PK(x_PK: Tensor, valid_PK: Tensor) -> Tensor:
    """log softmax over the valid completions; 0 where none is, so mask what is computed from it."""
    x_PK = torch.where(valid_PK, x_PK, torch.finfo(x_PK.dtype).min)
    return masked(x_PK.log_softmax(-1), valid_PK)


def accuracy_P(x_PK: Tensor, valid_PK: Tensor) -> Tensor:
    """The share of a list's pairs that ``x_PK`` puts in the right order; 0 for a list without pairs."""
    right_PKK = (differences_PKK(x_PK, valid_PK) > 0) & below_PKK(valid_PK)
    return right_PKK.sum((-2, -1)).to(x_PK.dtype) / pairs_P(valid_PK).clamp(min=1)


def rest_mean_P(x_PK: Tensor, valid_PK: Tensor) -> Tensor:
    """Mean over the valid completions below the best; 0 where there is none."""
    rest_PK = valid_PK & (valid_PK.cumsum(-1) > 1)
    return masked(x_PK, rest_PK).sum(-1) / rest_PK.sum(-1).clamp(min=1)
