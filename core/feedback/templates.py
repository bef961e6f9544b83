"""What a judge is asked: texts with places to fill in, those of the package (``prompts/*.txt``) or your own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prefzoo.registry import UsageError, suggest

FOLDER = Path(__file__).parent / "prompts"
PLACE = re.compile(r"\{([a-z_][a-z0-9_]*)\}")


class Template:
    """A text with places such as ``{prompt}``.

    The places are filled in one pass, so that a brace in an answer stays a brace. ``{fence}`` is a mark made from the
    values, by which a template can show where material begins and ends: an answer cannot hold its own.

    Args:
        source: the name of a template of the package, the path of a text file, or the text itself (of several lines).
        needed: places that it must have.
    """

    def __init__(self, source: str | Path, needed: Iterable[str]) -> None:
        self.text = _read(source)
        self.places = tuple(dict.fromkeys(PLACE.findall(self.text)))
        lacking = [place for place in needed if place not in self.places]
        if lacking:
            name = str(source) if "\n" not in str(source) else "of your own"
            have = ", ".join(f"{{{p}}}" for p in self.places) or "none"
            raise UsageError(f"template {name!r}: the place {{{lacking[0]}}} is missing; it has {have}.")

    def fill(self, values: Mapping[str, Any]) -> str:
        """The text with these values in its places."""
        told = {k: said(v) for k, v in values.items() if k in self.places}
        told["fence"] = hashlib.sha256("\0".join(told.values()).encode(errors="replace")).hexdigest()[:12]
        for place in self.places:
            if place not in told:
                known = [k for k in values if k != "fence"]
                raise UsageError(f"template: nothing fills the place {{{place}}}{suggest(place, known)} "
                                 f"There are {', '.join(known)}.")  # fmt: skip
        return PLACE.sub(lambda found: told[found[1]], self.text)


def said(value: Any) -> str:
    """A value as a judge reads it: messages turn by turn.

    >>> print(said([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]))
    user: Hi
    <BLANKLINE>
    assistant: Hello!
    """
    messages = isinstance(value, list | tuple) and value and all(isinstance(m, Mapping) for m in value)
    if not messages:
        return str(value)
    return "\n\n".join(f"{m.get('role', 'user')}: {m.get('content') or ''}" for m in value)


def _read(source: str | Path) -> str:
    if isinstance(source, str) and "\n" in source:
        return source
    known = sorted(file.stem for file in FOLDER.glob("*.txt"))
    file = FOLDER / f"{source}.txt" if str(source) in known else Path(source)
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"template {str(source)!r} could not be read ({error.__class__.__name__}){suggest(str(source), known)} "
            f"Give a text file, or one of {', '.join(known)}."
        ) from None
