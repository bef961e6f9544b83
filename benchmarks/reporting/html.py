"""The report as one HTML file: nothing is loaded from anywhere, and text of models and errors stays text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib.resources import files
from typing import Any

from prefzoo.benchmarks.reporting.page import Page

FOLDER = "prefzoo.benchmarks.reporting"


def embedded(value: Any) -> str:
    """JSON that can stand in a script element: no character of it can end the element.

    >>> embedded({"a": "</script><!--"})
    '{"a":"\\\\u003c/script\\\\u003e\\\\u003c!--"}'
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"


def html(page: Page) -> str:
    """The page as HTML.

    Two walls keep text of others from running: everything is escaped, and the policy in the head lets the page run its
    own script alone, which it names by hash, and load nothing.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader(FOLDER), undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"embedded": lambda v: Markup(embedded(v)), "slug": slug}
    script, style = (files(FOLDER).joinpath("templates", f"report.{kind}").read_text("utf-8") for kind in ("js", "css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        page=page, script=Markup(script), style=Markup(style), digest=digest, markup=Markup
    )
