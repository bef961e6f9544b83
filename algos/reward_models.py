"""Reward modelling: rewards of whole answers, and of the steps of a solution."""

from collections.abc import Mapping
from typing import Any, Literal

from prefzoo.algorithm import Algorithm, register_algorithm, takes
from prefzoo.losses import LOSSES, create_loss
from prefzoo.parts.source import DatasetRows
from prefzoo.records import RankedScores, Ratings, Scores, StepScores
from prefzoo.registry import UsageError

WHOLE = (Scores, RankedScores, Ratings)  # the families of losses that read one reward per answer


@register_algorithm(paper="arXiv:2203.02155", aliases=("rm",), recommended={"learning_rate": 1e-5})
def reward_model(
    *, loss: str = "bradley_terry", loss_options: Mapping[str, Any] | None = None, centering: float = 0.0,
    pooling: Literal["last", "mean"] = "last",
) -> Algorithm:  # fmt: skip
    """A reward model from feedback: the policy's trunk with a scalar head, fitted by a likelihood of that feedback.

        loss = - log sigmoid(r(x, y_w) - r(x, y_l) - m) + centering (r(x, y_w) + r(x, y_l))^2        (bradley_terry)

    Args:
        loss: any loss of scores. Of pairs: ``bradley_terry``, ``log_exp``; with ties (column ``tie``) ``davidson``,
            ``rao_kupper``. Of rankings: ``plackett_luce``, ``all_pairs``. Of rated answers: ``reward_regression``. Or
            one that you registered.
        loss_options: options of that loss by name, ``{nu: 2}`` on the command line.
        centering: weight of the squared sum of the two rewards, which keeps rewards near zero; of ``bradley_terry``.
        pooling: read the reward from the last token's state, or from the mean over the completion's tokens. Tiny models
            learn better with the mean; ``last`` is what sequence classifiers do.

    Convention: m is the data's column ``margin``, in units of the reward, 0 where there is none; Llama 2 takes it from
    how clear the preference was, 1, 2/3, 1/3 and 0, or 3, 2, 1 and 0. No KL enters here.

    Source: Ouyang et al., arXiv:2203.02155, equation 1; the margin: Touvron et al., arXiv:2307.09288, equation 2;
    centering: Eisenstein et al., arXiv:2312.09244; the learning rate: ours, for small models.

    Example::

        prefzoo.train("reward_model", model="my-model", dataset="pairs.jsonl.gz", output_dir="runs/rm")
        prefzoo.train("grpo", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final")
    """
    family, options = LOSSES.entry(loss).tags["family"], loss_options or {}
    if family is StepScores:
        raise UsageError(f"reward_model, option 'loss': {loss!r} scores steps; take 'process_reward_model'.")
    if family not in WHOLE:
        known = ", ".join(n for n in LOSSES.names() if LOSSES.entry(n).tags["family"] in WHOLE)
        raise UsageError(f"reward_model, option 'loss': {loss!r} reads no rewards of answers; those that do: {known}.")
    if not isinstance(options, Mapping) or "centering" in options:
        raise UsageError(
            "reward_model, option 'loss_options': expected options of the loss by name, such as {'nu': 2.0}, but for "
            f"centering, which is an option of its own; got {options!r}."
        )
    if centering or loss == "bradley_terry":
        options = {"centering": centering, **options}
    made = create_loss(loss, **options)
    return Algorithm(source=DatasetRows(takes(made)), loss=made, pooling=pooling)  # type: ignore[arg-type]


@register_algorithm(paper="arXiv:2305.20050", aliases=("prm",), recommended={"learning_rate": 1e-5})
def process_reward_model(*, weigh: Literal["steps", "solutions"] = "steps") -> Algorithm:
    """A reward model of steps: after each step of a solution, the probability that the step is right.

        loss = mean over steps of - y log sigmoid(z) - (1 - y) log sigmoid(-z),   z read at the step's last token

    Trains on stepwise data: ``prompt``, ``completions`` (the steps) and ``labels`` (true, false or a share).

    Args:
        weigh: every step alike, or every solution alike: then the mean is over a solution's steps first.

    Convention: one logit per step, where the paper's model says one of two or three words (of which *neutral* is here
    a label of 1/2). Labels after the first mistake mean little; leave these steps out of the data. As a reward
    it is given as ``steps(runs/prm)``: the product of the steps' probabilities, or their minimum. No KL enters here.

    Source: Lightman et al., Let's Verify Step by Step, arXiv:2305.20050; shares of completions that succeed as labels:
    Wang et al., Math-Shepherd, arXiv:2312.08935; the learning rate: ours, for small models.

    Example::

        prefzoo.train("process_reward_model", model="my-model", dataset="steps.jsonl", output_dir="runs/prm")
    """
    loss = create_loss("process_reward")
    return Algorithm(source=DatasetRows("steps"), loss=loss, count={"steps": "token", "solutions": "row"}[weigh])
