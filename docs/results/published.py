"""Published judgements, analysed with `prefzoo.benchmarks.statistics`: prints the page published.md.

python docs/results/published.py ../shared/data > docs/results/published.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from prefzoo.benchmarks import statistics
from prefzoo.benchmarks.statistics.fits import Coefficient

ANNOTATORS = ["annotator1", "annotator2", "annotator3"]


def page(data: Path) -> str:
    """The whole page, from a folder with alpaca_eval_winrates, pandalm_human and llmbar."""
    parts = [
        "<!-- Made by: python docs/results/published.py DATA > docs/results/published.md -->",
        "# Published numbers, and what our statistics say of the same data",
        *alpaca_eval(data / "alpaca_eval_winrates"),
        *pandalm(data / "pandalm_human" / "pandalm_testset.jsonl.gz"),
        *llmbar(data / "llmbar" / "llmbar.jsonl.gz"),
    ]
    return "\n\n".join(parts) + "\n"


def alpaca_eval(folder: Path) -> Iterator[str]:
    expected = json.loads((folder / "expected.json").read_text())
    instructions = pd.read_csv(folder / "lc_instructions.csv")
    sums = json.loads((folder / "lc_regulariser.json").read_text())
    lengths = (instructions["len_gamed_concise"], instructions["len_gamed_verbose"])
    gamed = statistics.Gamed(lengths, sums["S_tanh"], sums["S_difficulty"])
    rows, apart = [], []
    for model, numbers in sorted(expected.items(), key=lambda item: -item[1]["published"]["win_rate"]):
        judged = pd.read_json(folder / f"{model}.jsonl.gz", lines=True).rename(columns={"len_model": "len_method"})
        judged["y"] = np.where(judged["preference"] == 0, 0.5, judged["preference"] - 1)
        judged["difficulty"] = instructions["instruction_difficulty"]
        shown, exact = numbers["published"], numbers["recomputed"]
        theirs = statistics.alpaca_eval(judged, gamed=gamed, penalty=1 / exact["C_inferred"])
        ours = statistics.length_controlled(judged, difficulty="difficulty", resamples=2000)
        win_apart = max(abs(theirs.win_rate - shown["win_rate"]), abs(theirs.standard_error - shown["standard_error"]))
        published = shown["length_controlled_winrate"]
        apart.append((win_apart, abs(theirs.estimate - published), abs(100 * ours.estimate - published)))
        their_se, our_se = exact["lc_se_from_published_weights"], 100 * ours.se
        cells = [
            model, f"{theirs.win_rate:.2f} ± {theirs.standard_error:.2f}", f"{published:.2f}", f"{theirs.estimate:.2f}",
            f"{their_se:.2f}", f"{100 * ours.estimate:.2f}", f"**{our_se:.2f}**", f"{our_se / their_se:.1f}",
            f"{ours.length.estimate:+.2f} ± {ours.length.se:.2f}",
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    wins, refit, own = np.max(apart, axis=0)
    yield "## AlpacaEval 2: win rates, and win rates at equal length"
    yield (
        "805 judgements of each of five models. Win rates and their errors agree with the published ones to "
        f"{'1e-9' if wins < 1e-9 else f'{wins:.0e}'}, the refit of the length-controlled win rate, with gamed rows and "
        f"penalty, to {refit:.3f} points or better. Our own fit has neither: it is up to {own:.1f} points away. Its "
        "error comes from refitting resampled instructions; AlpacaEval's formula leaves the fit out. Both take "
        "AlpacaEval's difficulties of the instructions as known. All in per cent, errors are standard errors."
    )
    yield "\n".join(
        [
            "| model | win rate | LC published | LC refit | its error | LC ours | our error | ratio | weight |",
            "|---|---|---|---|---|---|---|---|---|",
            *rows,
        ]
    )
    yield "The weight is that of tanh(dlen/sd), dlen = baseline - model: negative, so the judge likes length."


def pandalm(path: Path) -> Iterator[str]:
    rows = pd.read_json(path, lines=True)
    found = statistics.agreement(rows, raters=ANNOTATORS, clusters="idx")
    majority = rows[ANNOTATORS].mode(axis=1)[0].astype(int)
    counts = majority.value_counts()
    yield "## PandaLM: three annotators"
    yield (
        f"{found.n_items} pairs, labels first / second / tie. Majority labels: {counts[0]} ties, {counts[1]} for the "
        f"first, {counts[2]} for the second, as published. Published kappas: 0.85, 0.88, 0.86."
    )
    measures = {"accuracy (pairs of labels that agree)": found.accuracy}
    measures |= {f"Cohen's kappa, {pair.replace('annotator', '')}": kappa for pair, kappa in found.cohen.items()}
    measures |= {"Fleiss' kappa": found.fleiss, "Krippendorff's alpha (nominal)": found.alpha}
    ordered = rows[ANNOTATORS].replace({1: 1.0, 0: 0.5, 2: 0.0})
    measures["Krippendorff's alpha (ordinal, first > tie > second)"] = statistics.agreement(
        ordered, scale="ordinal"
    ).alpha
    lines = [f"| {name} | {number(value, 3)} |" for name, value in measures.items() if value is not None]
    yield "\n".join(["| measure | estimate (95 % interval) |", "|---|---|", *lines])
    first, second = zip(*(split(key) for key in rows["cmp_key"]), strict=True)
    votes = rows[ANNOTATORS].to_numpy().ravel()
    battles = (np.repeat(first, 3), np.repeat(second, 3), np.select([votes == 1, votes == 2], [1.0, 0.0], 0.5))
    rated = statistics.bradley_terry(*battles, clusters=np.repeat(rows["idx"], 3))
    naive = statistics.bradley_terry(*battles)
    yield (
        "Three labels of a pair are not three battles. Bradley-Terry ratings of the five models (mean 1000), with the "
        "error clustered by pair, and with the error that takes labels as independent:"
    )
    lines = [
        f"| {r.name} | {r.estimate:.0f} ({r.ci[0]:.0f} to {r.ci[1]:.0f}) | {r.best_rank} to {r.worst_rank} "
        f"| {r.se:.1f} | {naive[r.name].se:.1f} |"
        for r in rated.ratings
    ]
    yield "\n".join(["| model | rating | rank | error by pair | error by label |", "|---|---|---|---|---|", *lines])
    if rated.fit is not None:
        yield f"Fit: deviance {rated.fit.deviance:.1f} on {rated.fit.df} df, p = {rated.fit.p:.2f} (clustered)."


def llmbar(path: Path) -> Iterator[str]:
    rows = pd.read_json(path, lines=True)
    yield "## LLMBar and companions: what rules reach as judges"
    yield (
        "Accuracy of two rules against the labels (95 % interval, Wilson): the longer answer in characters wins, and "
        "the answer with the larger share of the instruction's words wins. A tie of the rule is half right."
    )
    lines = []
    for subset, part in rows.groupby("subset", sort=False):
        truth = (part["label"] == 1).astype(float).to_numpy()
        len_1, len_2 = part["output_1"].str.len(), part["output_2"].str.len()
        longer = 0.5 + np.sign(len_1 - len_2) / 2
        words = 0.5 + np.sign(shared(part["input"], part["output_1"]) - shared(part["input"], part["output_2"])) / 2
        judges = [statistics.judge_quality(verdict, truth) for verdict in (longer, words)]
        cells = [f"{number(judge.accuracy, 2)} | {judge.kappa.estimate:+.2f}" for judge in judges if judge.kappa]
        lines.append(f"| {subset} | {len(part)} | {' | '.join(cells)} |")
    yield "\n".join(
        ["| subset | n | longer wins | kappa | instruction's words | kappa |", "|---|---|---|---|---|---|", *lines]
    )
    yield (
        "On votes of people (mt_bench_human, llmeval2_human) length alone does better than chance; on the adversarial "
        "subsets, which are made so, it does worse. A judge that is measured on one kind only is not measured."
    )


def number(found: Coefficient, digits: int) -> str:
    return f"{found.estimate:.{digits}f} ({found.ci[0]:.{digits}f} to {found.ci[1]:.{digits}f})"


def split(key: str) -> tuple[str, str]:
    first, second = key.split("_")
    return first, second


def shared(asked: pd.Series, answered: pd.Series) -> np.ndarray:
    """Share of the words of each instruction that its answer holds."""
    pairs = [(set(a.lower().split()), set(b.lower().split())) for a, b in zip(asked, answered, strict=True)]
    return np.array([len(a & b) / max(1, len(a)) for a, b in pairs])


if __name__ == "__main__":
    print(page(Path(sys.argv[1])), end="")
