"""Identity preference optimization."""

from prefzoo.algorithm import Algorithm, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.parts.source import DatasetRows
from prefzoo.registry import Positive


@register_algorithm(paper="arXiv:2310.12036", recommended={"learning_rate": 1e-6})
def ipo(*, beta: Positive = 0.1) -> Algorithm:
    """Identity preference optimization, per token: regress the difference of mean log-ratios on 1 / (2 beta).

        loss = (mean_t log pi/ref (y_w) - mean_t log pi/ref (y_l) - 1 / (2 beta))^2

    Args:
        beta: the paper's tau, on the scale of one token: a gap of 1/(2 beta) nats *per token* is aimed at.

    Convention: means over tokens, the authors' later form and TRL's ``ipo``. The paper and the original code sum:
    that is ``ipo_sum``, and the same beta means another thing there (a gap over the whole completion).

    Source: Azar et al., arXiv:2310.12036, equation 17.

    Example::

        prefzoo.train("ipo", model="my-model", dataset="pairs.jsonl.gz", output_dir="runs/ipo", beta=0.1)
    """
    return Algorithm(source=DatasetRows("pairs"), loss=create_loss("ipo", beta=beta))
