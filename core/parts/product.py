"""Products: how answers are made with what a run has trained, where its weights alone do not say it.

A product draws answers through :class:`Draw`, and is kept as ``final/decode.json`` beside the weights.
``prefzoo.generate`` and all that samples through it obey that file; whatever loads the weights alone knows nothing
of it.
"""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prefzoo.data.samples import Samples
from prefzoo.feedback import RewardSource, resolve_reward
from prefzoo.models.folders import find
from prefzoo.models.load import end_ids
from prefzoo.models.roles import Policy
from prefzoo.parts.condition import put_before
from prefzoo.parts.roles import REWARD
from prefzoo.registry import UsageError, suggest
from prefzoo.rollout import Decoder, Finish, Sampling, rollout_engine

FILE = "decode.json"
PRODUCTS: dict[str, type[Product]] = {}  # by the name of the class


@dataclass(frozen=True)
class Draw:
    """Samples answers, each a function of (weights, prompt, seed, its number); what a product is given to work with."""

    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    seed: int

    def __call__(self, prompts: Samples, n: int, decoder: Decoder | None = None) -> Samples:
        """``n`` completions of each prompt."""
        engine = rollout_engine(self.policy, end_ids(self.tokenizer, self.policy.model))
        return engine.generate(prompts, n, self.sampling, self.seed, decoder=decoder)


class Product:
    """A way to make answers; a subclass is a frozen dataclass, and is known under its name once it is imported.

    ``needs``: roles of the run that it goes on using.
    """

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def __init_subclass__(cls) -> None:
        PRODUCTS[cls.__name__] = cls

    def answer(self, draw: Draw, prompts: Samples, n: int) -> Samples:
        """``n`` answers to each prompt, prompt by prompt, with the prompts as they were given."""
        raise NotImplementedError

    def of_run(self, **made: Any) -> Product:
        """Itself with what the run has that it needs: ``reward``, as it was given and (``source``) as it was used, with
        ``reward_weights``; ``heads``."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """For ``decode.json``."""
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.init}  # type: ignore[arg-type]
        return {"product": type(self).__name__, **options}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any], folder: Path | None = None) -> Product:
        """What :meth:`to_dict` gave; ``folder`` is where it was found."""
        return cls(**facts)


def product_of(facts: Mapping[str, Any], folder: Path | None = None) -> Product:
    """The product of a ``decode.json``."""
    for module in pkgutil.iter_modules(importlib.import_module(__package__).__path__):  # products may stand beside us
        importlib.import_module(f"{__package__}.{module.name}")
    options = dict(facts)
    name = options.pop("product", None)
    if name not in PRODUCTS:
        raise UsageError(
            f"{FILE}: no product {name!r}{suggest(str(name), PRODUCTS)} Known: {', '.join(sorted(PRODUCTS))}; one of "
            "your own must be imported first."
        )
    try:
        return PRODUCTS[name].from_dict(options, folder)
    except TypeError as error:
        raise UsageError(f"{FILE}: {name} cannot be made of {options} ({error}).") from error


def read_product(source: str | Path, revision: str | None = None) -> Product | None:
    """The product of a model's folder or hub id; None: its weights."""
    file = find(source, FILE, revision)
    if file is None:
        return None
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise UsageError(f"{str(file)!r} cannot be read ({error}).") from error
    return product_of(facts, file.parent)


def write_product(product: Product, folder: Path) -> None:
    """Write ``decode.json``."""
    (folder / FILE).write_text(json.dumps(product.to_dict(), indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class BestOfN(Product):
    """Sample n answers, give the one that the reward likes best.

        y = argmax_i R(x, y_i),   y_1..y_n ~ pi(. | x)

    KL: not penalised, known: KL(best of n || pi) <= log n - (n - 1)/n nats per answer, with equality where no two
    answers have the same probability mass to tie on (a continuous reward); of a reward with ties c of probability P_c
    and F_c up to and with c,

        KL = sum_c (F_c^n - (F_c - P_c)^n) log((F_c^n - (F_c - P_c)^n) / P_c)

    Args:
        n: answers sampled for each that is given.
        choose: ``"best"``; ``"random"``: one of the n whatever its reward, the control of equal cost.
        finished: answers cut at the limit do not compete, unless all n are.
        reward, reward_weights: what ``prefzoo.train`` takes; None: the run's.

    Ties go to the first, which is any of them by chance, since samples are alike before they are scored. An answer
    without a reward (None) wins only where no other is left. Log-probabilities of an answer are the policy's own;
    the column ``decoding_kl`` is the bound.

    Source: Stiennon et al., arXiv:2009.01325; the bound: Beirami et al., arXiv:2401.01879.
    """

    n: int = 8
    choose: Literal["best", "random"] = "best"
    finished: bool = True
    reward: Any = None
    reward_weights: Any = None
    _source: dict[int, RewardSource] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UsageError(f"BestOfN: n is a number of answers of at least 1, got {self.n}.")
        if self.choose not in ("best", "random"):
            raise UsageError(f"BestOfN: choose is 'best' or 'random', got {self.choose!r}.")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({REWARD} if self.choose == "best" else ())

    @property
    def kl(self) -> float:
        """The bound on KL(best of n || pi), in nats per answer."""
        return best_of_n_kl(self.n) if self.choose == "best" else 0.0

    def of_run(
        self, *, reward: Any = None, reward_weights: Any = None, source: RewardSource | None = None, **made: Any
    ) -> BestOfN:
        if self.reward is not None or self.choose == "random":
            return self
        bound = replace(self, reward=reward, reward_weights=reward_weights)
        if source is not None:
            bound._source[0] = source
        return bound

    def to_dict(self) -> dict[str, Any]:
        given = self.reward if isinstance(self.reward, list | tuple) else [self.reward]
        named = [str(r) if isinstance(r, str | Path) else None for r in given]
        facts = super().to_dict() | {"reward": named if isinstance(self.reward, list | tuple) else named[0]}
        return facts if None not in named else {**facts, "reward": None, "reward_weights": None}

    def answer(self, draw: Draw, prompts: Samples, n: int) -> Samples:
        samples = draw(prompts, n * self.n)
        blocks = torch.arange(len(samples)).view(-1, self.n)
        if self.choose == "best":
            rewards = self._rewards(draw)
            scores_B = rewards(apart(samples, self.n) if getattr(rewards, "compares", False) else samples)
            cut_B = samples.columns["finish"] == Finish.LENGTH
            chosen = best_of(scores_B.view(-1, self.n), cut_B.view(-1, self.n) & self.finished)
            samples = replace(samples, columns={**samples.columns, "score": scores_B})
        else:  # samples of a prompt are alike before they are scored, so the first is a random one
            chosen = torch.zeros(len(blocks), dtype=torch.long)
        answers = samples.take(blocks.gather(1, chosen[:, None])[:, 0].numpy())
        return replace(answers, columns={**answers.columns, "decoding_kl": torch.full((len(answers),), self.kl)})

    def _rewards(self, draw: Draw) -> RewardSource:
        if 0 not in self._source:
            if self.reward is None:
                raise UsageError("best of n: what scores the answers is not known (a function has no place in a file); "
                                 "give reward=.")  # fmt: skip
            device = next(draw.policy.parameters()).device
            self._source[0] = resolve_reward(self.reward, draw.tokenizer, device, self.reward_weights)
        return self._source[0]


@dataclass(frozen=True)
class Prefix(Product):
    """Control words before every prompt, behind its BOS token if it has one.

    The answers' log-probabilities are those behind the words; the prompts that come back are without them.
    """

    text: str

    def answer(self, draw: Draw, prompts: Samples, n: int) -> Samples:
        ids = np.asarray(draw.tokenizer(self.text, add_special_tokens=False)["input_ids"], dtype=np.int32)
        asked = replace(prompts, prompts=put_before(prompts.prompts, ids, draw.tokenizer.bos_token_id))
        return replace(draw(asked, n), prompts=prompts.prompts)


def apart(samples: Samples, n: int) -> Samples:
    """Every ``n`` completions with a prompt of their own: a judge compares what stands under one prompt."""
    prompt_P = samples.prompt_B[::n]
    return replace(
        samples, prompts=samples.prompts.take(prompt_P), prompt_B=np.repeat(np.arange(len(prompt_P)), n),
        extra={k: [values[p] for p in prompt_P] for k, values in samples.extra.items()},
    )  # fmt: skip


def best_of(scores_PN: Tensor, last_PN: Tensor) -> Tensor:
    """Of each row the place of its best score, (P,), the first of equal ones; those marked ``last`` only where no other
    has a score, those without (NaN) only where none has.

    >>> nan = float("nan")
    >>> best_of(torch.tensor([[1.0, 3.0, 3.0], [5.0, nan, 2.0]]), torch.tensor([[False] * 3, [True, False, False]]))
    tensor([1, 2])
    """
    scores_PN = scores_PN.double()
    order = np.lexsort((-scores_PN.nan_to_num(0.0).numpy(), last_PN.numpy(), scores_PN.isnan().numpy()), axis=1)
    return torch.from_numpy(order[:, 0].copy())


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1)/n: the largest KL of best-of-n to the policy that it samples, in nats per answer.

    >>> round(best_of_n_kl(16), 4)
    1.8351
    """
    return math.log(n) - (n - 1) / n
