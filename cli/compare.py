"""``prefzoo compare``: models or files of answers, by judges, without training."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefzoo.benchmarks import comparison
from prefzoo.benchmarks.judging.people import export_for_humans
from prefzoo.cli.training import read_columns
from prefzoo.models.folders import run_model
from prefzoo.models.load import load_tokenizer
from prefzoo.registry import UsageError

DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 256, "seed": 0, "cache": ".prefzoo-judge"}


def compare(
    models: Sequence[str],
    judges: Sequence[str],
    prompts: str | None,
    columns: str | None,
    names: str | None,
    answering: Mapping[str, Any],
    out: Path | None,
    export: Path | None,
    as_json: bool,
) -> None:
    """Print who wins against whom, and write what was asked for."""
    if export is not None and export.exists():
        raise UsageError(f"--export {str(export)!r} exists already; choose another name.")
    told: Any = list(models)
    if names is not None:
        said = [n.strip() for n in names.split(",")]
        if len(said) != len(models) or len({*said}) != len(said):
            raise UsageError(f"--names {names!r}: give {len(models)} different names, one for each of the models.")
        told = dict(zip(said, models, strict=True))
    given = {"judge": judges, "prompts": prompts, "columns": columns, "names": names, **answering}
    words = answering["tokenizer"]
    options = {**answering, "tokenizer": None if words is None else load_tokenizer(run_model(words))}
    found = comparison.compare(
        told, judge=list(judges), prompts=prompts, columns=None if columns is None else read_columns(columns),
        command=command(models, given), **options,
    )  # fmt: skip
    report = None if out is None else found.report(out)
    count = None if export is None else export_for_humans(found.contenders, found.baseline, export)
    if as_json:
        print(json.dumps(found.results, indent=1))
        return
    print(found)
    for sentence in found.results["verdict"]:
        print(f"• {sentence}")
    if report is not None:
        print(report.rstrip().splitlines()[-1])
    if count is not None:
        print(f"{count} comparisons to judge are in {export}; when they are: --judge '{{human: {export}}}'")


def command(models: Sequence[str], given: Mapping[str, Any]) -> str:
    """The command line that does this again.

    >>> command(["a.jsonl", "b.jsonl"], {"judge": ["length"], "samples": 2, "seed": 0})
    'prefzoo compare a.jsonl b.jsonl --judge length -n 2'
    """
    words = ["prefzoo", "compare", *models]
    for option, value in given.items():
        if value is None or DEFAULTS.get(option) == value:
            continue
        name = "-n" if option == "samples" else f"--{option.replace('_', '-')}"
        for one in value if isinstance(value, list | tuple) else [value]:
            words += [name, str(one)]
    return shlex.join(words)
