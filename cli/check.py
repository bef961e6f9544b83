"""``prefzoo check``: the contracts of losses and algorithms, and what the laboratory finds, as tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefzoo.algorithm import ALGORITHMS, algorithm_entry, list_algorithms
from prefzoo.cli.cards import AROUND, import_all, plain, table, wide_console
from prefzoo.cli.training import read_settings
from prefzoo.losses import LOSSES, create_loss
from prefzoo.registry import UsageError, suggest
from prefzoo.testing import AlgorithmCheck, Check, ContractError, algorithm_checks, loss_checks


def show_contract(
    names: Sequence[str], settings: Sequence[str], imports: Iterable[Path], as_json: bool, algorithms: bool = False
) -> bool:
    """Check losses, and algorithms that are no losses; print how it went, and return whether all keep the contract.

    Where none is named: all losses, or with ``algorithms``, as which all names are then taken, all algorithms.
    """
    import_all(imports)
    options = read_settings(settings)
    if options and len(names) != 1:
        raise UsageError(f"-s sets an option of one entry, but {len(names) or 'no'} names are given: name one.")
    for name in names:
        if algorithms:
            algorithm_entry(name)
        else:
            _known(name)
    everything = list_algorithms() if algorithms else LOSSES.names()
    results = []
    for name in names or everything:
        trained = algorithms or name not in LOSSES
        results.append(proof_of(name, options) if trained else contract_of(name, options))
    if as_json:
        print(json.dumps(results, indent=2))
    elif len(names) == 1:
        _print_one(results[0])
    else:
        _print_all(results)
    return not any(result["failed"] for result in results)


def contract_of(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """How each check of one loss went, by outcome: check and reason, of those that passed the check alone."""
    loss = create_loss(name, **options)
    return _outcomes("loss", loss.name, options, loss_checks(loss))


def proof_of(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The same of an algorithm; ``seen``: what a check that passed has to say."""
    return _outcomes("algorithm", algorithm_entry(name).name, options, algorithm_checks(name, **options))


def _outcomes(
    kind: str, name: str, options: Mapping[str, Any], checks: Iterable[Check | AlgorithmCheck]
) -> dict[str, Any]:
    result: dict[str, Any] = {"name": name, "kind": kind, "options": dict(options)}
    result |= {"passed": [], "failed": {}, "exceptions": {}, "not_applicable": {}, "seen": {}}
    for check in checks:
        try:
            outcome, _, reason = check().partition(": ")
        except ContractError as error:
            result["failed"][check.name] = str(error)
            continue
        if outcome == "passed":
            result["passed"].append(check.name)
            if reason:
                result["seen"][check.name] = reason
        else:
            result["exceptions" if outcome == "exception" else "not_applicable"][check.name] = reason
    return result


def show_theory(names: Sequence[str], settings: Sequence[str], imports: Iterable[Path], as_json: bool) -> bool:
    """Print what the laboratory finds of these entries, of all where none is named; return whether all of it holds."""
    from prefzoo.theory import findings
    from prefzoo.theory.base import load_theorems

    import_all(imports)
    if settings:
        raise UsageError("-s has no effect on --theory: theorems choose their options themselves.")
    proved = sorted({entry for theorem in load_theorems() for entry in theorem.entries})
    known = sorted({*proved, *(n for r in (ALGORITHMS, *AROUND.values()) for n in r.names())})
    for name in names:
        if name not in known:
            raise UsageError(f"no entry {name!r}{suggest(name, known)} 'prefzoo list losses' shows the names.")
    rows = [vars(f) | {"holds": f.holds} for name in names or proved for f in findings(name)]
    if as_json:
        print(json.dumps(rows, indent=2))
        return all(row["holds"] for row in rows)
    shown = table("kind", "claim", "measured", "bound", "holds", first="entry")
    for row in rows:
        bound = "a bias" if row["bound"] is None else f"{row['bound']:.2g}"
        verdict = "stated" if row["bound"] is None else "yes" if row["holds"] else "NO"
        shown.add_row(row["entry"], row["kind"], plain(row["claim"]), f"{row['measured']:.2g}", bound, verdict)
    wide_console().print(shown)
    without = [name for name in names if all(row["entry"] != name for row in rows)]
    if without:
        print(f"no theorem speaks of {', '.join(without)}")
    return all(row["holds"] for row in rows)


def _known(name: str) -> None:
    """Refuse what is neither loss nor algorithm, with the reason where it is something else."""
    if name in LOSSES or name in ALGORITHMS:
        return
    kind = next((r.kind for r in AROUND.values() if name in r), None)
    if kind == "modifier":
        raise UsageError(f"{name!r} is a modifier: it is checked with every loss that it applies to.")
    if kind is not None:
        raise UsageError(
            f"{name!r} is no loss ({kind}), and the contracts are those of losses and algorithms; try --theory."
        )
    algorithm_entry(name)  # raises, with the nearest name


def _print_one(result: Mapping[str, Any]) -> None:
    shown = table("outcome", "", first="check")
    for name in result["passed"]:
        shown.add_row(name, "passed", plain(result["seen"].get(name, "")))
    for outcome in ("exceptions", "not_applicable", "failed"):
        for name, reason in result[outcome].items():
            words = {"exceptions": "exception", "not_applicable": "not applicable", "failed": "FAILED"}[outcome]
            shown.add_row(name, words, plain(reason))
    wide_console().print(shown)


def _print_all(results: Sequence[Mapping[str, Any]]) -> None:
    kinds = {result["kind"] for result in results}
    first, many = ("entry", "entries") if len(kinds) > 1 else ("loss", "losses")
    first, many = ("algorithm", "algorithms") if kinds == {"algorithm"} else (first, many)
    shown = table("passed", "failed", "exceptions", "not applicable", first=first)
    for result in results:
        told = result["exceptions"] | {k: v for k, v in result["seen"].items() if k == "learns"}
        exceptions = "\n".join(f"{check}: {reason}" for check, reason in told.items())
        counts = [str(len(result[key])) for key in ("passed", "failed", "not_applicable")]
        shown.add_row(result["name"], counts[0], counts[1] if result["failed"] else "", plain(exceptions), counts[2])
    wide_console().print(shown)
    for result in results:
        for message in result["failed"].values():
            print(f"\n{message}")
    broken = sum(bool(result["failed"]) for result in results)
    print(f"\n{len(results) - broken} of {len(results)} {many} keep the contract")
