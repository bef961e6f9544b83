"""Signs, ranks, Cochran's Q, max-t, the planner and aggregates: by enumeration, other solvers, closed forms."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from prefzoo.benchmarks import statistics as harness

# ---- signs, ranks, right or wrong


def test_sign_flip_is_scipys_permutation_of_signs():
    d_N = np.random.default_rng(0).normal(0.2, 0.5, 11).round(1)
    reference = stats.permutation_test((d_N,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert harness.sign_flip(d_N).p == pytest.approx(reference.pvalue)
    assert harness.sign_flip(-d_N).p == harness.sign_flip(d_N).p
    assert harness.sign_flip(np.repeat(d_N, 3), clusters=np.repeat(np.arange(11), 3)).p == harness.sign_flip(d_N).p


def test_sign_test_is_mcnemar_where_outcomes_are_right_or_wrong():
    a_N, b_N = np.random.default_rng(1).integers(0, 2, (2, 60))
    signs, flags = harness.sign_test(a_N, b_N), harness.mcnemar(a_N, b_N)
    assert (signs.plus, signs.minus, signs.p) == (flags.only_a, flags.only_b, flags.p)
    assert signs.plus + signs.minus + signs.ties == 60
    assert flags.estimate == pytest.approx(a_N.mean() - b_N.mean())
    swapped = harness.sign_test(b_N, a_N)
    assert (swapped.p, swapped.estimate) == (signs.p, 1 - signs.estimate)
    assert harness.sign_test(a_N, a_N).p == 1


def test_signs_see_dust_that_the_mean_does_not():
    """Why a sign test is not for probabilistic judges."""
    dust_N = np.full(300, 1e-6)
    dust_N[:10] = -0.9
    assert harness.sign_test(dust_N, np.zeros(300)).estimate > 0.95 > 0.5
    assert harness.difference(dust_N, np.zeros(300), paired_seeds=False).estimate < 0


def test_wilcoxon_is_pratts_by_hand_and_by_scipy():
    a_N, b_N = np.array([1, 1, 0.5, 1, 1, 0.5]), np.array([0, 0.5, 0.5, 0, 0.5, 1])
    found = harness.wilcoxon(a_N, b_N)
    # |d|: one 0 has rank 1, three ½ share rank 3, two 1 share rank 5.5; the zero is then left out
    assert (found.rank_a, found.rank_b, found.ties) == (5.5 * 2 + 3 * 2, 3, 1)
    reference = stats.wilcoxon(a_N - b_N, zero_method="pratt", correction=False, method="approx")
    assert found.p == reference.pvalue and min(found.rank_a, found.rank_b) == reference.statistic
    assert harness.wilcoxon(b_N, a_N).p == pytest.approx(found.p)
    assert harness.wilcoxon(a_N, a_N).p == 1
    # more ties make Pratt's test less sure; scipy's default drops them
    tied_a, tied_b = np.r_[a_N, np.ones(30)], np.r_[b_N, np.ones(30)]
    assert harness.wilcoxon(tied_a, tied_b).p != pytest.approx(stats.wilcoxon(tied_a, tied_b, method="approx").pvalue)


def test_cochran_q_of_two_is_mcnemar_and_of_three_the_definition():
    random = np.random.default_rng(2)
    solved = {name: random.integers(0, 2, 200) for name in "abc"}
    two = harness.cochran_q({name: solved[name] for name in "ab"})
    flags = harness.mcnemar(solved["a"], solved["b"])
    assert two.q == pytest.approx((flags.only_a - flags.only_b) ** 2 / (flags.only_a + flags.only_b))
    three, y_KN = harness.cochran_q(solved), np.stack(list(solved.values()))
    between = 200 * 200 * ((y_KN.mean(1) - y_KN.mean()) ** 2).sum() / 200
    within = (y_KN.sum(0) * (3 - y_KN.sum(0))).sum() / (
        3 * 200
    )  # K - 1 times the mean variance within a prompt / (K-1)
    assert three.q == pytest.approx((3 - 1) * between / within)
    assert three.p == pytest.approx(stats.chi2.sf(three.q, 2)) and three.shares == pytest.approx(y_KN.mean(1))
    assert three.n_discordant == int(((y_KN.sum(0) % 3) > 0).sum())
    assert harness.cochran_q({"a": solved["a"], "b": solved["a"]}).p == 1


# ---- max-t


def crossed(random, n_methods=4, n_seeds=5, n_prompts=300, seed_sd=0.02):
    prompt_N = random.normal(0, 0.3, n_prompts)
    return {
        f"m{k}": 0.5 + prompt_N + random.normal(0, seed_sd, (n_seeds, 1)) + random.normal(0, 0.2, (n_seeds, n_prompts))
        for k in range(n_methods)
    }


@pytest.mark.parametrize("paired_seeds", [True, False])
def test_max_t_of_one_pair_is_the_t_test(paired_seeds):
    tables = crossed(np.random.default_rng(3), 2, 30)  # many seeds: the tails of both forms are the normal's
    found = harness.max_t(tables, paired_seeds=paired_seeds, resamples=40_000)
    gap = harness.difference(tables["m0"], tables["m1"], paired_seeds=paired_seeds)
    assert found.p_adjusted[0] == pytest.approx(gap.p, abs=0.02)
    assert found.ci[0] == pytest.approx(gap.ci, abs=0.05 * gap.se)
    assert found.differences == (gap,)


@pytest.mark.parametrize("paired_seeds", [True, False])
def test_max_t_is_monotone_and_swapping_negates(paired_seeds):
    tables = crossed(np.random.default_rng(4))
    tables["m3"] = tables["m3"] + 0.2
    there = list(itertools.combinations(tables, 2))
    back = [(b, a) for a, b in there]
    found, swapped = (
        harness.max_t(tables, paired_seeds=paired_seeds, pairs=p, resamples=20_000) for p in (there, back)
    )
    assert swapped.p_adjusted == pytest.approx(found.p_adjusted, abs=0.02)
    for (low, high), (swapped_low, swapped_high), gap in zip(found.ci, swapped.ci, found.differences, strict=True):
        assert (low, high) == pytest.approx((-swapped_high, -swapped_low), abs=0.2 * gap.se)
        assert low < gap.ci[0] < gap.estimate < gap.ci[1] < high  # simultaneous is wider than one at a time
    p_K, adjusted_K = np.array([gap.p for gap in found.differences]), np.array(found.p_adjusted)
    assert (adjusted_K >= p_K).all() and (np.diff(adjusted_K[p_K.argsort()]) >= 0).all()
    assert {pair for pair, p in zip(found.pairs, found.p_adjusted, strict=True) if p < 0.05} == {
        ("m0", "m3"), ("m1", "m3"), ("m2", "m3"),
    }  # fmt: skip


def test_max_t_uses_that_pairs_share_methods():
    """Ten copies of nearly one comparison cost max-t nothing, and Holm a factor ten."""
    random = np.random.default_rng(5)
    base = crossed(random, 2, 10)
    shared_N = base["m1"] + random.normal(0, 1e-4, (10, 1, 300))
    tables = {"m0": base["m0"]} | {f"copy{k}": y_SN for k, y_SN in enumerate(shared_N)}
    pairs = [("m0", f"copy{k}") for k in range(10)]
    found = harness.max_t(tables, paired_seeds=True, pairs=pairs, resamples=4000)
    p = np.median([gap.p for gap in found.differences])
    assert max(found.p_adjusted) < 3 * p + 0.02
    assert harness.holm([gap.p for gap in found.differences]).max() >= min(1, 9 * p)


def test_methods_without_any_difference_have_p_one():
    y_SN = crossed(np.random.default_rng(6), 1)["m0"]
    found = harness.max_t({"a": y_SN, "b": y_SN, "c": y_SN + 0.1}, paired_seeds=True, resamples=500)
    assert found.p_adjusted[0] == 1 and found.ci[0] == (0, 0)
    assert found.p_adjusted[1] < 0.05 and found.differences[1].se == pytest.approx(0, abs=1e-15)


# ---- the planner


def test_noise_is_recovered_from_the_tables_that_it_made():
    random, wanted = np.random.default_rng(7), harness.Noise(0.03, 0.3, 0.25)
    tables = {
        f"m{k}": random.normal(0, 0.3 / math.sqrt(2), 1000)
        + random.normal(0, wanted.seed_sd, (200, 1))
        + random.normal(0, wanted.residual_sd, (200, 1000))
        for k in range(3)
    }
    found = harness.noise_of(tables)
    assert found.to_dict() == pytest.approx(wanted.to_dict(), rel=0.08)


def test_the_plan_is_the_table_of_smallest_detectable_differences():
    noise = harness.Noise(0.03)
    plan = harness.plan_study(noise=noise, prompts=(200, 805, 1600), seeds=(3, 10))
    for n_prompts, found in zip(plan.prompts, plan.smallest_detectable, strict=True):
        assert found == pytest.approx([harness.smallest_detectable(0.03, n_prompts, s) for s in plan.seeds])
    assert plan.seeds_needed[1:] == (11, 9)  # the specification's, for five points
    # 200 prompts: the prompts alone leave more than five points, however many seeds
    assert plan.seeds_needed[0] is None and plan.prompts_needed[0] is None
    needed = plan.prompts_needed[1]
    assert harness.smallest_detectable(0.03, needed, 10) <= 0.05 < harness.smallest_detectable(0.03, needed - 1, 10)
    text = plan.to_text()
    assert "9.6" in text and "> 100" in text and "out of reach" in text


def test_power_rises_with_everything_that_should_raise_it():
    base = harness.power(0.05, 800, 5).estimate
    for more in (harness.power(0.06, 800, 5), harness.power(0.05, 1600, 5), harness.power(0.05, 800, 8)):
        assert more.estimate > base
    assert harness.power(0.05, 800, 5, noise=harness.Noise(0.03)).estimate < base
    assert harness.power(1e-9, 800, 5).estimate == pytest.approx(0.05, abs=1e-6)  # nothing to find: the level
    assert harness.power(0.05, 10**9, 5, noise=harness.Noise(0)).estimate == pytest.approx(1)


def test_paired_and_mcnemar_prompts_are_the_specifications():
    assert [harness.prompts_needed_paired(0.05, sd) for sd in (0.3, 0.4, 0.5)] == [283, 503, 785]
    assert [harness.prompts_needed_mcnemar(d, 0.2) for d in (0.05, 0.03)] == [626, 1742]


# ---- aggregates over tasks


def test_iqm_is_the_mean_of_the_middle_half():
    y_ST = np.random.default_rng(8).random((4, 10))
    middle = np.sort(y_ST.ravel())[10:-10]
    assert harness.iqm(y_ST).estimate == pytest.approx(middle.mean())
    assert harness.iqm(3 * y_ST + 1).se == pytest.approx(3 * harness.iqm(y_ST).se)
    y_ST[0, y_ST[0].argmax()] = 1e6  # an outlier moves a mean, not this
    assert harness.iqm(y_ST).estimate < 1


def test_the_error_of_a_linear_statistic_left_out_run_by_run_is_the_standard_error():
    share_S = np.random.default_rng(9).random((6, 40)).round(2)
    profile = harness.performance_profile(share_S, [0.5])
    assert profile.se_K[0] == pytest.approx(stats.sem((share_S > 0.5).mean(1)))


def test_probability_of_improvement_is_mann_whitneys_u():
    random = np.random.default_rng(10)
    a_ST, b_ST = random.integers(0, 6, (5, 3)), random.integers(0, 6, (4, 3))
    u = [stats.mannwhitneyu(a_S, b_S).statistic / 20 for a_S, b_S in zip(a_ST.T, b_ST.T, strict=True)]
    ab, ba = (harness.probability_of_improvement(*x, paired_seeds=False) for x in ((a_ST, b_ST), (b_ST, a_ST)))
    assert ab.estimate == pytest.approx(np.mean(u)) and ba.estimate == pytest.approx(1 - ab.estimate)
    assert ab.ci == pytest.approx((1 - ba.ci[1], 1 - ba.ci[0])) and ab.p == pytest.approx(ba.p)
    same = harness.probability_of_improvement(a_ST, a_ST, paired_seeds=True)
    assert (same.estimate, same.se, same.p) == (0.5, 0, 1)
    always = harness.probability_of_improvement(a_ST + 10, a_ST, paired_seeds=True)
    assert always.estimate == 1 and always.se == 0 and always.ci[0] < 0.6, "five runs cannot prove that it is certain"


def test_a_run_is_left_out_of_all_tasks_together():
    """Twenty tasks that say the same are one: the error must not shrink with the tasks."""
    score_S = np.random.default_rng(11).random(6)
    few, copied = (harness.iqm(np.repeat(score_S[:, None], tasks, axis=1)) for tasks in (20, 400))
    assert copied.se == pytest.approx(few.se)
    a_S, b_S = score_S[:3], score_S[3:]
    single = harness.probability_of_improvement(a_S, b_S, paired_seeds=False)
    many = harness.probability_of_improvement(*(np.repeat(y[:, None], 20, 1) for y in (a_S, b_S)), paired_seeds=False)
    assert (many.se, many.df) == pytest.approx((single.se, single.df))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: harness.iqm([[0.1, 0.2]]), "at least two runs"),
        (lambda: harness.probability_of_improvement(np.ones((2, 2)), np.ones((2, 3)), paired_seeds=True), "same tasks"),
        (lambda: harness.probability_of_improvement(np.ones(2), np.ones(3), paired_seeds=True), "paired_seeds=False"),
        (lambda: harness.cochran_q({"a": [0, 1], "b": [0.5, 1]}), "b must be one 0 or 1"),
        (lambda: harness.plan_study(seeds=(1, 3)), "at least 2"),
        (lambda: harness.power(0.05, 800, 5, noise=harness.Noise(-1)), "negative"),
    ],
)
def test_refusals_say_what_is_wrong(call, words):
    with pytest.raises(ValueError, match=words):
        call()
