"""``prefzoo train``: from the words of the command line and of a file to one call of :func:`prefzoo.train`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from prefzoo.algorithm import algorithm_entry
from prefzoo.plugins import import_file, import_function, names_function
from prefzoo.registry import UsageError, suggest
from prefzoo.training import TrainConfig
from prefzoo.training import train as train_algorithm

# What train() takes beside options of the algorithm and of the training.
ARGUMENTS = ("model", "dataset", "output_dir", "reward", "reference", "ptx_dataset")


def train(
    words: Sequence[str],
    given: Mapping[str, Any],
    config: Path | None,
    settings: Sequence[str],
    imports: Iterable[Path],
    quiet: bool,
) -> None:
    """Train, then say where the result is. Later layers win: the file, ``--key value``, ``-s key=value``."""
    for file in imports:
        import_file(file)
    name, free = read_words(words)
    merged = read_config(config) if config is not None else {}
    merged |= {k: v for k, v in given.items() if v is not None} | free | read_settings(settings)
    for file in _listed(merged.pop("import", [])):
        import_file(file)
    name = name or merged.pop("algorithm", None)
    merged.pop("algorithm", None)
    if not name:
        raise UsageError("which algorithm? prefzoo train NAME ...; 'prefzoo list' shows the names.")
    known = [*ARGUMENTS, *algorithm_entry(name).options, *TrainConfig.model_fields]
    for key in merged:
        if key not in known:
            raise UsageError(f"neither algorithm {name!r} nor training has an option {key!r}{suggest(key, known)}")
    if merged.get("model") is None:
        raise UsageError("which model? --model FOLDER, a hub id, or 'tiny' for a small one with random weights.")
    if "reward" in merged:
        rewards = [import_function(r) if names_function(r) else r for r in _listed(merged["reward"])]
        merged["reward"] = rewards[0] if len(rewards) == 1 else rewards
    merged.setdefault("output_dir", Path("runs") / name)
    run = train_algorithm(name, quiet=quiet, **merged)
    if run.history:
        last = {k: v for k, v in run.history[-1].items() if k != "time"}
        print("  ".join(f"{key} {value:.6g}" for key, value in last.items()))
    spent = run.spent
    print(f"{spent.optimizer_steps} optimizer steps in {spent.seconds:.1f} s")
    print(f"the result is in {merged['output_dir']}/final")


def read_words(words: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """The algorithm's name, if it comes first, and the options after it.

    >>> read_words(["dpo", "--beta", "0.2", "--gradient-checkpointing", "--learning-rate=1e-5"])
    ('dpo', {'beta': 0.2, 'gradient_checkpointing': True, 'learning_rate': 1e-05})
    """
    rest = list(words)
    name = rest.pop(0) if rest and not rest[0].startswith("-") else None
    options: dict[str, Any] = {}
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise UsageError(f"{word!r} is unexpected here: the algorithm's name comes first, then --key value.")
        key, has_value, value = word[2:].partition("=")
        if has_value:
            options[_key(key)] = read_value(value)
        elif rest and not rest[0].startswith("--"):
            options[_key(key)] = read_value(rest.pop(0))
        else:
            options[_key(key)] = True
    return name, options


def read_settings(settings: Sequence[str]) -> dict[str, Any]:
    """``-s key=value``.

    >>> read_settings(["max-grad-norm=null", "schedule=cosine"])
    {'max_grad_norm': None, 'schedule': 'cosine'}
    """
    options = {}
    for setting in settings:
        key, has_value, value = setting.partition("=")
        if not has_value or not key:
            raise UsageError(f"-s {setting!r}: expected KEY=VALUE, such as -s beta=0.2.")
        options[_key(key)] = read_value(value)
    return options


def read_config(path: Path) -> dict[str, Any]:
    """A YAML file of options."""
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
    return {_key(key): value for key, value in found.items()}


def read_value(text: str) -> Any:
    """A value as YAML reads it: a number, true or false, null, a list, or text.

    >>> [read_value(text) for text in ("1e-5", "3", "true", "null", "[0.9, 0.99]", "cosine")]
    [1e-05, 3, True, None, [0.9, 0.99], 'cosine']
    """
    try:
        return yaml.load(text, Loader=Numbers)
    except yaml.YAMLError:
        return text


class Numbers(yaml.SafeLoader):
    """YAML in which 1e-5 is a number: version 1.1, which the library reads, asks for a point in it."""


Numbers.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+\Z"), list("-+0123456789")
)


def _key(text: str) -> str:
    return text.replace("-", "_")


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
