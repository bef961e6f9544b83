"""``prefzoo diff``: why two runs differ, from their records, metrics and weights."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open

from prefzoo.registry import UsageError
from prefzoo.training import checkpoint
from prefzoo.training.record import RECORD, Difference, Effect, differences, shown

METRICS = "metrics.jsonl"
ROUNDED = 1e-6  # relative difference up to which two metrics are the same but for rounding
FIRST = ("loss", "reward", "eval/loss", "eval/reward")  # shown first where runs part
TITLES: dict[Effect, str] = {
    "result": "what changes the result",
    "rounding": "what moves the last digits only (which training lets grow)",
    "none": "without effect",
}
NOTHING_RECORDED = (
    "Nothing that is recorded explains it. What may: a reward function that draws random numbers, reads a clock, asks "
    "a server, or has code in other files; a callback or a loop of your own; GPU kernels that add in another order "
    "each time. --deterministic rules out the last, and seeds the generators of python, numpy and torch."
)
ONLY_ROUNDING = (
    "Only rounding is recorded as different: if the metrics part slowly, that is why. For equal bits make these the "
    "same (on a GPU, with --deterministic)."
)


@dataclass(frozen=True)
class Place:
    """A run as the user named it: its folder, and the weights that are meant."""

    name: str
    folder: Path
    weights: Path


@dataclass(frozen=True)
class Metrics:
    """How far the metrics of two runs agree."""

    verdict: str  # in words
    lines: int = 0  # compared
    largest: float = 0.0  # relative difference up to the line where they part
    part_at: int | None = None  # step of that line


def show_diff(first: str, second: str, everything: bool, as_json: bool) -> None:
    """Say whether two runs agree, how far, and what they were given differently."""
    places = find(first), find(second)
    here, there = (read_record(p) for p in places)
    metrics = compare_metrics(read_metrics(places[0]), read_metrics(places[1]), (first, second))
    weights = compare_weights(*places)
    found = differences(here, there)
    if as_json:
        told = {"runs": [first, second], "metrics": asdict(metrics), "weights": weights}
        print(json.dumps(told | {"differences": [asdict(d) for d in found]}, indent=2))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    lines = [metrics.verdict, weights["words"]]
    lines += [f"{p.name} is not finished" for p, r in zip(places, (here, there), strict=True) if not _finished(r, p)]
    for line in lines:
        told = line if line.startswith((first, second)) else line[0].upper() + line[1:]
        console.print(Text(f"{told}."), style="bold", soft_wrap=True)
    for name, record in zip((first, second), (here, there), strict=True):
        for break_ in record.get("resumed", []):
            said = "; ".join(break_["here_there"])
            console.print(Text(f"{name} went on after step {break_['step']} with: {said}"), soft_wrap=True)
        ended, total = record.get("ended", (0, 0))
        if ended < total:
            console.print(Text(f"{name} was ended after step {ended} of {total}"), soft_wrap=True)
    effects = Counter(d.effect for d in found)
    for effect, title in TITLES.items():
        if effects[effect] and (effect != "none" or everything):
            console.print()
            console.print(_table(title, (first, second), [d for d in found if d.effect == effect]))
    if effects["none"] and not everything:
        count = effects["none"]
        console.print(f"\n{count} recorded difference{'s'[: count > 1]} without effect (--all).")
    if not found:
        console.print("\nThe records are the same.")
    if (metrics.largest or weights["distance"]) and not effects["result"]:
        console.print(f"\n{ONLY_ROUNDING if effects['rounding'] else NOTHING_RECORDED}")


def _table(title: str, names: tuple[str, str], rows: Sequence[Difference]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in (title, *names):
        table.add_column(Text(column), overflow="fold")
    for d in rows:
        table.add_row(*(Text(t) for t in (f"  {d.place}", shown(d.here), shown(d.there))))
    return table


def _finished(record: Mapping[str, Any], place: Place) -> bool:
    """Older records say nothing and were written at the end."""
    return bool(record.get("finished", (place.folder / "final").is_dir()))


# ------------------------------------------------------------------------------------------------- reading


def find(name: str) -> Place:
    """The run of a folder: the run's own, or one in it that holds a model."""
    folder = Path(name)
    if not folder.is_dir():
        raise UsageError(f"run {name!r}: there is no such folder.")
    if (folder / RECORD).is_file():
        models = [folder / "final", *reversed(checkpoint.found(folder))]
        return Place(name, folder, next((m for m in models if m.is_dir()), models[0]))
    parent = folder.resolve().parent
    if (parent / RECORD).is_file():
        return Place(name, parent, folder)
    raise UsageError(
        f"run {name!r}: neither it nor the folder around it holds {RECORD}; give the output folder of a run, its "
        "final/ or one of its checkpoints."
    )


def read_record(place: Place) -> dict[str, Any]:
    """``run.json``."""
    file = place.folder / RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read ({str(error).splitlines()[0]}).") from None
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise UsageError(f"{file} is not the record of a run: it has no 'config'.")
    return record


def read_metrics(place: Place) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; a last one that a killed run left half is left out."""
    file = place.folder / METRICS
    rows: list[dict[str, Any]] = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return rows
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read ({str(error).splitlines()[0]}).") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                raise UsageError(f"{file}, line {number}: not a line of metrics: {line[:60]!r}.") from None
    return rows


# ------------------------------------------------------------------------------------------------- metrics


def compare_metrics(
    here: Sequence[Mapping[str, Any]], there: Sequence[Mapping[str, Any]], names: tuple[str, str]
) -> Metrics:
    """How far two runs have the same metrics. A difference is relative to the metric's largest value in either run.

    >>> a = [{"step": s, "loss": 1 / s, "time": 0.1} for s in (10, 20, 30)]
    >>> b = [*a[:2], {"step": 30, "loss": 0.05, "time": 0.2}]
    >>> compare_metrics(a, b, ("a", "b")).verdict
    'the metrics agree bit for bit to step 20 and part at step 30: loss 0.033333 / 0.05'
    """
    lines = _by_line(here), _by_line(there)
    empty = [name for name, rows in zip(names, lines, strict=True) if not rows]
    if empty:
        return Metrics(f"no metrics to compare: {' and '.join(empty)} logged none")
    common = [line for line in lines[0] if line in lines[1]]
    if not common:
        return Metrics("no metrics to compare: the runs logged at different steps")
    sizes: dict[str, float] = {}
    for row in (*here, *there):
        for key in _metrics(row):
            sizes[key] = max(sizes.get(key, 0.0), abs(row[key]) if math.isfinite(row[key]) else 0.0)
    equal, rounded = "", ""  # the last line that agrees bit for bit, and up to rounding
    parts, exact, largest = "", True, 0.0
    for line in common:
        a, b = lines[0][line], lines[1][line]
        apart = {k: _apart(a[k], b[k], sizes[k]) for k in _metrics(a) if k in _metrics(b)}
        exact = exact and not any(apart.values())
        largest = max([largest, *apart.values()])
        equal = _name(line) if exact else equal
        over = [k for k in apart if apart[k] > ROUNDED]
        if over:
            key = next((k for k in FIRST if k in over), max(over, key=apart.__getitem__))
            parts = f"{_name(line)}: {key} {_pair(a[key], b[key])}"
            break
        rounded = _name(line)
    said = _only_one_has(lines, common, names)
    if parts and not rounded:
        return Metrics(f"the metrics part at the first line, {parts}{said}", len(common), largest, line[1])
    if parts:
        bits = f"bit for bit to {equal}" if equal else ""
        roughly = f"but for rounding to {rounded}" if rounded != equal else ""
        agree = ", ".join(filter(None, (bits, roughly)))
        return Metrics(f"the metrics agree {agree} and part at {parts}{said}", len(common), largest, line[1])
    if exact:
        return Metrics(f"the metrics agree bit for bit to {equal}{said}", len(common))
    at_first = f"bit for bit to {equal}, then " if equal else ""
    return Metrics(f"the metrics agree {at_first}to {largest:.0e} relative{said}", len(common), largest)


Line = tuple[int, int, bool]  # stage, step, whether it is an evaluation


def _by_line(rows: Sequence[Mapping[str, Any]]) -> dict[Line, Mapping[str, Any]]:
    """The rows by what they are of; the steps of a later stage begin anew."""
    out: dict[Line, Mapping[str, Any]] = {}
    stage, last = 0, 0
    for row in rows:
        stage += row["step"] < last
        last = row["step"]
        out[stage, last, any(key.startswith("eval/") for key in row)] = row
    return out


def _metrics(row: Mapping[str, Any]) -> list[str]:
    """Names of the numbers that a run is to repeat: the clock's is none."""
    return [k for k, v in row.items() if isinstance(v, int | float) and k not in ("step", "time")]


def _apart(a: float, b: float, size: float) -> float:
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    return abs(a - b) / size if math.isfinite(a) and math.isfinite(b) else 2.0  # as far as two numbers can be


def _pair(a: float, b: float) -> str:
    """Two numbers with as many digits as it takes to tell them apart, and two more."""
    digits = next((d for d in range(3, 17) if f"{a:.{d}g}" != f"{b:.{d}g}"), 17)
    return f"{a:.{digits + 2}g} / {b:.{digits + 2}g}"


def _name(line: Line) -> str:
    return f"step {line[1]}" + (f" of stage {line[0] + 1}" if line[0] else "")


def _only_one_has(
    lines: tuple[Mapping[Line, Mapping[str, Any]], ...], common: Sequence[Line], names: tuple[str, str]
) -> str:
    """What cannot be compared, as the end of the sentence."""
    out = []
    for name, mine, other in zip(names, lines, reversed(lines), strict=True):
        if len(mine) > len(common):
            out.append(f"{name} has {len(mine) - len(common)} lines more")
        more = sorted({k for line in common for k in set(_metrics(mine[line])) - set(_metrics(other[line]))})
        if more:
            rest = f" and {len(more) - 3} more" if len(more) > 3 else ""
            out.append(f"only {name} has {', '.join(more[:3])}{rest}")
    return f" ({'; '.join(out)})" if out else ""


# ------------------------------------------------------------------------------------------------- weights


def compare_weights(here: Place, there: Place) -> dict[str, Any]:
    """The distance of the final weights, ‖a - b‖ / ‖a‖, one tensor at a time in memory."""
    files = _tensors(here.weights), _tensors(there.weights)
    for place, found in zip((here, there), files, strict=True):
        if not found:
            return {"words": f"no weights to compare: {place.weights} holds none", "distance": None}
    if files[0].keys() != files[1].keys():
        only = next(iter(files[0].keys() ^ files[1].keys()))
        owner = (here if only in files[0] else there).name
        words = f"the weights have other names: only {owner} has {only}"
        return {"words": words, "distance": None}
    apart = size = 0.0
    equal = True
    for name in files[0]:
        a, b = (_read(found[name], name) for found in files)
        if a.shape != b.shape:
            words = f"the weights have other shapes: {name} {tuple(a.shape)} / {tuple(b.shape)}"
            return {"words": words, "distance": None}
        equal = equal and a.dtype == b.dtype and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
        a, b = a.double(), b.double()
        apart, size = apart + float((a - b).square().sum()), size + float(a.square().sum())
    if equal:
        return {"words": "the weights are equal bit for bit", "distance": 0.0}
    distance = math.sqrt(apart / size) if size else math.inf
    return {"words": f"the weights differ: ‖a - b‖ / ‖a‖ = {distance:.2g}", "distance": distance}


def _tensors(folder: Path) -> dict[str, Path]:
    """Names of the weights of a model folder -> the file that holds each; a checkpoint's other state is left out."""
    out: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name != "state.safetensors":
            try:
                with safe_open(file, "pt") as opened:
                    out |= dict.fromkeys(opened.keys(), file)
            except (OSError, SafetensorError) as error:
                raise UsageError(f"{file} cannot be read ({str(error).splitlines()[0]}).") from None
    return out


def _read(file: Path, name: str) -> Any:
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)
