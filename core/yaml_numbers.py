"""YAML as people write it: 1e-5 is a number. The version that the library reads asks for a point in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from prefzoo.registry import UsageError


class Numbers(yaml.SafeLoader):
    """YAML in which 1e-5 is a number."""


Numbers.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+\Z"), list("-+0123456789")
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The lines ``key: value`` of a YAML file; an empty file has none."""
    path = Path(path)
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader=Numbers)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"config {str(path)!r} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"config {str(path)!r} is not YAML: {' '.join(str(error).split())}.") from error
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UsageError(f"config {str(path)!r}: expected lines of the form 'key: value'.")
    return found
