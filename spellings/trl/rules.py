"""How a field of TRL's becomes one of ours: the translation that is filled in, and the rules that fill it in.

The rules of fields that go together are in :mod:`prefzoo.spellings.trl.rules_run` and
:mod:`prefzoo.spellings.trl.rules_data`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prefzoo.registry import UsageError

NO_LIMIT = 1 << 20  # of tokens: the model's positions are the limit


class Refusal(ValueError):
    """Why a value cannot be what it says."""


@dataclass
class Translated:
    """What another library's fields are here. ``check`` stops the run where something was refused."""

    algorithm: str
    given: Mapping[str, Any]
    source: str = "these options"
    trainer: str = ""  # whose fields they are: "dpo"
    sampled: bool = False  # whether it trains on samples of the policy
    options: dict[str, Any] = field(default_factory=dict)  # of the algorithm
    settings: dict[str, Any] = field(default_factory=dict)  # fields of TrainConfig
    arguments: dict[str, Any] = field(default_factory=dict)  # of train()
    mapped: list[tuple[str, str, Any]] = field(default_factory=list)  # field, our spelling, our value
    ignored: list[tuple[str, str]] = field(default_factory=list)  # field, reason
    refused: list[tuple[str, Any, str]] = field(default_factory=list)  # field, value, reason
    notes: list[str] = field(default_factory=list)  # what stays different, and how batch sizes add up

    def lines(self) -> list[str]:
        """The whole translation in words: what maps, what has no effect here, what is refused and why."""
        out = [f"{self.source}, as {self.algorithm}"]
        kinds = [
            ("maps", [f"{f} = {show(self.given[f])} -> {_ours(name, value)}" for f, name, value in self.mapped]),
            ("has no effect here", self._ignored()),
            ("is refused", self._refusals()),
            ("note", self.notes),
        ]
        for title, found in kinds:
            out += [f"  {title}:", *(f"    {line}" for line in dict.fromkeys(found))] if found else []
        return out

    def check(self) -> None:
        """Raise with everything that was refused."""
        if self.refused:
            raise UsageError("\n  ".join([f"{self.source}, as {self.algorithm}:", *dict.fromkeys(self._refusals())]))

    def call(self) -> dict[str, Any]:
        """Keyword arguments of ``prefzoo.train(translated.algorithm, ...)``."""
        return {**self.arguments, **self.options, "config": self.settings}

    def _ignored(self) -> list[str]:
        """By reason: files are full of these."""
        by_reason: dict[str, list[str]] = {}
        for f, reason in self.ignored:
            by_reason.setdefault(reason, []).append(f"{f} = {show(self.given[f])}")
        return [f"{', '.join(fields)}: {reason}" for reason, fields in by_reason.items()]

    def _refusals(self) -> list[str]:
        return [f"{f} = {show(value)}: {reason}" if f else reason for f, value, reason in self.refused]

    # What rules do.

    def get(self, name: str, default: Any = None) -> Any:
        """The value given for a field, or the default where there is none or it is null."""
        value = self.given.get(name)
        return default if value is None else value

    def put(self, where: dict[str, Any], fieldname: str, name: str, value: Any) -> None:
        """Set one of ours, and say so; two fields that say different things contradict each other."""
        if name in where and where[name] != value:
            self.refuse(fieldname, f"another field makes {name} {where[name]!r} already, not {value!r}; give one.")
            return
        where[name] = value
        self.mapped.append((fieldname, name, value))

    def set(self, fieldname: str, name: str, value: Any) -> None:
        self.put(self.settings, fieldname, name, value)

    def same(self, fieldname: str) -> None:
        """What is asked for is what happens anyway."""
        self.mapped.append((fieldname, "", None))

    def ignore(self, fieldname: str, reason: str) -> None:
        self.ignored.append((fieldname, reason))

    def refuse(self, fieldname: str, reason: str) -> None:
        self.refused.append((fieldname, self.given.get(fieldname), reason))


def show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _ours(name: str, value: Any) -> str:
    return f"{name} = {show(value)}" if name else "as it is here"


# ------------------------------------------------------------------------------------------------ rules

Apply = Callable[[Translated, str], None]


@dataclass(frozen=True)
class Rule:
    """What is done with a field; ``ours`` says it in a few words, for the page."""

    ours: str
    apply: Apply

    def __call__(self, out: Translated, name: str) -> None:
        try:
            self.apply(out, name)
        except Refusal as refusal:
            out.refuse(name, str(refusal))


def same_value(value: Any) -> Any:
    return value


def whole(value: Any) -> int | None:
    """A whole number, also written 8.0 or '8'; null stays null."""
    if value is None:
        return None
    try:
        if isinstance(value, bool) or int(value) != float(value):
            raise ValueError
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise Refusal("expected a whole number.") from None


def positive(value: Any) -> int:
    number = whole(value)
    if number is None or number < 1:
        raise Refusal("expected a whole number of at least 1.")
    return number


def real(value: Any) -> float | None:
    """A number, also written as text ('1e-6'); null stays null."""
    if value is None:
        return None
    try:
        if isinstance(value, bool) or not math.isfinite(float(value)):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise Refusal("expected a number.") from None


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Refusal("expected true or false.")
    return value


def text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise Refusal("expected a text.")
    return value


def listed(value: Any) -> list[Any]:
    """A list, or one of it; null is an empty one."""
    if value is None or isinstance(value, str):
        return [] if value is None else [value]
    if not isinstance(value, list | tuple):
        raise Refusal("expected a list.")
    return list(value)


def option(convert: Callable[[Any], Any] = same_value) -> Rule:
    """An option of the algorithm, under the same name."""
    return Rule("option of the algorithm", lambda out, name: out.put(out.options, name, name, convert(out.given[name])))


def setting(ours: str, convert: Callable[[Any], Any] = same_value) -> Rule:
    """A training option."""
    return Rule(f"`{ours}`", lambda out, name: out.set(name, ours, convert(out.given[name])))


def argument(ours: str, convert: Callable[[Any], Any] = same_value) -> Rule:
    """An argument of ``train``; null is none."""

    def apply(out: Translated, name: str) -> None:
        if out.given[name] is None:
            return out.same(name)
        out.put(out.arguments, name, ours, convert(out.given[name]))

    return Rule(f"`{ours}=`", apply)


def fixed(*values: Any, why: str) -> Rule:
    """Only these values: they are what happens here anyway. TRL's default is the first."""

    def apply(out: Translated, name: str) -> None:
        value = out.given[name]
        if any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values):
            out.same(name)
        else:
            out.refuse(name, f"{why}; only {' or '.join(_yaml(v) for v in values)}.")

    return Rule(f"only {' or '.join(f'`{_yaml(v)}`' for v in values)}: {why}", apply)


def no_effect(why: str) -> Rule:
    return Rule(f"no effect: {why}", lambda out, name: out.ignore(name, why))


def refused(why: str) -> Rule:
    return Rule(f"refused: {why}", lambda out, name: out.refuse(name, f"{why}."))


def _yaml(value: Any) -> str:
    names: dict[Any, str] = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return names[value]
    return "''" if value == "" else str(value)


def mapping(value: Any) -> Mapping[str, Any]:
    """A mapping, or JSON of one, as TRL's command line takes it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise Refusal("expected a mapping.") from None
    if not isinstance(value, Mapping):
        raise Refusal("expected a mapping.")
    return value
