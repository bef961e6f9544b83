"""The charts of a report: reward against KL, gold against proxy, learning curves, one key varied."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prefzoo.benchmarks.reporting import words
from prefzoo.benchmarks.reporting.charts import Axis, Panel, Span, colour, drawing
from prefzoo.benchmarks.reporting.page import Cell, Chart, Column, Table
from prefzoo.benchmarks.reporting.words import BASELINES, Result, ends, finite, number, ranked

NAMED = {"kl": "KL, nats", "proxy": "proxy"}  # columns of rows, as axes
FEW = 12  # so many methods get colours and names of their own
UNITS = {
    "steps": "optimizer steps", "generated_tokens": "generated tokens", "trained_tokens": "trained tokens",
    "prompts": "prompts", "completions": "completions", "flops": "floating point operations",
}  # fmt: skip


def frontier(task: Result) -> Chart | None:
    """Gold against the square root of KL, both with errors; the line of best-of-n and Gao's fits."""
    found = task.get("frontier")
    points = [p for p in (found or {}).get("points", ()) if _whole(p["kl"]) and _whole(p["gold"])]
    if not found or not points:
        return None
    column = found["gold_column"]
    line = sorted(
        (
            (math.sqrt(max(b["kl"], 0.0)), {**b, "gold": b[column], "gold_se": b.get(f"{column}_se")})
            for b in found.get("best_of_n") or ()
            if finite(b.get(column))
        ),
        key=lambda pair: pair[0],
    )
    places = {p["method"]: math.sqrt(max(p["kl"]["estimate"], 0.0)) for p in points}
    reach = max([*places.values(), *(d for d, _ in line)]) or 1.0
    x = Axis("√KL to the start, √nats", -0.03 * reach, 1.13 * reach)
    levels = [p["gold"]["estimate"] for p in points] + [b["gold"] for _, b in line]
    wide = [e for p in points if (e := ends(p["gold"]))]
    room = max(levels) - min(levels) or 1.0  # the interval of a collapsed method may leave it
    held = [v for e in wide for v in e if min(levels) - room <= v <= max(levels) + room]
    panel = Panel(x, Axis.around(column, [*levels, *held]))
    start = next((p["gold"]["estimate"] for p in points if p["method"] == "start"), None)
    if start is not None:
        panel.rule(start, "start")
    for judge in dict.fromkeys(b["judge"] for _, b in line):
        mine = [(d, b) for d, b in line if b["judge"] == judge]
        way, band = [(d, b["gold"]) for d, b in mine], [_around(b) for _, b in mine]
        panel.curve(way, "quiet", dash="5 4", band=band, name=f"best of {mine[-1][1]['n']} by {judge}")
    for name, fit in _fits(found.get("gao")).items():
        curve = _gao(fit, start or 0.0, places.get(name, max((d for d, _ in line), default=reach)))
        panel.curve(curve, "s0" if name in places else "quiet", dash="2 3")
    names = {*ranked(task)[:FEW], *BASELINES, *(p["method"] for p in points if p.get("on_front"))}
    for p in sorted(points, key=lambda p: p["method"] not in names, reverse=True):
        name, span = p["method"], ends(p["kl"])
        tip = f"{name}\n{found['gold_column']} {_said(p['gold'])}\nKL {_said(p['kl'])} nats"
        tip += f"\nproxy {_said(p['proxy'])}" if p.get("proxy") else ""
        panel.point(
            places[name], p["gold"]["estimate"], "quiet" if name in BASELINES else "s0", tip,
            x_span=None if span is None else tuple(math.sqrt(max(e, 0.0)) for e in span),  # type: ignore[arg-type]
            y_span=ends(p["gold"]), name=name if name in names else "",
            hollow=not p.get("on_front", True) or name in BASELINES,
        )  # fmt: skip
    panel.labels()
    columns = [Column("method", number=False), Column("KL, nats"), Column("√KL"), Column(column),
               Column("proxy")]  # fmt: skip
    rows = [
        [Cell(p["method"], sort=p["method"]), words.value_cell(p["kl"]), words.value_cell(places[p["method"]]),
         words.value_cell(p["gold"]), words.value_cell(p.get("proxy"))]
        for p in points
    ]  # fmt: skip
    rows += [
        [Cell(f"best of {b['n']} by {b['judge']}"), words.value_cell(b["kl"]), words.value_cell(d),
         words.value_cell({"estimate": b["gold"], "ci": _around(b)}), Cell(words.NONE)]
        for d, b in line
    ]  # fmt: skip
    numbers = Table("Numbers of this chart", columns, rows, quiet=True)
    return Chart("Reward against KL", drawing([panel], f"{column} against the square root of KL"), numbers)


def _fits(gao: Result | None) -> dict[str, Result]:
    """Fits by the name of the method, or of best-of-n; only whole ones can be drawn."""
    return {k: v for k, v in (gao or {}).items() if _whole(v["alpha"]) and _whole(v["beta"])}


def _gao(fit: Result, start: float, reach: float) -> list[Span]:
    """R(d) = d (α - β d) of best-of-n, or d (α - β log d) of RL, above the start."""
    alpha, beta = fit["alpha"]["estimate"], fit["beta"]["estimate"]
    best_of_n = fit["form"] == "best_of_n"
    distances = [reach * k / 40 for k in range(1, 41)]
    return [(0.0, start), *((d, start + d * (alpha - beta * (d if best_of_n else math.log(d)))) for d in distances)]


def gold_against_proxy(task: Result) -> Chart | None:
    """Where every method ends, and the way that those with a curve took."""
    gold = (task.get("frontier") or {}).get("gold_column") or task["metric"]
    ended = {
        m: x["means"] for m, x in task["methods"].items()
        if _whole(x["means"].get("proxy")) and _whole(x["means"].get(gold))
    }  # fmt: skip
    if gold == "proxy" or len(ended) < 2:
        return None
    ways = {m: c for m, c in learned(task).items() if "proxy" in c["means"] and gold in c["means"]}
    xs = [v["proxy"]["estimate"] for v in ended.values()] + [x for c in ways.values() for x in c["means"]["proxy"]]
    ys = [v[gold]["estimate"] for v in ended.values()] + [y for c in ways.values() for y in c["means"][gold]]
    panel = Panel(
        Axis.around("proxy reward: what training sees", xs, room=0.1), Axis.around(f"{gold}: the truth", ys, room=0.1)
    )
    colours = {m: colour(i) for i, m in enumerate(ways)}
    for m, c in ways.items():
        panel.curve(list(zip(c["means"]["proxy"], c["means"][gold], strict=True)), colours[m][0], dash=colours[m][1])
        for step, x, y in zip(c["steps"], c["means"]["proxy"], c["means"][gold], strict=True):
            tip = f"{m}, step {step}\nproxy {number(x)}\n{gold} {number(y)}"
            panel.point(x, y, colours[m][0], tip, hollow=True, size=2.5)
    names = {*ranked(task)[:FEW], *BASELINES, *ways}
    for m, means in ended.items():
        tip = f"{m}\nproxy {_said(means['proxy'])}\n{gold} {_said(means[gold])}"
        shade = "quiet" if m in BASELINES else colours[m][0] if m in colours else "s0"
        panel.point(
            means["proxy"]["estimate"], means[gold]["estimate"], shade, tip, x_span=ends(means["proxy"]),
            y_span=ends(means[gold]), name=m if m in names else "",
        )  # fmt: skip
    panel.labels()
    rows = [[Cell(m, sort=m), words.value_cell(v["proxy"]), words.value_cell(v[gold])] for m, v in ended.items()]
    head = [Column("method", number=False), Column("proxy"), Column(gold)]
    svg = drawing([panel], f"{gold} against the proxy reward")
    return Chart("Gold against proxy", svg, Table("Numbers of this chart", head, rows, quiet=True))


def learning_curves(task: Result) -> dict[str, Chart]:
    """The truth above, the proxy and KL below, over steps and over what was spent."""
    curves, gold = learned(task), (task.get("frontier") or {}).get("gold_column") or task["metric"]
    units = ["steps", *dict.fromkeys(u for c in curves.values() for u in c.get("spent") or ())]
    columns = [c for c in dict.fromkeys((gold, "proxy", "kl")) if any(c in x["means"] for x in curves.values())]
    made = {}
    for unit in units:
        chart = _curves_over(unit, curves, columns)
        if chart:
            made[UNITS.get(unit, unit.replace("_", " "))] = chart
    return made


def _curves_over(unit: str, curves: Mapping[str, Result], columns: Sequence[str]) -> Chart | None:
    spent = {m: c["steps"] if unit == "steps" else (c.get("spent") or {}).get(unit, []) for m, c in curves.items()}
    spent = {m: s for m, s in spent.items() if max(s, default=0) > 0}
    if not spent or not columns:
        return None
    title = UNITS.get(unit, unit.replace("_", " "))
    reach = max(max(s) for s in spent.values())
    panels: list[Panel] = []
    for index, column in enumerate(columns):
        mine = {m: curves[m] for m in spent if column in curves[m]["means"]}
        bands = {m: _bands(c, column) for m, c in mine.items()}
        held = [v for c in mine.values() for v in c["means"][column]]
        held += [v for band in bands.values() for span in band if span for v in span]
        tall = 230 if index == 0 else 140
        top = panels[-1].top + panels[-1].height + 22 if panels else 14
        y = Axis.around(NAMED.get(column, column), held)
        panel = Panel(Axis(title, 0.0, reach), y, top=top, width=560, height=tall)
        for m, c in mine.items():
            shade, dash = colour(list(curves).index(m))
            values = c["means"][column]
            panel.curve(list(zip(spent[m], values, strict=True)), shade, dash=dash, band=bands[m],
                        name=m if index == 0 else "")  # fmt: skip
            for x, value, step, band in zip(spent[m], values, c["steps"], bands[m], strict=True):
                said = _said({"estimate": value, "ci": band})
                panel.point(x, value, shade, f"{m}, step {step}\n{column} {said}", size=2.5)
        panel.taken.clear()
        panel.labels(must=True)
        panels.append(panel)
    head = [Column("method", number=False), Column(title), *(Column(NAMED.get(c, c)) for c in columns)]
    rows = [
        [Cell(m, sort=m), words.value_cell(x),
         *(words.value_cell({"estimate": curves[m]["means"][c][k], "ci": _bands(curves[m], c)[k]})
           if c in curves[m]["means"] else Cell(words.NONE) for c in columns)]
        for m in spent for k, x in enumerate(spent[m])
    ]  # fmt: skip
    svg = drawing(panels, f"{', '.join(columns)} over {title}", right=170)
    return Chart(f"Over {title}", svg, Table("Numbers of this chart", head, rows, quiet=True))


def profiles(found: Result) -> Chart | None:
    """Share of a method's runs and tasks whose win rate is above a threshold."""
    if not found:
        return None
    y = Axis("share of runs and tasks, %", 0.0, 1.02, percent=True)
    panel = Panel(Axis("win rate above, %", 0.0, 1.0, percent=True), y)
    rows, thresholds = [], next(iter(found.values()))["thresholds_K"]
    for index, (m, profile) in enumerate(found.items()):
        shade, dash = ("quiet", "5 4") if m in BASELINES else colour(index)
        points = list(zip(profile["thresholds_K"], profile["estimate_K"], strict=True))
        panel.curve(points, shade, dash=dash)
        middle = min(points, key=lambda p: abs(p[1] - 0.5))
        panel.waiting.append((*panel.at(*middle), m, shade))
        rows.append([Cell(m, sort=m), *(Cell(words.percent(y, 0), sort=y) for _, y in points[::2])])
    panel.labels()
    head = [Column("method", number=False), *(Column(f"> {words.percent(t, 0)}") for t in thresholds[::2])]
    svg = drawing([panel], "performance profiles")
    return Chart("Performance profiles", svg, Table("Numbers of this chart", head, rows, quiet=True))


def varied(vary: Result) -> Chart | None:
    """Win rates against the start over the values of the key that a suite varies."""
    values, methods = list(vary["values"]), vary["methods"]
    if len(values) < 2 or not methods:
        return None
    numeric = all(finite(v) for v in values)
    xs = [float(v) for v in values] if numeric else [float(k) for k in range(len(values))]
    room = 0.04 * (max(xs) - min(xs))
    marks = [(x, f"{v:g}" if finite(v) else str(v)) for x, v in zip(xs, values, strict=True)]
    held = [e for row in methods.values() for win in row if _whole(win) for e in (win["estimate"], *(ends(win) or ()))]
    panel = Panel(
        Axis(vary["key"], min(xs) - room, max(xs) + room, marks=marks),
        Axis.around("win rate against the start, %", [*(min(max(h, 0.0), 1.0) for h in held), 0.5], percent=True),
        width=560,
    )
    panel.rule(0.5, "")
    shift = 0.004 * (max(xs) - min(xs))
    for index, (m, row) in enumerate(methods.items()):
        shade, dash = ("quiet", "5 4") if m == "sft_more" else colour(index)
        kept = [(x + shift * (index - len(methods) / 2), win) for x, win in zip(xs, row, strict=True) if _whole(win)]
        if not kept:
            continue
        panel.curve([(x, w["estimate"]) for x, w in kept], shade, dash=dash, name=m)
        for x, win in kept:
            shown = words.share_cell(win)
            panel.point(x, win["estimate"], shade, f"{m}\n{shown.text} % ({shown.note})", y_span=ends(win), size=3)
    panel.taken.clear()
    panel.labels(must=True)
    head = [Column("method", number=False), *(Column(f"{vary['key']} = {t}") for _, t in marks)]
    rows = [[Cell(m, sort=m), *(words.share_cell(w, bar=False) for w in row)] for m, row in methods.items()]
    svg = drawing([panel], f"win rate against the start over {vary['key']}", right=170)
    return Chart(f"Over {vary['key']}", svg, Table("Win rate against the start, %", head, rows))


def learned(task: Result) -> dict[str, Result]:
    return {m: task["methods"][m]["curve"] for m in ranked(task) if task["methods"][m].get("curve")}


def _bands(curve: Result, column: str) -> list[Span | None]:
    """The intervals of a curve; of normal errors where only errors are stored."""
    if column in (curve.get("cis") or {}):
        return [ends({"ci": ci}) for ci in curve["cis"][column]]
    errors = (curve.get("ses") or {}).get(column) or [None] * len(curve["steps"])
    values = curve["means"][column]
    return [(v - 1.96 * e, v + 1.96 * e) if finite(e) else None for v, e in zip(values, errors, strict=True)]


def _around(best: Result) -> Span | None:
    error = best.get("gold_se")
    return (best["gold"] - 1.96 * error, best["gold"] + 1.96 * error) if finite(error) else None


def _whole(estimate: Any) -> bool:
    return isinstance(estimate, Mapping) and finite(estimate.get("estimate"))


def _said(estimate: Result) -> str:
    cell = words.value_cell(estimate)
    return cell.text + (f" ({cell.note})" if cell.note else "")
