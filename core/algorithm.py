"""An algorithm is a composition: stages of parts that fit, checked before any model is loaded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from prefzoo.data.samples import Kind
from prefzoo.losses import LOSSES, Loss, create_loss
from prefzoo.losses.base import LossEntry
from prefzoo.parts.controllers import AdaptiveKL, FixedKL
from prefzoo.parts.count import Count, as_count
from prefzoo.parts.credit import GAE, BestOfK, GroupRelative, LeaveOneOut
from prefzoo.parts.feedback import Finished, Labels, MaskTruncated, Reward
from prefzoo.parts.prelude import PRELUDES, Prelude
from prefzoo.parts.reference import Moving, Start
from prefzoo.parts.roles import CRITIC, POLICY, REFERENCE, REWARD
from prefzoo.parts.source import DatasetRows, Rollouts
from prefzoo.records import (
    Likelihood,
    Pairs,
    PolicyGradient,
    Ranked,
    RankedScores,
    Ratings,
    Record,
    Scores,
    StepScores,
    Unpaired,
    Values,
)
from prefzoo.registry import Entry, Registry, UsageError, prefix_of, suggest

Source = DatasetRows | Rollouts
Feedback = Labels | Reward
Credit = GroupRelative | LeaveOneOut | GAE | BestOfK
Keep = Finished | MaskTruncated

# What a family is made from: the gift of the credit, or of the source where there is none.
TAKES: dict[type[Record], str] = {
    Pairs: "pairs",
    Scores: "pairs",
    Unpaired: "unpaired",
    Ranked: "rankings",
    RankedScores: "rankings",
    Ratings: "scored",
    StepScores: "steps",
    Likelihood: "completions",
    PolicyGradient: "advantages",
    Values: "advantages",
}
# The fields beyond log-probabilities and masks that the shared layer can fill in, where a loss declares that it needs
# them; a family that is not here is not trained yet.
FILLED: dict[type[Record], frozenset[str]] = {
    Pairs: frozenset({
        "margin_B", "probability_B", "weight_B", "chosen_log_sq_BT", "rejected_log_sq_BT", "chosen_kl_BT",
        "rejected_kl_BT", "prompt_logps_BT", "prompt_mask_BT",
    }),
    Scores: frozenset({"margin_B", "probability_B", "tie_B", "weight_B"}),
    Unpaired: frozenset({"baseline", "delta", "weight_B"}),
    Ranked: frozenset({"scores_PK", "weight_P"}),
    RankedScores: frozenset({"weight_P"}),
    Ratings: frozenset({"weight_B"}),
    StepScores: frozenset({"weight_B"}),
    Likelihood: frozenset({"scores_B", "weight_B"}),
    PolicyGradient: frozenset({"entropy_BT", "entropy_floor", "sampling_logps_BT"}),
    Values: frozenset(),
}  # fmt: skip
# Fields that only one kind of samples has; and what else a kind may be used as.
ONLY = {"scores_B": "scored"}
ALSO = {"scored": "completions"}
SCORED_BY_MODEL: tuple[type[Record], ...] = (Scores, RankedScores, Ratings, StepScores)  # what a reward model learns
CURES = {
    ("advantages", "rollouts"): "give a credit: GroupRelative(), LeaveOneOut() or GAE()",
    ("completions", "rollouts"): "give the credit BestOfK()",
    ("pairs", "advantages"): "pairs come from DatasetRows('pairs')",
    ("completions", "advantages"): "likelihood takes BestOfK() instead",
    ("scored", "completions"): "give DatasetRows('scored'), completions with their scores",
    ("advantages", "pairs"): "policy gradients need Rollouts() as the source",
}


@dataclass(frozen=True)
class Term:
    """A loss on rows, divided by a count, times a weight, training one role.

    ``rows``: ``"main"`` is what the stage's credit gives; ``"ptx"`` are rows of a demonstration data set beside it.
    """

    loss: Loss
    rows: str = "main"
    count: Count | str | None = None
    weight: float = 1.0
    trains: str = POLICY

    @property
    def counted(self) -> Count:
        return as_count(self.count if self.count is not None else self.loss.count)


@dataclass(frozen=True)
class Schedule:
    """For rollout sources: prompts per step, and how its samples are walked through.

    Each of ``inner_epochs`` passes is cut into ``minibatches`` optimizer steps, or into steps of ``minibatch_rows``.
    """

    prompts: int = 32
    inner_epochs: int = 1
    minibatches: int = 1
    minibatch_rows: int | None = None

    def __post_init__(self) -> None:
        if self.minibatch_rows is not None and self.minibatches != 1:
            raise UsageError("schedule: give minibatches or minibatch_rows, not both.")
        if min(self.prompts, self.inner_epochs, self.minibatches, self.minibatch_rows or 1) < 1:
            raise UsageError(f"schedule: all numbers must be at least 1; got {self}.")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training loop: samples, what they are worth, and the terms that move the models."""

    source: Source
    terms: tuple[Term, ...]
    feedback: Feedback = field(default_factory=Labels)
    keep: Keep | None = None
    credit: Credit | None = None
    prelude: Prelude | None = None
    schedule: Schedule = field(default_factory=Schedule)
    controllers: Mapping[str, FixedKL | AdaptiveKL] = field(default_factory=dict)
    reference: Start | Moving = field(default_factory=Start)
    critic_from: str = POLICY
    pooling: str = "last"

    def __post_init__(self) -> None:
        if not self.terms:
            raise UsageError("a stage needs at least one term.")
        gift = self.source.gives if self.credit is None else self.credit.gives
        for term in self.terms:
            check_filled(term.loss)
            have = "completions" if term.rows == "ptx" else gift
            need = takes(term.loss)
            if need not in (have, ALSO.get(have)):
                cure = CURES.get((need, have), f"choose parts that give {need!r}")
                maker = (
                    f"credit {type(self.credit).__name__}" if self.credit else f"source {type(self.source).__name__}"
                )
                raise UsageError(f"loss {term.loss.name!r} takes {need}, but {maker} gives {have}; {cure}.")
            for wanted in set(term.loss.extras) & set(PRELUDES):
                if self.prelude is None or self.prelude.gives != wanted:
                    part = PRELUDES[wanted].__name__
                    raise UsageError(f"loss {term.loss.name!r} needs a {wanted}; give prelude={part}().")
            if term.loss.family is Values and term.trains != CRITIC:
                raise UsageError(f"loss {term.loss.name!r} trains the critic; write Term(..., trains='critic').")
        if isinstance(self.source, Rollouts):
            if isinstance(self.feedback, Labels):
                raise UsageError("rollouts have no labels; give feedback=Reward() or Verifier().")
            if self.credit and self.source.group_size < self.credit.smallest_group:
                raise UsageError(
                    f"credit {type(self.credit).__name__} compares samples of one prompt: group_size must be at least "
                    f"{self.credit.smallest_group}, got {self.source.group_size}."
                )
        elif self.credit is not None or not isinstance(self.feedback, Labels) or self.keep is not None:
            raise UsageError("rows of a data set carry their labels; credit, keep and reward belong to Rollouts().")
        if isinstance(self.reference, Moving) and REFERENCE not in self.needs:
            raise UsageError("a moving reference has no effect here: no part of this stage has a reference.")
        if self.controllers and REFERENCE not in self.needs:
            raise UsageError("controller 'kl' follows the KL to the reference, but no part of this stage has one.")
        adaptive = self.credit.kl if isinstance(self.credit, GAE) and isinstance(self.credit.kl, AdaptiveKL) else None
        if adaptive is not None and self.controllers.get("kl") is not adaptive:
            raise UsageError("nobody updates the adaptive KL of GAE; give it as controllers={'kl': ...} too.")
        if self.uses_critic and not any(t.trains == CRITIC for t in self.terms):
            raise UsageError(
                "credit GAE needs a critic that learns; add Term(create_loss('clipped_value'), trains='critic')."
            )

    @property
    def trains(self) -> tuple[str, ...]:
        """Roles that a term moves."""
        return tuple(dict.fromkeys(t.trains for t in self.terms))

    @property
    def needs(self) -> frozenset[str]:
        """Roles that must be there: the shared layer loads exactly these."""
        parts = [p.needs for p in (self.feedback, self.credit, self.prelude) if p is not None]
        reference = frozenset({REFERENCE}) if any(t.loss.reference for t in self.terms) else frozenset()
        return frozenset().union(*parts, reference, self.trains)

    @property
    def uses_critic(self) -> bool:
        return self.credit is not None and CRITIC in self.credit.needs

    @property
    def on_policy(self) -> bool:
        return isinstance(self.source, Rollouts)


def untrained(loss: Loss) -> str | None:
    """Why the shared layer cannot train with this loss; None where it can."""
    if loss.family not in FILLED:
        known = ", ".join(f.__name__ for f in FILLED)
        return f"takes {loss.family.__name__} records, which no source gives yet; there are sources of {known}"
    missing = [e for e in loss.extras if e not in FILLED[loss.family]]
    if missing:
        return f"needs {missing[0]}, which the data layer does not fill in yet"
    return None


def takes(loss: Loss) -> str:
    """What must be given to a loss: that of its family, or what alone has a field that it needs."""
    return next((ONLY[e] for e in loss.extras if e in ONLY), TAKES[loss.family])


def check_filled(loss: Loss) -> None:
    """Refuse a loss whose records nobody makes: it is a function to call, and no term of a run."""
    why = untrained(loss)
    if why is not None:
        raise UsageError(f"loss {loss.name!r} {why}. It can be called with records of your own (prefzoo.losses).")


class Algorithm:
    """Stages, written flat when there is one: ``Algorithm(source=..., loss=..., count=...)`` or ``terms=(...)``."""

    def __init__(
        self,
        *,
        stages: tuple[Stage, ...] = (),
        loss: Loss | None = None,
        count: Count | str | None = None,
        **one_stage: Any,
    ) -> None:
        if stages and (loss is not None or one_stage):
            raise UsageError("Algorithm: give stages, or the parts of a single stage, not both.")
        if not stages:
            if loss is not None:
                role = REWARD if loss.family in SCORED_BY_MODEL else POLICY
                one_stage["terms"] = (*one_stage.get("terms", ()), Term(loss, count=count, trains=role))
            known = Stage.__dataclass_fields__
            for key in one_stage:
                if key not in known:
                    raise UsageError(f"Algorithm has no part {key!r}{suggest(key, known)} Parts: {', '.join(known)}.")
            stages = (Stage(**one_stage),)
        self.stages = stages
        self.name = "unnamed"
        self.options: dict[str, Any] = {}
        self.recommended: dict[str, Any] = {}
        self.sources: dict[str, str] = {}  # registered functions this was made of -> hash of their source

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(s.needs for s in self.stages))

    @property
    def data(self) -> Kind:
        """The kind of rows its first stage is trained on."""
        return self.stages[0].source.data

    @property
    def trains_reward(self) -> bool:
        """Whether its product is a reward model instead of a policy."""
        return REWARD in self.stages[-1].trains

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.options.items())
        return f"<algorithm {self.name}({options}): {' -> '.join(_describe(s) for s in self.stages)}>"


def _describe(stage: Stage) -> str:
    terms = " + ".join(f"{t.weight:g} {t.loss.name}/{t.counted.unit}->{t.trains}" for t in stage.terms)
    parts = [type(p).__name__ for p in (stage.source, stage.feedback, stage.keep, stage.credit) if p is not None]
    return f"{' x '.join(parts)} x {{{terms}}}"


ALGORITHMS = Registry("algorithm", provider=("prefzoo.algos", "prefzoo.spellings"))


def register_algorithm(
    function: Callable[..., Algorithm] | None = None,
    /,
    *,
    name: str | None = None,
    paper: str | None = None,
    aliases: tuple[str, ...] = (),
    recommended: Mapping[str, Any] | None = None,
    **tags: Any,
) -> Any:
    """Register a function that returns an :class:`Algorithm` under its name, or the ``name`` given.

    Its keyword-only arguments are the configuration of the mathematics; ``recommended`` are values for
    :class:`~prefzoo.training.TrainConfig` that a user's own values override. ``spelling=`` is a function that turns
    a run's options, written as another library writes them, into ours (:mod:`prefzoo.spellings.trl`).
    """
    if function is None:
        return lambda f: register_algorithm(
            f, name=name, paper=paper, aliases=aliases, recommended=recommended, **tags
        )  # fmt: skip
    return ALGORITHMS.register(
        function, name=name, paper=paper, aliases=aliases, recommended=dict(recommended or {}), **tags
    )


# How a policy-gradient loss samples where it is an algorithm of its own; any composition may do otherwise.
SAMPLING: dict[str, Any] = {
    "group_size": 8, "prompts_per_step": 32, "inner_epochs": 1, "minibatches": 1, "temperature": 1.0,
    "max_new_tokens": 128,
}  # fmt: skip


class SampledLoss(LossEntry):
    """A policy-gradient loss as an algorithm: it also takes the options of its sampling."""

    @functools.cached_property
    def own_options(self) -> dict[str, Any]:
        own = super().own_options
        return {**own, **{k: v for k, v in SAMPLING.items() if k not in own}}

    @property
    def hints(self) -> dict[str, Any]:
        return {**{k: type(v) for k, v in SAMPLING.items()}, **super().hints}


def _of_loss(loss: Loss, sampling: Mapping[str, Any]) -> Algorithm:
    """A registered loss is at once an algorithm of the same name, through its family's default composition."""
    if loss.family is Values:
        raise UsageError(
            f"loss {loss.name!r} trains a critic; it is a term of an algorithm (see ppo), not one of its own."
        )
    check_filled(loss)
    prelude = next((PRELUDES[e]() for e in loss.extras if e in PRELUDES), None)
    if loss.family is PolicyGradient:
        s = {**SAMPLING, **sampling}
        return Algorithm(
            source=Rollouts(s["group_size"], temperature=s["temperature"], max_new_tokens=s["max_new_tokens"]),
            feedback=Reward(), credit=GroupRelative(), loss=loss, prelude=prelude,
            schedule=Schedule(s["prompts_per_step"], s["inner_epochs"], s["minibatches"]),
        )  # fmt: skip
    return Algorithm(source=DatasetRows(cast(Kind, takes(loss))), loss=loss, prelude=prelude)


def is_algorithm(entry: LossEntry) -> bool:
    """Whether a loss is an algorithm of its own, and not only a term, or a function of records that nobody makes."""
    loss = Loss(entry)
    return loss.family is not Values and untrained(loss) is None


def algorithm_entry(name: str) -> Entry:
    """The entry behind an algorithm's name: a composition, or a loss."""
    if not isinstance(name, str):
        raise UsageError(f"algorithm: expected a name or an Algorithm, got {type(name).__name__}.")
    if name not in ALGORITHMS and name in LOSSES:
        entry = LOSSES.entry(name)
        if entry.tags["family"] is PolicyGradient:
            return SampledLoss(entry.name, entry.function, entry.paper, entry.aliases, entry.tags)
        return entry
    if name not in ALGORITHMS:
        raise ALGORITHMS.unknown(name, list_algorithms(f"{prefix_of(name)}*"))
    return ALGORITHMS.entry(name)


def create_algorithm(name: str, /, **options: Any) -> Algorithm:
    """The algorithm of that name; an unknown name or option raises with the nearest.

    >>> create_algorithm("dpo", beta=0.2).needs == {"policy", "reference"}
    True
    """
    entry = algorithm_entry(name)
    entry.check_options(options, "algorithm")
    if entry.name in ALGORITHMS:
        algorithm = entry.function(**options)
    else:
        known = LOSSES.entry(entry.name).options
        loss = create_loss(entry.name, **{k: v for k, v in options.items() if k in known})
        algorithm = _of_loss(loss, {k: v for k, v in options.items() if k not in known})
    algorithm.name = entry.name
    algorithm.options = {**entry.own_options, **options}
    algorithm.recommended = dict(entry.tags["recommended"])
    algorithm.sources = {entry.name: entry.source_hash()}
    for term in (t for stage in algorithm.stages for t in stage.terms):
        algorithm.sources[f"loss:{term.loss.name}"] = term.loss.entry.source_hash()
        algorithm.sources |= {f"modifier:{m.name}": m.source_hash() for m, _ in term.loss.modifiers}
    return algorithm


def list_algorithms(pattern: str = "*") -> list[str]:
    """Names of all algorithms that match a shell pattern: compositions, and losses with a default composition."""
    losses = [n for n in LOSSES.names(pattern) if is_algorithm(cast(LossEntry, LOSSES.entry(n)))]
    return sorted({*ALGORITHMS.names(pattern), *losses})


__all__ = [
    "ALGORITHMS", "Algorithm", "Schedule", "Stage", "Term", "algorithm_entry", "create_algorithm", "list_algorithms",
    "register_algorithm", "replace",
]  # fmt: skip
