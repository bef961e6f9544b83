"""Decoding by the advantages of a Q-learner: the product of ``ilql``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from prefzoo.data.samples import Samples
from prefzoo.models.heads import QHeads, load_heads
from prefzoo.parts.product import Draw, Product
from prefzoo.parts.roles import HEADS
from prefzoo.registry import UsageError
from prefzoo.rollout import Next

FOLDER = "heads"  # beside the policy's weights


@dataclass(frozen=True)
class AdvantageDecoder:
    """Logits plus β times the advantage of every token: p(v) ∝ policy(v) exp(β (min(slow Q1, slow Q2)(v) - V))."""

    other: QHeads
    beta: float

    def __call__(self, here: Next) -> Tensor:
        assert here.other_RV is not None
        return here.logits_RV.float() + self.beta * here.other_RV.float()


@dataclass(frozen=True)
class AdvantageDecoding(Product):
    """The policy steered by the heads of a Q-learner, which read along.

        p(v) ∝ policy(v) exp(β (min(slow Q1, slow Q2)(v) - V)),   then temperature and top-p

    Args:
        beta: β, per unit of the score. 0: the policy alone; large: the token of the largest Q.

    KL: not penalised; β holds the answers to the policy token by token, and the same β changes more where Q differ
    more. The heads have a model of their own, so decoding costs twice the policy's.

    Source: Snell et al. (ILQL), arXiv:2206.11871, section 5.
    """

    beta: float = 1.0
    _heads: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.beta >= 0:
            raise UsageError(f"AdvantageDecoding: beta is at least 0, got {self.beta:g}.")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({HEADS})

    def of_run(self, *, heads: QHeads | None = None, **made: Any) -> AdvantageDecoding:
        bound = AdvantageDecoding(self.beta)
        bound._heads["found"] = heads
        return bound

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any], folder: Path | None = None) -> AdvantageDecoding:
        made = cls(**facts)
        made._heads["folder"] = None if folder is None else folder / FOLDER
        return made

    def answer(self, draw: Draw, prompts: Samples, n: int) -> Samples:
        if self.beta == 0:
            return draw(prompts, n)
        if self._heads.get("found") is None:
            if self._heads.get("folder") is None:
                raise UsageError("decoding by advantages needs the heads of the run that trained them ('ilql').")
            device = next(draw.policy.parameters()).device
            self._heads["found"] = load_heads(self._heads["folder"]).to(device)
        return draw(prompts, n, AdvantageDecoder(self._heads["found"], self.beta))
