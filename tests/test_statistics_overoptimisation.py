"""KL, Gao's curves, frontiers, diversity and alignment tax against closed forms, second solvers and simulation."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from scipy import optimize

from prefzoo.benchmarks.statistics.overoptimisation import frontier, frontier_area, gao_fit, kl
from prefzoo.benchmarks.statistics.text import alignment_tax, distinct_n, diversity, entropy, self_bleu

FORMS = {
    "best_of_n": lambda d, alpha, beta: d * (alpha - beta * d),
    "rl": lambda d, alpha, beta: d * (alpha - beta * np.log(d)),
}


# ---- KL


def gaussian_log_ratios(random, shape, shift=0.5):
    """log N(x; shift, 1) - log N(x; 0, 1) of x from the former: KL = shift²/2."""
    return shift * (random.normal(shift, 1, shape)) - shift**2 / 2


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_of_gaussians(estimator):
    result = kl(gaussian_log_ratios(np.random.default_rng(0), (3, 4000)), estimator=estimator).sequence
    assert result.estimate == pytest.approx(0.125, abs=4 * result.se) and result.se < 0.01


def test_k3_by_token_is_never_negative_and_less_noisy():
    answers = [gaussian_log_ratios(np.random.default_rng(i), 1 + i % 7, shift=0.1) for i in range(500)]
    k1, k3 = (kl(answers, by_token=True, estimator=estimator) for estimator in ("k1", "k3"))
    assert k3.sequence.se < k1.sequence.se
    assert k3.per_token.estimate == pytest.approx(0.005, abs=4 * k3.per_token.se)
    assert all(kl([answer, answer], by_token=True, estimator="k3").sequence.estimate >= 0 for answer in answers[:50])


def test_kl_per_token_is_a_ratio_with_its_delta_error():
    random = np.random.default_rng(1)
    tokens_N, sums_N = random.integers(5, 50, 300), random.normal(2, 1, 300)
    result = kl(sums_N, tokens=tokens_N).per_token
    rho = sums_N.sum() / tokens_N.sum()
    assert result.estimate == pytest.approx(rho)
    assert result.se == pytest.approx((sums_N - rho * tokens_N).std(ddof=1) / math.sqrt(300) / tokens_N.mean())
    with pytest.raises(ValueError, match="tokens: expected positive counts"):
        kl(sums_N, tokens=tokens_N[:5])


# ---- Gao's curves


@pytest.mark.parametrize("form", FORMS)
def test_gao_fit_is_that_of_a_second_solver(form):
    random, d_K = np.random.default_rng(2), np.linspace(0.3, 5, 12)
    gold_K = FORMS[form](d_K, 1.0, 0.3) + random.normal(0, 0.05, 12)
    ours = gao_fit(d_K**2, gold_K, form=form)
    theta, covariance = optimize.curve_fit(FORMS[form], d_K, gold_K, p0=(1.0, 0.1))
    assert (ours.alpha.estimate, ours.beta.estimate) == pytest.approx(tuple(theta), rel=1e-6)
    assert (ours.alpha.se, ours.beta.se) == pytest.approx(tuple(np.sqrt(np.diag(covariance))), rel=1e-4)
    top = optimize.minimize_scalar(lambda d: -FORMS[form](d, *theta), bounds=(0.01, 100), method="bounded")
    assert ours.peak.estimate == pytest.approx(top.x, rel=1e-3)
    assert ours.peak.gold == pytest.approx(-top.fun, rel=1e-6)
    assert ours.peak.ci[0] < ours.peak.estimate < ours.peak.ci[1]


def test_units_give_the_error_of_their_mean():
    random, d_K = np.random.default_rng(3), np.linspace(0.5, 4, 8)
    theta_U2 = random.normal((1.0, 0.2), (0.3, 0.1), (50, 2))
    gold_UK = np.array([FORMS["rl"](d_K, *theta) for theta in theta_U2])
    fit = gao_fit(d_K**2, gold_UK)
    assert fit.alpha.estimate == pytest.approx(theta_U2[:, 0].mean())
    assert fit.beta.se == pytest.approx(theta_U2[:, 1].std(ddof=1) / math.sqrt(50))
    twice = gao_fit(d_K**2, np.concatenate([gold_UK] * 2), clusters=np.tile(np.arange(50), 2))
    assert (twice.beta.se, twice.n_clusters) == (pytest.approx(fit.beta.se), 50)


def test_a_peak_says_when_it_lies_outside_the_data_or_does_not_exist():
    random, d_K = np.random.default_rng(4), np.linspace(0.5, 2, 6)
    beyond = gao_fit(d_K**2, FORMS["best_of_n"](d_K, 1.0, 0.1) + random.normal(0, 1e-4, 6), form="best_of_n").peak
    assert beyond.estimate == pytest.approx(5, rel=0.05) and not beyond.inside_data
    noisy = gao_fit(d_K**2, FORMS["best_of_n"](d_K, 1.0, 0.05) + random.normal(0, 0.1, 6), form="best_of_n")
    assert noisy.beta.p > 0.05 and (noisy.peak is None or noisy.peak.ci[1] == math.inf)
    assert gao_fit(d_K**2, FORMS["best_of_n"](d_K, 1.0, -0.1), form="best_of_n").peak is None
    with pytest.raises(ValueError, match="three or more different, positive KL"):
        gao_fit([0.0, 1.0, 2.0], [0.0, 1.0, 1.0])


@pytest.mark.parametrize("form", FORMS)
def test_intervals_of_parameters_and_peak_cover(form):
    random, d_K, hits = np.random.default_rng(5), np.linspace(0.5, 4, 8), []
    alpha, beta = (1.0, 0.25) if form == "best_of_n" else (0.5, 0.25)
    top = 2.0 if form == "best_of_n" else math.e
    for _ in range(1000):
        noise_UK = random.normal(0, 0.4, (20, 8)) + random.normal(0, 0.4, (20, 1)) * d_K
        fit = gao_fit(d_K**2, FORMS[form](d_K, alpha, beta) + noise_UK, form=form)
        found = [(fit.alpha.ci, alpha), (fit.beta.ci, beta), (fit.peak.ci, top)]
        hits.append([low <= truth <= high for (low, high), truth in found])
    coverage = np.mean(hits, axis=0)
    assert (coverage > 0.93).all() and (coverage < 0.98).all(), coverage


# ---- the frontier


def test_frontier_is_what_nothing_beats():
    random = np.random.default_rng(6)
    kl_P, gold_P = random.integers(0, 6, 40).astype(float), random.integers(0, 6, 40).astype(float)
    beaten = [
        any(
            k <= kl_P[p] and g >= gold_P[p] and (k < kl_P[p] or g > gold_P[p])
            for k, g in zip(kl_P, gold_P, strict=True)
        )
        for p in range(40)
    ]
    assert frontier(kl_P, gold_P).on_front_P.tolist() == [not b for b in beaten]


def test_area_is_the_integral_of_the_best_within_reach():
    random = np.random.default_rng(7)
    kl_SK, gold_SK = random.uniform(0, 20, (4, 9)), random.normal(0.5, 1, (4, 9))
    d_K, gold_K = np.sqrt(kl_SK.mean(0)), gold_SK.mean(0)
    grid = (np.arange(200_000) + 0.5) / 200_000 * math.sqrt(9.0)
    heights = [max([0.0, *gold_K[d_K <= d]]) for d in grid[::50]]
    result = frontier_area(kl_SK, gold_SK, up_to_kl=9.0)
    assert result.estimate == pytest.approx(np.mean(heights), abs=1e-3)
    assert frontier_area(kl_SK[0], gold_SK[0], up_to_kl=9.0).se is None
    assert frontier_area(kl_SK, gold_SK + 1, up_to_kl=9.0).estimate > result.estimate


def test_area_of_runs_that_differ_by_a_factor_has_the_error_of_the_factor():
    scale_S = np.random.default_rng(8).normal(1, 0.1, 8)
    kl_SK = np.tile([1.0, 4.0, 9.0], (8, 1))
    result = frontier_area(kl_SK, scale_S[:, None] * [1.0, 2.0, 2.5], up_to_kl=9.0, resamples=5000)
    assert result.se == pytest.approx(scale_S.std(ddof=1) / math.sqrt(8), rel=0.05)
    assert result.df == 7
    with pytest.raises(ValueError, match="a positive bound"):
        frontier_area([1.0], [1.0], up_to_kl=0)


@pytest.mark.long
@pytest.mark.parametrize("n_runs", [3, 5, 10])
def test_interval_of_the_area_covers(n_runs):
    random = np.random.default_rng(12)
    kl_K, gold_K = np.array([0.5, 1, 2, 4, 7, 11]), np.array([0.4, 0.7, 1.1, 1.3, 1.2, 0.9])

    def area(n_runs, resamples):
        slope_S1 = random.normal(0, 0.1, (n_runs, 1))
        gold_SK = gold_K + slope_S1 * np.sqrt(kl_K) / 2 + random.normal(0, 0.05, (n_runs, 6))
        kl_SK = kl_K * np.exp(random.normal(0, 0.1, (n_runs, 6)))
        return frontier_area(kl_SK, gold_SK, up_to_kl=9.0, resamples=resamples)

    truth = area(20_000, 2).estimate
    hit = [low <= truth <= high for low, high in (area(n_runs, 300).ci for _ in range(1000))]
    assert 0.93 <= np.mean(hit) <= 0.98


# ---- diversity


def bleu(words, others, max_n=4):
    """From the definition, without tables shared between texts."""

    def grams(text, n):
        return Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))

    logs = []
    for n in range(1, min(max_n, len(words)) + 1):
        own = grams(words, n)
        held = sum(min(count, max(grams(other, n)[gram] for other in others)) for gram, count in own.items())
        logs.append(math.log(max(held, 0.1) / own.total()))
    nearest = min((abs(len(other) - len(words)), len(other)) for other in others)[1]
    return min(1.0, math.exp(1 - nearest / len(words))) * math.exp(sum(logs) / len(logs))


def test_self_bleu_is_the_definition():
    random = np.random.default_rng(9)
    texts = [" ".join(random.choice(list("abcd"), random.integers(1, 12))) for _ in range(25)]
    split = [text.split() for text in texts]
    expected = np.mean([bleu(text, split[:i] + split[i + 1 :]) for i, text in enumerate(split)])
    assert self_bleu(texts) == pytest.approx(expected, rel=1e-12)


def test_self_bleu_by_hand():
    # Against "a b c e": 3/4 words, 2/3 pairs, 1/2 triples; four in a row none, counted as 0.1 of one.
    assert self_bleu(["a b c d", "a b c e"]) == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 0.1) ** 0.25)
    # "a" is covered by "a a", which is longer: the penalty is e^{1 - 2}. "a a" has half of its words, no pair.
    assert self_bleu(["a", "a a"]) == pytest.approx((math.exp(-1) + math.sqrt(0.5 * 0.1)) / 2)


def test_diversity_of_extremes():
    same, different = ["w x y z"] * 5, [" ".join(f"w{i}{j}" for j in range(4)) for i in range(5)]
    assert diversity(same).self_bleu == 1 and diversity(same).distinct_2 == pytest.approx(3 / 15)
    assert diversity(different).distinct_1 == diversity(different).distinct_2 == 1
    assert entropy(different) == pytest.approx(math.log(20)) and entropy(same, n=4) == 0
    assert entropy(different, n=0) == pytest.approx(math.log(5))
    assert diversity(different).self_bleu < 0.1
    assert diversity(["", "a"]).self_bleu is None
    texts = ["a b c", "b c d", "a"]
    assert all(distinct_n(list(order)) == distinct_n(texts) for order in itertools.permutations(texts))
    with pytest.raises(ValueError, match="no text has 2 words"):
        distinct_n(["a"])
    with pytest.raises(ValueError, match="at least two texts"):
        self_bleu(["a"])


# ---- alignment tax


def test_no_change_is_no_tax():
    random = np.random.default_rng(10)
    nll_N, tokens_N = random.uniform(10, 40, 30), random.integers(5, 20, 30)
    tax = alignment_tax(nll_N, np.tile(nll_N, (3, 1)), tokens_N, tasks={"sums": (nll_N > 20, nll_N > 20)})
    assert (tax.nll.estimate, tax.nll.se, tax.ratio, tax.tasks["sums"].estimate) == (0, 0, 1, 0)
    assert tax.perplexity_before == tax.perplexity_after == pytest.approx(math.exp(nll_N.sum() / tokens_N.sum()))


def test_tax_is_the_ratio_of_perplexities_and_covers():
    random, hits = np.random.default_rng(11), []
    for _ in range(500):
        tokens_N = random.integers(10, 60, 100)
        before_N = tokens_N * random.normal(2, 0.3, 100)
        after_SN = before_N + tokens_N * (0.05 + random.normal(0, 0.05, (4, 100)) + random.normal(0, 0.01, (4, 1)))
        tax = alignment_tax(before_N, after_SN, tokens_N)
        hits.append(tax.ratio_ci[0] <= math.exp(0.05) <= tax.ratio_ci[1])
    assert tax.perplexity_after / tax.perplexity_before == pytest.approx(tax.ratio)
    assert 0.93 <= np.mean(hits) <= 0.98
    with pytest.raises(ValueError, match="of the same held-out texts"):
        alignment_tax(before_N, after_SN[:, 1:], tokens_N)
