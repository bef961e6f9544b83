"""Length-controlled win rates against AlpacaEval's published numbers, closed forms, symmetries and simulation."""

import gzip
import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, special

from prefzoo.benchmarks.statistics.length_control import Gamed, alpaca_eval, length_controlled, prompt_difficulty

MODELS = ("FuseChat-Llama-3.1-8B-Instruct", "alpaca-farm-ppo-human", "claude", "gpt-3.5-turbo-0301", "vicuna-7b-v1.5")


@pytest.fixture(scope="module")
def folder(data_dir):
    folder = data_dir / "alpaca_eval_winrates"
    if not folder.exists():
        pytest.skip(f"no {folder}")
    return folder


@pytest.fixture(scope="module")
def instructions(folder):
    return pd.read_csv(folder / "lc_instructions.csv")


@pytest.fixture(scope="module")
def gamed(folder, instructions):
    regulariser = json.loads((folder / "lc_regulariser.json").read_text())
    lengths = (instructions["len_gamed_concise"], instructions["len_gamed_verbose"])
    return Gamed(lengths, regulariser["S_tanh"], regulariser["S_difficulty"])


def published(folder, model, instructions):
    """A model's rows as a frame, and its published and exact numbers."""
    with gzip.open(folder / f"{model}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = pd.DataFrame([json.loads(line) for line in lines])
    rows["y"] = np.where(rows["preference"] == 0, 0.5, rows["preference"] - 1)
    rows["difficulty"] = instructions["instruction_difficulty"]
    return rows.rename(columns={"len_model": "len_method"}), json.loads((folder / "expected.json").read_text())[model]


@pytest.mark.parametrize("model", MODELS)
def test_published_numbers_are_reproduced(folder, model, instructions, gamed):
    rows, numbers = published(folder, model, instructions)
    shown, exact = numbers["published"], numbers["recomputed"]
    plain, regularised = alpaca_eval(rows), alpaca_eval(rows, gamed=gamed)
    assert plain.win_rate == pytest.approx(shown["win_rate"], abs=1e-9)
    assert plain.standard_error == pytest.approx(shown["standard_error"], abs=1e-9)
    assert plain.discrete_win_rate == pytest.approx(shown["discrete_win_rate"], abs=1e-9)
    assert plain.estimate == pytest.approx(exact["lc_mle_noreg"], abs=1e-6)
    assert regularised.estimate == pytest.approx(exact["lc_mle_with_gamed"], abs=1e-6)
    assert [regularised.length, regularised.difficulty, regularised.constant] == pytest.approx(
        exact["weights_mle_with_gamed"], abs=1e-5
    )
    refit = alpaca_eval(rows, gamed=gamed, penalty=1 / exact["C_inferred"])
    assert refit.estimate == pytest.approx(exact["lc_refit_C_inferred"], abs=1e-6)
    assert refit.se == pytest.approx(exact["lc_se_refit_C_inferred"], abs=1e-6)
    for inverse in (2.782559402207126, 21.54434690031882, 10000.0):
        assert (
            abs(alpaca_eval(rows, gamed=gamed, penalty=1 / inverse).estimate - shown["length_controlled_winrate"])
            < 0.15
        )


@pytest.mark.parametrize("model", MODELS)
def test_our_fit_is_the_unpenalised_one_and_its_error_is_larger(folder, model, instructions):
    rows, numbers = published(folder, model, instructions)
    exact = numbers["recomputed"]
    ours = length_controlled(rows, difficulty="difficulty", resamples=200)
    minimal = length_controlled(rows, resamples=2)
    assert 100 * ours.estimate == pytest.approx(exact["lc_mle_noreg"], abs=1e-6)
    assert 100 * minimal.estimate == pytest.approx(exact["lc_mle_minimal"], abs=1e-6)
    assert 100 * ours.se > 1.5 * exact["lc_se_from_published_weights"]
    assert ours.ci[0] < ours.estimate < ours.ci[1]


def judged(random, n_seeds=4, n_prompts=120, strength=0.3, slope=1.0, seed_sd=0.2):
    """Judgements that like length, whose win rate at equal length is mean σ(strength + difficulty + seed)."""
    difficulty_N = random.normal(0, 0.8, n_prompts)
    dlen_SN = random.normal(-100, 300, (n_seeds, n_prompts))
    seed_S1 = random.normal(0, seed_sd, (n_seeds, 1))
    logit_SN = strength + difficulty_N + seed_S1 - slope * np.tanh(dlen_SN / 300)
    y_SN = (random.random(logit_SN.shape) < special.expit(logit_SN)).astype(float)
    return y_SN, 1000 - dlen_SN, np.full(n_prompts, 1000.0), difficulty_N


def test_identical_answers_are_one_half_without_error():
    result = length_controlled(np.full((3, 20), 0.5), np.full(20, 100), np.full(20, 100), resamples=20)
    assert (result.estimate, result.raw, result.se, result.length.estimate) == (0.5, 0.5, 0.0, 0.0)


def test_equal_lengths_leave_the_win_rate_alone():
    y_N = (np.random.default_rng(0).random(200) < 0.7).astype(float)
    result = length_controlled(y_N, np.full(200, 50), np.full(200, 50), resamples=500)
    assert result.estimate == pytest.approx(y_N.mean(), abs=1e-9)
    assert result.se == pytest.approx(y_N.std(ddof=1) / math.sqrt(200), rel=0.1)


def test_swapping_method_and_baseline_mirrors():
    y_SN, method_SN, baseline_N, difficulty_N = judged(np.random.default_rng(1))
    one = length_controlled(y_SN, method_SN, baseline_N, difficulty=difficulty_N)
    other = length_controlled(1 - y_SN, np.broadcast_to(baseline_N, y_SN.shape), method_SN, difficulty=-difficulty_N)
    assert other.estimate == pytest.approx(1 - one.estimate, abs=1e-9)
    assert other.se == pytest.approx(one.se, rel=1e-6)
    assert other.length.estimate == pytest.approx(one.length.estimate, abs=1e-8)


def test_the_unit_of_length_and_repeated_clusters_do_not_matter():
    y_SN, method_SN, baseline_N, difficulty_N = judged(np.random.default_rng(2), n_seeds=1)
    one = length_controlled(y_SN, method_SN, baseline_N, difficulty=difficulty_N)
    tokens = length_controlled(y_SN, method_SN / 4, baseline_N / 4, difficulty=difficulty_N)
    assert tokens.estimate == pytest.approx(one.estimate, abs=1e-9)
    twice = [np.concatenate([values, values], axis=-1) for values in (y_SN, method_SN, baseline_N, difficulty_N)]
    labels = np.tile(np.arange(120), 2)
    again = length_controlled(*twice[:3], difficulty=twice[3], clusters=labels)
    assert (again.n_prompts, again.n_clusters) == (240, 120)
    assert again.se == pytest.approx(one.se, rel=0.02)
    assert length_controlled(*twice[:3], difficulty=twice[3]).se < 0.8 * one.se


def test_seeds_count():
    y_SN, method_SN, baseline_N, difficulty_N = judged(np.random.default_rng(3), seed_sd=0.6)
    result = length_controlled(y_SN, method_SN, baseline_N, difficulty=difficulty_N)
    assert result.se > result.se_seeds > 0 and result.df < 30 and not result.this_run_only
    one = length_controlled(y_SN[0], method_SN[0], baseline_N, difficulty=difficulty_N)
    assert one.this_run_only and one.se_seeds is None and one.se == one.se_prompts and one.df == 119


def test_a_frame_of_seeds_and_prompts_is_its_table():
    y_SN, method_SN, baseline_N, difficulty_N = judged(np.random.default_rng(8), n_prompts=60)
    seed, prompt = np.indices(y_SN.shape)
    rows = {"y": y_SN, "seed": seed, "prompt": prompt, "passage": prompt // 2, "len_method": method_SN}
    rows |= {"len_baseline": baseline_N[prompt], "difficulty": difficulty_N[prompt]}
    frame = pd.DataFrame({name: values.ravel() for name, values in rows.items()}).sample(frac=1, random_state=0)
    one = length_controlled(frame, difficulty="difficulty", clusters="passage", resamples=50)
    other = length_controlled(
        y_SN, method_SN, baseline_N, difficulty=difficulty_N, clusters=np.arange(60) // 2, resamples=50
    )
    assert (one.n_seeds, one.n_clusters, one.estimate) == (4, 30, pytest.approx(other.estimate))


def test_difficulty_is_the_penalised_maximum_and_shrinks():
    random = np.random.default_rng(4)
    truth_N = random.normal(0, 1, 150)
    y_MN = special.expit(np.array([[-1.0], [0.0], [0.5], [1.0]]) + truth_N)
    difficulty_N = prompt_difficulty(y_MN)
    assert np.corrcoef(difficulty_N, truth_N)[0, 1] > 0.99
    assert np.abs(prompt_difficulty(y_MN, ridge=10)).sum() < np.abs(difficulty_N).sum()

    def score(effect, ridge=1.0):
        residual = y_MN - special.expit(effect[:4, None] + effect[4:])
        return np.concatenate([residual.sum(1), residual.sum(0)]) - ridge * effect

    root = optimize.root(score, np.zeros(154)).x
    assert difficulty_N == pytest.approx(root[4:], abs=1e-6)


@pytest.mark.parametrize(
    ("y", "words"),
    [([1.0] * 6, "infinite"), ([1.0, 1, 1, 0, 0, 0], "infinite"), ([2.0, 1, 1, 0, 0, 0], r"lies in \[0, 1\]")],
)
def test_bad_judgements_are_refused(y, words):
    with pytest.raises(ValueError, match=words):
        length_controlled(y, [3, 3, 3, 1, 1, 1], [2] * 6)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match=r"len_method has shape \(5,\)"):
        length_controlled([1.0, 0, 1, 0, 1, 0], [1] * 5, [2] * 6)
    with pytest.raises(ValueError, match="no column 'len_metod'; did you mean 'len_method'"):
        length_controlled(pd.DataFrame({"y": [1.0], "len_method": [1], "len_baseline": [1]}), "len_metod")
    with pytest.raises(ValueError, match="one run"):
        alpaca_eval(np.ones((2, 3)) / 2, [1, 2, 3], [1, 2, 3], [0, 0, 0])


@pytest.mark.long
@pytest.mark.parametrize("n_seeds", [1, 5])
def test_intervals_cover(n_seeds):
    """Truth at one seed: of this run (its own seed effect is drawn as 0)."""
    random, hit = np.random.default_rng(5), []
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    seed_sd = 0.0 if n_seeds == 1 else 0.2
    truth = weights @ special.expit(0.3 + nodes * math.hypot(0.8, seed_sd)) / weights.sum()
    for _ in range(500):
        y_SN, method_SN, baseline_N, difficulty_N = judged(random, n_seeds, 300, seed_sd=seed_sd)
        result = length_controlled(y_SN, method_SN, baseline_N, difficulty=difficulty_N, resamples=100)
        hit.append(result.ci[0] <= truth <= result.ci[1])
    assert 0.93 <= np.mean(hit) <= 0.98
