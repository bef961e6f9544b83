"""An algorithm is a composition: stages of parts that fit, checked before any model is loaded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

from torch import Tensor

from prefzoo.data.samples import Kind, Samples
from prefzoo.losses import LOSSES, Loss, create_loss
from prefzoo.losses.base import LossEntry
from prefzoo.parts.controllers import AdaptiveKL, Controller
from prefzoo.parts.count import Count, as_count
from prefzoo.parts.credit import GroupRelative
from prefzoo.parts.feedback import Labels, Unjudged
from prefzoo.parts.offline import ReturnAbove
from prefzoo.parts.options import SAMPLING, sampled
from prefzoo.parts.prelude import PRELUDES, Prelude
from prefzoo.parts.reference import EachRound, Moving, Start
from prefzoo.parts.replay import Replay
from prefzoo.parts.roles import HEADS, POLICY, REFERENCE, REWARD, TEACHER, Roles, critic_of_role
from prefzoo.parts.schedule import Schedule
from prefzoo.parts.source import DatasetRows, Rollouts
from prefzoo.parts.update import TrustRegion
from prefzoo.records import (
    Distribution,
    Heads,
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


class Feedback(Protocol):
    """Who says what is good: scores (B,) of completions, (B, K) of several objectives, NaN where nobody said any.

    One with ``revises = True`` changes the completions first: ``revise(samples, roles) -> Samples``; its
    ``measure(before, after)``, where it has it, says what the log is to say. ``check(source)``, where it has it,
    refuses a reward that cannot serve.
    """

    @property
    def needs(self) -> frozenset[str]: ...


class Keep(Protocol):
    """Which samples stay. ``refill``, where it has one: how often prompts are sampled anew while some are missing."""

    def __call__(self, samples: Samples, scores_B: Tensor) -> tuple[Samples, Tensor]: ...


class Credit(Protocol):
    """What each sample or token deserves: scored completions in, what ``gives`` says out.

    Tokens that are there: ``old_logps``; of the roles in ``needs`` also ``ref_logps``, ``teacher_logps``, ``values``.
    ``columns``, where it has them: the numbers that it gives to each row (``"margin"``, ``"probability"``).
    ``measure(before, scores_B, after)``, where it has it: what the log is to say, by name (shares that were left out).
    """

    @property
    def gives(self) -> str: ...

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def smallest_group(self) -> int: ...

    def __call__(self, samples: Samples, scores_B: Tensor) -> Samples: ...


class Condition(Protocol):
    """Words before a prompt that say how good the answer is to be: :mod:`prefzoo.parts.condition`."""

    def best(self, prompts: Samples, roles: Roles) -> Samples:
        """The prompts with the word of the best level before them: what is sampled from."""
        ...

    def marked(self, samples: Samples, roles: Roles) -> Samples:
        """Each row with the word of its own level (column ``level``) before its prompt: what is trained on."""
        ...

    def of_rows(self, samples: Samples, roles: Roles) -> Samples:
        """Rows of a data set, marked by their labels or scores."""
        ...

    def room(self, tokenizer: Any) -> int:
        """How many tokens it needs before a prompt."""
        ...


class Product(Protocol):
    """How answers are made with what was trained: :mod:`prefzoo.parts.product`."""

    def of_run(self, **made: Any) -> Any: ...


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
    Distribution: "completions",
    Heads: "scored",
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
    Likelihood: frozenset({"scores_B", "advantages_BT", "weight_B"}),
    PolicyGradient: frozenset({"entropy_BT", "entropy_floor", "sampling_logps_BT"}),
    Values: frozenset(),
    Distribution: frozenset(),
    Heads: frozenset({"q1_lse_BT", "q2_lse_BT"}),
}  # fmt: skip
# Fields that only one kind of samples has; and what else a kind may be used as.
ONLY = {"scores_B": "scored", "advantages_BT": "advantages"}
ALSO = {"scored": "completions", "advantages": "completions", "pairs": "unpaired"}
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


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training loop: samples, what they are worth, and the terms that move the models."""

    source: Source
    terms: tuple[Term, ...]
    feedback: Feedback = field(default_factory=Labels)
    keep: Keep | None = None
    replay: Replay | None = None
    credit: Credit | None = None
    condition: Condition | None = None
    prelude: Prelude | None = None
    schedule: Schedule = field(default_factory=Schedule)
    controllers: Mapping[str, Controller] = field(default_factory=dict)
    reference: Start | Moving = field(default_factory=Start)
    update: TrustRegion | None = None
    critic_from: str = POLICY
    pooling: str = "last"
    polyak: float = 0.005  # of the slow Q of role "heads"

    def __post_init__(self) -> None:
        if not self.terms:
            raise UsageError("a stage needs at least one term.")
        for term in self.terms:
            self._check_term(term)
        if self.gives == "advantages" and not any(takes(t.loss) == self.gives for t in self.terms):
            loss, part = self.terms[0].loss, type(self.credit).__name__
            cure = CURES.get((takes(loss), self.gives), "choose another credit")
            raise UsageError(f"credit {part} gives advantages, which loss {loss.name!r} does not take; {cure}.")
        if isinstance(self.source, Rollouts):
            self._check_rollouts(self.source)
        else:
            self._check_rows(self.source)
        if isinstance(self.reference, Moving) and REFERENCE not in self.needs:
            raise UsageError("a moving reference has no effect here: no part of this stage has a reference.")
        for name, controller in self.controllers.items():
            if controller.follows == "kl" and REFERENCE not in self.needs:
                raise UsageError(
                    f"controller {name!r} follows the KL to the reference, but no part of this stage has one."
                )
        adaptive = getattr(self.credit, "kl", None)
        if isinstance(adaptive, AdaptiveKL) and adaptive not in self.controllers.values():
            part = type(self.credit).__name__
            raise UsageError(f"nobody updates the adaptive KL of {part}; give it as controllers={{'kl': ...}} too.")
        for critic in self.critics:
            if not any(t.trains == critic for t in self.terms):
                part = type(self.credit).__name__
                raise UsageError(
                    f"credit {part} needs a critic that learns; add Term(create_loss('clipped_value'), "
                    f"trains={critic!r})."
                )

    @property
    def gives(self) -> str:
        """What its terms on ``main`` rows are made from."""
        if self.credit is not None:
            return self.credit.gives
        marked = self.condition is not None and not self.on_policy  # what is bad is told apart, so all may be imitated
        return "completions" if marked or isinstance(self.feedback, Unjudged) else self.source.gives

    def _check_term(self, term: Term) -> None:
        check_filled(term.loss)
        have = "completions" if term.rows == "ptx" else self.gives
        need = takes(term.loss)
        rows = self.source.gives if have == self.gives and isinstance(self.source, DatasetRows) else have
        if need not in (have, ALSO.get(have), rows):
            cure = CURES.get((need, have), f"choose parts that give {need!r}")
            maker = f"credit {type(self.credit).__name__}" if self.credit else f"source {type(self.source).__name__}"
            raise UsageError(f"loss {term.loss.name!r} takes {need}, but {maker} gives {have}; {cure}.")
        for wanted in set(term.loss.extras) & set(PRELUDES):
            if self.prelude is None or self.prelude.gives != wanted:
                part = PRELUDES[wanted].__name__
                raise UsageError(f"loss {term.loss.name!r} needs a {wanted}; give prelude={part}().")
        critic = critic_of_role(term.trains) is not None
        if (term.loss.family is Values) != critic:
            what = "trains the critic; write Term(..., trains='critic')" if not critic else "does not train a critic"
            raise UsageError(f"loss {term.loss.name!r} {what}.")
        if (term.loss.family is Heads) != (term.trains == HEADS):
            raise UsageError(
                f"loss {term.loss.name!r} and trains={term.trains!r} do not fit: Q-learners train 'heads'."
            )
        given: frozenset[str] = getattr(self.credit, "columns", frozenset())
        for column in term.loss.columns:
            if term.rows == "main" and self.on_policy and column not in given:
                raise UsageError(
                    f"loss {term.loss.name!r} needs a {column} of each row, which credit {type(self.credit).__name__} "
                    "does not give."
                )

    def _check_rollouts(self, source: Rollouts) -> None:
        if isinstance(self.feedback, Labels):
            raise UsageError("rollouts have no labels; give feedback=Reward() or Verifier().")
        if self.credit and source.completions < self.credit.smallest_group:
            raise UsageError(
                f"credit {type(self.credit).__name__} compares samples of one prompt: group_size must be at least "
                f"{self.credit.smallest_group}, got {source.completions}."
            )
        if self.replay is not None and getattr(self.keep, "refill", False):
            raise UsageError("a replay takes what a step gives; keep with refill has no effect beside it.")

    def _check_rows(self, source: DatasetRows) -> None:
        credited = self.credit is not None and source.kind not in getattr(self.credit, "of_rows", {"scored"})
        if credited or not isinstance(self.feedback, Labels) or self.keep is not None or self.replay is not None:
            raise UsageError(
                "rows of a data set carry their labels; keep, reward and replay belong to Rollouts(), a credit to "
                "these or to rows that it knows, such as DatasetRows('scored')."
            )
        if isinstance(self.reference, EachRound):
            raise UsageError("EachRound() belongs to Rollouts(); of rows of a data set give Moving(alpha=1, every=N).")

    @property
    def trains(self) -> tuple[str, ...]:
        """Roles that a term moves."""
        return tuple(dict.fromkeys(t.trains for t in self.terms))

    @property
    def needs(self) -> frozenset[str]:
        """Roles that must be there: the shared layer loads exactly these."""
        parts = (self.source, self.feedback, self.keep, self.credit, self.condition, self.prelude, self.update)
        declared: list[frozenset[str]] = [getattr(part, "needs", frozenset()) for part in parts if part is not None]
        losses = {REFERENCE for t in self.terms if t.loss.reference}
        losses |= {TEACHER for t in self.terms if t.loss.family is Distribution}
        return frozenset().union(*declared, losses, self.trains)

    @property
    def critics(self) -> tuple[str, ...]:
        """Roles of its critics: ``"critic"``, and ``"critic:NAME"`` of further ones."""
        return tuple(sorted(role for role in self.needs if critic_of_role(role) is not None))

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
        product: Product | None = None,
        loss: Loss | None = None,
        count: Count | str | None = None,
        **one_stage: Any,
    ) -> None:
        if stages and (loss is not None or one_stage):
            raise UsageError("Algorithm: give stages, or the parts of a single stage, not both.")
        if loss is not None or one_stage:
            if loss is not None:
                role = REWARD if loss.family in SCORED_BY_MODEL else POLICY
                one_stage["terms"] = (*one_stage.get("terms", ()), Term(loss, count=count, trains=role))
            known = Stage.__dataclass_fields__
            for key in one_stage:
                if key not in known:
                    raise UsageError(f"Algorithm has no part {key!r}{suggest(key, known)} Parts: {', '.join(known)}.")
            stages = (Stage(**one_stage),)
        if not stages and product is None:
            raise UsageError("Algorithm: give the parts of a stage, stages, or a product (a way to decode).")
        self.stages = stages
        self.product = product  # None: the weights
        self.name = "unnamed"
        self.options: dict[str, Any] = {}
        self.recommended: dict[str, Any] = {}
        self.sources: dict[str, str] = {}  # registered functions this was made of -> hash of their source

    @property
    def needs(self) -> frozenset[str]:
        own = () if self.stages else (POLICY,)
        return frozenset(own).union(*(s.needs for s in self.stages), getattr(self.product, "needs", ()))

    @property
    def data(self) -> Kind:
        """The kind of rows its first stage is trained on."""
        return self.stages[0].source.data if self.stages else "prompts"

    @property
    def on_policy(self) -> bool:
        """Whether its first stage samples what it is trained on; so does what is only a way to decode."""
        return not self.stages or self.stages[0].on_policy

    @property
    def trains_reward(self) -> bool:
        """Whether its product is a reward model instead of a policy."""
        return bool(self.stages) and REWARD in self.stages[-1].trains

    @property
    def asks_for_reward(self) -> bool:
        """Whether a stage is judged by the run's reward, and not by what an earlier stage has trained."""
        for stage in self.stages:
            if REWARD in stage.feedback.needs:
                return True
            if REWARD in stage.trains:
                return False
        return REWARD in getattr(self.product, "needs", ())

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.options.items())
        steps = [stage_in_words(s) for s in self.stages] + ([repr(self.product)] if self.product is not None else [])
        return f"<algorithm {self.name}({options}): {' -> '.join(steps)}>"


def stage_in_words(stage: Stage) -> str:
    """Its parts by their names, and its terms."""
    terms = " + ".join(f"{t.weight:g} {t.loss.name}/{t.counted.unit}->{t.trains}" for t in stage.terms)
    parts = [type(p).__name__ for p in (stage.source, stage.feedback, stage.keep, stage.credit) if p is not None]
    return f"{' x '.join(parts)} x {{{terms}}}"


class AlgorithmEntry(Entry):
    """An entry whose options are those of its function, and those that it shares with its kind (``shared``).

    ``around``: a loss whose modifiers apply; their options are shared too.
    """

    @functools.cached_property
    def own_options(self) -> dict[str, Any]:
        own = super().own_options
        return {**own, **{k: v for k, v in self.shared.items() if k not in own}}

    @property
    def shared(self) -> dict[str, Any]:
        return {**self.tags.get("shared", {}), **{k: v for m in self._modifiers for k, v in m.options.items()}}

    @property
    def hints(self) -> dict[str, Any]:
        theirs = {k: hint for m in self._modifiers for k, hint in m.hints.items() if k in m.options}
        return {**{k: type(v) for k, v in self.shared.items()}, **theirs, **super().hints}

    @property
    def _modifiers(self) -> list[Entry]:
        around = self.tags.get("around")
        return [] if around is None else cast(LossEntry, LOSSES.entry(around)).modifiers


ALGORITHMS = Registry("algorithm", provider=("prefzoo.algos", "prefzoo.spellings"), entry=AlgorithmEntry)


def register_algorithm(
    function: Callable[..., Algorithm] | None = None,
    /,
    *,
    name: str | None = None,
    paper: str | None = None,
    aliases: tuple[str, ...] = (),
    recommended: Mapping[str, Any] | None = None,
    shared: Mapping[str, Any] | None = None,
    **tags: Any,
) -> Any:
    """Register a function that returns an :class:`Algorithm` under its name, or the ``name`` given.

    Its keyword-only arguments are the configuration of the mathematics; ``recommended`` are values for
    :class:`~prefzoo.training.TrainConfig` that a user's own values override. ``shared`` are further options with their
    defaults (:mod:`prefzoo.parts.options`), given to its ``**options`` as one; with ``as_given=True`` only those that
    the user has given, for functions that hand them on. ``spelling=`` is a function that turns
    a run's options, written as another library writes them, into ours (:mod:`prefzoo.spellings.trl`).
    """
    if function is None:
        return lambda f: register_algorithm(
            f, name=name, paper=paper, aliases=aliases, recommended=recommended, shared=shared, **tags
        )  # fmt: skip
    return ALGORITHMS.register(
        function, name=name, paper=paper, aliases=aliases, recommended=dict(recommended or {}),
        shared=dict(shared or {}), **tags,
    )  # fmt: skip


class SampledLoss(LossEntry, AlgorithmEntry):
    """A policy-gradient loss as an algorithm: it also takes the options of its sampling."""

    @property
    def shared(self) -> dict[str, Any]:
        return {**SAMPLING, "max_new_tokens": 128}


def _of_loss(loss: Loss, sampling: Mapping[str, Any]) -> Algorithm:
    """A registered loss is at once an algorithm of the same name, through its family's default composition."""
    if loss.family in (Values, Heads):
        what, where = ("a critic", "ppo") if loss.family is Values else ("heads", "ilql")
        raise UsageError(
            f"loss {loss.name!r} trains {what}; it is a term of an algorithm (see {where}), not one of its own."
        )
    check_filled(loss)
    prelude = next((PRELUDES[e]() for e in loss.extras if e in PRELUDES), None)
    if loss.family is PolicyGradient:
        return Algorithm(**sampled(sampling), credit=GroupRelative(), loss=loss, prelude=prelude)
    if takes(loss) == "advantages":
        return Algorithm(source=DatasetRows("scored"), credit=ReturnAbove(), loss=loss)
    return Algorithm(source=DatasetRows(cast(Kind, takes(loss))), loss=loss, prelude=prelude)


def is_algorithm(entry: LossEntry) -> bool:
    """Whether a loss is an algorithm of its own, and not only a term, or a function of records that nobody makes."""
    loss = Loss(entry)
    return loss.family not in (Values, Heads) and untrained(loss) is None


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
    own = dict(entry.own_options)
    if isinstance(entry, AlgorithmEntry) and entry.tags.get("as_given"):
        own = {k: v for k, v in own.items() if k not in entry.shared}
    elif isinstance(entry, AlgorithmEntry):
        options = {**entry.shared, **options}
    if entry.name in ALGORITHMS:
        algorithm = entry.function(**options)
    else:
        known = LOSSES.entry(entry.name).options
        loss = create_loss(entry.name, **{k: v for k, v in options.items() if k in known})
        algorithm = _of_loss(loss, {k: v for k, v in options.items() if k not in known})
    algorithm.name = entry.name
    algorithm.options = {**own, **options}
    algorithm.recommended = dict(entry.tags["recommended"])
    algorithm.sources = {**algorithm.sources, entry.name: entry.source_hash()}  # one made of another has its sources
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
