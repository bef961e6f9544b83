"""How a suite's file is read: YAML with 1e-4 as a number, ready tasks underneath, keys with dots, mistakes in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from prefzoo.registry import UsageError, suggest
from prefzoo.yaml_numbers import read_yaml


def like(value: Mapping[str, Any]) -> dict[str, Any]:
    """A task under which lies a ready one."""
    value = dict(value)
    name, folder = value.pop("like"), Path(__file__).parent / "ready"
    known = sorted(f.stem for f in folder.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"like: no ready task {name!r}{suggest(str(name), known)} There are {', '.join(known)}")
    ready = read_yaml(folder / f"{name}.yaml")
    methods = {m.get("name", m["algorithm"]): m for m in ready["algorithms"] if isinstance(m, Mapping)}
    if "algorithms" in value and isinstance(value["algorithms"], list | tuple):
        value["algorithms"] = [methods.get(m, m) if isinstance(m, str) else m for m in value["algorithms"]]
    return {"name": name, **merged(ready, value)}


def merged(under: Any, over: Any) -> Any:
    """Nested mappings, the second over the first; ``null`` takes a value away."""
    if isinstance(over, BaseModel):
        over = {k: getattr(over, k) for k in over.model_fields_set}
    if not (isinstance(under, Mapping) and isinstance(over, Mapping)):
        return over
    return {**under, **{k: merged(under.get(k), v) for k, v in over.items()}}


def varied(task: Any, vary: Any) -> Iterator[Any]:
    if not isinstance(vary, Mapping) or len(vary) != 1 or not isinstance(next(iter(vary.values())), list | tuple):
        raise ValueError(f"vary: expected one key and its values, such as {{world.noise: [0, 0.2]}}, got {vary!r:.60}")
    if not isinstance(task, Mapping):
        raise ValueError("vary multiplies tasks that are written as mappings")
    [(key, values)] = vary.items()
    for value in values:
        yield changed({**task, "name": f"{key.split('.')[-1]}={value}"}, key.split("."), value)


def changed(found: Any, path: Sequence[str], value: Any) -> Any:
    """A nested mapping with one value changed; a number chooses from a list."""
    if not path:
        return value
    key, *rest = path
    if isinstance(found, list | tuple) and key.isdigit() and int(key) < len(found):
        return [changed(item, rest, value) if i == int(key) else item for i, item in enumerate(found)]
    if found is not None and not isinstance(found, Mapping):
        raise UsageError(f"{key!r} is not part of {found!r:.60}; write keys as start.model=FOLDER.")
    return {**(found or {}), key: changed((found or {}).get(key), rest, value)}


def said_of(model: type[BaseModel], error: ValidationError, extra: Mapping[Any, Sequence[str]]) -> str:
    """The first mistake, by the key at fault, with the nearest known key."""
    first = error.errors()[0]
    place = ".".join(str(p) for p in first["loc"])
    if first["type"] == "extra_forbidden":
        known = keys_at(model, extra, first["loc"][:-1])
        inside = f" in {place.rpartition('.')[0]}" if len(first["loc"]) > 1 else ""
        key = str(first["loc"][-1])
        return f"no key {key!r}{inside}{suggest(key, known)} Known: {', '.join(known)}."
    words = str(first["msg"]).removeprefix("Value error, ").rstrip(".")
    got = "" if first["type"] in ("value_error", "missing") else f" (got {first['input']!r:.80})"
    return f"{place + ': ' if place else ''}{words}{got}."


def keys_at(model: Any, extra: Mapping[Any, Sequence[str]], path: Sequence[Any]) -> list[str]:
    """The keys that are known at a place of a model."""
    for part in path:
        if isinstance(part, int):
            continue
        field = getattr(model, "model_fields", {}).get(part)
        found = _section(field.annotation) if field is not None else None
        if found is None:
            return []
        model = found
    keys = list(model.model_fields)
    return [*keys, *(k for k in extra.get(model, ()) if k not in keys)]


def _section(annotation: Any) -> Any:
    """The model inside an annotation: of ``Task | None``, or of ``tuple[Task, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section, getattr(annotation, "__args__", ()))), None)
