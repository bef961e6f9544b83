"""An extension of griffe, for what Markdown or the Google style would read as something else in our docstrings."""

import re
from typing import Any

import griffe

# A doctest, which Markdown takes for a quote; and what is returned, of which a colon would make a table of types.
DOCTEST = re.compile(r"(?:\A|(?<=\n\n))>>> .*?(?=\n\s*\n|\Z)", re.S)
RETURNS = re.compile(r"^Returns:\n((?:    .*\n?)+)", re.M)


class Examples(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object | griffe.Alias, **kwargs: Any) -> None:
        if not obj.is_alias and obj.docstring:
            text = DOCTEST.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
            obj.docstring.value = RETURNS.sub(lambda found: f"**Returns:** {' '.join(found[1].split())}\n", text)
