"""Reward modelling."""

from typing import Literal

from prefzoo.algorithm import Algorithm, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.parts.source import DatasetRows


@register_algorithm(paper="arXiv:2203.02155", aliases=("rm",), recommended={"learning_rate": 1e-5})
def reward_model(*, centering: float = 0.0, pooling: Literal["last", "mean"] = "last") -> Algorithm:
    """A reward model from pairs: the policy's trunk with a scalar head, fitted by Bradley-Terry likelihood.

        loss = - log sigmoid(r(x, y_w) - r(x, y_l)) + centering (r(x, y_w) + r(x, y_l))^2

    Args:
        centering: weight of the squared sum of the two rewards, which keeps rewards near zero.
        pooling: read the reward from the last token's state, or from the mean over the completion's tokens. Tiny models
            learn better with the mean; ``last`` is what sequence classifiers do.

    Source: Ouyang et al., arXiv:2203.02155, equation 1; centering: Eisenstein et al., arXiv:2312.09244.

    Example::

        prefzoo.train("reward_model", model="my-model", dataset="pairs.jsonl.gz", output_dir="runs/rm")
        prefzoo.train("grpo", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final")
    """
    loss = create_loss("bradley_terry", centering=centering)
    return Algorithm(source=DatasetRows("pairs"), loss=loss, pooling=pooling)
