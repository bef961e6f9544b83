"""Calibration: one temperature, fitted on pairs, so that what a reward model says is likely happens so often."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import expit
from transformers import PreTrainedTokenizerBase

from prefzoo.data.formats import Dataset, load_dataset, split_by_prompt
from prefzoo.data.tokens import tokenise
from prefzoo.feedback.rewards import ModelReward
from prefzoo.models.folders import run_model
from prefzoo.models.load import load_scorer, save_scorer
from prefzoo.models.roles import Scorer
from prefzoo.models.tokenizer import open_tokenizer
from prefzoo.registry import UsageError

BINS = 10


@dataclass(frozen=True)
class Quality:
    """How good stated probabilities are, over so many pairs.

    ``nll``: mean of -p log P - (1 - p) log(1 - P), in nats; log 2 = 0.693 is a coin's. ``accuracy``: share of pairs in
    the right order, an equal score counting 1/2. ``ece``: expected calibration error, the mean over pairs of the
    distance between confidence and accuracy of their bin (``BINS`` of equal width from 1/2 to 1).
    """

    pairs: int
    nll: float
    accuracy: float
    ece: float


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate` found: the temperature, and the quality of held-out pairs before and after it."""

    temperature: float
    fitted_on: int
    before: Quality
    after: Quality
    bins: tuple[dict[str, Any], ...]  # of the reliability figure: which, from, to, pairs, confidence, accuracy
    held_out: bool  # whether other pairs were measured than fitted
    folder: Path | None = None

    def lines(self) -> list[str]:
        """In words."""
        where = f"measured on {self.before.pairs} others" if self.held_out else "and measured on the same"
        out = [f"temperature {self.temperature:.4g}, fitted on {self.fitted_on} pairs, {where}:"]
        out.append(f"{'':10}{'NLL':>9}{'accuracy':>11}{'ECE':>9}")
        for name, q in (("before", self.before), ("after", self.after)):
            out.append(f"{name:10}{q.nll:>9.4f}{q.accuracy:>11.4f}{q.ece:>9.4f}")
        return out


def calibrate(
    reward_model: str | Path | Scorer,
    pairs: Any,
    *,
    output: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    share: float = 0.5,
    seed: int = 0,
    max_length: int = 1024,
    columns: dict[str, str] | None = None,
    token_budget: int = 16_384,
    device: str | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """The temperature that makes a reward model's probabilities true, and the model with it.

        T = argmin_T mean over pairs of -p log sigmoid(d / T) - (1 - p) log sigmoid(-d / T),   d = r_chosen - r_rejected

    The order of completions, and so the accuracy, stays. After it a difference of 1 means odds of e, so that reward
    models can be averaged, compared with a threshold (:class:`prefzoo.feedback.Gate`) or weighed against a KL.

    Args:
        reward_model: a run, a reward-model folder or hub id, or one in memory (with ``tokenizer``).
        pairs: a data set that it was not trained on, of any form that gives pairs; a column ``probability`` holds soft
            labels p (else 1).
        output: a new folder for the model, with its scale multiplied by T, ``calibration.json`` and
            ``reliability.png``; None: nothing is written.
        share: of the prompts, chosen by ``seed``, that T is fitted on; the others are what NLL, accuracy and ECE are
            measured on. 1: everything is both.
        max_length: as in training. columns: what the data calls its columns.
        token_budget: tokens of a batch. device: ``cuda`` if there is one.

    Convention: a temperature alone; Platt's scaling would have an offset too, which says that the first completion of a
    pair is better whatever it is. No KL enters here.

    Source: Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599.

    Example::

        prefzoo.feedback.calibrate("runs/rm", "held_out.jsonl", output="runs/rm-calibrated").temperature
    """
    if not 0 < share <= 1:
        raise UsageError(f"calibrate, option 'share': expected a share above 0 and at most 1, got {share}.")
    folder = None if output is None else _new_folder(output)
    if isinstance(reward_model, Scorer):
        if tokenizer is None:
            raise UsageError("calibrate: a reward model in memory needs its tokenizer: give tokenizer=.")
        scorer, words = reward_model, tokenizer
    else:
        source = run_model(reward_model)
        scorer, words = load_scorer(source), tokenizer or open_tokenizer(source)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    reward = ModelReward(scorer.to(where), token_budget=token_budget)
    data = load_dataset(pairs, columns=columns)
    fitted, measured = (data, data) if share == 1 else split_by_prompt(data, 1 - share, seed)

    def read(part: Dataset) -> tuple[np.ndarray, np.ndarray]:
        samples, report = tokenise(part, words, "pairs", max_length=max_length)
        for line in report.lines():
            note(line)
        scores = reward(samples).double().numpy()
        target = samples.row_columns.get("probability")
        labels = np.ones(len(samples)) if target is None else target.double().numpy()
        return scores[0::2] - scores[1::2], labels

    difference, label = read(fitted)
    temperature = fit_temperature(difference, label)
    held = (difference, label) if share == 1 else read(measured)
    found = Calibration(
        temperature, len(difference), quality(*held), quality(held[0] / temperature, held[1]),
        (*_bins("before", *held), *_bins("after", held[0] / temperature, held[1])), share < 1, folder,
    )  # fmt: skip
    if folder is not None:
        original = scorer.scale.clone()
        try:  # the caller's own stays as it is
            scorer.scale.mul_(temperature)
            save_scorer(scorer, words, folder, note=note)
        finally:
            scorer.scale.copy_(original)
        facts = asdict(found) | {"folder": str(folder), "bins": list(found.bins)}
        (folder / "calibration.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        draw_reliability(found, folder / "reliability.png", note)
    return found


def fit_temperature(difference: np.ndarray, label: np.ndarray | None = None) -> float:
    """The temperature of least NLL; the NLL is convex in 1/T, so that where its slope is 0 is the only one.

    >>> import math
    >>> d = np.array([2.0, 2.0, 2.0, -2.0])  # right three times of four: odds of 3
    >>> round(fit_temperature(d), 4), round(2 / math.log(3), 4)
    (1.8205, 1.8205)
    """
    label = np.ones(len(difference)) if label is None else label
    if not len(difference) or not np.isfinite(difference).all():
        raise UsageError("calibrate: there is no pair, or a reward that is not finite.")

    def slope(inverse: float) -> float:
        """Of the mean NLL by 1/T."""
        return float(np.mean(difference * (expit(inverse * difference) - label)))

    size = float(np.abs(difference).max())
    if size == 0 or slope(0.0) >= 0:
        raise UsageError(
            "calibrate: on these pairs the reward model is no better than a coin, which no temperature cures: were the "
            "chosen and the rejected side exchanged, or is it a model of another kind of data?"
        )
    if np.where(difference > 0, label == 1, (label == 0) | (difference == 0)).all():
        raise UsageError(
            f"calibrate: all {len(difference)} pairs are in the right order, so the likeliest temperature is 0; more "
            "pairs, or harder ones, are needed."
        )
    highest = 1.0 / size
    while slope(highest) < 0:  # ends, as some of the labels is on the other side
        highest *= 2
    return 1.0 / float(brentq(slope, 0.0, highest, xtol=1e-14, rtol=1e-12))


def quality(difference: np.ndarray, label: np.ndarray) -> Quality:
    """NLL, accuracy and ECE of probabilities sigmoid(difference)."""
    nll = np.logaddexp(0, -difference) * label + np.logaddexp(0, difference) * (1 - label)
    right = _right(difference, label)
    rows = _bins("", difference, label)
    ece = sum(r["pairs"] * abs(r["confidence"] - r["accuracy"]) for r in rows) / len(difference)
    return Quality(len(difference), float(nll.mean()), float(right.mean()), float(ece))


def _right(difference: np.ndarray, label: np.ndarray) -> np.ndarray:
    """How much each pair is in the right order: what the label says of the side that the model prefers."""
    return np.where(difference == 0, 0.5, np.where(difference > 0, label, 1 - label))


def _bins(which: str, difference: np.ndarray, label: np.ndarray) -> list[dict[str, Any]]:
    confidence, right = expit(np.abs(difference)), _right(difference, label)
    edges = np.linspace(0.5, 1.0, BINS + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, BINS - 1)
    return [
        {"which": which, "from": float(edges[b]), "to": float(edges[b + 1]), "pairs": int(here.sum()),
         "confidence": float(confidence[here].mean()), "accuracy": float(right[here].mean())}
        for b in range(BINS) if (here := place == b).any()
    ]  # fmt: skip


def draw_reliability(found: Calibration, file: Path, note: Callable[[str], None] = lambda _: None) -> None:
    """What a model says against what happens, before and after, and how many pairs say so."""
    try:
        from matplotlib.figure import Figure  # without pyplot: no display, no global state
    except ImportError:
        note("no reliability.png: matplotlib is not installed.")
        return
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    top = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(3, 1))
    for column, (which, q) in enumerate((("before", found.before), ("after", found.after))):
        rows = [r for r in found.bins if r["which"] == which]
        x, y, n = (np.array([r[key] for r in rows]) for key in ("confidence", "accuracy", "pairs"))
        curve, counts = top[0][column], top[1][column]
        curve.plot([0.5, 1], [0.5, 1], color="0.6", linestyle="--", linewidth=1, label="perfect calibration")
        low, high = _wilson(y, n)
        curve.errorbar(
            x, y, yerr=np.maximum([y - low, high - y], 0), marker="o", markersize=4, capsize=2, linewidth=1.2
        )
        told = "" if column == 0 else f" (T = {found.temperature:.3g})"
        curve.set_title(f"{which}{told}: NLL {q.nll:.3f}, ECE {q.ece:.3f}", fontsize=10)
        curve.set_ylim(0, 1.02)
        curve.grid(alpha=0.25)
        counts.bar([(r["from"] + r["to"]) / 2 for r in rows], n, width=0.5 / BINS * 0.9, color="C0", alpha=0.6)
        counts.set_xlim(0.49, 1.01)
        counts.set_xlabel("stated probability that the preferred answer wins")
    top[0][0].set_ylabel("share that won")
    top[1][0].set_ylabel("pairs")
    top[0][0].legend(loc="lower right", fontsize=8, frameon=False)
    figure.savefig(file, dpi=130)


def _wilson(share: np.ndarray, n: np.ndarray, z: float = 1.96) -> tuple[np.ndarray, np.ndarray]:
    """95 % intervals of shares."""
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return middle - half, middle + half


def _new_folder(output: str | Path) -> Path:
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"calibrate, option 'output': {str(folder)!r} is there already; give a new folder.")
    return folder


__all__ = ["BINS", "Calibration", "Quality", "calibrate", "draw_reliability", "fit_temperature", "quality"]
