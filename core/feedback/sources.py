"""Reward sources by name: what ``--reward 'name(...)'`` makes, in the spelling that verifiers have.

    ensemble(runs/rm1, runs/rm2, combine=minimum)
    judge(endpoint=http://localhost:8000, model=my-model)

A maker is a function: its positional arguments are rewards (or files), its keyword-only ones are options. In Python it
is called as it is written here, with values in quotes.
"""

from __future__ import annotations

import ast
import inspect
import re
from typing import Any

from prefzoo.registry import Registry, UsageError

SOURCES = Registry("reward source", provider="prefzoo.feedback")
_OPTION = re.compile(r"\s*([A-Za-z_]\w*)\s*=(?!=)(.*)", re.DOTALL)
_WORDS = {"true": True, "false": False, "none": None, "null": None}


def named_source(text: str) -> Any:
    """The source that a text such as ``ensemble(a, b)`` makes, not bound to a tokenizer yet; None: it names none."""
    name, bracket, _ = text.strip().partition("(")
    if not bracket or not re.fullmatch(r"[A-Za-z_]\w*", name) or name not in SOURCES:
        return None
    entry = SOURCES.entry(name)
    given, options = read_call(text.strip())
    entry.check_options(options, "reward source")
    parameters = inspect.signature(entry.function).parameters.values()
    if not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        needed = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
        if not len(needed) <= len(given) <= len(names):
            expected = f"{', '.join(names)} in this order" if names else "options alone, written option=value"
            raise UsageError(f"reward {text!r}: {name} takes {expected}; got {len(given)} without a name.")
    return entry.function(*given, **options)


def read_call(text: str) -> tuple[list[Any], dict[str, Any]]:
    """Arguments and options of ``name(...)``. A value is a number, true or false, none, or text; text that holds a
    comma or an equals sign stands in quotes.

    >>> read_call("ensemble(runs/rm1, judge(model=runs/a, both_orders=false), k=2, combine='minimum')")
    (['runs/rm1', 'judge(model=runs/a, both_orders=false)'], {'k': 2, 'combine': 'minimum'})
    """
    body = text[text.index("(") + 1 :]
    if not body.endswith(")"):
        raise UsageError(f"reward {text!r}: the bracket is not closed.")
    given: list[Any] = []
    options: dict[str, Any] = {}
    for part in _parts(body[:-1], text):
        found = _OPTION.fullmatch(part)
        if found is not None:
            if found[1] in options:
                raise UsageError(f"reward {text!r}: option {found[1]!r} is given twice.")
            options[found[1]] = _value(found[2])
        elif options:
            raise UsageError(f"reward {text!r}: {part.strip()!r} stands behind an option; rewards come first.")
        else:
            given.append(_value(part))
    return given, options


def _parts(body: str, text: str) -> list[str]:
    """What stands between commas, those inside brackets and quotes left alone."""
    parts, depth, quote = [""], 0, ""
    for letter in body:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and parts[-1].rstrip(" ")[-1:] in ("", "=", "(", "["):  # an apostrophe opens no quote
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and not depth:
            parts.append("")
            continue
        parts[-1] += letter
    if depth or quote:
        raise UsageError(f"reward {text!r}: a {'quote' if quote else 'bracket'} is not closed.")
    if parts == [""] or parts[-1].strip() == "":
        parts.pop()
    if any(not p.strip() for p in parts):
        raise UsageError(f"reward {text!r}: nothing stands between two commas.")
    return parts


def _value(text: str) -> Any:
    text = text.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):  # a path, an address, a name
        return text
