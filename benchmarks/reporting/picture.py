"""``report.png``: win rates, the metric against KL and curves, one row per task."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from prefzoo.benchmarks.reporting import words
from prefzoo.benchmarks.reporting.figures import learned
from prefzoo.benchmarks.reporting.words import BASELINES, Result, baselines, ends, finite, ranked
from prefzoo.files import replacing_file

BLUE, GREY, RED, INK = "#2459a8", "#8a8f98", "#b4520a", "#24262b"
MANY = 30  # methods in one figure that must be read with patience


def draw(results: Result, path: Path) -> None:
    """Write the picture; without methods there is none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks = [(n, t) for n, t in results["tasks"].items() if len(t["methods"]) > 1]
    if not tasks:
        path.unlink(missing_ok=True)
        return
    wide = 3 if any(learned(t) for _, t in tasks) else 2
    heights = [max(2.8, (0.17 if _dense(t) else 0.34) * len(t["methods"]) + 1.3) for _, t in tasks]
    style: dict[Any, Any] = {"font.size": 9, "axes.edgecolor": "#b9b6ae", "text.color": INK, "axes.labelcolor": INK,
             "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            len(tasks), wide, figsize=(4.7 * wide, sum(heights)), squeeze=False, layout="constrained",
            gridspec_kw={"height_ratios": heights},
        )  # fmt: skip
        for (name, task), row in zip(tasks, axes, strict=True):
            _wins(row[0], name, task)
            _frontier(row[1], task)
            if wide == 3:
                _curve(row[2], task)
        figure.suptitle(f"prefzoo bench {results['suite']} – {words.stamp(results)}".replace("$", r"\$"), fontsize=11)
        with replacing_file(path) as aside:
            figure.savefig(aside, dpi=130, format="png", metadata={"Software": None})
        plt.close(figure)


def _dense(task: Result) -> bool:
    return len(task["methods"]) > MANY


def _label(text: str) -> str:
    """Text that matplotlib does not take for mathematics, and that leaves room for the axes."""
    return (text if len(text) <= 32 else f"{text[:31]}…").replace("$", r"\$")


def _wins(axis: Any, name: str, task: Result) -> None:
    """Win rates against the start; for a verifier, whose answers are right or wrong, the gain in accuracy."""
    checked = task["metric"] == "exact"
    base = next((b for b in baselines(task) if b in task["methods"]), "start")
    kind = "difference" if checked else "win"
    shown = [(m, x["against"][base][kind]) for m in ranked(task) if base in (x := task["methods"][m])["against"]]
    shown = [(m, v) for m, v in shown if v and finite(v.get("estimate"))]
    for place, (method, value) in enumerate(reversed(shown)):
        colour = GREY if method in BASELINES else BLUE
        if span := ends(value):
            low, high = span if checked else (max(span[0], 0.0), min(span[1], 1.0))
            axis.plot([100 * low, 100 * high], [place, place], color=colour, lw=2.2, solid_capstyle="round")
        axis.plot(100 * value["estimate"], place, "o", color=colour, ms=6)
    axis.axvline(0 if checked else 50, color=INK, lw=0.8, ls=":")
    names = [_label(m) for m, _ in reversed(shown)]
    axis.set_yticks(range(len(shown)), names, fontsize=6.5 if _dense(task) else None)
    axis.set_ylim(-0.6, max(len(shown), 1) - 0.4)
    axis.set_xlabel(f"{'accuracy gained over' if checked else 'win rate against'} {base}, % (95 %)")
    axis.set_title(_label(f"{name}, judged by {task['metric']}"), fontsize=10, loc="left")


def _frontier(axis: Any, task: Result) -> None:
    points = (task.get("frontier") or {}).get("points") or ()
    points = [p for p in points if finite(p["kl"].get("estimate")) and finite(p["gold"].get("estimate"))]
    if not points:
        axis.set_axis_off()
        return
    order = ranked(task)
    named = {*order[:12], *BASELINES} if _dense(task) else {*order}
    for p in points:
        distance, value = math.sqrt(max(p["kl"]["estimate"], 0.0)), p["gold"]["estimate"]
        colour = GREY if p["method"] in BASELINES else BLUE
        if span := ends(p["gold"]):
            axis.plot([distance, distance], span, color=colour, lw=1.2)
        if span := ends(p["kl"]):
            axis.plot([math.sqrt(max(e, 0.0)) for e in span], [value, value], color=colour, lw=1.2)
        axis.plot(distance, value, "o", color=colour, ms=5)
        if p["method"] in named:
            where = {"xytext": (5, 3), "textcoords": "offset points", "fontsize": 7.5}
            axis.annotate(_label(p["method"]), (distance, value), **where)
    values = [p["gold"]["estimate"] for p in points]
    room = max(values) - min(values) or 1.0  # the interval of a collapsed method may leave it
    held = [v for p in points for v in ends(p["gold"]) or () if min(values) - room <= v <= max(values) + room] + values
    axis.set_ylim(min(held) - 0.05 * room, max(held) + 0.05 * room)
    reach = max(math.sqrt(max(p["kl"]["estimate"], 0.0)) for p in points) or 1.0
    axis.set_xlim(-0.06 * reach, 1.25 * reach)
    axis.set_xlabel("√KL to the start, √nats")
    axis.set_ylabel(_label(task["frontier"]["gold_column"]))


def _curve(axis: Any, task: Result) -> None:
    """Truth and proxy of the method whose truth falls most from its peak."""
    curves = learned(task)
    if not curves:
        axis.set_axis_off()
        return
    gold = (task.get("frontier") or {}).get("gold_column") or task["metric"]

    def fall(name: str) -> float:
        moved = (curves[name].get("end_minus_peak") or {}).get("estimate")
        return float(moved) if finite(moved) else 0.0

    name = min(curves, key=fall)
    curve = curves[name]
    if gold not in curve["means"]:
        axis.set_axis_off()
        return
    axis.plot(curve["steps"], curve["means"][gold], color=BLUE, marker="o", ms=4)
    axis.set_xlabel(_label(f"{name}: optimizer step"))
    axis.set_ylabel(_label(gold), color=BLUE)
    if "proxy" in curve["means"]:
        other = axis.twinx()
        other.plot(curve["steps"], curve["means"]["proxy"], color=RED, marker="s", ms=4, ls="--")
        other.set_ylabel("proxy reward (what training sees)", color=RED)
        other.spines["right"].set_visible(True)
