"""Kahneman-Tversky optimization."""

from prefzoo.algorithm import Algorithm, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.parts.prelude import RotatedBaseline
from prefzoo.parts.source import DatasetRows
from prefzoo.registry import Positive


@register_algorithm(paper="arXiv:2402.01306", recommended={"learning_rate": 1e-6, "rows_per_step": 64})
def kto(
    *,
    beta: Positive = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    baseline_rows: int | None = None,
) -> Algorithm:
    """Kahneman-Tversky optimization: single completions labelled good or bad, judged against a reference point.

        loss = w_D (1 - sigmoid(beta (r - z0)))  for desirable, w_U (1 - sigmoid(beta (z0 - r))) for undesirable rows
        r = log pi(y|x) / ref(y|x),   z0 = max(0, mean of r over mismatched prompts and completions)

    Args:
        beta: strength of the pull to the reference.
        desirable_weight, undesirable_weight: w_D and w_U; set them so that w_D n_D / (w_U n_U) is 1 to 4/3.
        baseline_rows: mismatched rows that z0 is estimated from; None: as many as the step has.

    Trains on unpaired data; pairs become one good and one bad row each, shuffled.

    Convention: z0 is estimated once for the whole optimizer batch, from each prompt with its neighbour's completion;
    TRL estimates it within each device's micro-batch, in file order.

    Source: Ethayarajh et al., arXiv:2402.01306, equation 8.

    Example::

        prefzoo.train("kto", model="my-model", dataset="thumbs.jsonl", output_dir="runs/kto")
    """
    loss = create_loss("kto", beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    return Algorithm(source=DatasetRows("unpaired"), prelude=RotatedBaseline(baseline_rows), loss=loss)
