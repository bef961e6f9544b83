"""``prefzoo list`` and ``prefzoo show``: what is registered, for people and as JSON."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prefzoo.algorithm import (
    ALGORITHMS,
    Algorithm,
    algorithm_entry,
    create_algorithm,
    is_algorithm,
    list_algorithms,
)  # fmt: skip
from prefzoo.losses import LOSSES, Loss
from prefzoo.parts.feedback import Verifier
from prefzoo.parts.roles import POLICY, REWARD
from prefzoo.plugins import import_file
from prefzoo.registry import Entry, UsageError, prefix_of, suggest
from prefzoo.training.config import ONLY_DATASET, TrainConfig

KINDS = ("algorithms", "losses")
LEARNS_FROM = {  # what the data must hold, or can be turned into
    "pairs": "pairs",
    "unpaired": "rated answers",
    "completions": "demonstrations",
    "prompts": "prompts",
}


def show_list(kind: str, pattern: str, imports: Iterable[Path], as_json: bool) -> None:
    """Print the entries of a kind whose names match."""
    if kind not in KINDS:
        raise UsageError(f"cannot list {kind!r}{suggest(kind, KINDS)} Known: {', '.join(KINDS)}.")
    _import_all(imports)
    facts = algorithm_facts if kind == "algorithms" else loss_facts
    names = list_algorithms(pattern) if kind == "algorithms" else LOSSES.names(pattern)
    rows = [facts(name) for name in names]
    if as_json:
        print(json.dumps(rows, indent=2, default=str))
        return
    if not rows:
        known = list_algorithms() if kind == "algorithms" else LOSSES.names()
        raise UsageError(f"no {kind} match {pattern!r}{suggest(pattern, known)} Registered: {', '.join(known)}.")
    columns = ("learns_from", "needs") if kind == "algorithms" else ("family", "count")
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("what it is")
    for column in (*columns, "paper"):
        table.add_column(column.replace("_", " "), no_wrap=column in ("paper", "family"))
    for row in rows:
        also = f" (also {', '.join(row['aliases'])})" if row["aliases"] else ""
        cells = [", ".join(row[c]) if isinstance(row[c], list) else row[c] for c in columns]
        table.add_row(row["name"], row["line"] + also, *cells, (row["paper"] or "").removeprefix("arXiv:"))
    _console().print(table)


def show_card(name: str, as_loss: bool, imports: Iterable[Path], as_json: bool) -> None:
    """Print everything about one entry; of the name ``training``, the options that all runs share."""
    if name == "training":
        show_training(as_json)
        return
    _import_all(imports)
    if as_loss or _is_term_only(name):
        facts = loss_facts(LOSSES.entry(name).name, whole=True)
    elif name not in ALGORITHMS and name not in LOSSES:
        raise ALGORITHMS.unknown(name, sorted({*list_algorithms(f"{prefix_of(name)}*"), *LOSSES.names()}))
    else:
        facts = algorithm_facts(algorithm_entry(name).name, whole=True)
    if as_json:
        print(json.dumps(facts, indent=2, default=str))
        return
    _print_card(facts)


def show_training(as_json: bool) -> None:
    """Print the options of every run, their values unless an algorithm recommends others, and what they do."""
    rows = training_options()
    if as_json:
        print(json.dumps(rows, indent=2, default=str))
        return
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("option", style="bold", no_wrap=True)
    table.add_column("default", no_wrap=True)
    table.add_column("")
    for row in rows:
        table.add_row(row["name"], _word(row["default"]), _plain(row["doc"]))
    _console().print(table)


def training_options() -> list[dict[str, Any]]:
    """Name, default and description of every field of the training configuration."""
    defaults = TrainConfig.of().model_dump(mode="json")
    fields = TrainConfig.model_fields
    return [{"name": k, "default": v, "doc": fields[k].description or ""} for k, v in defaults.items()]


def training_page() -> str:
    """The same as a page of the documentation."""
    head = "# Training options\n\nOf every run, whatever the algorithm: `--key value`, or `-s key=value`.\n\n"
    rows = "".join(f"| `{r['name']}` | `{_word(r['default'])}` | {_text(r['doc'])} |\n" for r in training_options())
    return f"{head}| option | default | what it does |\n|---|---|---|\n{rows}"


def _text(words: str) -> str:
    return words.replace("|", "\\|")


def algorithm_facts(name: str, whole: bool = False) -> dict[str, Any]:
    """What is known about an algorithm; ``whole``: its documentation, options and training values too."""
    entry = algorithm_entry(name)
    try:
        algorithm = create_algorithm(name)
    except Exception as error:  # a user's entry must not hide all others
        algorithm, problem = None, f"cannot be made with its defaults: {error}"
    facts: dict[str, Any] = {
        "name": name,
        "kind": "algorithm",
        "line": entry.line,
        "paper": entry.paper,
        "aliases": list(entry.aliases),
        "learns_from": LEARNS_FROM[algorithm.data] if algorithm else problem,
        "needs": _needs(algorithm) if algorithm else [],
    }
    if whole and algorithm is None:
        raise UsageError(f"algorithm {name!r} {problem}")
    if whole and algorithm is not None:
        training = TrainConfig.of(algorithm.recommended).model_dump(mode="json")
        if algorithm.stages[0].on_policy:
            training = {k: v for k, v in training.items() if k not in ONLY_DATASET}
        facts |= _documentation(entry) | {
            "recommended": algorithm.recommended,
            "training": training,
            "composition": repr(algorithm).partition(": ")[2].removesuffix(">"),
            "losses": list(dict.fromkeys(t.loss.name for s in algorithm.stages for t in s.terms)),
        }
    return facts


def loss_facts(name: str, whole: bool = False) -> dict[str, Any]:
    """What is known about a loss."""
    entry = LOSSES.entry(name)
    loss = Loss(entry)
    facts: dict[str, Any] = {
        "name": name,
        "kind": "loss",
        "line": entry.line,
        "paper": entry.paper,
        "aliases": list(entry.aliases),
        "family": loss.family.__name__,
        "count": loss.count,
        "needs": [*(["reference"] if loss.reference else []), *loss.extras],
    }
    if whole:
        facts |= _documentation(entry)
    return facts


def _needs(algorithm: Algorithm) -> list[str]:
    """What must be there beside the policy and the data; what it trains from nothing is not needed."""
    needs = set(algorithm.needs) - {POLICY}
    if algorithm.trains_reward:
        needs.discard(REWARD)
    if REWARD in needs and any(isinstance(s.feedback, Verifier) for s in algorithm.stages):
        needs = (needs - {REWARD}) | {"verifier"}
    return sorted(needs)


def _documentation(entry: Entry) -> dict[str, Any]:
    function = inspect.unwrap(entry.function)
    return {"doc": inspect.getdoc(function) or "", "options": entry.options, "file": inspect.getsourcefile(function)}


def _is_term_only(name: str) -> bool:
    """A loss that is no algorithm of its own: it trains a critic, or nobody makes its records."""
    return name not in ALGORITHMS and name in LOSSES and not is_algorithm(LOSSES.entry(name))


def _print_card(facts: dict[str, Any]) -> None:
    console = _console()
    head = [facts["name"], f"({facts['kind']})", *([facts["paper"]] if facts["paper"] else [])]
    if facts["aliases"]:
        head.append(f"also {', '.join(facts['aliases'])}")
    console.print("  ".join(head), style="bold", markup=False)
    console.print(f"\n{facts['doc'].strip()}\n", markup=False, highlight=False, soft_wrap=True)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for key, value in _rows(facts).items():
        table.add_row(key, _plain(value))
    table.add_row("source", facts["file"] or "unknown")
    console.print(table)


def card_page(facts: dict[str, Any]) -> str:
    """The same card as a page of the documentation, in Markdown; the docstring comes through mkdocstrings."""
    function = inspect.unwrap((LOSSES if facts["kind"] == "loss" else ALGORITHMS).entry(facts["name"]).function)
    rows = "".join(f"| {key} | {_cell(value)} |\n" for key, value in _rows(facts).items())
    also = f" (also {', '.join(facts['aliases'])})" if facts["aliases"] else ""
    paper = f" · {facts['paper']}" if facts["paper"] else ""
    head = f"# {facts['name']}\n\n{facts['kind'].capitalize()}{also}{paper}\n\n| | |\n|---|---|\n{rows}"
    return f"{head}\n::: {function.__module__}.{function.__qualname__}\n"


def _cell(text: str) -> str:
    return " ".join(f"`{word}`" for word in _text(text).splitlines()) if text else "–"


def _rows(facts: dict[str, Any]) -> dict[str, str]:
    """What a card says beside the docstring."""
    rows = {"options": _settings(facts["options"]) or "none"}
    if facts["kind"] == "algorithm":
        rows |= {
            "learns from": facts["learns_from"],
            "needs": ", ".join(facts["needs"]) or "nothing more",
            "made of": facts["composition"],
            "training": _settings(facts["recommended"]),
            "": "all options of training: prefzoo show training",
            "its losses": "\n".join(f"prefzoo show --loss {name}" for name in facts["losses"]),
        }
    else:
        rows |= {
            "family": facts["family"],
            "mean over": facts["count"],
            "needs": ", ".join(facts["needs"]) or "nothing more",
        }
    return {key: value for key, value in rows.items() if value}


def _settings(values: Mapping[str, Any]) -> str:
    return "  ".join(f"{k}={_word(v)}" for k, v in values.items())


def _word(value: Any) -> str:
    """A value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value, default=repr)


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)


def _import_all(files: Iterable[Path]) -> None:
    for file in files:
        import_file(file)


def _console() -> Console:
    """Wide where nobody looks, so that a pipe gets one line per entry."""
    return Console(width=None if sys.stdout.isatty() else 160)
