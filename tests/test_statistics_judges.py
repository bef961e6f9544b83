"""Agreement and the quality of judges: printed examples, second implementations, published numbers, planted biases."""

import gzip
import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import special

from prefzoo.benchmarks.statistics.agreement import agreement, judge_quality

X = math.nan
KRIPPENDORFF = np.array(  # his example of four observers with gaps (2011, section C)
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, X, X, X],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, X, 3],
        [X, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, X],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, X],
    ]
).T
FLEISS = [  # ten items, fourteen raters, five categories
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip


def rows_of(path):
    if not path.exists():
        pytest.skip(f"no {path}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return pd.DataFrame([json.loads(line) for line in lines])


# ---- agreement


@pytest.mark.parametrize(("scale", "printed"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_is_krippendorffs_own(scale, printed):
    assert agreement(KRIPPENDORFF, scale=scale).alpha.estimate == pytest.approx(printed, abs=5e-4)


def test_alpha_of_two_observers_is_as_printed():
    binary = [[0, 1], [1, 1], [0, 1], [0, 0], [0, 0], [0, 1], [0, 0], [0, 0], [1, 0], [0, 0]]
    assert agreement(binary).alpha.estimate == pytest.approx(0.095, abs=5e-4)
    words = list(zip("aabbdcccedda", "babbbccceddd", strict=True))
    assert agreement(words).alpha.estimate == pytest.approx(0.692, abs=5e-4)


def test_fleiss_kappa_is_the_textbook_one():
    labels = [[c for c, n in enumerate(row) for _ in range(n)] for row in FLEISS]
    assert agreement(labels).fleiss.estimate == pytest.approx(0.210, abs=5e-4)


def test_cohens_kappa_by_hand():
    labels = [[1, 1]] * 20 + [[1, 0]] * 5 + [[0, 1]] * 10 + [[0, 0]] * 15
    result = agreement(labels, raters=["a", "b"])
    assert result.cohen["a-b"].estimate == pytest.approx((0.7 - 0.5) / 0.5)
    p, chance = 0.7, 0.5
    # Fleiss, Cohen & Everitt 1969 for this table
    cells, left, right = np.array([[20, 5], [10, 15]]) / 50, np.array([0.5, 0.5]), np.array([0.6, 0.4])
    kappa = 0.4
    diagonal = sum(cells[i, i] * ((1 - chance) - (left[i] + right[i]) * (1 - p)) ** 2 for i in range(2))
    off = (1 - p) ** 2 * sum(cells[i, j] * (right[i] + left[j]) ** 2 for i, j in [(0, 1), (1, 0)])
    variance = (diagonal + off - (p * chance - 2 * chance + p) ** 2) / (50 * (1 - chance) ** 4)
    assert result.cohen["a-b"].estimate == pytest.approx(kappa)
    assert result.cohen["a-b"].se == pytest.approx(math.sqrt(variance), rel=0.03)


def pairwise_kappa(a, b, distance):
    observed = np.mean([distance(x, y) for x, y in zip(a, b, strict=True)])
    return 1 - observed / np.mean([distance(x, y) for x, y in itertools.product(a, b)])


@pytest.mark.parametrize(
    ("scale", "distance"),
    [("nominal", lambda x, y: x != y), ("ordinal", lambda x, y: abs(x - y)), ("interval", lambda x, y: (x - y) ** 2)],
)
def test_kappa_is_disagreement_over_that_of_all_pairs(scale, distance):
    random = np.random.default_rng(0)
    a_N = random.integers(0, 4, 60)
    b_N = np.where(random.random(60) < 0.6, a_N, random.integers(0, 4, 60))
    result = agreement(np.stack([a_N, b_N], 1), scale=scale)
    assert result.cohen["1-2"].estimate == pytest.approx(pairwise_kappa(a_N, b_N, distance))
    pooled = np.concatenate([a_N, b_N])
    pairs = list(itertools.permutations(range(120), 2))
    if scale != "ordinal":
        chance = np.mean([distance(pooled[i], pooled[j]) for i, j in pairs])
        observed = np.mean([distance(x, y) for x, y in zip(a_N, b_N, strict=True)])
        assert result.alpha.estimate == pytest.approx(1 - observed / chance)


def test_agreement_knows_its_limits():
    same = agreement([["x", "x"], ["y", "y"], ["x", "x"], ["y", "y"]])
    assert same.accuracy.estimate == same.cohen["1-2"].estimate == same.fleiss.estimate == same.alpha.estimate == 1
    constant = agreement([[1, 1], [1, 1], [1, 1]])
    assert (constant.cohen["1-2"], constant.fleiss, constant.alpha) == (None, None, None)
    assert constant.accuracy.estimate == 1 and constant.accuracy.ci[0] < 1
    random = np.random.default_rng(1)
    chance = agreement(random.integers(0, 3, (3000, 3)))
    assert abs(chance.alpha.estimate) < 4 * chance.alpha.se < 0.08
    renamed = agreement(np.vectorize({1: 30, 2: 10, 3: 20, 4: 5, 5: 7}.get)(np.nan_to_num(KRIPPENDORFF, nan=1)))
    assert renamed.alpha.estimate == pytest.approx(agreement(np.nan_to_num(KRIPPENDORFF, nan=1)).alpha.estimate)


def test_repeated_items_are_one_cluster():
    random = np.random.default_rng(2)
    labels = random.integers(0, 2, (100, 3))
    once = agreement(labels)
    again = agreement(np.concatenate([labels] * 2), clusters=np.tile(np.arange(100), 2))
    assert (again.n_items, again.n_clusters) == (200, 100)
    assert again.accuracy.se == pytest.approx(once.accuracy.se)
    assert again.fleiss.se == pytest.approx(once.fleiss.se)


@pytest.mark.parametrize(
    ("labels", "options", "words"),
    [
        ([[1], [2]], {}, "at least two raters"),
        ([[1, X], [X, 2]], {}, "no item has labels of two raters"),
        ([["a", "b"], ["a", "a"]], {"scale": "ordinal"}, "needs numbers"),
        ([["a", 1], ["a", "a"]], {}, "mix numbers and words"),
        ([[1, 2], [1, 1]], {"scale": "ratio"}, 'expected "nominal"'),
        ([[score, score + 1] for score in range(60)], {}, "61 different labels"),
    ],
)
def test_bad_labels_are_refused(labels, options, words):
    table = np.array(labels, dtype=object)
    with pytest.raises(ValueError, match=words):
        agreement(table, **options)


def test_pandalm_has_the_published_agreement(data_dir):
    rows = rows_of(data_dir / "pandalm_human" / "pandalm_testset.jsonl.gz")
    raters = ["annotator1", "annotator2", "annotator3"]
    result = agreement(rows, raters=raters, clusters="idx")
    kappas = [round(found.estimate, 2) for found in result.cohen.values()]
    assert kappas == [0.85, 0.88, 0.86]
    majority = rows[raters].mode(axis=1)[0].astype(int)
    assert majority.value_counts().to_dict() == {2: 472, 1: 422, 0: 105}


# ---- judges


def judged(random, n=400, place=0.0, length=0.0, right=0.8, unparsed=0.0):
    truth_N = random.integers(0, 2, n).astype(float)
    dlen_N = random.normal(0, 100, n)
    logit_N = special.logit(right) * (2 * truth_N - 1) + length * np.tanh(dlen_N / 100)
    forward_N, backward_N = ((random.random(n) < special.expit(logit_N + sign * place)) * 1.0 for sign in (1, -1))
    forward_N[random.random(n) < unparsed] = np.nan
    return pd.DataFrame(
        {"forward": forward_N, "backward": backward_N, "truth": truth_N, "len_a": 500 + dlen_N, "len_b": 500.0}
    )


EVERY = {"backward": "backward", "len_a": "len_a", "len_b": "len_b"}


def test_a_perfect_judge():
    rows = judged(np.random.default_rng(3))
    result = judge_quality(
        rows["truth"], rows["truth"], backward=rows["truth"], len_a=rows["len_a"], len_b=rows["len_b"]
    )
    assert result.accuracy.estimate == result.kappa.estimate == result.alpha.estimate == 1
    assert (result.flip_rate.estimate, result.position_bias.estimate, result.length_bias.estimate) == (0, 0, 0)
    assert result.length_bias.p == result.position_bias.p == 1 and result.length_slope is None


def test_a_judge_of_places_only():
    rows = judged(np.random.default_rng(4))
    result = judge_quality(np.ones(400), rows["truth"], backward=np.zeros(400))
    assert (result.position_bias.estimate, result.flip_rate.estimate, result.ties) == (0.5, 1.0, 1.0)
    assert result.accuracy.estimate == 0.5 and result.kappa.estimate == 0


def test_planted_biases_are_found_and_absent_ones_are_not():
    random = np.random.default_rng(5)
    fair = judge_quality(judged(random, 2000), **EVERY)
    assert min(fair.position_bias.p, fair.length_bias.p, fair.length_slope.p) > 0.01
    placed = judge_quality(judged(random, 2000, place=0.7), **EVERY)
    expected = np.mean([special.expit(s * special.logit(0.8) + 0.7) for s in (1, -1)]) - 0.5
    assert placed.position_bias.estimate == pytest.approx(expected, abs=3 * placed.position_bias.se)
    assert placed.position_bias.p < 1e-6 and placed.length_bias.p > 0.01
    long = judge_quality(judged(random, 2000, length=1.0), **EVERY)
    assert long.length_bias.p < 1e-6 and long.length_bias.estimate > 0
    assert long.length_slope.ci[0] < 1.0 < long.length_slope.ci[1]


def test_swapping_the_answers_changes_no_quality():
    rows = judged(np.random.default_rng(6), place=0.5, length=0.5, unparsed=0.1)
    one = judge_quality(rows, **EVERY)
    other = judge_quality(
        1 - rows["backward"], 1 - rows["truth"], backward=1 - rows["forward"], len_a=rows["len_b"], len_b=rows["len_a"]
    )
    for name in ("accuracy", "kappa", "alpha", "position_bias", "flip_rate", "length_bias", "length_slope"):
        assert getattr(one, name).estimate == pytest.approx(getattr(other, name).estimate, abs=1e-8)
        assert getattr(one, name).se == pytest.approx(getattr(other, name).se, abs=1e-8)


def test_ties_and_unparsed_verdicts_are_half_right():
    result = judge_quality([1.0, X, 0.5, 0.0], [1, 1, 0.5, 0.5])
    assert result.accuracy.estimate == (1 + 0.5 + 1 + 0.5) / 4
    assert (result.unparsed, result.ties) == (0.25, 0.5)
    assert (result.position_bias, result.flip_rate, result.length_bias) == (None, None, None)


def test_bad_verdicts_are_refused():
    with pytest.raises(ValueError, match="backward must be 2 verdicts"):
        judge_quality([1.0, 0.0], [1, 0], backward=[1.0])
    with pytest.raises(ValueError, match="truth must be 1"):
        judge_quality([1.0, 0.0], [1, 2])


def test_longer_wins_on_llmbar(data_dir):
    rows = rows_of(data_dir / "llmbar" / "llmbar.jsonl.gz")
    len_a, len_b = rows["output_1"].str.len(), rows["output_2"].str.len()
    verdict = 0.5 + np.sign(len_a - len_b) / 2
    accuracy = {
        subset: judge_quality(verdict[part.index], part["label"] == 1).accuracy
        for subset, part in rows.groupby("subset")
    }
    assert sum(accuracy[subset].ci[1] < 0.5 for subset in accuracy if "adversarial" in subset) >= 2
    assert accuracy["mt_bench_human"].ci[0] > 0.5


@pytest.mark.long
def test_intervals_of_a_judge_cover():
    random, hits = np.random.default_rng(7), []
    bias = np.mean([special.expit(sign * special.logit(0.8) + 0.5) for sign in (1, -1)]) - 0.5
    for _ in range(1000):
        placed = judge_quality(judged(random, 200, place=0.5), backward="backward")
        long = judge_quality(judged(random, 200, length=0.8), len_a="len_a", len_b="len_b")
        single = judge_quality(judged(random, 200))
        found = [placed.position_bias, long.length_slope, single.accuracy, single.kappa, single.alpha]
        hits.append([f.ci[0] <= truth <= f.ci[1] for f, truth in zip(found, [bias, 0.8, 0.8, 0.6, 0.6], strict=True)])
    coverage = np.mean(hits, axis=0)
    assert (coverage > 0.93).all() and (coverage < 0.98).all(), coverage
