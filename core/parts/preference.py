"""Any preference loss on sampled completions: the loss by its name, and the parts that make its rows."""

from __future__ import annotations

from typing import Any, Literal

from prefzoo.feedback.sources import read_call
from prefzoo.losses import Loss, create_loss
from prefzoo.parts.pairs import AllPairs, Desirable, Matches, RankedSamples, ScoreUnit, TopAgainstBottom
from prefzoo.parts.prelude import PRELUDES
from prefzoo.records import Pairs, Ranked, Unpaired
from prefzoo.registry import UsageError

Choice = Literal["extremes", "all", "first_round", "tournament"]


def loss_named(text: str, **given: Any) -> Loss:
    """The loss that a text names, with options in brackets where it has some; ``given``: options that are not None.

    >>> loss_named("simpo(gamma=1.0)", beta=None).options, loss_named("dpo", beta=0.2).options
    ({'gamma': 1.0}, {'beta': 0.2})
    """
    name, bracket, _ = text.partition("(")
    options: dict[str, Any] = {}
    if bracket:
        try:
            values, options = read_call(text)
        except UsageError as error:
            raise UsageError(f"loss={text!r}: options are written as name(option=value, option=value).") from error
        if values:
            raise UsageError(f"loss={text!r}: write each option as option=value; {values[0]!r} has no name.")
    for key, value in given.items():
        if value is None:
            continue
        if key in options:
            raise UsageError(f"loss={text!r} and {key}={value!r} say {key} twice; give one of them.")
        options[key] = value
    return create_loss(name.strip(), **options)


def compared(loss: Loss, pairs: Choice = "extremes", soft_labels: ScoreUnit | None = None) -> dict[str, Any]:
    """The parts of an algorithm that turn scored samples into the rows of this loss: pairs, labelled rows, rankings.

    For a loss of pairs, ``pairs`` says which: the best against the worst; all; or of those that meet in one round, or
    in a tournament. ``soft_labels``: the unit of the scores, where their probability is the label; None: the larger
    score wins.
    """
    how: dict[str, Any] = {} if soft_labels is None else {"unit": soft_labels, "soft": True}
    makers: dict[str, Any] = {
        "extremes": TopAgainstBottom(**how), "all": AllPairs(**how), "first_round": Matches(**how),
        "tournament": Matches(tournament=True, **how),
    }  # fmt: skip
    if pairs not in makers:
        raise UsageError(f"pairs is {pairs!r}; it must be one of {', '.join(makers)}.")
    if loss.entry.tags["writers"]:
        raise UsageError(
            f"loss {loss.name!r} compares the completions of two writers, whoever won, and these pairs are the better "
            f"and the worse one of a single writer; the algorithm {loss.name!r} samples both."
        )
    credit = {Pairs: makers[pairs], Unpaired: Desirable(), Ranked: RankedSamples()}.get(loss.family)
    if credit is None:
        raise UsageError(
            f"loss {loss.name!r} takes {loss.family.__name__}, and no preferences; choose a loss of pairs such as "
            "'dpo', of labelled completions such as 'kto', or of rankings such as 'pl_dpo'."
        )
    for option, without_effect in ((f"pairs={pairs!r}", pairs != "extremes"), (f"soft_labels={soft_labels!r}", how)):
        if loss.family is not Pairs and without_effect:
            raise UsageError(f"{option} has no effect on loss {loss.name!r}, which takes no pairs; leave it out.")
    prelude = next((PRELUDES[e]() for e in loss.extras if e in PRELUDES), None)
    return {"loss": loss, "credit": credit, "prelude": prelude}
