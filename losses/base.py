"""The registry of losses and the contract's data: family, count, needs."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from prefzoo.records import FAMILIES, LossOut, Record
from prefzoo.registry import Entry, Registry, UsageError

LOSSES = Registry("loss", provider="prefzoo.losses.catalogue")


@dataclass(frozen=True)
class Loss:
    """A registered loss with its options bound: call it with a record of its family."""

    entry: Entry
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
    def reference(self) -> bool:
        """Whether it needs reference log-probabilities."""
        return self.entry.tags["reference"]

    @property
    def extras(self) -> tuple[str, ...]:
        """Fields of the record beyond log-probabilities and masks that it needs, such as ``entropy_BT``."""
        return self.entry.tags["extras"]

    def __call__(self, batch: Record) -> LossOut:
        if not isinstance(batch, self.family):
            raise UsageError(f"loss {self.name!r} takes {self.family.__name__}, got {type(batch).__name__}.")
        return self.entry.function(batch, **self.options)


def register_loss(
    function: Callable[..., LossOut] | None = None,
    /,
    *,
    paper: str | None = None,
    aliases: tuple[str, ...] = (),
    count: str | None = None,
    reference: bool = True,
    extras: tuple[str, ...] = (),
    whole_batch: bool = False,
    exceptions: Mapping[str, str] = MappingProxyType({}),
) -> Any:
    """Register a loss under its function's name.

    The type of the first argument is the family, the keyword-only arguments are the hyper-parameters. ``count``: the
    unit its paper averages over (default: ``"token"`` for token losses of the policy-gradient, likelihood and value
    families, else ``"row"``). ``reference=False``: it needs no reference model. ``whole_batch``: it couples rows, so
    the engine must not split the batch. ``exceptions``: checks of ``prefzoo.testing.check_loss`` it fails, and why.

    >>> import torch.nn.functional as F
    >>> from prefzoo.records import LossOut, Pairs
    >>> @register_loss(paper="arXiv:2305.18290")
    ... def my_loss(batch: Pairs, *, beta: float = 0.1) -> LossOut:
    ...     "-log sigmoid of the scaled difference of log-ratios."
    ...     return LossOut(-F.logsigmoid(beta * (batch.chosen_ratio_B - batch.rejected_ratio_B)))
    """
    if function is None:
        return lambda f: register_loss(
            f, paper=paper, aliases=aliases, count=count, reference=reference, extras=extras,
            whole_batch=whole_batch, exceptions=exceptions,
        )  # fmt: skip
    family = _family(function)
    token = family.__name__ in ("PolicyGradient", "Likelihood", "Values")
    return LOSSES.register(
        function,
        paper=paper,
        aliases=aliases,
        family=family,
        count=count or ("token" if token else "row"),
        reference=reference and any("ref" in f.name for f in dataclasses.fields(family)),
        extras=extras,
        whole_batch=whole_batch,
        exceptions=dict(exceptions),
    )


def _family(function: Callable[..., LossOut]) -> type[Record]:
    name = getattr(function, "__name__", repr(function))
    parameters = list(inspect.signature(function).parameters.values())
    known = ", ".join(f.__name__ for f in FAMILIES)
    if not parameters:
        raise UsageError(f"loss {name!r} takes no arguments; its first must be a record: {known}.")
    family = typing.get_type_hints(function).get(parameters[0].name)
    if family not in FAMILIES:
        raise UsageError(
            f"loss {name!r}: annotate its first argument {parameters[0].name!r} with the record it takes ({known}), "
            f"from prefzoo.records; got {family!r}."
        )
    for parameter in parameters[1:]:
        if parameter.kind is not parameter.KEYWORD_ONLY or parameter.default is parameter.empty:
            raise UsageError(
                f"loss {name!r}: hyper-parameter {parameter.name!r} must be keyword-only with a default "
                "(put '*,' after the record)."
            )
    return typing.cast(type[Record], family)


def create_loss(name: str, /, **options: Any) -> Loss:
    """The loss of that name with its options bound; an unknown name or option raises with the nearest."""
    entry = LOSSES.entry(name)
    entry.check_options(options, "loss")
    return Loss(entry, dict(options))


def list_losses(pattern: str = "*") -> list[str]:
    """Names of the registered losses that match a shell pattern."""
    return LOSSES.names(pattern)
