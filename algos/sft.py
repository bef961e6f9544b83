"""Supervised fine-tuning."""

from prefzoo.algorithm import Algorithm, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.parts.source import DatasetRows


@register_algorithm(recommended={"learning_rate": 2e-5})
def sft() -> Algorithm:
    """Supervised fine-tuning: make the demonstrations likelier.

        loss = - sum over completion tokens of log pi(y_t | x, y_<t) / number of completion tokens

    Trains on prompt-completion data; of preference data it takes the chosen side, of unpaired data the desirable rows.

    Convention: prompt tokens carry no loss, and the mean is over all tokens of the optimizer batch, so that long
    answers weigh as much as their length; TRL divides within each micro-batch.

    Example::

        prefzoo.train("sft", model="my-model", dataset="demonstrations.jsonl")
    """
    return Algorithm(source=DatasetRows("completions"), loss=create_loss("sft"))
