"""Regression of the implicit reward to an advantage that is known beforehand."""

from typing import Any

from prefzoo.algorithm import Algorithm, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.parts.optimal import OptimalAdvantage
from prefzoo.parts.options import SAMPLING, sampled
from prefzoo.parts.source import Sampler
from prefzoo.registry import Positive


@register_algorithm(
    paper="arXiv:2505.20686", recommended={"learning_rate": 1e-6}, shared={**SAMPLING, "group_size": 1}
)  # fmt: skip
def a2po(
    *, beta: Positive = 1e-3, value_temperature: Positive = 0.5, value_samples: int = 8, **sampling: Any
) -> Algorithm:
    """A*-PO: one completion per prompt is fitted to its advantage over the optimal value, which the reference tells.

        V*(x) = τ log mean_i exp(R(x, y_i) / τ),   y_1..y_N from the reference
        loss  = (β log π(y)/ref(y) - (R(x, y) - V*(x)))²,   y from the policy

    Args:
        beta: β, reward units per nat: strength of the pull to the reference.
        value_temperature: τ of the value. With τ = β the optimum is that of the KL-regularised reward; the paper has a
            larger one, as N samples do not reach the best answers that a small β asks for.
        value_samples: N.

    KL enters through the log-ratio to the reference, summed over the completion's tokens: the loss is 0 at the
    KL-regularised optimum.

    Convention: the reference's samples are drawn and scored beside the policy's at every step, so N + 1 completions are
    paid for each that is trained on; the paper and TRL draw them once for all prompts before the run, which is cheaper
    where prompts come back. Prompts that the reference never solves are not left out. Defaults are TRL's.

    Source: Brantley et al., Accelerating RL for LLM Reasoning with Optimal Advantage Regression, arXiv:2505.20686.

    Example::

        prefzoo.train("a2po", model="my-model", dataset="questions.jsonl", reward="exact", max_steps=100)
    """
    beside = (Sampler("reference", count=value_samples),)
    return Algorithm(
        **sampled(sampling, beside=beside), credit=OptimalAdvantage(value_temperature),
        loss=create_loss("a2po", beta=beta), count="row",
    )  # fmt: skip
