"""Presets of single completions, labelled good or bad."""

from prefzoo.algorithm import Algorithm, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.parts.offline import ClassBalance
from prefzoo.parts.prelude import ClassMidpoint, RunningMean
from prefzoo.parts.source import DatasetRows
from prefzoo.registry import Positive


@register_algorithm(paper="arXiv:2404.04656", recommended={"learning_rate": 5e-7, "rows_per_step": 64})
def bco(*, beta: Positive = 0.1, running: bool = True, balanced: bool = True) -> Algorithm:
    """Binary classifier optimization: a classifier of good against bad whose logit is the shifted implicit reward.

        loss = mean over good of - log σ(β (s - δ)) + mean over bad of - log σ(-β (s - δ)),   s = log π(y)/ref(y)
        δ = midpoint of the two classes' mean s, averaged over the batches so far

    Args:
        beta: strength of the pull to the reference, per nat.
        running: δ is the paper's running average; False: the midpoint of each batch alone.
        balanced: the two class means are added, whatever the number of rows in each, by weights n / n_class of the
            whole data; False: one mean over all rows.

    Trains on unpaired data; pairs become one good and one bad row each. KL enters by the log-ratio to the reference,
    summed over tokens.

    Convention: δ is in nats (the paper's is β δ) and is measured before each step over the whole optimizer batch; its
    average weighs batches by their rows and is kept in checkpoints. The class weights are those of all the data, so
    that a batch with few rows of one class is not blown up. The density ratio for classes with different prompts
    (``density_ratio_weights``) needs a classifier of prompts: give its weights in the column ``weight``.

    Source: Jung et al., Binary Classifier Optimization for Large Language Model Alignment, arXiv:2404.04656.

    Example::

        prefzoo.train("bco", model="my-model", dataset="thumbs.jsonl")
    """
    shift = RunningMean("delta") if running else None
    return Algorithm(
        source=DatasetRows("unpaired"), credit=ClassBalance() if balanced else None,
        prelude=ClassMidpoint(shift), controllers={} if shift is None else {"delta": shift},
        loss=create_loss("bco", beta=beta),
    )  # fmt: skip
