"""Direct preference optimization."""

from prefzoo.algorithm import Algorithm, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.parts.source import DatasetRows
from prefzoo.registry import Positive


@register_algorithm(paper="arXiv:2305.18290", recommended={"learning_rate": 1e-6})
def dpo(*, beta: Positive = 0.1) -> Algorithm:
    """Direct preference optimization: the Bradley-Terry likelihood of the pairs under the policy's own implicit reward.

        loss = - log sigmoid(beta (log pi(y_w)/ref(y_w) - log pi(y_l)/ref(y_l)))

    Args:
        beta: strength of the pull to the reference; 1/beta is the temperature of the implicit reward.

    The reference is the start model, its log-probabilities computed once before the first step. Learning rate 1e-6
    (TRL) suits full fine-tuning of models of a billion parameters; tiny models want 1e-4 to 2e-4.

    Known behaviour: log-probabilities of *both* sides usually fall, the rejected ones faster; watch ``logps/chosen``,
    and lower the learning rate or add a likelihood term where answers degrade.

    Source: Rafailov et al., arXiv:2305.18290, equation 7.

    Example::

        prefzoo.train("dpo", model="my-model", dataset="pairs.jsonl.gz", output_dir="runs/dpo", beta=0.1)
    """
    return Algorithm(source=DatasetRows("pairs"), loss=create_loss("dpo", beta=beta))
