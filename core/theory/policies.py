"""Policies whose responses can be enumerated: every expectation is a sum, in float64.

One prompt; another prompt would be another policy. Responses are all strings over a small vocabulary whose token 0 ends
the string, cut at a length: with V = 3 and length 3 these are 15 strings of 1 to 3 tokens. With length 1 every token is
a response of its own.

Legend: **R** responses, **T** tokens of the longest, **V** the vocabulary.

>>> policy = Tabular(vocabulary=3, length=3, seed=0)
>>> logps_RT, mask_RT = policy.logps()
>>> len(logps_RT), mask_RT.sum(-1).tolist()
(15, [1, 2, 3, 3, 3, 3, 3, 3, 2, 3, 3, 3, 3, 3, 3])
>>> round(policy.log_probs().exp().sum().item(), 12)
1.0
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

END = 0


def all_strings(vocabulary: int, length: int) -> list[tuple[int, ...]]:
    """Every string that ends with the end token, or is cut at ``length``.

    >>> all_strings(2, 3)
    [(0,), (1, 0), (1, 1, 0), (1, 1, 1)]
    """

    def grow(prefix: tuple[int, ...]) -> list[tuple[int, ...]]:
        if len(prefix) == length or (prefix and prefix[-1] == END):
            return [prefix]
        return [string for token in range(vocabulary) for string in grow((*prefix, token))]

    return grow(())


class EnumerablePolicy(nn.Module, ABC):
    """A distribution over all strings, given by the logits of the next token after every prefix."""

    tokens_RT: Tensor  # 0 outside the mask
    mask_RT: Tensor
    prefix_RT: Tensor  # number of the prefix before each token, in ``prefixes``

    def __init__(self, vocabulary: int, length: int, strings: Sequence[tuple[int, ...]] | None = None) -> None:
        super().__init__()
        self.vocabulary, self.length = vocabulary, length
        self.strings = list(strings or all_strings(vocabulary, length))
        self.prefixes = sorted({s[:t] for s in self.strings for t in range(len(s))}, key=lambda p: (len(p), p))
        place = {prefix: i for i, prefix in enumerate(self.prefixes)}
        rows = range(len(self.strings))
        tokens, mask, prefix = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3))
        for r in rows:
            for t, token in enumerate(self.strings[r]):
                tokens[r, t], mask[r, t], prefix[r, t] = token, 1, place[self.strings[r][:t]]
        self.register_buffer("tokens_RT", tokens)
        self.register_buffer("mask_RT", mask.bool())
        self.register_buffer("prefix_RT", prefix)

    @abstractmethod
    def prefix_logits(self) -> Tensor:
        """Logits of the next token after each of ``prefixes``, (number of prefixes, V)."""

    def logits(self) -> Tensor:
        """Logits over the vocabulary at each token of each response, (R, T, V); outside the mask they mean nothing."""
        return self.prefix_logits()[self.prefix_RT]

    def distributions(self) -> Tensor:
        """Log-probabilities over the vocabulary at each token of each response, (R, T, V)."""
        return self.logits().log_softmax(-1)

    def logps(self) -> tuple[Tensor, Tensor]:
        """Log-probability of every token of every response (R, T), differentiable, and the mask."""
        logps_RT = self.distributions().gather(-1, self.tokens_RT[..., None])[..., 0]
        return torch.where(self.mask_RT, logps_RT, 0.0), self.mask_RT

    def log_probs(self) -> Tensor:
        """Log-probability of every response, (R,); its exp sums to one."""
        return self.logps()[0].sum(-1)

    def gradient(self, value: Tensor) -> Tensor:
        """Gradient of a scalar by all parameters, as one vector; 0 for a parameter that it does not reach."""
        grads = torch.autograd.grad(value, list(self.parameters()), allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in grads])


class Tabular(EnumerablePolicy):
    """A table of logits, one row per prefix: it can be any distribution over the strings.

    Args:
        vocabulary: V, the end token included.
        length: tokens of the longest response; 1 makes every token a response.
        seed: of the random logits; the global stream is not touched.
        spread: their standard deviation.
        strings: the responses, where they are not all strings.
    """

    def __init__(
        self,
        vocabulary: int = 4,
        length: int = 1,
        seed: int = 0,
        spread: float = 1.0,
        strings: Sequence[tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__(vocabulary, length, strings)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(self.prefixes), vocabulary, generator=generator, dtype=torch.float64)
        self.table = nn.Parameter(spread * noise)

    def prefix_logits(self) -> Tensor:
        return self.table

    @torch.no_grad()
    def become(self, log_probs_R: Tensor) -> Tabular:
        """Set the table so that the responses have these log-probabilities (up to a constant); returns itself.

        The conditional of a token is the sum over the responses that go on with it.

        >>> wanted = Tabular(3, 2, seed=1).log_probs()
        >>> bool(torch.allclose(Tabular(3, 2, seed=2).become(wanted).log_probs(), wanted))
        True
        """
        for i, prefix in enumerate(self.prefixes):
            for token in range(self.vocabulary):
                path = (*prefix, token)
                goes_on = torch.tensor([s[: len(path)] == path for s in self.strings])
                self.table[i, token] = log_probs_R[goes_on].logsumexp(0)
        self.table.sub_(self.table.logsumexp(-1, keepdim=True))
        return self


class TinyTransformer(EnumerablePolicy):
    """One causal attention block and one hidden layer, some hundred parameters; prefixes share all of them.

    Arguments as ``Tabular``; ``width``: of the hidden states.
    """

    def __init__(
        self, vocabulary: int = 3, length: int = 3, seed: int = 0, spread: float = 0.5, width: int = 6
    ) -> None:
        super().__init__(vocabulary, length)
        generator = torch.Generator().manual_seed(seed)

        def matrix(rows: int, columns: int, scale: float) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(rows, columns, generator=generator, dtype=torch.float64))

        self.embed = matrix(vocabulary + 1, width, 1.0)  # one row more: the start, which stands for the prompt
        self.place = matrix(length, width, 1.0)
        self.attention = matrix(width, 3 * width, width**-0.5)
        self.up = matrix(width, 2 * width, width**-0.5)
        self.down = matrix(2 * width, width, (2 * width) ** -0.5)
        self.head = matrix(width, vocabulary, spread * width**-0.5)
        start = vocabulary
        padded = [(start, *p) + (start,) * (length - 1 - len(p)) for p in self.prefixes]
        self.register_buffer("inputs", torch.tensor(padded))
        self.register_buffer("last", torch.tensor([len(p) for p in self.prefixes]))

    def prefix_logits(self) -> Tensor:
        inputs, last = self.get_buffer("inputs"), self.get_buffer("last")
        hidden = self.embed[inputs] + self.place
        query, key, value = (hidden @ self.attention).chunk(3, -1)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        future = torch.ones(self.length, self.length, dtype=torch.bool).triu(1)
        hidden = hidden + scores.masked_fill(future, -math.inf).softmax(-1) @ value
        hidden = hidden + torch.tanh(hidden @ self.up) @ self.down
        return (hidden @ self.head)[torch.arange(len(last)), last]
