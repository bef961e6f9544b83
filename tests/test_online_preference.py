"""Online preference: pairs, labels and rankings from scored samples, win rates, and the algorithms made of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prefzoo.algorithm import create_algorithm
from prefzoo.data.samples import Ragged, Samples
from prefzoo.feedback import Judge
from prefzoo.losses import create_loss
from prefzoo.parts.pairs import (
    AgainstOther,
    AllPairs,
    Desirable,
    Matches,
    RankedSamples,
    RejectionSampled,
    TopAgainstBottom,
    accepted,
)
from prefzoo.parts.preference import compared, loss_named
from prefzoo.parts.win_rate import Demonstrated, WinMargin, WinRate
from prefzoo.records import Pairs, PolicyGradient
from prefzoo.registry import UsageError
from prefzoo.theory.enumerable_lm import PROMPTS, RESPONSES, EnumerableWorld
from prefzoo.theory.policies import Tabular
from prefzoo.theory.populations import total_variation
from prefzoo.theory.runs import Claim, fit, sized

NAN = math.nan
CREDITS: dict[str, Any] = {
    "top": TopAgainstBottom(), "all": AllPairs(), "gap": AllPairs(min_gap=0.5), "matches": Matches(),
    "tournament": Matches(tournament=True), "other": AgainstOther(), "ordered": AgainstOther(ordered=True),
    "soft": AllPairs(soft=True), "ordered soft": AgainstOther(ordered=True, soft=True), "labels": Desirable(),
    "ranking": RankedSamples(), "ends": RankedSamples(ends=True),
}  # fmt: skip
SCORES = [[0.5, 2.0, -1.0, 2.0, 0.25], [0.0, NAN, 1.5, 0.25, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0], [NAN] * 5]


def samples_of(scores: Sequence[Sequence[float]], texts: Sequence[Sequence[Sequence[int]]] | None = None) -> Samples:
    """Completions of as many prompts, all different unless given; the last of each prompt is another sampler's."""
    counts = [len(group) for group in scores]
    numbers = range(100, 100 + sum(counts))
    ids = [[n, n % 7, 1][: 1 + n % 3] for n in numbers] if texts is None else [t for group in texts for t in group]
    completions = Ragged.of(ids)
    return Samples(
        "completions", Ragged.of([[5, p] for p in range(len(counts))]), completions,
        np.repeat(np.arange(len(counts)), counts),
        columns={
            "finish": torch.zeros(len(ids), dtype=torch.long),
            "sampler": torch.tensor([int(k == n - 1) for n in counts for k in range(n)]),
        },
        tokens={"ref_logps": -torch.from_numpy(completions.flat).float() / 100},
        extra={"answer": [f"answer {p}" for p in range(len(counts))]},
    )  # fmt: skip


def flat(scores: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor([value for group in scores for value in group])


def rows_of(samples: Samples) -> list[tuple[Any, ...]]:
    """What a loss is told of each row: prompt, completions, labels and columns."""
    found = []
    for row in range(len(samples)):
        part = samples.take([row])
        texts = tuple(tuple(part.completions[b].tolist()) for b in range(len(part.completions)))
        columns = {**part.row_columns, **{k: v for k, v in part.columns.items() if k in ("desirable", "score")}}
        numbers = tuple((k, tuple(v.tolist())) for k, v in sorted(columns.items()))
        found.append((tuple(part.prompts[0].tolist()), texts, numbers))
    return sorted(found)


def text_of(prompt: int, place: int, scores: Sequence[Sequence[float]] = SCORES) -> tuple[int, ...]:
    samples = samples_of(scores)
    return tuple(samples.completions[sum(map(len, scores[:prompt])) + place].tolist())


def said(rows: list[tuple[Any, ...]]) -> set[tuple[int, ...]]:
    return {text for _, texts, _ in rows for text in texts if text}


# -- credits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CREDITS)
def test_only_differences_of_scores_count(name: str) -> None:
    shift = [[8.0, -4.0, 2.0, 1.0][p] for p, group in enumerate(SCORES) for _ in group]
    plain = rows_of(CREDITS[name](samples_of(SCORES), flat(SCORES)))
    moved = rows_of(CREDITS[name](samples_of(SCORES), flat(SCORES) + torch.tensor(shift)))
    without = lambda rows: [(p, t, [n for n in c if n[0] != "score"]) for p, t, c in rows]  # noqa: E731
    assert plain and without(plain) == without(moved)


@pytest.mark.parametrize("name", [n for n in CREDITS if n not in ("matches", "tournament")])
def test_the_order_of_the_samples_decides_nothing(name: str) -> None:
    scores = [[0.5, 2.0, -1.0, 2.5, 0.25], SCORES[1], SCORES[2]]
    samples, scores_B = samples_of(scores), flat(scores)
    order = np.random.default_rng(0).permutation(len(scores_B))
    turned = CREDITS[name](samples.take(order), scores_B[torch.from_numpy(order)])
    assert rows_of(turned) == rows_of(CREDITS[name](samples, scores_B))


@pytest.mark.parametrize("name", CREDITS)
def test_what_has_no_score_and_what_ties_gives_nothing(name: str) -> None:
    result = CREDITS[name](samples_of(SCORES), flat(SCORES))
    rows = rows_of(result)
    assert {prompt for prompt, _, _ in rows} == {(5, 0), (5, 1)}  # the others are tied or unscored
    assert text_of(1, 1) not in said(rows)
    for column in (*result.row_columns.values(), *result.columns.values()):
        assert not column.float().isnan().any()
    for scores in ([[NAN] * 5], [[2.0] * 5], [[NAN, NAN, 1.0, NAN, NAN]]):
        nothing = CREDITS[name](samples_of(scores), flat(scores))
        assert len(nothing) == 0 and nothing.kind == result.kind


@pytest.mark.parametrize("name", [n for n in CREDITS if CREDITS[n].gives == "pairs"])
def test_a_completion_is_no_pair_with_its_like(name: str) -> None:
    same = samples_of([[0.0, 1.0]], texts=[[[7, 8], [7, 8]]])
    other = samples_of([[0.0, 1.0]], texts=[[[7, 8], [7, 9]]])
    wanted = 2 if name == "soft" else 1
    assert len(CREDITS[name](same, flat([[0.0, 1.0]]))) == 0
    assert len(CREDITS[name](other, flat([[0.0, 1.0]]))) == wanted


@pytest.mark.parametrize("name", CREDITS)
def test_tokens_stay_with_their_completions(name: str) -> None:
    result = CREDITS[name](samples_of(SCORES), flat(SCORES))
    wanted = -torch.from_numpy(np.asarray(result.completions.flat)).float() / 100
    assert torch.equal(result.tokens["ref_logps"], wanted)


@pytest.mark.parametrize(
    "name", [n for n in CREDITS if CREDITS[n].gives == "pairs" and n not in ("ordered", "ordered soft", "soft")]
)
def test_margin_and_probability_are_those_of_the_scores(name: str) -> None:
    samples, scores_B = samples_of(SCORES), flat(SCORES)
    number = {tuple(samples.completions[b].tolist()): float(scores_B[b]) for b in range(len(scores_B))}
    rows = rows_of(CREDITS[name](samples, scores_B))
    assert rows
    for _, (chosen, rejected), columns in rows:
        (_, (margin,)), (_, (probability,)) = columns
        assert margin == number[chosen] - number[rejected] > 0
        assert probability == pytest.approx(1 / (1 + math.exp(-margin)))


def test_soft_labels_train_both_orders_by_their_probability() -> None:
    """As the population does: p loss(w, l) + (1 - p) loss(l, w), whatever the loss."""
    soft = AllPairs(soft=True)(samples_of(SCORES), flat(SCORES))
    hard = AllPairs()(samples_of(SCORES), flat(SCORES))
    assert len(soft) == 2 * len(hard)
    weight = {t: dict(c)["weight"][0] for _, t, c in rows_of(soft)}
    margin = {t: dict(c)["margin"][0] for _, t, c in rows_of(soft)}
    for _, (chosen, rejected), columns in rows_of(hard):
        p = dict(columns)["probability"][0]
        assert weight[chosen, rejected] == pytest.approx(2 * p)
        assert weight[rejected, chosen] == pytest.approx(2 * (1 - p))
        assert margin[chosen, rejected] == -margin[rejected, chosen] == dict(columns)["margin"][0]
    ordered = AgainstOther(ordered=True, soft=True)(samples_of([[0.0, 1.0]]), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ordered.row_columns["probability"], torch.tensor([-1.0]).sigmoid())


def test_a_win_rate_of_two_is_the_probability_itself() -> None:
    credit = TopAgainstBottom(unit="win_rates")
    pair = credit(samples_of([[0.25, 0.75]]), torch.tensor([0.25, 0.75]))
    assert pair.row_columns["probability"].tolist() == [0.75] and pair.row_columns["margin"].tolist() == [0.5]


def test_top_against_bottom_takes_the_extremes() -> None:
    rows = rows_of(TopAgainstBottom()(samples_of(SCORES), flat(SCORES)))
    assert [texts for _, texts, _ in rows] == [(text_of(0, 1), text_of(0, 2)), (text_of(1, 2), text_of(1, 0))]


def test_all_pairs_beyond_a_gap() -> None:
    for gap in (0.0, 0.25, 1.0, 9.0):
        rows = rows_of(AllPairs(min_gap=gap)(samples_of(SCORES), flat(SCORES)))
        wanted = {
            (text_of(p, i), text_of(p, j))
            for p, group in enumerate(SCORES)
            for i, j in itertools.permutations(range(5), 2)
            if group[i] - group[j] > gap
        }
        assert {texts for _, texts, _ in rows} == wanted and len(rows) == len(wanted)


def test_matches_meet_two_by_two_and_winners_again() -> None:
    scores = [[1.0, 2.0, 4.0, 3.0, 0.0]]
    meet = lambda credit: {texts for _, texts, _ in rows_of(credit(samples_of(scores), flat(scores)))}  # noqa: E731
    text = [text_of(0, k, scores) for k in range(5)]
    assert meet(Matches()) == {(text[1], text[0]), (text[2], text[3])}
    assert meet(Matches(tournament=True)) == {
        (text[1], text[0]), (text[2], text[3]), (text[2], text[1]), (text[2], text[4]),
    }  # fmt: skip


def test_main_completions_meet_those_of_the_other_sampler() -> None:
    scores = [[0.0, 2.0, 1.0]]
    text = [text_of(0, k, scores) for k in range(3)]
    samples, scores_B = samples_of(scores), flat(scores)
    assert {t for _, t, _ in rows_of(AgainstOther()(samples, scores_B))} == {(text[1], text[2]), (text[2], text[0])}
    ordered = AgainstOther(ordered=True)(samples, scores_B)
    told = {(t, dict(columns)["probability"]) for _, t, columns in rows_of(ordered)}
    assert told == {((text[0], text[2]), (0.0,)), ((text[1], text[2]), (1.0,))}
    with pytest.raises(UsageError, match=r"beside=\(Sampler"):
        AgainstOther()(replace(samples, columns={}), scores_B)


def test_labels_are_above_and_below() -> None:
    scores = [[0.0, 1.0, 1.0, 2.0, NAN]]
    label = lambda credit: {  # noqa: E731
        t[0]: dict(c)["desirable"][0] for _, t, c in rows_of(credit(samples_of(scores), flat(scores)))
    }
    text = [text_of(0, k, scores) for k in range(5)]
    assert label(Desirable()) == {text[0]: False, text[3]: True}  # the mean is 1
    assert label(Desirable(threshold=1.0)) == {text[0]: False, text[1]: True, text[2]: True, text[3]: True}
    assert Desirable().smallest_group == 2 and Desirable(0.5).smallest_group == 1


def test_rankings_are_best_first_and_padded() -> None:
    ranked = RankedSamples()(samples_of(SCORES), flat(SCORES))
    assert ranked.width == 5 and len(ranked) == 2 and ranked.completions.lengths[-1] == 0
    first, second = ranked.columns["score"].view(2, 5).tolist()
    assert first == [2.0, 2.0, 0.5, 0.25, -1.0] and second == [1.5, 1.0, 0.25, 0.0, 0.0]
    best = [tuple(ranked.completions[k].tolist()) for k in (0, 1, 5)]
    assert best == [text_of(0, 1), text_of(0, 3), text_of(1, 2)]
    assert ranked.take([1]).prompts[0].tolist() == [5, 1] and ranked.take([1]).completions.lengths[-1] == 0
    ends = RankedSamples(ends=True)(samples_of(SCORES), flat(SCORES))
    assert ends.width == 2 and ends.columns["score"].tolist() == [2.0, -1.0, 1.5, 0.0]


def test_what_is_left_out_is_measured() -> None:
    scores = [*SCORES, [0.0, 1.0], [2.0, 1.0], [NAN, 1.0], [NAN], [3.0, 2.0]]
    credit, samples, scores_B = TopAgainstBottom(), samples_of(scores), flat(scores)
    measured = credit.measure(samples, scores_B, credit(samples, scores_B))
    shares = {name: float(values.mean()) for name, values in measured.items()}
    wanted = {"prompts/unscored": 3 / 9, "prompts/tied": 1 / 9, "prompts/unused": 4 / 9}
    assert shares == pytest.approx(wanted)


# -- rejection sampling ------------------------------------------------------------------------------------------------

REFERENCE_R = np.array([0.4, 0.3, 0.2, 0.1])
REWARDS_R = np.array([0.0, 0.5, 1.0, 0.8])


def test_a_candidate_is_accepted_with_the_exact_probability() -> None:
    """Of two candidates the worse one, asked first, is the one kept if it passes."""
    stream, draws = np.random.default_rng(1), 20_000
    for gap, beta in ((0.3, 0.5), (1.0, 0.5), (0.1, 2.0)):
        share = np.mean([accepted(np.array([-gap, 0.0]), beta, 1, stream) == [0] for _ in range(draws)])
        wanted = math.exp(-gap / beta)
        assert abs(share - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / draws)


def test_further_passes_are_among_those_that_are_left() -> None:
    """The best of the rest is then sure to be accepted: two passes for two candidates, however far apart."""
    asked: list[int] = []
    stream = SimpleNamespace(random=lambda size: asked.append(size) or np.full(size, 0.5))
    assert accepted(np.array([-5.0, 0.0]), 0.5, 2, stream) == [0, 1] and asked == [2, 1]


def test_accepted_samples_have_the_law_of_the_regularised_optimum() -> None:
    """ref exp(r / beta), where many candidates are seen and few are kept; further passes flatten it."""
    stream, beta = np.random.default_rng(2), 0.5
    counts, flatter = np.zeros(4), np.zeros(4)
    for _ in range(2_000):
        drawn = stream.choice(4, size=48, p=REFERENCE_R)
        np.add.at(counts, drawn[accepted(REWARDS_R[drawn], beta, 4, stream)], 1)
        np.add.at(flatter, drawn[accepted(REWARDS_R[drawn], beta, 40, stream)], 1)
    wanted = REFERENCE_R * np.exp(REWARDS_R / beta)
    wanted /= wanted.sum()
    error = np.sqrt(wanted * (1 - wanted) / counts.sum())
    assert (abs(counts / counts.sum() - wanted) < 4 * error).all()
    distance = [abs(c / c.sum() - wanted).sum() / 2 for c in (counts, flatter)]
    assert distance[0] < 0.015 and distance[1] > 0.1


def test_rejection_is_a_function_of_the_candidates() -> None:
    scores = [[0.5, NAN, 1.0, 0.0, 0.75], [0.0, 0.25, NAN, 3.0, 0.5]]
    samples, scores_B = samples_of(scores), flat(scores)
    part = RejectionSampled(beta=0.7, count=2)
    kept, kept_scores = part(samples, scores_B)
    again, _ = part(samples, scores_B)
    assert rows_of(kept) == rows_of(again) and len(kept) == 4 and not kept_scores.isnan().any()
    alone, _ = part(samples.take(range(5, 10)), scores_B[5:])  # whoever stands beside it
    assert set(rows_of(alone)) <= set(rows_of(kept))
    number = {tuple(samples.completions[b].tolist()): float(scores_B[b]) for b in range(10)}
    assert [number[tuple(kept.completions[b].tolist())] for b in range(4)] == kept_scores.tolist()
    everything, _ = RejectionSampled(beta=0.7, count=9)(samples, scores_B)
    assert len(everything) == 8  # but for the two without a score
    with pytest.raises(UsageError, match="beta is above 0"):
        RejectionSampled(beta=0.0)


# -- win rates ---------------------------------------------------------------------------------------------------------


def run_with(scores_B: Tensor | None = None, table: dict[tuple[int, ...], float] | None = None) -> Any:
    """Roles of a run whose reward scores one by one, or is a judge that knows the strength of each completion."""

    def judged(samples: Samples) -> Tensor:
        assert table is not None
        strength_B = torch.tensor([table[tuple(samples.completions[b].tolist())] for b in range(len(samples))])
        group_B = torch.from_numpy(samples.prompt_B)
        meet_BB = (group_B[:, None] == group_B) & ~torch.eye(len(group_B)).bool()
        win_BB = torch.where(meet_BB, (1 + strength_B[:, None] - strength_B) / 2, 0.0)
        return win_BB.sum(1) / meet_BB.sum(1)

    if table is None:
        return SimpleNamespace(compares=False, rewards=lambda samples: scores_B, note=lambda name, values: None)
    return SimpleNamespace(compares=True, rewards=judged)


def test_win_rates_of_rewards_are_bradley_terry() -> None:
    scores = [[0.0, 1.0, NAN, 3.0], [2.0, 2.0, NAN, NAN], [1.0, NAN, NAN, NAN]]
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    found = WinRate(tau=2.0)(samples_of(scores), run_with(flat(scores)))
    wanted = [(sigmoid(-0.5) + sigmoid(-1.5)) / 2, (sigmoid(0.5) + sigmoid(-1)) / 2, NAN]
    wanted += [(sigmoid(1.5) + sigmoid(1)) / 2, 0.5, 0.5, NAN, NAN, NAN, NAN, NAN, NAN]
    torch.testing.assert_close(found, torch.tensor(wanted), equal_nan=True)
    beside = WinRate(tau=2.0, against="beside")(samples_of(scores), run_with(flat(scores)))
    wanted = [sigmoid(-1.5), sigmoid(-1), NAN, wanted[3], *[NAN] * 8]
    torch.testing.assert_close(beside, torch.tensor(wanted), equal_nan=True)


def test_win_rates_of_a_judge_are_its_own() -> None:
    scores = [[0.0, 0.5, 0.25], [1.0, 0.0, 0.5]]
    samples = samples_of(scores)
    table = {tuple(samples.completions[b].tolist()): float(flat(scores)[b]) for b in range(6)}
    found = WinRate()(samples, run_with(table=table))
    torch.testing.assert_close(found[:3], torch.tensor([0.3125, 0.6875, 0.5]))
    beside = WinRate(against="beside")(samples, run_with(table=table))  # the third is the other sampler's
    torch.testing.assert_close(beside[:3], torch.tensor([0.375, 0.625, 0.5]))
    torch.testing.assert_close(beside[3:], torch.tensor([0.75, 0.25, 0.5]))
    with pytest.raises(UsageError, match="no effect on a judge"):
        WinRate(missing_eos_penalty=1.0)(samples, run_with(table=table))
    alone = WinRate(against="beside")(replace(samples, columns={}), run_with(table=table))
    torch.testing.assert_close(alone, found)  # as in an evaluation


def test_a_cut_completion_pays_in_its_reward() -> None:
    samples = samples_of([[1.0, 1.0]])
    samples = replace(samples, columns={**samples.columns, "finish": torch.tensor([0, 1])})
    found = WinRate(missing_eos_penalty=2.0)(samples, run_with(torch.tensor([1.0, 1.0])))
    torch.testing.assert_close(found, torch.tensor([2.0, -2.0]).sigmoid())


def test_what_the_data_wrote_wins() -> None:
    assert Demonstrated()(samples_of([[0.0, 0.0, 0.0]]), SimpleNamespace()).tolist() == [0.0, 0.0, 1.0]
    alone = replace(samples_of([[0.0, 0.0]]), columns={})
    assert Demonstrated()(alone, SimpleNamespace()).isnan().all()


# -- Nash learning -----------------------------------------------------------------------------------------------------

GAME_RR = torch.tensor([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]], dtype=torch.float64)  # cyclic
KL = 0.2


def mixture_of(policy: Tabular, reference: Tabular, share: float) -> Tensor:
    """Log-probabilities of policy^(1 - share) reference^share."""
    return ((1 - share) * policy.log_probs() + share * reference.log_probs()).log_softmax(-1).detach()


def mean_gradient(policy: Tabular, reference: Tabular, share: float) -> Tensor:
    """What the credit and the loss of nash_md do on average over all (y, y'), as an ascent direction."""
    count = len(policy.strings)
    index = torch.arange(count)
    own_D, other_D = index.repeat_interleave(count), index.repeat(count)
    weight_D = policy.log_probs().detach().exp()[own_D] * mixture_of(policy, reference, share).exp()[other_D]
    wins_B = torch.stack([GAME_RR[own_D, other_D], GAME_RR[other_D, own_D]], 1).reshape(-1)
    both_B = torch.stack([own_D, other_D], 1).reshape(-1)
    samples = Samples(
        "completions", Ragged.of([[1]] * count**2), Ragged.of([[int(y)] for y in both_B]),
        np.repeat(np.arange(count**2), 2), columns={"sampler": torch.tensor([0, 1] * count**2)},
        tokens={
            "old_logps": policy.log_probs().detach()[both_B], "ref_logps": reference.log_probs().detach()[both_B]
        },
    )  # fmt: skip
    credited = WinMargin(kl=KL)(samples, wins_B)
    assert len(credited) == count**2
    logps_BT = policy.logps()[0][own_D]
    record = PolicyGradient(
        logps_BT=logps_BT, mask_BT=torch.ones_like(logps_BT, dtype=torch.bool), old_logps_BT=logps_BT.detach(),
        advantages_BT=credited.tokens["advantages"][:, None],
    )  # fmt: skip
    return -policy.gradient((weight_D * create_loss("reinforce")(record).loss.sum(-1)).sum())


def at_rest(reference: Tabular, share: float) -> Tabular:
    """Where ascent by the mean gradient ends."""
    policy = Tabular(vocabulary=3, length=1, seed=7)
    for _ in range(3_000):
        slope = mean_gradient(policy, reference, share).view_as(policy.table)
        if float(slope.abs().max()) < 1e-8:
            break
        with torch.no_grad():
            policy.table.add_(3 * slope)
    return policy


def equilibrium(reference: Tabular) -> Tabular:
    """Of the regularised game: pi ∝ ref exp(P(y beats pi) / kl), by damped iteration of that equation."""
    policy = Tabular(vocabulary=3, length=1)
    ref_R, log_R = reference.log_probs().detach(), reference.log_probs().detach()
    for _ in range(2_000):
        answer_R = (ref_R + GAME_RR @ log_R.exp() / KL).log_softmax(-1)
        log_R = (0.95 * log_R + 0.05 * answer_R).log_softmax(-1)
    assert float((answer_R - log_R).abs().max()) < 1e-9
    return policy.become(log_R)


def test_nash_md_follows_the_exact_gradient_of_its_game() -> None:
    reference, policy = Tabular(3, 1, seed=5), Tabular(3, 1, seed=6)
    for share in (0.0, 0.5):
        other_R = mixture_of(policy, reference, share).exp()
        log_R = policy.log_probs()
        value = (log_R.exp() * (GAME_RR @ other_R)).sum()
        kl = (log_R.exp() * (log_R - reference.log_probs().detach())).sum()
        wanted = policy.gradient(value - KL * kl)
        torch.testing.assert_close(mean_gradient(policy, reference, share), wanted, rtol=0, atol=1e-7)


def test_nash_md_rests_at_the_regularised_nash_equilibrium() -> None:
    """Exactly without a mixture; with one it rests beside it, by a distance that shrinks with the share."""
    reference = Tabular(vocabulary=3, length=1, seed=8)
    wanted = equilibrium(reference)
    assert total_variation(reference, wanted) > 0.1  # there is something to learn
    distance = {share: total_variation(at_rest(reference, share), wanted) for share in (0.0, 0.0625, 0.125)}
    assert distance[0.0] < 1e-5
    assert 0.001 < distance[0.125] < 0.03 and distance[0.0625] == pytest.approx(distance[0.125] / 2, rel=0.1)


def test_win_margins_are_of_main_completions_and_0_where_unknown() -> None:
    samples = samples_of([[0.0, 0.0, 0.0]])
    credited = WinMargin()(samples, torch.tensor([0.75, NAN, 0.3]))
    first = [credited.completions.offsets[b] for b in range(2)]
    assert len(credited) == 2 and credited.tokens["advantages"][first].tolist() == [0.25, 0.0]
    assert WinMargin().needs == set() and WinMargin(kl=0.1).needs == {"reference"}


# -- xpo ---------------------------------------------------------------------------------------------------------------


def test_xpo_logs_who_wins_and_what_the_reference_wrote() -> None:
    mask_BT, zeros_BT = torch.ones(4, 1, dtype=torch.bool), torch.zeros(4, 1)
    batch = Pairs(
        chosen_logps_BT=torch.tensor([[-1.0], [-1.0], [-3.0], [-3.0]]), rejected_logps_BT=zeros_BT - 2,
        ref_chosen_logps_BT=zeros_BT - 2, ref_rejected_logps_BT=zeros_BT - 2, chosen_mask_BT=mask_BT,
        rejected_mask_BT=mask_BT, probability_B=torch.tensor([1.0, 0.0, 1.0, 0.0]),
    )  # fmt: skip
    metrics = create_loss("xpo")(batch).metrics
    assert metrics["rewards/accuracies"].tolist() == [1.0, 0.0, 0.0, 1.0]
    assert metrics["exploration"].tolist() == [-2.0] * 4
    with pytest.raises(UsageError, match="column 'probability'"):
        create_loss("xpo")(replace(batch, probability_B=None))


# -- losses by name ----------------------------------------------------------------------------------------------------


def test_a_loss_is_named_with_its_options() -> None:
    loss = loss_named("simpo(beta=3, gamma=1.0)", beta=None)
    assert loss.name == "simpo" and loss.options == {"beta": 3, "gamma": 1.0}
    for text, given, words in (
        ("dpo(beta=0.1)", {"beta": 0.2}, "say beta twice"),
        ("dpo(0.1)", {}, "has no name"),
        ("dpo(beta=0.1", {}, "written as name"),
        ("dop", {}, "did you mean 'dpo'"),
        ("dpo(bta=1)", {}, "did you mean 'beta'"),
    ):
        with pytest.raises(UsageError, match=words):
            loss_named(text, **given)


def test_rows_are_made_for_the_family_of_the_loss() -> None:
    kinds = {name: type(compared(loss_named(name))["credit"]).__name__ for name in ("ipo", "kto", "lipo")}
    assert kinds == {"ipo": "TopAgainstBottom", "kto": "Desirable", "lipo": "RankedSamples"}
    assert compared(loss_named("kto"))["prelude"] is not None and compared(loss_named("dpo"))["prelude"] is None
    with pytest.raises(UsageError, match="takes Likelihood, and no preferences"):
        compared(loss_named("sft"))
    for options in ({"pairs": "all"}, {"soft_labels": "rewards"}):
        with pytest.raises(UsageError, match=f"{next(iter(options))}=.*no effect on loss 'kto'"):
            compared(loss_named("kto"), **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="one of extremes"):
        compared(loss_named("dpo"), "some")  # type: ignore[arg-type]


# -- the algorithms ----------------------------------------------------------------------------------------------------

ALL = ("online_dpo", "xpo", "nash_md", "iterative_dpo", "sppo_iterative", "spin", "rs_dpo", "rso")


@pytest.fixture(scope="module")
def world() -> EnumerableWorld:
    return EnumerableWorld.make()


def ended(world: EnumerableWorld, name: str, options: dict[str, Any] | None = None, **settings: Any) -> Any:
    algorithm = sized(create_algorithm(name, **(options or {})), samples=16)
    return fit(world, algorithm, Claim("anything"), **{"max_steps": 2, **settings})


@pytest.mark.parametrize("name", [n for n in ALL if n != "spin"])
def test_nothing_is_learned_where_all_are_equal_or_nobody_says_anything(name: str, world: EnumerableWorld) -> None:
    options = {"kl": 0.0} if name == "nash_md" else {}
    for reward in (lambda completions: [1.0] * len(completions), lambda completions: [None] * len(completions)):
        policy = ended(world, name, options, reward=reward).run.policy
        assert torch.equal(world.log_probs(policy), world.log_probs())
    policy = ended(world, name, options).run.policy
    assert not torch.equal(world.log_probs(policy), world.log_probs())


@pytest.mark.parametrize(
    ("name", "options"),
    [("online_dpo", {}), ("online_dpo", {"soft_labels": "win_rates"}), ("nash_md", {"group_size": 2, "kl": 0.1}),
     ("sppo_iterative", {"train_on": "all"}), ("xpo", {"soft_labels": "win_rates"})],
)  # fmt: skip
def test_a_judge_stands_where_a_reward_does(name: str, options: dict[str, Any], world: EnumerableWorld) -> None:
    def shorter(prompts: list[str], first: list[str], second: list[str]) -> list[float]:
        return [0.5 + 0.4 * ((len(a) < len(b)) - (len(a) > len(b))) for a, b in zip(first, second, strict=True)]

    end = world.log_probs(ended(world, name, options, reward=Judge(shorter), max_steps=8).run.policy)
    short = torch.tensor([len(r) == 1 for r in RESPONSES])
    gained = [float(x.exp()[:, short].sum(-1).min()) for x in (world.log_probs(), end)]
    assert gained[1] > gained[0] + 0.03


@pytest.mark.parametrize("loss", ["ipo_sum", "simpo(beta=2, gamma=1.0)", "odpo", "sppo_soft", "kto", "bco", "lipo"])
def test_any_preference_loss_learns_online(loss: str, world: EnumerableWorld) -> None:
    for name in ("online_dpo", "iterative_dpo"):
        options = {"loss": loss, **({"group_size": 4} if name == "online_dpo" else {})}
        policy = ended(world, name, options, max_steps=10, learning_rate=0.2).run.policy
        assert world.gained(world.log_probs(policy)) > 0.05


def test_soft_labels_are_logged_as_they_weigh(world: EnumerableWorld) -> None:
    """Both orders of a pair have opposite margins: their mean says nothing, that by their weights does."""
    options = {"soft_labels": "rewards", "beta": 0.5}
    history = ended(world, "online_dpo", options, max_steps=20, logging_steps=1).run.history
    margins = [line["rewards/margins"] for line in history if "rewards/margins" in line]
    assert margins[0] == 0 and margins[-1] > 0.05


MISFITS = {
    "a group of one": ("online_dpo", {"group_size": 1}, "at least 2, got 1"),
    "a round for a loss without reference": (
        "iterative_dpo", {"loss": "cpo", "reference": "round"}, "moving reference has no effect",
    ),
    "a loss of demonstrations": ("online_dpo", {"loss": "sft"}, "no preferences"),
    "a column that nobody gives": ("online_dpo", {"loss": "step_dpo"}, "step_dpo"),
    "the reference as its own opponent": ("nash_md", {"mixture": 1.0}, "blend is a share"),
    "steps that nash_md does not take": ("nash_md", {"inner_epochs": 2}, "no option 'inner_epochs'"),
    "a coin flip": ("rs_dpo", {"threshold": 0.4}, "from 0.5 to below 1"),
    "certainty": ("rs_dpo", {"threshold": 1.0}, "from 0.5 to below 1"),
    "a reward without unit": ("nash_md", {"tau": 0.0}, "above 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_told(case: str) -> None:
    name, options, words = MISFITS[case]
    with pytest.raises(UsageError, match=words):
        create_algorithm(name, **options)


@pytest.mark.parametrize("name", ["nash_md", "xpo", "spin", "rso", "sppo_iterative"])
def test_held_out_prompts_are_answered_by_the_policy(name: str, world: EnumerableWorld) -> None:
    rows = world.rows_for(create_algorithm(name))
    shown, held_out = ([row for row in rows if row["prompt"] == prompt] for prompt in PROMPTS)
    run = ended(world, name, dataset=shown, eval_dataset=held_out, eval_steps=1).run
    found = {key: value for line in run.history for key, value in line.items()}
    assert found["eval/completions/mean_length"] > 0 and "eval/kl" in found
    assert ("eval/reward/absolute" in found) == (name in ("nash_md", "sppo_iterative"))
    # One sample has nobody to win against, and nobody scores the samples of spin.
    assert ("eval/reward" in found) == (name not in ("sppo_iterative", "spin"))
    assert ("kl" in found) == (name != "rso")  # the reference's samples say nothing of the policy's KL


def test_what_each_needs() -> None:
    asked = {name: create_algorithm(name).needs - {"policy"} for name in ALL}
    assert all(needs == {"reference", "reward"} for name, needs in asked.items() if name != "spin")
    assert asked["spin"] == {"reference"}
    assert create_algorithm("iterative_dpo", loss="simpo").needs == {"policy", "reward"}
    assert create_algorithm("spin").data == "completions"


def test_pairs_of_rs_dpo_are_those_above_its_threshold() -> None:
    credit = create_algorithm("rs_dpo", threshold=0.7, tau=2.0).stages[0].credit
    assert isinstance(credit, AllPairs)
    for gap in (1.6, 1.8):
        pairs = credit(samples_of([[0.0, gap]]), torch.tensor([0.0, gap]))
        assert len(pairs) == int(1 / (1 + math.exp(-gap / 2.0)) > 0.7)


@pytest.mark.parametrize("name", ["online_dpo", "iterative_dpo", "rlaif", "rso"])
def test_a_loss_of_two_writers_needs_both(name: str) -> None:
    with pytest.raises(UsageError, match=r"'xpo' compares the completions of two writers.*algorithm 'xpo'"):
        create_algorithm(name, loss="xpo")
