"""Names: one registry class, used for losses, algorithms, worlds and judges.

The name of an entry is the name of its function, its configuration is the function's signature, its documentation
the docstring. Names of another library's spelling have its prefix, ``trl:dpo``: they are found like all others, and
listed only by a pattern that has the colon too. A leaf module: it imports nothing of prefzoo.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import math
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


class UsageError(ValueError):
    """A mistake of the caller, told in words: what is at fault, what was expected, and the cure."""


class RunError(RuntimeError):
    """What a run could not go on for, told in words: a disk, numbers that are not finite, another process that died."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that looks most like this one, if any does; of the same letters in another order above all.

    >>> nearest("dop", ["dpop", "dpo"]), nearest("gpro", ["pro", "grpo"])
    ('dpo', 'grpo')
    """
    known = list(known)
    mixed = next((k for k in known if sorted(k) == sorted(word)), None)
    return mixed or next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.5)), None)


def suggest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the nearest known one, or a full stop.

    >>> suggest("dop", ["dpo", "ipo", "kto"]), suggest("xyz", ["dpo"])
    ("; did you mean 'dpo'?", '.')
    """
    near = nearest(word, known)
    return f"; did you mean {near!r}?" if near else "."


@dataclass(frozen=True)
class Entry:
    """What is known about a registered function without calling it."""

    name: str
    function: Callable[..., Any]
    paper: str | None = None
    aliases: tuple[str, ...] = ()
    tags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    @functools.cached_property
    def own_options(self) -> dict[str, Any]:
        """Keyword-only options of the function, with their defaults; made once, so not to be changed."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    @property
    def options(self) -> dict[str, Any]:
        """All that may be given under this name; a kind of entry may know more than its function does."""
        return self.own_options

    @property
    def hints(self) -> dict[str, Any]:
        """What the options are annotated with."""
        return typing.get_type_hints(self.function, include_extras=True)

    def check_options(self, options: Mapping[str, Any], kind: str) -> None:
        """Refuse an option that the function does not have, or a value that its annotation does not allow."""
        hints = self.hints
        for key, value in options.items():
            if key not in self.options:
                raise UsageError(
                    f"{kind} {self.name!r} has no option {key!r}{suggest(key, self.options)} "
                    f"Its options: {', '.join(self.options) or 'none'}."
                )
            if key in hints and not _allows(hints[key], value):
                finite = "finite " if isinstance(value, float) and not math.isfinite(value) else ""
                wanted = finite + _words(hints[key])
                raise UsageError(f"{kind} {self.name!r}, option {key!r}: expected {wanted}, got {value!r}.")

    def source_hash(self) -> str:
        """Hash of the file that defines the function, so that edited mathematics never gets an old result.

        The whole file, not the function alone, and the files of its package that it takes from: helpers are part of
        what it computes.
        """
        target = inspect.unwrap(self.function)
        try:
            module = inspect.getmodule(target)
            source = "".join(map(inspect.getsource, [target] if module is None else with_helpers(module)))
        except (OSError, TypeError):  # defined in an interpreter or a notebook cell: the code object is all there is
            code = target.__code__
            source = repr((code.co_code, code.co_consts, code.co_names))
        return hashlib.sha256(source.encode()).hexdigest()[:16]


def with_helpers(module: types.ModuleType) -> list[types.ModuleType]:
    """A module, and those of its package that it takes something from, and so on, in the order of their names."""
    found, ahead = {module.__name__: module}, [module]
    while ahead:
        for value in vars(ahead.pop()).values():
            name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
            beside = isinstance(name, str) and name.rpartition(".")[0] == module.__package__ != ""
            if beside and name not in found and name in sys.modules:
                found[name] = sys.modules[name]
                ahead.append(found[name])
    return [found[name] for name in sorted(found)]


FEW = 30  # names that a message still lists


class Registry:
    """Functions by name. ``provider``: the modules that register our own entries, imported at the first look-up.

    Packages add entries through the entry-point groups ``prefzoo.losses``, ``prefzoo.algorithms`` (the kind's plural);
    users' files through ``--import``.

    >>> shapes = Registry("shape")
    >>> @shapes.register(aliases=("quad",))
    ... def square(*, side: float = 1.0) -> float:
    ...     "A square's area."
    ...     return side * side
    >>> shapes.entry("quad").line
    "A square's area."
    >>> shapes.names("s*")
    ['square']

    ``absent``: names that people will ask for and that are not here, each with the reason, told instead of "unknown".
    ``entry``: the class of its entries.
    """

    def __init__(self, kind: str, provider: str | tuple[str, ...] = (), entry: type[Entry] = Entry) -> None:
        self.kind = kind
        self._entry = entry
        self._providers = (provider,) if isinstance(provider, str) else provider
        self._loaded = not provider
        self._entries: dict[str, Entry] = {}
        self._aliases: dict[str, str] = {}
        self.absent: dict[str, str] = {}

    def register(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        name: str | None = None,
        paper: str | None = None,
        aliases: tuple[str, ...] = (),
        **tags: Any,
    ) -> Any:
        """Decorator: the function's name becomes the entry's, unless ``name`` is given. A name that is taken raises."""
        if function is None:
            return lambda f: self.register(f, name=name, paper=paper, aliases=aliases, **tags)
        name = name or function.__name__
        for word in (name, *aliases):
            owner = self._entries.get(self._aliases.get(word, word))
            if owner is not None and not _same_definition(owner.function, function):
                raise UsageError(
                    f"{self.kind} {word!r} is already registered by {owner.function.__module__}; choose another name."
                )
        self._entries[name] = self._entry(name, function, paper, aliases, tags)
        self._aliases.update(dict.fromkeys(aliases, name))
        return function

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True  # before the import: the providers themselves register here
        for provider in self._providers:
            importlib.import_module(provider)
        plural = f"{self.kind}{'es' if self.kind.endswith('s') else 's'}".replace(" ", "_").lower()
        for point in importlib.metadata.entry_points(group=f"prefzoo.{plural}"):
            point.load()

    def __contains__(self, name: str) -> bool:
        self._load()
        return self._aliases.get(name, name) in self._entries

    def entry(self, name: str) -> Entry:
        """The entry of a name or alias; an unknown one raises with the nearest name."""
        self._load()
        found = self._entries.get(self._aliases.get(name, name))
        if found is None:
            raise self.unknown(name, self.names(f"{prefix_of(name)}*"))
        return found

    def unknown(self, name: str, listed: Iterable[str]) -> UsageError:
        """The error of a name that is not among the ``listed`` ones."""
        if name in self.absent:
            return UsageError(f"{self.kind} {name!r} {self.absent[name]}")
        listed = list(listed)
        near = suggest(name, [*listed, *prefixed(self._aliases, prefix_of(name))])
        kind = "algorithms" if self.kind == "algorithm" else "losses"  # which lists what stands around them too
        lister = f"prefzoo list {kind} '{prefix_of(name)}*'" if prefix_of(name) else f"prefzoo list {kind}"
        known = ", ".join(listed) if len(listed) <= FEW else f"{len(listed)} names, which {lister!r} shows"
        return UsageError(f"no {self.kind} {name!r}{near} Registered: {known}.")

    def names(self, pattern: str = "*") -> list[str]:
        """Sorted names that match a shell pattern; those with a prefix only where the pattern has one."""
        self._load()
        names = fnmatch.filter(self._entries, pattern)
        return sorted(names if ":" in pattern else prefixed(names, ""))


def prefix_of(name: str) -> str:
    """The library that a name is spelled as: ``"trl:"`` of ``"trl:dpo"``, nothing of ``"dpo"``."""
    return "".join(name.partition(":")[:2]) if ":" in name else ""


def prefixed(names: Iterable[str], prefix: str) -> list[str]:
    """The names with exactly this prefix.

    >>> prefixed(["dpo", "trl:dpo"], "trl:"), prefixed(["dpo", "trl:dpo"], "")
    (['trl:dpo'], ['dpo'])
    """
    return [name for name in names if prefix_of(name) == prefix]


# Annotations of options of losses and algorithms that say more than the type.
ABOVE_0, SHARE, NOT_NEGATIVE = "above 0", "from 0 to 1", "of at least 0"
RANGES = {ABOVE_0: lambda x: x > 0, SHARE: lambda x: 0 <= x <= 1, NOT_NEGATIVE: lambda x: x >= 0}
Positive = typing.Annotated[float, ABOVE_0]
Share = typing.Annotated[float, SHARE]
NotNegative = typing.Annotated[float, NOT_NEGATIVE]


def _words(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Annotated:
        return f"{hint.__origin__.__name__} {hint.__metadata__[0]}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_words(part) for part in typing.get_args(hint))
    if hint is type(None):
        return "None"
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _allows(hint: Any, value: Any) -> bool:
    """Whether a value fits an annotation of plain types, literals and unions; other annotations allow anything."""
    if typing.get_origin(hint) is typing.Annotated:
        return _allows(hint.__origin__, value) and all(RANGES[m](value) for m in hint.__metadata__ if m in RANGES)
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_allows(part, value) for part in typing.get_args(hint))
    if hint is type(None):
        return value is None
    if hint in (int, float):  # True is an int to Python, and never meant as one; NaN and infinity make NaN of a loss
        number = isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
        return number and (isinstance(value, int) or math.isfinite(value))
    return isinstance(value, hint) if hint in (bool, str) else True


def _same_definition(old: Callable[..., Any], new: Callable[..., Any]) -> bool:
    """Whether ``new`` is ``old`` imported again (``--import`` of one file in two ways), not a second definition."""
    old, new = inspect.unwrap(old), inspect.unwrap(new)
    return (old.__code__.co_filename, old.__qualname__) == (new.__code__.co_filename, new.__qualname__)
