"""The registries of losses and of their modifiers, and the contract's data: family, count, needs."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from prefzoo.records import FAMILIES, LossOut, Record
from prefzoo.registry import Entry, Registry, UsageError


class LossEntry(Entry):
    """A loss of the registry. Its options are those of its function, and those of the modifiers that apply to it."""

    @property
    def modifiers(self) -> list[Entry]:
        """The modifiers that apply to this loss, outermost first."""
        return [m for m in self.family_modifiers() if self.refusal(m) is None]

    @property
    def options(self) -> dict[str, Any]:
        return {**self.own_options, **{k: v for m in self.modifiers for k, v in m.options.items()}}

    @property
    def hints(self) -> dict[str, Any]:
        theirs = {k: v for m in self.modifiers for k, v in m.hints.items() if k in m.options}
        return {**theirs, **super().hints}

    def refusal(self, modifier: Entry) -> str | None:
        """Why a modifier of the family does not apply to this loss; None where it does."""
        if modifier.name in self.tags["refuses"]:
            return self.tags["refuses"][modifier.name]
        own = next((k for k in modifier.options if k in self.own_options), None)
        if own is not None:
            return f"the loss has an option {own!r} of its own"
        if modifier.tags["reference"] and not self.tags["reference"]:
            return "the loss has no reference"
        return modifier.tags["refuses"](self)

    def check_options(self, options: Mapping[str, Any], kind: str) -> None:
        self.check_modifiers(options, kind)
        super().check_options(options, kind)

    def check_modifiers(self, options: Mapping[str, Any], kind: str) -> None:
        """Refuse options of modifiers that do not apply to this loss, and say why they do not."""
        for modifier in self.family_modifiers():
            for key in modifier.options:
                if key in options and key not in self.options:
                    raise UsageError(
                        f"{kind} {self.name!r} does not take {key!r}: modifier {modifier.name!r} does not apply, "
                        f"because {self.refusal(modifier)}."
                    )

    def family_modifiers(self) -> list[Entry]:
        """All modifiers of the family, outermost first, whether they apply or not."""
        found = [MODIFIERS.entry(name) for name in MODIFIERS.names()]
        found = [m for m in found if m.tags["family"] is self.tags["family"]]
        return sorted(found, key=lambda m: m.tags["order"])


LOSSES = Registry("loss", provider="prefzoo.losses.catalogue", entry=LossEntry)
MODIFIERS = Registry("modifier", provider="prefzoo.losses.catalogue")
CREDITS = Registry("credit", provider="prefzoo.losses.catalogue")
ESTIMATORS = Registry("KL estimator", provider="prefzoo.losses.catalogue")


@dataclass(frozen=True)
class Loss:
    """A registered loss with its options bound: call it with a record of its family."""

    entry: LossEntry
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def family(self) -> type[Record]:
        return self.entry.tags["family"]

    @property
    def count(self) -> str:
        """The unit that its paper averages over; a term may name another."""
        return self.entry.tags["count"]

    @property
    def modifiers(self) -> list[tuple[Entry, dict[str, Any]]]:
        """The modifiers that its options switch on, outermost first, each with the options given to it."""
        found = []
        for modifier in self.entry.family_modifiers() if self.options else ():
            given = {k: v for k, v in self.options.items() if k in modifier.options}
            if any(v != modifier.options[k] for k, v in given.items()) and self.entry.refusal(modifier) is None:
                found.append((modifier, given))
        return found

    @property
    def reference(self) -> bool:
        """Whether it needs reference log-probabilities."""
        return self.entry.tags["reference"]

    @property
    def extras(self) -> tuple[str, ...]:
        """Fields of the record beyond log-probabilities and masks that it needs, such as ``entropy_BT``."""
        own = self.entry.tags["extras"]
        own = own({**self.entry.own_options, **self.options}) if callable(own) else own
        wanted = [own, *(m.tags["extras"] for m, _ in self.modifiers)]
        return tuple(dict.fromkeys(name for names in wanted for name in names))

    @property
    def columns(self) -> list[str]:
        """The columns of numbers that it needs of every row of the data, as the data call them."""
        fields = [e for e in self.extras if e.endswith(("_B", "_P", "_PK")) and e != "tie_B"]  # a tie is said or not
        return ["score" if e == "scores_B" else e.rpartition("_")[0] for e in fields]

    @property
    def by_row(self) -> bool:
        """Whether the loss of a row stays with it when rows change places."""
        return "row_permutation" not in self.entry.tags["exceptions"]

    @property
    def whole_batch(self) -> bool:
        """Whether it couples the rows of a batch, which the engine then does not split."""
        return self.entry.tags["whole_batch"]

    def __call__(self, batch: Record) -> LossOut:
        if not isinstance(batch, self.family):
            raise UsageError(f"loss {self.name!r} takes {self.family.__name__}, got {type(batch).__name__}.")
        own = {k: v for k, v in self.options.items() if k in self.entry.own_options}
        call = functools.partial(self.entry.function, **own)
        for modifier, options in reversed(self.modifiers):
            call = functools.partial(modifier.function, call, **options)
        out = call(batch)
        if not isinstance(out, LossOut):
            raise UsageError(f"loss {self.name!r} returned {type(out).__name__}; return LossOut(loss, metrics).")
        return out


Extras = tuple[str, ...] | Callable[[Mapping[str, Any]], tuple[str, ...]]


def register_loss(
    function: Callable[..., LossOut] | None = None,
    /,
    *,
    paper: str | None = None,
    aliases: tuple[str, ...] = (),
    count: str | None = None,
    reference: bool = True,
    extras: Extras = (),
    whole_batch: bool = False,
    contrast: bool = False,
    divergence: bool | None = None,
    refuses: Mapping[str, str] = MappingProxyType({}),
    recommended: Mapping[str, Any] = MappingProxyType({}),
    exceptions: Mapping[str, str] = MappingProxyType({}),
    writers: bool = False,
) -> Any:
    """Register a loss under its function's name.

    The type of the first argument is the family, the keyword-only arguments are the hyper-parameters. ``count``: the
    unit its paper averages over (default: ``"token"`` for the families of token losses, else ``"row"``).
    ``reference=False``: it needs no reference model. ``whole_batch``: it couples rows, so the engine must not split the
    batch. ``contrast``: it knows the two log-ratios of a pair through their difference only, so what both sides share
    cancels. ``divergence``: whether it stays meaningful where the score of an f-divergence replaces the log-ratios
    (default: as ``contrast``). ``extras``: fields of the record that it needs beyond log-probabilities and masks, or a
    function from the options to them. ``refuses``: modifiers that do not apply, and why. ``recommended``: values for
    the training of the algorithm of the same name. ``exceptions``: checks of ``prefzoo.testing.check_loss`` it fails,
    and why. ``writers``: the sides of its pairs are those of two writers, whoever won, so it is for credits that keep
    them apart.

    >>> import torch.nn.functional as F
    >>> from prefzoo.records import LossOut, Pairs
    >>> @register_loss(paper="arXiv:2305.18290")
    ... def my_loss(batch: Pairs, *, beta: float = 0.1) -> LossOut:
    ...     "-log sigmoid of the scaled difference of log-ratios."
    ...     return LossOut(-F.logsigmoid(beta * (batch.chosen_ratio_B - batch.rejected_ratio_B)))
    """
    if function is None:
        return lambda f: register_loss(
            f, paper=paper, aliases=aliases, count=count, reference=reference, extras=extras, whole_batch=whole_batch,
            contrast=contrast, divergence=divergence, refuses=refuses, recommended=recommended, exceptions=exceptions,
            writers=writers,
        )  # fmt: skip
    family = _family(function, "loss", 0)
    return LOSSES.register(
        function,
        paper=paper,
        aliases=aliases,
        family=family,
        count=count or ("token" if family.per_token else "row"),
        reference=reference and any("ref" in f.name for f in dataclasses.fields(family)),
        extras=extras,
        whole_batch=whole_batch,
        contrast=contrast,
        divergence=contrast if divergence is None else divergence,
        refuses=dict(refuses),
        recommended=dict(recommended),
        exceptions=dict(exceptions),
        writers=writers,
    )


def register_modifier(
    function: Callable[..., LossOut] | None = None,
    /,
    *,
    paper: str | None = None,
    order: int = 0,
    reference: bool = False,
    extras: tuple[str, ...] = (),
    refuses: Callable[[LossEntry], str | None] = lambda entry: None,
    exceptions: Mapping[str, str] = MappingProxyType({}),
) -> Any:
    """Register what changes many losses alike, as a function around a loss: ``modifier(loss, batch, *, option=off)``.

    Every loss of the batch's family gets its options, except where the loss has an option of that name itself or
    ``refuses`` says why not. At their defaults the options do nothing; the modifier is called where one of them has
    another value, and refuses a combination without effect. Modifiers of lower ``order`` lie outside. ``reference``:
    only for losses that have one. ``extras``: fields of the record that it needs. ``exceptions``: checks of
    ``prefzoo.testing.check_loss`` that a loss may fail while it is on, and why.
    """
    if function is None:
        return lambda f: register_modifier(
            f, paper=paper, order=order, reference=reference, extras=extras, refuses=refuses, exceptions=exceptions
        )
    family = _family(function, "modifier", 1)
    return MODIFIERS.register(
        function, paper=paper, family=family, order=order, reference=reference, extras=extras, refuses=refuses,
        exceptions=dict(exceptions),
    )  # fmt: skip


Gives = Literal["advantages", "rows", "rewards"]


def register_credit(*, paper: str | None = None, gives: Gives = "advantages", aliases: tuple[str, ...] = ()) -> Any:
    """Register a function from rewards to what each completion or token deserves, under its name.

    ``gives``: ``"advantages"`` (of rows or tokens), ``"rows"`` (indices of completions) or ``"rewards"`` (of tokens).
    """
    return CREDITS.register(paper=paper, aliases=aliases, gives=gives)


def register_estimator(
    *, paper: str | None = None, name: str | None = None, needs: Literal["logps", "logits"] = "logps"
) -> Any:
    """Register an estimator of KL(π ‖ ref), under its function's name unless ``name`` is given.

    ``needs``: two log-probabilities of the sampled token (``"logps"``), or ``"logits"`` over the whole vocabulary.
    """
    return ESTIMATORS.register(name=name, paper=paper, needs=needs)


def _family(function: Callable[..., LossOut], kind: str, place: int) -> type[Record]:
    """The record that a loss takes as its first argument, a modifier as its second."""
    name = getattr(function, "__name__", repr(function))
    parameters = list(inspect.signature(function).parameters.values())
    known = ", ".join(f.__name__ for f in FAMILIES)
    if len(parameters) <= place:
        raise UsageError(f"{kind} {name!r} takes no record: its argument {place + 1} must be a record ({known}).")
    family = typing.get_type_hints(function).get(parameters[place].name)
    if family not in FAMILIES:
        raise UsageError(
            f"{kind} {name!r}: annotate its argument {parameters[place].name!r} with the record it takes ({known}), "
            f"from prefzoo.records; got {family!r}."
        )
    for parameter in parameters[place + 1 :]:
        if parameter.kind is not parameter.KEYWORD_ONLY or parameter.default is parameter.empty:
            raise UsageError(
                f"{kind} {name!r}: hyper-parameter {parameter.name!r} must be keyword-only with a default "
                "(put '*,' after the record)."
            )
    return typing.cast(type[Record], family)


def create_loss(name: str, /, **options: Any) -> Loss:
    """The loss of that name with its options bound; an unknown name or option raises with the nearest."""
    entry = LOSSES.entry(name)
    entry.check_options(options, "loss")
    return Loss(typing.cast(LossEntry, entry), dict(options))


def list_losses(pattern: str = "*") -> list[str]:
    """Names of the registered losses that match a shell pattern."""
    return LOSSES.names(pattern)
