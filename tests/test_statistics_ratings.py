"""Ratings against second solvers, hand-made errors, closed forms and simulation."""

import itertools
import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy import optimize, special

from prefzoo.benchmarks.statistics.ratings import ELO, bradley_terry, elo

NAMES = ("dpo", "ipo", "kto", "sft")


def arena(random, n_prompts=60, strength=(0.6, 0.3, 0.0, -0.4), place=0.0, prompt_sd=0.0, tie=0.0):
    """Every pair on every prompt, a prompt that favours some pairs: names, judgements, places and prompts."""
    rows = []
    for prompt in range(n_prompts):
        for i, j in itertools.combinations(range(len(strength)), 2):
            first = random.integers(2)
            logit = strength[i] - strength[j] + place * (2 * first - 1) + prompt_sd * random.normal()
            y = 0.5 if random.random() < tie else float(random.random() < special.expit(logit))
            rows.append((NAMES[i], NAMES[j], y, first, prompt))
    a, b, y, first, prompt = zip(*rows, strict=True)
    return {"a": a, "b": b, "y": np.array(y), "first": np.array(first), "clusters": np.array(prompt)}


def loss_of(battles, davidson=False, place=False):
    i, j = (np.array([NAMES.index(name) for name in battles[side]]) for side in "ab")
    y, sign = battles["y"], 2 * battles["first"] - 1

    def loss(beta):
        gap = beta[i] - beta[j] + (beta[4] * sign if place else 0)
        if not davidson:
            return -(y * special.log_expit(gap) + (1 - y) * special.log_expit(-gap)).sum() + beta[:4].sum() ** 2
        log_p = special.log_softmax(np.stack([gap / 2, np.full(len(gap), beta[-1]), -gap / 2]), axis=0)
        return -np.where(y == 1, log_p[0], np.where(y == 0.5, log_p[1], log_p[2])).sum() + beta[:4].sum() ** 2

    return loss


@pytest.mark.parametrize(
    ("ties", "place"), [("halves", False), ("halves", True), ("davidson", False), ("davidson", True)]
)
def test_ratings_are_those_of_a_second_solver(ties, place):
    battles = arena(np.random.default_rng(1), place=0.5, tie=0.2)
    result = bradley_terry(**{**battles, "first": battles["first"] if place else None}, ties=ties)
    size = 4 + place + (ties == "davidson")
    other = optimize.minimize(loss_of(battles, ties == "davidson", place), np.zeros(size), method="BFGS", tol=1e-9).x
    assert [result[name].estimate for name in NAMES] == pytest.approx(1000 + ELO * other[:4], abs=ELO * 1e-6)
    if place:
        assert result.position.estimate == pytest.approx(other[4], abs=1e-6)
    if ties == "davidson":
        assert result.log_tie.estimate == pytest.approx(other[-1], abs=1e-6)


def test_ratings_are_the_fixed_point_of_mm():
    battles = arena(np.random.default_rng(2))
    wins, met = np.zeros((2, 4, 4))
    for a, b, y in zip(battles["a"], battles["b"], battles["y"], strict=True):
        i, j = NAMES.index(a), NAMES.index(b)
        wins[i, j], wins[j, i] = wins[i, j] + y, wins[j, i] + 1 - y
        met[i, j], met[j, i] = met[i, j] + 1, met[j, i] + 1
    strength = np.ones(4)
    for _ in range(2000):  # Hunter 2004
        strength = wins.sum(1) / (met / (strength[:, None] + strength)).sum(1)
        strength /= np.exp(np.log(strength).mean())
    result = bradley_terry(**{**battles, "first": None})
    assert [result[name].estimate for name in NAMES] == pytest.approx(1000 + ELO * np.log(strength), abs=ELO * 1e-6)


def test_two_methods_have_the_closed_form():
    y, prompts = np.array([1, 1, 0, 0.5, 1, 1, 0, 1.0]), np.array([0, 0, 1, 1, 2, 2, 3, 4])
    result = bradley_terry(["a"] * 8, ["b"] * 8, y, clusters=prompts, anchor="b")
    share, scores = y.mean(), np.bincount(prompts, weights=y - y.mean())
    gap, error = special.logit(share), math.sqrt(5 / 4 * (scores**2).sum()) / (8 * share * (1 - share))
    assert result["a"].estimate == pytest.approx(1000 + ELO * gap)
    assert result["a"].se == pytest.approx(ELO * error)
    assert (result["b"].estimate, result["b"].se, result.fit) == (1000, 0, None)
    assert result.contrasts[0].observed == result.contrasts[0].expected == pytest.approx(share)


def test_repeating_the_battles_of_a_prompt_is_no_new_evidence():
    battles = arena(np.random.default_rng(3), place=0.3)
    twice = {key: np.concatenate([values, values]) for key, values in battles.items()}
    once, again = bradley_terry(**battles), bradley_terry(**twice)
    for name in NAMES:
        assert again[name].estimate == pytest.approx(once[name].estimate, abs=1e-9)
        assert again[name].se == pytest.approx(once[name].se, rel=1e-9)
    assert again.fit.p == pytest.approx(once.fit.p, rel=1e-6)
    naive = bradley_terry(**{**twice, "clusters": None})
    assert naive["dpo"].se < 0.8 * again["dpo"].se


def test_sandwich_and_bootstrap_agree():
    battles = arena(np.random.default_rng(4), n_prompts=150)
    sandwich, bootstrap = bradley_terry(**battles), bradley_terry(**battles, resamples=300)
    assert (bootstrap.error, bootstrap.failed_resamples) == ("bootstrap", 0)
    for name in NAMES:
        assert bootstrap[name].se == pytest.approx(sandwich[name].se, rel=0.15)


def test_names_and_sides_do_not_matter():
    battles = arena(np.random.default_rng(5), place=0.4)
    swapped = {**battles, "a": battles["b"], "b": battles["a"], "y": 1 - battles["y"], "first": 1 - battles["first"]}
    one, other = bradley_terry(**battles), bradley_terry(**swapped)
    assert [r.estimate for r in one.ratings] == pytest.approx([r.estimate for r in other.ratings], abs=1e-8)
    assert one.position.estimate == pytest.approx(other.position.estimate, abs=1e-10)
    assert np.mean([r.estimate for r in one.ratings]) == pytest.approx(1000)
    for contrast in one.contrasts:
        assert contrast.estimate == pytest.approx(one[contrast.a].estimate - one[contrast.b].estimate)


@pytest.mark.parametrize("frame", [pd.DataFrame, pa.table])
def test_a_frame_is_its_columns(frame):
    battles = arena(np.random.default_rng(6), n_prompts=20)
    rows = frame({**{k: battles[k] for k in ("a", "b", "y")}, "prompt": battles["clusters"]})
    assert bradley_terry(rows, clusters="prompt") == bradley_terry(**{**battles, "first": None})
    with pytest.raises(ValueError, match="no column 'promt'; did you mean 'prompt'"):
        bradley_terry(rows, clusters="promt")


def test_a_cycle_shows_in_the_fit_and_true_ratings_do_not():
    cycle = [("a", "b", 1), ("b", "c", 1), ("c", "a", 1)] * 30 + [("a", "b", 0), ("b", "c", 0), ("c", "a", 0)] * 5
    result = bradley_terry(*zip(*cycle, strict=True))
    assert result.fit.df == 1 and result.fit.p < 1e-6
    assert all((rating.best_rank, rating.worst_rank) == (1, 3) for rating in result.ratings)
    random, rejected = np.random.default_rng(7), 0
    for _ in range(200):
        rejected += bradley_terry(**{**arena(random, n_prompts=40), "first": None}).fit.p < 0.05
    assert 2 <= rejected <= 20


def test_ranks_follow_the_adjusted_contrasts():
    result = bradley_terry(**{**arena(np.random.default_rng(8), 200, strength=(1.5, 0.0, 0.02, -1.5)), "first": None})
    ranks = {rating.name: (rating.best_rank, rating.worst_rank) for rating in result.ratings}
    assert ranks == {"dpo": (1, 1), "ipo": (2, 3), "kto": (2, 3), "sft": (4, 4)}


@pytest.mark.parametrize(
    ("battles", "words"),
    [
        ([("a", "b", 1), ("b", "a", 1), ("c", "d", 1), ("d", "c", 1)], r"\(a, b \| c, d\)|\(c, d \| a, b\)"),
        ([("a", "b", 1), ("b", "a", 1), ("a", "c", 1), ("b", "c", 1)], "not joined by wins in both directions"),
        ([("a", "b", 2), ("b", "a", 1)], "judgements lie in"),
        ([("a", "a", 1), ("b", "a", 1)], "against itself"),
    ],
)
def test_ratings_that_do_not_exist_are_refused(battles, words):
    with pytest.raises(ValueError, match=words):
        bradley_terry(*zip(*battles, strict=True))


def test_position_and_tie_terms_that_do_not_exist_are_refused():
    a, b = ["a"] * 6, ["b"] * 6
    with pytest.raises(ValueError, match="position or tie term is infinite"):
        bradley_terry(a, b, [1, 1, 1, 0, 0, 0], first=[1, 1, 1, 0, 0, 0])
    with pytest.raises(ValueError, match="cannot be told from the ratings"):
        bradley_terry(a, b, [1, 1, 1, 0, 0, 0], first=[1] * 6)
    with pytest.raises(ValueError, match="position or tie term is infinite"):
        bradley_terry(a, b, [1, 1, 1, 0, 0, 0], ties="davidson")
    with pytest.raises(ValueError, match="needs judgements that are 0"):
        bradley_terry(a, b, [1, 0.7, 1, 0, 0, 0], ties="davidson")


@pytest.mark.long
def test_intervals_of_contrasts_cover_with_dependent_battles():
    random, hit = np.random.default_rng(9), []
    for _ in range(1000):
        battles = arena(random, n_prompts=100)
        shared = {key: np.repeat(values, 3) for key, values in battles.items()}
        contrast = next(c for c in bradley_terry(**{**shared, "first": None}).contrasts if {c.a, c.b} == {"dpo", "sft"})
        low, high = sorted(np.array(contrast.ci) * (1 if contrast.a == "dpo" else -1))
        hit.append(low <= ELO * 1.0 <= high)
    assert 0.93 <= np.mean(hit) <= 0.98


def test_elo_replays_battles_by_hand_and_shows_the_order():
    result = elo(["a", "a"], ["b", "b"], [1, 0], k=32, orders=50)
    after_one = 16.0
    expected = 1 / (1 + 10 ** (-2 * after_one / 400))
    assert result["a"].as_given == pytest.approx(1000 + after_one - 32 * expected)
    assert result["a"].order_range == pytest.approx((1000 + 16 - 32 * expected, 1000 - 16 + 32 * expected))
    assert result["a"].order_sd > 0
    rows = arena(np.random.default_rng(10), n_prompts=200)
    long = elo(rows["a"], rows["b"], rows["y"], k=4)
    assert long == elo(rows["a"], rows["b"], rows["y"], k=4)
    assert sum(rating.estimate for rating in long.ratings) == pytest.approx(4000)
    assert [rating.name for rating in long.ratings][::3] == ["dpo", "sft"]
