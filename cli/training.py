"""``prefzoo train``: from the words of the command line and of a file to one call of :func:`prefzoo.train`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
import yaml

from prefzoo.algorithm import algorithm_entry
from prefzoo.plugins import import_file, import_function, names_function
from prefzoo.processes import Processes
from prefzoo.registry import UsageError
from prefzoo.spellings.trl import read_trl_config
from prefzoo.spellings.trl.fields import FIELDS
from prefzoo.training import NonFiniteError, Stopped, TrainConfig
from prefzoo.training import train as train_algorithm
from prefzoo.training.checkpoint import found
from prefzoo.training.setup import no_option
from prefzoo.yaml_numbers import Numbers, read_yaml

# What train() takes beside options of the algorithm and of the training.
ARGUMENTS = (
    "model", "dataset", "output_dir", "reward", "reward_weights", "reference", "teacher", "ptx_dataset", "eval_dataset",
    "push_to_hub", "resume", "may_differ",
)  # fmt: skip


def train(
    words: Sequence[str],
    given: Mapping[str, Any],
    config: Path | None,
    from_trl: Path | None,
    settings: Sequence[str],
    imports: Iterable[Path],
    quiet: bool,
) -> None:
    """Train, then say where the result is."""
    name, merged = read_all(words, given, config, from_trl, settings, imports)
    merged.setdefault("output_dir", Path("runs") / name.replace(":", "-"))
    before = found(Path(merged["output_dir"]))
    try:
        run = train_algorithm(name, quiet=quiet, **merged)
    except BaseException as error:
        if found(Path(merged["output_dir"])) != before and Processes.launched().main:
            print(_how_to_go_on(error, merged.get("resume") is True), file=sys.stderr)
        if isinstance(error, Stopped):
            raise typer.Exit(error.exit_code) from None
        raise
    if not Processes.launched().main:  # one speaks for all
        return
    for row in (
        next((r for r in reversed(run.history) if "learning_rate" in r), None),
        next((r for r in reversed(run.history) if any(k.startswith("eval/") for k in r)), None),
    ):
        if row is not None:
            print("  ".join(f"{key} {value:.6g}" for key, value in row.items() if key != "time"))
    if run.best is not None:
        print(f"best {run.best['metric']} {run.best['value']:.6g} after step {run.best['step']}")
    skipped = f", {run.spent.nonfinite_steps} more not taken (not finite)" if run.spent.nonfinite_steps else ""
    print(f"{run.spent.optimizer_steps} optimizer steps{skipped} in {run.spent.seconds:.1f} s")
    print(f"the result is in {merged['output_dir']}/final")


def _how_to_go_on(error: BaseException, resumed: bool) -> str:
    """What to type next."""
    if isinstance(error, NonFiniteError):
        return (
            "going on from the checkpoint meets the same rows: leave them out (--on-nonfinite skip --may-differ "
            "on_nonfinite), or begin anew with a lower learning rate."
        )
    if Processes.launched().size > 1:
        return "go on with the same launch command" + ("" if resumed else " and --resume")
    return f"go on with: {shlex.join(['prefzoo', *sys.argv[1:], *([] if resumed else ['--resume'])])}"


def read_all(
    words: Sequence[str],
    given: Mapping[str, Any],
    config: Path | None,
    from_trl: Path | None,
    settings: Sequence[str],
    imports: Iterable[Path],
) -> tuple[str, dict[str, Any]]:
    """The algorithm's name and everything that was said. Later layers win: files, ``--key value``, ``-s key=value``."""
    for file in imports:
        import_file(file)
    name, free = read_words(words)
    said = {k: v for k, v in given.items() if v is not None} | free | read_settings(settings)
    if config is not None:
        said = read_config(config) | said
    for file in listed(said.pop("import", [])):
        import_file(file)
    name = name or said.get("algorithm")
    said.pop("algorithm", None)
    if from_trl is not None:
        name, merged = read_trl(from_trl, name, said)
    else:
        merged = said
    if not name:
        raise UsageError("which algorithm? prefzoo train NAME ...; 'prefzoo list' shows the names.")
    entry = algorithm_entry(name)
    known = [*ARGUMENTS, "config", *entry.options, *TrainConfig.model_fields]
    for key in merged:
        if key not in known and "spelling" not in entry.tags:  # trl: names know more words, and check them
            raise no_option(name, entry.options, key, known)
    if merged.get("model") is None:
        raise UsageError("which model? --model FOLDER, a hub id, or 'tiny' for a small one with random weights.")
    if "reward" in merged:
        rewards = listed(merged["reward"])
        for function in filter(names_function, rewards):
            import_function(function)  # what is wrong with the file is told before anything is loaded
        merged["reward"] = rewards[0] if len(rewards) == 1 else rewards
    if isinstance(merged.get("columns"), str):
        merged["columns"] = read_columns(merged["columns"])
    for key in ("dataset", "eval_dataset"):
        if isinstance(merged.get(key), list) and len(merged[key]) == 1:
            merged[key] = merged[key][0]
    return name, merged


def read_trl(file: Path, name: str | None, said: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A TRL configuration in our words; what maps, what has no effect and what is refused is printed.

    What was said beside the file wins over it: our arguments, and our settings where TRL has no field of the name, as
    they are; the rest by TRL's names.
    """
    theirs = {field for table in FIELDS.values() for field in table}
    ours = {k: v for k, v in said.items() if k in ARGUMENTS}
    settings = {k: v for k, v in said.items() if k in TrainConfig.model_fields and k not in theirs}
    rest = {k: v for k, v in said.items() if k not in ours and k not in settings}
    translated = read_trl_config(file, name, rest)
    for line in translated.lines():
        print(line, file=sys.stderr)
    translated.check()
    found = translated.call()
    return translated.algorithm, {**found, **ours, "config": found["config"] | settings}


def read_columns(text: str) -> dict[str, str]:
    """``--columns``: what the data calls our columns.

    >>> read_columns("chosen=good,rejected=bad")
    {'chosen': 'good', 'rejected': 'bad'}
    """
    out = {}
    for pair in text.split(","):
        ours, equals, theirs = pair.partition("=")
        if not equals or not ours.strip() or not theirs.strip():
            raise UsageError(f"--columns {text!r}: expected OURS=THEIRS, such as chosen=good,rejected=bad.")
        out[ours.strip()] = theirs.strip()
    return out


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
    return {_key(key): value for key, value in read_yaml(path).items()}


def read_value(text: str) -> Any:
    """A value as YAML reads it: a number, true or false, null, a list, or text.

    >>> [read_value(text) for text in ("1e-5", "3", "true", "null", "[0.9, 0.99]", "cosine")]
    [1e-05, 3, True, None, [0.9, 0.99], 'cosine']
    """
    try:
        return yaml.load(text, Loader=Numbers)
    except yaml.YAMLError:
        return text


def _key(text: str) -> str:
    return text.replace("-", "_")


def listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
