"""The contracts of losses and of algorithms as functions you can call, on entries of ours and of your own.

    from prefzoo.testing import check_algorithm, check_loss
    check_loss(my_loss)                    # every check; raises ContractError with cause and cure of each failure
    check_loss("clipped_surrogate", clip_high=0.28)
    check_algorithm("rloo", kl=0.1)        # trained on a language model whose responses can be enumerated
    check_algorithm(my_algorithm)          # a function that returns an Algorithm, registered or not

The checks are in ``prefzoo.contract``, named as in ``CHECKS``, and in ``prefzoo.algorithm_checks``, named as in
``ALGORITHM_CHECKS``. A check holds for every correct loss; where a loss
breaks one on purpose, its registration says so, ``@register_loss(exceptions={"reference_shift": "has an NLL term"})``,
and from then on ``check_loss`` insists that it does break it. ``"reward_shift@centering"`` speaks of the check where
that option is not at its default.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from prefzoo.algorithm import ALGORITHMS, Algorithm, algorithm_entry, create_algorithm
from prefzoo.algorithm_checks import ALGORITHM_CHECKS, Subject
from prefzoo.algorithm_checks import FIRST as FIRST_RUN
from prefzoo.contract import CHECKS, ContractError, NotApplicable, breaks, exceptions_of
from prefzoo.losses.base import LOSSES, MODIFIERS, Loss, create_loss
from prefzoo.parts.count import UNITS
from prefzoo.records import LossOut, Record
from prefzoo.registry import Entry, UsageError, suggest
from prefzoo.trial import is_trained, random_record

__all__ = [
    "ALGORITHM_CHECKS", "CHECKS", "AlgorithmCheck", "Check", "ContractError", "algorithm_checks", "check_algorithm",
    "check_loss", "is_trained", "loss_checks", "random_record",
]  # fmt: skip


FIRST = "unreduced"  # the check without which the others have nothing to look at


@dataclass(frozen=True)
class Check:
    """One check of one loss. Call it: it returns how it went, or raises ``ContractError``."""

    name: str
    subject: Any
    exception: str | None = None
    insists: bool = True  # that the exception is needed

    kind: ClassVar[str] = "loss"
    known: ClassVar[Mapping[str, Callable[[Any], str | None]]] = CHECKS
    first: ClassVar[str] = FIRST

    @property
    def line(self) -> str:
        """What the check demands."""
        return (inspect.getdoc(self.known[self.name]) or "").split("\n", 1)[0]

    def __call__(self) -> str:
        """``"passed"``, ``"passed: what was seen"``, ``"not applicable: why"``, or ``"exception: why"``."""
        who = f"{self.kind} {self.subject.name!r}"
        try:
            seen = self.known[self.name](self.subject)
            outcome = "passed" if seen is None else f"passed: {seen}"
        except NotApplicable as reason:
            outcome = f"not applicable: {reason}"
        except Exception as error:  # whatever a user's code raises on plain input is a failure of the check
            if self.exception is not None:
                return f"exception: {self.exception}"
            if isinstance(error, ContractError):
                told = str(error)
            elif self.name != self.first and self._told(error):  # one fault is told once, not by every check
                return f"not applicable: it raised {type(error).__name__}, and {self.first!r} is to pass first"
            else:
                told = self._words(error)
            raise ContractError(f"{who} breaks {self.name!r} ({self.line}) {told}") from error
        if self.exception is not None and self.insists:
            raise ContractError(
                f"{who} declares an exception from {self.name!r} ({self.exception}), but it holds ({outcome}): remove "
                "the exception."
            )
        return outcome

    def _told(self, error: Exception) -> bool:
        """Whether the first check tells of this error already."""
        return breaks(self.subject, self.first)

    def _words(self, error: Exception) -> str:
        return _raised(self.subject, error)


def loss_checks(loss: str | Callable[..., LossOut] | Loss, /, **options: Any) -> Iterator[Check]:
    """The checks of a loss, given by its name, its registered function, or with its options bound.

    >>> [check() for check in loss_checks("dpo") if check.name in ("unreduced", "zero_advantage")]
    ['passed', 'not applicable: Pairs has no advantages']
    """
    bound = _bind(loss, options)
    declared = bound.entry.tags["exceptions"]
    if bound.count not in UNITS:
        raise UsageError(
            f"loss {bound.name!r}: no count {bound.count!r}{suggest(bound.count, UNITS)} Known: {', '.join(UNITS)}."
        )
    for name in bound.entry.tags["refuses"]:
        if name not in MODIFIERS:
            raise UsageError(f"loss {bound.name!r} refuses {name!r}: no modifier{suggest(name, MODIFIERS.names())}")
    for key in declared:
        check, _, option = key.partition("@")
        if check in ALGORITHM_CHECKS:  # of its default composition
            continue
        if check not in CHECKS:
            raise UsageError(
                f"loss {bound.name!r}: no check {check!r}{suggest(check, CHECKS)} Known: {', '.join(CHECKS)}."
            )
        if option and option not in bound.entry.options:
            near = suggest(option, bound.entry.options)
            raise UsageError(f"loss {bound.name!r}, exception {key!r}: it has no option {option!r}{near}")
    exceptions = exceptions_of(bound)
    for name in CHECKS:
        yield Check(name, bound, exceptions.get(name), insists=name in declared and not bound.options)


@dataclass(frozen=True)
class AlgorithmCheck(Check):
    """One check of one algorithm, on one thread: its tensors are so small that a second one makes it slower."""

    kind = "algorithm"
    known = ALGORITHM_CHECKS
    first = FIRST_RUN

    def __call__(self) -> str:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return super().__call__()
        finally:
            torch.set_num_threads(threads)

    def _told(self, error: Exception) -> bool:
        return bool(self.subject.fault == type(error).__name__)

    def _words(self, error: Exception) -> str:
        return f"It raised {type(error).__name__}: {error}"


def algorithm_checks(
    algorithm: str | Callable[..., Algorithm] | Algorithm, /, **options: Any
) -> Iterator[AlgorithmCheck]:
    """The checks of an algorithm, given by its name, by a function that makes it, or as a composition.

    They share their runs: call them in this order.
    """
    subject = _subject(algorithm, options)
    declared = subject.tags.get("exceptions", {})
    for key in declared:
        if key not in ALGORITHM_CHECKS and key.partition("@")[0] not in CHECKS:
            known = f"{suggest(key, ALGORITHM_CHECKS)} Known: {', '.join(ALGORITHM_CHECKS)}."
            raise UsageError(f"algorithm {subject.name!r}: no check {key!r}{known}")
    for name in ALGORITHM_CHECKS:
        yield AlgorithmCheck(name, subject, declared.get(name), insists=not options)


def check_algorithm(algorithm: str | Callable[..., Algorithm] | Algorithm, /, **options: Any) -> dict[str, str]:
    """Run every check of an algorithm; raise one ``ContractError`` that lists all failures, or return how each went.

    It is trained some twenty times, on a language model whose responses can be enumerated: a second or two.

    >>> check_algorithm("sft")["learns"].partition(":")[0]
    'passed'
    """
    results, failures = {}, []
    for check in algorithm_checks(algorithm, **options):
        try:
            results[check.name] = check()
        except ContractError as error:
            failures.append(str(error))
    if failures:
        raise ContractError("\n".join(failures))
    return results


def _subject(algorithm: str | Callable[..., Algorithm] | Algorithm, options: dict[str, Any]) -> Subject:
    """What is proved, whichever way it is given."""
    if isinstance(algorithm, Algorithm):
        if options:
            raise UsageError(f"a composition has no options: {', '.join(options)} have no effect; give its name.")
        composed = algorithm
        return Subject(composed.name, lambda: composed)
    entry: Entry | None = None
    make: Callable[..., Algorithm]
    if callable(algorithm):
        name = getattr(algorithm, "__name__", repr(algorithm))
        if name in ALGORITHMS and inspect.unwrap(ALGORITHMS.entry(name).function) is inspect.unwrap(algorithm):
            algorithm = name
    if isinstance(algorithm, str):
        entry = algorithm_entry(algorithm)
        entry.check_options(options, "algorithm")
        name, make = entry.name, functools.partial(create_algorithm, entry.name)
        known = tuple(entry.options)
    else:
        make = algorithm
        known = tuple(p.name for p in inspect.signature(algorithm).parameters.values() if p.kind is p.KEYWORD_ONLY)
    left = tuple(k for k in known if k not in options)
    return Subject(name, functools.partial(make, **options), left, entry, tuple(options))


def check_loss(loss: str | Callable[..., LossOut] | Loss, /, **options: Any) -> dict[str, str]:
    """Run the whole contract; raise one ``ContractError`` that lists every failure, or return how each check went.

    >>> check_loss("dpo", beta=0.5)["halves_equal_whole"]
    'passed'
    """
    results, failures = {}, []
    for check in loss_checks(loss, **options):
        try:
            results[check.name] = check()
        except ContractError as error:
            failures.append(str(error))
    if failures:
        raise ContractError("\n".join(failures))
    return results


def _raised(loss: Loss, error: Exception) -> str:
    """An error that is not the check's own: what it says, and the line of the loss that it went through last."""
    near = ""
    if isinstance(error, AttributeError) and isinstance(error.obj, Record):
        near = suggest(str(error.name), [n for n in dir(error.obj) if not n.startswith("_")]).removesuffix(".")
    file = inspect.getsourcefile(inspect.unwrap(loss.entry.function))
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    place = f" ({Path(file).name}, line {lines[-1]})" if file and lines else ""
    return f"It raised {type(error).__name__}: {error}{near}{place}"


def _bind(loss: str | Callable[..., LossOut] | Loss, options: dict[str, Any]) -> Loss:
    if isinstance(loss, Loss):
        loss.entry.check_options(options, "loss")
        return dataclasses.replace(loss, options={**loss.options, **options})
    if isinstance(loss, str):
        return create_loss(loss, **options)
    name = getattr(loss, "__name__", repr(loss))
    if name not in LOSSES or inspect.unwrap(LOSSES.entry(name).function) is not inspect.unwrap(loss):
        raise UsageError(f"{name!r} is not registered: put @register_loss above it (from prefzoo.losses).")
    return create_loss(name, **options)
