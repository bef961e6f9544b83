"""``prefzoo list`` and ``prefzoo show``: what is registered and what is proved of it, for people and as JSON."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from prefzoo.algorithm import (
    ALGORITHMS,
    Term,
    algorithm_entry,
    create_algorithm,
    is_algorithm,
    list_algorithms,
    untrained,
)  # fmt: skip
from prefzoo.cli.composition import COLUMNS, LEARNS_FROM, composition, needs
from prefzoo.losses.base import CREDITS, ESTIMATORS, LOSSES, MODIFIERS, Loss, LossEntry
from prefzoo.parts.options import DOC
from prefzoo.plugins import import_file
from prefzoo.registry import Entry, Registry, UsageError, prefix_of, suggest
from prefzoo.theory.base import Finding
from prefzoo.training.config import ONLY_DATASET, TrainConfig

# What ``list losses`` shows, by the word that lists it alone: losses, and the functions around them.
AROUND: dict[str, Registry] = {"losses": LOSSES, "modifiers": MODIFIERS, "credits": CREDITS, "estimators": ESTIMATORS}
KINDS = ("algorithms", *AROUND)
# Columns of the table of algorithms by the width of the terminal: below the first, from it on, from the second on.
MADE_OF = {0: ("source", "credit", "terms"), 100: COLUMNS[:4], 150: (*COLUMNS, "needs", "paper")}

GIVES = {"advantages": "advantages", "rows": "rows to keep", "rewards": "rewards of tokens"}
READS = {"logps": "two log-probabilities of a token", "logits": "logits of policy and reference"}


def show_list(kind: str, pattern: str, imports: Iterable[Path], as_json: bool, in_lines: bool = False) -> None:
    """Print the entries of a kind whose names match; of ``losses`` those of the functions around them too.

    ``in_lines``: of algorithms what each is, in words, instead of what it is made of.
    """
    if kind not in KINDS:
        raise UsageError(f"cannot list {kind!r}{suggest(kind, KINDS)} Known: {', '.join(KINDS)}.")
    import_all(imports)
    if kind == "algorithms":
        names = list_algorithms(pattern)
        rows = [algorithm_facts(name) for name in names]
    else:
        chosen = AROUND.values() if kind == "losses" else [AROUND[kind]]
        rows = [entry_facts(registry, name) for registry in chosen for name in registry.names(pattern)]
    if as_json:
        print(json.dumps(rows, indent=2, default=str))
        return
    if not rows:
        known = list_algorithms() if kind == "algorithms" else [n for r in chosen for n in r.names()]
        raise UsageError(f"no {kind} match {pattern!r}{suggest(pattern, known)} Registered: {', '.join(known)}.")
    console = wide_console()
    if kind == "algorithms" and not in_lines:
        console.print(_table_of_algorithms(rows, console.width))
        return
    columns: tuple[str, ...] = ("learns_from", "needs") if kind == "algorithms" else ("kind", "takes", "gives")
    columns = (*columns, "paper")  # as many as leave the line enough room to be read
    if console.width < (110 if kind == "algorithms" else 140):
        columns = (columns[0], "paper") if console.width >= 100 else columns[:1]
    shown = table("what it is", *(column.replace("_", " ") for column in columns), first="name")
    for row in rows:
        also = f" (also {', '.join(row['aliases'])})" if row["aliases"] else ""
        cells = [", ".join(row[c]) if isinstance(row[c], list) else row[c] or "" for c in columns]
        shown.add_row(row["name"], row["line"] + also, *(cell.removeprefix("arXiv:") for cell in cells))
    console.print(shown)


def _table_of_algorithms(rows: Iterable[Mapping[str, Any]], width: int) -> Table:
    """One line of parts for each stage; a narrow terminal gets fewer columns."""
    columns = MADE_OF[max(least for least in MADE_OF if least <= width)]
    shown = table(*columns, first="name")
    for row in rows:
        also = {"needs": ", ".join(row["needs"]), "paper": (row["paper"] or "").removeprefix("arXiv:")}
        if row["problem"]:
            shown.add_row(row["name"], row["problem"])
        for number, stage in enumerate(row["stages"]):
            cells = {**stage, **(also if number == 0 else {})}
            shown.add_row("" if number else row["name"], *(cells.get(column, "") for column in columns))
    return shown


def show_card(name: str, as_loss: bool, imports: Iterable[Path], as_json: bool, quick: bool = False) -> None:
    """Print everything about one entry; of the name ``training``, the options that all runs share.

    ``quick``: without what the laboratory would have to compute.
    """
    if name == "training":
        show_training(as_json)
        return
    import_all(imports)
    facts = facts_of(name, as_loss)
    if as_json:
        proved = {} if quick else {"proved": [vars(f) | {"holds": f.holds} for f in findings_of(facts)]}
        print(json.dumps(facts | proved, indent=2, default=str))
        return
    _print_card(facts)
    if not quick:
        _print_proofs(facts)


def facts_of(name: str, as_loss: bool = False) -> dict[str, Any]:
    """Everything about the entry of that name; an algorithm goes before a loss, unless the loss is asked for."""
    if as_loss and name not in LOSSES and name in ALGORITHMS:
        losses = ", ".join(algorithm_facts(algorithm_entry(name).name, whole=True)["losses"])
        raise UsageError(f"{name!r} is an algorithm and no loss; its losses: {losses}.")
    if as_loss or _is_term_only(name):
        return loss_facts(LOSSES.entry(name).name, whole=True)
    if name in ALGORITHMS or name in LOSSES:
        return algorithm_facts(algorithm_entry(name).name, whole=True)
    for registry in AROUND.values():
        if name in registry:
            return entry_facts(registry, registry.entry(name).name, whole=True)
    prefix = prefix_of(name)
    if prefix:
        near = suggest(name, list_algorithms(f"{prefix}*") or list_algorithms("*:*"))
        raise UsageError(f"no entry {name!r}{near} 'prefzoo list algorithms \"*:*\"' shows names that have a prefix.")
    near = suggest(name, [n for r in (ALGORITHMS, *AROUND.values()) for n in r.names()])
    raise UsageError(f"no entry {name!r}{near} 'prefzoo list' and 'prefzoo list losses' show the names.")


def show_training(as_json: bool) -> None:
    """Print the options of every run, their values unless an algorithm recommends others, and what they do."""
    rows = training_options()
    if as_json:
        print(json.dumps(rows, indent=2, default=str))
        return
    shown = table("default", "", first="option")
    for row in rows:
        shown.add_row(row["name"], _word(row["default"]), plain(row["doc"]))
    wide_console().print(shown)


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
        "needs": needs(algorithm) if algorithm else [],
        "problem": None if algorithm else problem,
        "stages": composition(algorithm) if algorithm else [],
    }
    facts |= {column: " → ".join(stage[column] for stage in facts["stages"]) for column in COLUMNS}
    if whole and algorithm is None:
        raise UsageError(f"algorithm {name!r} {problem}")
    if whole and algorithm is not None:
        training = TrainConfig.of(algorithm.recommended).model_dump(mode="json")
        if algorithm.on_policy:
            training = {k: v for k, v in training.items() if k not in ONLY_DATASET}
        facts |= _documentation(entry) | {
            "columns": list(dict.fromkeys(c for s in algorithm.stages for t in s.terms for c in t.loss.columns)),
            "recommended": algorithm.recommended,
            "training": training,
            "composition": repr(algorithm).partition(": ")[2].removesuffix(">"),
            "losses": list(dict.fromkeys(t.loss.name for s in algorithm.stages for t in s.terms)),
        }
        if prefix_of(name):
            facts["resolves_to"] = [_resolution(term) for stage in algorithm.stages for term in stage.terms]
    return facts


def _resolution(term: Term) -> dict[str, Any]:
    """The entry behind a term of another library's spelling, and what its card says about that library."""
    return {
        "loss": term.loss.name,
        "options": dict(term.loss.options),
        "mean_over": term.counted.unit,
        "weight": term.weight,
        "why": section(term.loss.entry, "Convention"),
    }


def entry_facts(registry: Registry, name: str, whole: bool = False) -> dict[str, Any]:
    """What is known about a loss, a modifier, a credit function or an estimator."""
    entry = registry.entry(name)
    if registry is LOSSES:
        return loss_facts(name, whole)
    facts: dict[str, Any] = {
        "name": name,
        "kind": registry.kind,
        "line": entry.line,
        "paper": entry.paper,
        "aliases": list(entry.aliases),
    }
    if registry is MODIFIERS:
        facts |= {"takes": f"losses of {entry.tags['family'].__name__}", "gives": "the loss, modified"}
        facts["needs"] = [*(["reference"] if entry.tags["reference"] else []), *entry.tags["extras"]]
        if whole:
            losses = [cast(LossEntry, LOSSES.entry(n)) for n in LOSSES.names()]
            family = {e.name: e.refusal(entry) for e in losses if e.tags["family"] is entry.tags["family"]}
            facts["applies_to"] = [n for n, why in family.items() if why is None]
            facts["refused_by"] = {n: why for n, why in family.items() if why is not None}
    elif registry is CREDITS:
        facts |= {"takes": "rewards", "gives": GIVES[entry.tags["gives"]]}
    else:
        facts |= {"takes": READS[entry.tags["needs"]], "gives": "KL of each token"}
    if whole:
        facts |= _documentation(entry) | {"exceptions": dict(entry.tags.get("exceptions", {}))}
    return facts


def loss_facts(name: str, whole: bool = False) -> dict[str, Any]:
    """What is known about a loss."""
    entry = LOSSES.entry(name)
    loss = Loss(cast(LossEntry, entry))
    facts: dict[str, Any] = {
        "name": name,
        "kind": "loss",
        "line": entry.line,
        "paper": entry.paper,
        "aliases": list(entry.aliases),
        "family": loss.family.__name__,
        "count": loss.count,
        "needs": [*(["reference"] if loss.reference else []), *loss.extras],
        "takes": loss.family.__name__,
        "gives": f"mean over {loss.count}",
    }
    if whole:
        facts |= _documentation(entry)
        facts["untrained"] = untrained(loss)
    return facts


def section(entry: Entry, title: str) -> str:
    """A paragraph of the docstring that begins with its title, as one line without the title.

    >>> section(LOSSES.entry("ipo_sum"), "Source")
    'Azar et al., A General Theoretical Paradigm, arXiv:2310.12036, equation 17.'
    """
    found = re.search(
        rf"^{title}:\s(.*?)(?=\n\n(?:[A-Z][a-z ]+:|>>> )|\Z)", inspect.getdoc(entry.function) or "", re.M | re.S
    )
    return " ".join(found[1].split()) if found else ""


def findings_of(facts: Mapping[str, Any]) -> list[Finding]:
    """What the laboratory finds of the entry, computed now."""
    from prefzoo.theory import findings

    return findings(facts["name"])


def _documentation(entry: Entry) -> dict[str, Any]:
    function = inspect.unwrap(entry.function)
    made: dict[str, Any] = {
        "doc": inspect.getdoc(function) or "",
        "options": dict(entry.own_options),
        "shared": {k: DOC[k] for k in getattr(entry, "shared", {}) if k in DOC},
        "file": inspect.getsourcefile(function),
    }
    if isinstance(entry, LossEntry):
        made["modifiers"] = {m.name: dict(m.options) for m in entry.modifiers}
        made["exceptions"] = dict(entry.tags["exceptions"])
    return made


def _is_term_only(name: str) -> bool:
    """A loss that is no algorithm of its own: it trains a critic, or nobody makes its records."""
    return name not in ALGORITHMS and name in LOSSES and not is_algorithm(cast(LossEntry, LOSSES.entry(name)))


def _print_card(facts: dict[str, Any]) -> None:
    console = wide_console()
    head = [facts["name"], f"({facts['kind']})", *([facts["paper"]] if facts["paper"] else [])]
    if facts["aliases"]:
        head.append(f"also {', '.join(facts['aliases'])}")
    console.print("  ".join(head), style="bold", markup=False)
    console.print(f"\n{facts['doc'].strip()}\n", markup=False, highlight=False, soft_wrap=True)
    for line in _resolved(facts):
        console.print(f"{line}\n", markup=False, highlight=False, soft_wrap=True)
    shown = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    shown.add_column(style="bold", no_wrap=True)
    shown.add_column()
    for key, value in _rows(facts).items():
        shown.add_row(key, plain(value))
    shown.add_row("source", facts["file"] or "unknown")
    console.print(shown)


def _print_proofs(facts: dict[str, Any]) -> None:
    """What the laboratory finds; printed last, because it is computed now."""
    console = wide_console()
    for title, lines in _proved(findings_of(facts)).items():
        console.print(f"\n{title}", style="bold", markup=False)
        for line in lines:
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def _proved(found: Iterable[Finding]) -> dict[str, list[str]]:
    """Findings by what they are, in words: claims that are proved, biases that are stated, claims that do not hold."""
    made: dict[str, list[str]] = {"what is proved": [], "biases": [], "what does not hold": []}
    for finding in found:
        title = "biases" if finding.bound is None else "what is proved" if finding.holds else "what does not hold"
        made[title].append(finding.words)
    return {title: lines for title, lines in made.items() if lines}


def _resolved(facts: Mapping[str, Any]) -> list[str]:
    """Of another library's name: which entries here are meant, and what their cards say about the spelling."""
    lines = []
    for term in facts.get("resolves_to", []):
        weight = f"{term['weight']:g} x " if term["weight"] != 1 else ""
        options = f" with {_settings(term['options'])}" if term["options"] else ""
        lines.append(f"resolves to: {weight}{term['loss']}{options}, mean over {term['mean_over']}")
        lines += [f"why {term['loss']}: {term['why']}"] if term["why"] else []
    return lines


def card_page(facts: dict[str, Any]) -> str:
    """The same card as a page of the documentation, in Markdown; the docstring comes through mkdocstrings."""
    function = inspect.unwrap(_registry(facts).entry(facts["name"]).function)
    rows = "".join(f"| {key} | {_cell(value)} |\n" for key, value in _rows(facts).items())
    also = f" (also {', '.join(facts['aliases'])})" if facts["aliases"] else ""
    paper = f" · {facts['paper']}" if facts["paper"] else ""
    head = f"# {facts['name']}\n\n{facts['kind'].capitalize()}{also}{paper}\n\n| | |\n|---|---|\n{rows}"
    resolved = "".join(f"\n{_text(line)}\n" for line in _resolved(facts))
    proofs = "".join(
        f"\n## {title.capitalize()}\n\n" + "".join(f"- {_text(line)}\n" for line in lines)
        for title, lines in _proved(findings_of(facts)).items()
    )
    found = getattr(sys.modules[function.__module__], function.__qualname__, None)
    # mkdocstrings finds what stands in the module; the entries of a loop (``trl:ipo``) are not there.
    own = found is not None and inspect.getdoc(inspect.unwrap(found)) == facts["doc"]
    card = f"::: {function.__module__}.{function.__qualname__}" if own else f"```text\n{facts['doc'].strip()}\n```"
    return f"{head}{resolved}\n{card}\n{proofs}"


def _registry(facts: Mapping[str, Any]) -> Registry:
    """Where the entry of these facts is; a loss may be shown as the algorithm of its name."""
    found = next((r for r in AROUND.values() if r.kind == facts["kind"]), ALGORITHMS)
    return found if facts["name"] in found else LOSSES


def all_pages() -> Iterator[tuple[str, str]]:
    """Path and content of every generated page: the options of training, and one card for each entry."""
    yield "training-options.md", training_page()
    for name in [*ALGORITHMS.names(), *ALGORITHMS.names("*:*")]:
        yield f"cards/{name.replace(':', '-')}.md", card_page(algorithm_facts(name, whole=True))
    for kind, registry in AROUND.items():
        for name in registry.names():
            yield f"cards/{kind}/{name}.md", card_page(entry_facts(registry, name, whole=True))


def _cell(text: str) -> str:
    return "<br>".join(f"`{word}`" for word in _text(text).splitlines()) if text else "–"


def _rows(facts: dict[str, Any]) -> dict[str, str]:
    """What a card says beside the docstring."""
    rows = {"options": _settings(facts["options"]) or "none"}
    rows |= {f"  {name}": words for name, words in facts["shared"].items()}
    for modifier, options in facts.get("modifiers", {}).items():
        rows[f"with {modifier}"] = _settings(options)
    if facts["kind"] == "algorithm":
        rows |= {
            "learns from": " with ".join([facts["learns_from"], *facts["columns"]]),
            "needs": ", ".join(facts["needs"]) or "nothing more",
            "made of": facts["composition"],
            "training": _settings(facts["recommended"]),
            "": "all options of training: prefzoo show training",
            "its losses": "\n".join(f"prefzoo show --loss {name}" for name in facts["losses"]),
            "run it": _command(facts),
        }
    elif facts["kind"] == "loss":
        rows |= {
            "family": facts["family"],
            "mean over": facts["count"],
            "needs": ", ".join(facts["needs"]) or "nothing more",
        }
        if facts["untrained"]:
            rows["prefzoo train"] = f"not yet: it {facts['untrained']}; call it with records of your own"
    else:
        rows |= {"takes": facts["takes"], "gives": facts["gives"], "needs": ", ".join(facts.get("needs", []))}
        rows["applies to"] = ", ".join(facts.get("applies_to", []))
        rows["refused by"] = "\n".join(f"{name}: {why}" for name, why in facts.get("refused_by", {}).items())
    rows["breaks"] = "\n".join(f"{check}: {why}" for check, why in facts.get("exceptions", {}).items())
    return {key: value for key, value in rows.items() if value}


def _command(facts: Mapping[str, Any]) -> str:
    """What to type to train with it."""
    judges = {
        "reward": "--reward FOLDER_OR_FILE.py:FUNCTION",
        "verifier": "--reward FILE.py:FUNCTION",
        "teacher": "--teacher FOLDER",
    }
    judge = [words for need, words in judges.items() if need in facts["needs"]]
    return " ".join([f"prefzoo train {facts['name']} --model FOLDER --dataset FILE", *judge, "--output-dir RUN"])


def _settings(values: Mapping[str, Any]) -> str:
    return "  ".join(f"{k}={_word(v)}" for k, v in values.items())


def _word(value: Any) -> str:
    """A value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value, default=repr)


def plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)


def table(*columns: str, first: str) -> Table:
    """A plain table whose first column is bold and whole; short columns are not broken."""
    shown = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    shown.add_column(first, style="bold", no_wrap=True)
    for column in columns:
        shown.add_column(column, no_wrap=column in ("paper", "kind", "default"), overflow="fold")
    return shown


def import_all(files: Iterable[Path]) -> None:
    for file in files:
        import_file(file)


def wide_console() -> Console:
    """Wide where nobody looks, so that a pipe gets one line per entry."""
    return Console(width=None if sys.stdout.isatty() else 160)
