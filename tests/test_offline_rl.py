"""Offline RL: the heads of a Q-learner and their records, advantages from scored data, and what they decode."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import prefzoo
from prefzoo.data.samples import Samples
from prefzoo.data.tokens import tokenise
from prefzoo.losses import create_loss
from prefzoo.models import heads as heads_module
from prefzoo.models.heads import QHeads, load_heads, new_heads, save_heads
from prefzoo.models.load import learn_tokenizer, tiny_model
from prefzoo.models.reference import weights_hash
from prefzoo.models.roles import Policy
from prefzoo.models.tree import TreeBatch, pack_rows
from prefzoo.parts.offline import ReturnAbove
from prefzoo.parts.optimal import OptimalAdvantage
from prefzoo.records import Heads
from prefzoo.registry import UsageError
from prefzoo.training import Run
from prefzoo.training.records import after, at_last, build_record

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    return learn_tokenizer(["say a: a b c d one two three"], 270)


@pytest.fixture(scope="module")
def policy(words: PreTrainedTokenizerBase) -> Policy:
    return Policy(tiny_model(words))


@pytest.fixture
def heads(policy: Policy) -> QHeads:
    """Heads that are not zero."""
    made = new_heads(policy)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made


ROWS = [([5, 6, 7], [[8, 9, 10], [11]]), ([12, 13], [[14, 15]])]


def tree() -> TreeBatch:
    return TreeBatch.of(pack_rows(ROWS))


def test_the_scores_are_those_of_the_whole_table_of_q(heads: QHeads) -> None:
    batch = tree()
    found = heads(batch, lse=True).heads
    states = heads_module.run_trunk(heads.trunk, batch)[batch.predict_C]
    hidden = (states - states.mean(-1, keepdim=True)) / (states.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    rows = torch.arange(len(batch.target_C))
    for name in ("q1", "q2"):
        table_CV = heads.head[name](hidden)
        torch.testing.assert_close(found[name], table_CV[rows, batch.target_C])
        torch.testing.assert_close(found[f"{name}_lse"], table_CV.logsumexp(-1))
    slow = [heads.head[name](hidden)[rows, batch.target_C] for name in heads_module.SLOW]
    torch.testing.assert_close(found["target_q"], torch.minimum(*slow))
    assert not found["target_q"].requires_grad and found["q1"].requires_grad and found["v"].requires_grad
    torch.testing.assert_close(heads(batch).heads["q1"], found["q1"])  # without the table, the same
    advantage_CV = heads.advantages(states)
    torch.testing.assert_close(advantage_CV[rows, batch.target_C], found["target_q"] - found["v"])


def test_chunks_give_the_same_scores_and_gradients(heads: QHeads, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[dict[str, Tensor], list[Tensor]]:
        heads.zero_grad()
        found = dict(heads(tree(), lse=True).heads)
        sum((v.square().sum() for v in found.values() if v.requires_grad), torch.zeros(())).backward()
        return found, [p.grad.clone() for p in heads.parameters() if p.grad is not None]

    heads.double()
    whole, gradients = run()
    monkeypatch.setattr(heads_module, "LOGITS_BYTES", 8 * 270 * 2)
    parts, others = run()
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(others, gradients)


def test_the_slow_q_follow_by_their_share_and_are_never_trained(heads: QHeads) -> None:
    fast, slow = heads.head["q1"][2].weight, heads.head["slow_q1"][2].weight
    before = slow.detach().clone()
    heads.follow()
    torch.testing.assert_close(slow, before + 0.005 * (fast - before))
    assert fast.requires_grad and not slow.requires_grad
    assert {k.partition(".")[2].partition(".")[0] for k in heads.slow()} == set(heads_module.SLOW)
    assert set(heads.slow()) <= set(dict(heads.named_parameters()))


def test_new_heads_are_zero_and_leave_the_policy_alone(policy: Policy) -> None:
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    made = new_heads(policy)
    found = made(tree(), lse=True).heads
    assert not any(found[name].any() for name in ("q1", "q2", "v", "target_q"))
    loss = (1 - found["q1"]).square().sum() + (1 - found["q2"]).square().sum()
    loss.backward()
    first, second = (made.head[name][2].weight.grad for name in ("q1", "q2"))
    assert not torch.equal(first, second), "two Q that learn the same are one"
    made.trunk.get_input_embeddings().weight.data.zero_()
    assert all(torch.equal(v, before[k]) for k, v in policy.state_dict().items())


def test_heads_come_back_from_their_folder(heads: QHeads, words: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    save_heads(heads, words, tmp_path / "heads")
    back = load_heads(tmp_path / "heads")
    torch.testing.assert_close(dict(back(tree(), lse=True).heads), dict(heads(tree(), lse=True).heads))
    with pytest.raises(UsageError, match="holds no heads of a Q-learner"):
        load_heads(tmp_path)


def scored_samples(score: list[float], **tokens: Tensor) -> Samples:
    made = pack_rows(ROWS)
    return Samples("scored", made.prompts, made.completions, made.prompt_B, {"score": torch.tensor(score)}, {}, tokens)


def record_of(heads: QHeads, samples: Samples) -> Heads:
    batch = TreeBatch.of(samples)
    record = build_record(Heads, samples, heads(batch, lse=True), batch, {})
    assert isinstance(record, Heads)
    return record


def test_the_record_puts_the_score_on_the_last_token_and_shifts_values(heads: QHeads) -> None:
    record = record_of(heads, scored_samples([1.0, 2.0, 3.0]))
    assert record.rewards_BT.tolist() == [[0, 0, 1], [2, 0, 0], [0, 3, 0]]
    v = record.v_BT.detach()
    expected = torch.tensor([[v[0, 1], v[0, 2], 0], [0, 0, 0], [v[2, 1], 0, 0]])
    torch.testing.assert_close(torch.where(record.mask_BT, record.next_v_BT, 0.0), expected)
    assert not record.next_v_BT.requires_grad


def test_what_is_not_trained_is_skipped_between_a_token_and_the_value_after_it(heads: QHeads) -> None:
    trainable = torch.tensor([True, False, True, True, True, False])
    record = record_of(heads, scored_samples([1.0, 2.0, 3.0], trainable=trainable))
    assert record.rewards_BT.tolist() == [[0, 0, 1], [2, 0, 0], [3, 0, 0]]
    assert record.next_v_BT[0, 0] == record.v_BT[0, 2] and record.next_v_BT[2, 0] == 0


def test_shifts_on_random_masks_are_those_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    mask_BT = torch.rand(40, 7, generator=generator) < 0.5
    values_BT = torch.randn(40, 7, generator=generator)
    for row, (mask, values) in enumerate(zip(mask_BT, values_BT, strict=True)):
        places = mask.nonzero()[:, 0].tolist()
        following = dict(zip(places, [*places[1:], None], strict=True)) if places else {}
        for place in places:
            after_it = following[place]
            assert after(values_BT, mask_BT)[row, place] == (0 if after_it is None else values[after_it])
        expected = torch.zeros(7)
        expected[places[-1:]] = float(row)
        assert torch.equal(at_last(torch.arange(40.0), mask_BT)[row], expected)


def q_learned(steps: int, gamma: float, reward: float) -> tuple[Tensor, Tensor]:
    """Q and V of a chain of tokens, fitted by the losses on records made as the run makes them."""
    mask_BT = torch.ones(1, 4, dtype=torch.bool)
    q1, q2, v = (torch.zeros(1, 4, requires_grad=True) for _ in range(3))
    optimizer = torch.optim.SGD([q1, q2, v], lr=0.3)
    rewards_BT = at_last(torch.tensor([reward]), mask_BT)
    for _ in range(steps):
        record = Heads(
            q1_BT=q1, q2_BT=q2, v_BT=v, next_v_BT=after(v.detach(), mask_BT), mask_BT=mask_BT, rewards_BT=rewards_BT,
            target_q_BT=torch.minimum(q1, q2).detach(),
        )  # fmt: skip
        loss = create_loss("ilql_q", gamma=gamma)(record).loss.sum() + create_loss("ilql_v")(record).loss.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return q1.detach()[0], v.detach()[0]


def test_one_path_through_the_data_has_the_discounted_reward_as_its_q() -> None:
    """Where every state has one token, Q(s_t) = γ^(T-1-t) R and V = Q: the fixed point of both losses."""
    q_T, v_T = q_learned(400, gamma=0.9, reward=2.0)
    expected = torch.tensor([2 * 0.9**3, 2 * 0.9**2, 2 * 0.9, 2.0])
    torch.testing.assert_close(q_T, expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(v_T, expected, atol=1e-3, rtol=0)


# ------------------------------------------------------------------------------------------- scores less a baseline


def by_row(samples: Samples) -> list[list[float]]:
    return [a.tolist() for a in samples.tokens["advantages"].split(samples.completions.lengths.tolist())]


def test_advantages_of_scores_are_above_the_prompts_or_the_datas_mean() -> None:
    samples = scored_samples([1.0, 2.0, 6.0])
    scores_B = samples.columns["score"]
    of_prompt = ReturnAbove("prompt", standardise=False)(samples, scores_B)
    assert by_row(of_prompt) == [[-0.5, -0.5, -0.5], [0.5], [0, 0]]
    of_data = ReturnAbove("data", standardise=False)(samples, scores_B)
    assert by_row(of_data) == [[-2, -2, -2], [-1], [3, 3]]
    scaled = ReturnAbove("data")(samples, scores_B).tokens["advantages"]
    assert abs(float(scaled.std()) - 1) < 1e-3
    for baseline in ("prompt", "data"):
        shifted = ReturnAbove(baseline)(samples, scores_B + 5).tokens["advantages"]  # type: ignore[arg-type]
        torch.testing.assert_close(shifted, ReturnAbove(baseline)(samples, scores_B).tokens["advantages"])  # type: ignore[arg-type]


def test_a_critics_advantages_are_of_tokens_and_its_returns_the_scores() -> None:
    values = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    samples = scored_samples([1.0, float("nan"), 6.0], values=values)
    found = ReturnAbove("critic", standardise=False)(samples, samples.columns["score"])
    assert by_row(found)[0] == [1, 0, -1] and by_row(found)[2] == [2, 1]
    assert found.tokens["returns"][[0, 4]].tolist() == [1, 6]
    assert found.tokens["trainable"].tolist() == [True] * 3 + [False] + [True] * 2
    assert ReturnAbove("critic").needs == {"critic"} and ReturnAbove().needs == set()


def test_a_missing_score_weighs_nothing() -> None:
    samples = scored_samples([1.0, float("nan"), 6.0])
    found = ReturnAbove("data")(samples, samples.columns["score"])
    assert bool(found.tokens["advantages"][3].isnan()) and int(found.tokens["advantages"].isnan().sum()) == 1
    with pytest.raises(UsageError, match="baseline is 'mean'"):
        ReturnAbove("mean")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- runs

CHOICES = [{"prompt": "say:", "completion": f" {answer}", "score": score}
           for answer, score in (("a", 1.0), ("b", -1.0)) for _ in range(4)]  # fmt: skip
QUICK: dict[str, Any] = {
    "learning_rate": 1e-2, "schedule": "constant", "warmup_steps": 0, "logging_steps": 1, "rows_per_step": 8,
    "quiet": True,
}  # fmt: skip


def fit(name: str, policy: Policy, words: PreTrainedTokenizerBase, dataset: Any = None, **options: Any) -> Run:
    data = CHOICES if dataset is None else dataset
    return prefzoo.train(name, model=policy.model, tokenizer=words, dataset=data, **{**QUICK, **options})


def preference(model: Any, words: PreTrainedTokenizerBase) -> float:
    """log π(a) - log π(b) after the prompt."""
    samples, _ = tokenise(CHOICES[::4], words, "scored")
    logps = Policy(model)(TreeBatch.of(samples)).logps_C
    assert logps is not None
    mine, other = (part.sum() for part in logps.split(samples.completions.lengths.tolist()))
    return float(mine - other)


def test_awr_ends_where_its_weights_say(policy: Policy, words: PreTrainedTokenizerBase) -> None:
    """Data of two answers in equal shares: the optimum is π ∝ exp(A / β), so log π(a)/π(b) = 2 / β."""
    for beta, options in ((2.0, {}), (1.0, {"baseline": "data"})):
        run = fit("awr", policy, words, beta=beta, standardise=False, max_steps=60, **options)
        assert preference(run.model, words) == pytest.approx(2 / beta, abs=0.15), beta
    assert abs(preference(fit("awr", policy, words, beta=1e6, max_steps=60).model, words)) < 0.15  # imitation


def test_a_shift_of_the_scores_is_none_of_the_advantages(policy: Policy, words: PreTrainedTokenizerBase) -> None:
    shifted = [{**row, "score": row["score"] + 8} for row in CHOICES]
    for options in ({}, {"baseline": "data"}):
        runs = [fit("awr", policy, words, data, max_steps=3, **options) for data in (CHOICES, shifted)]
        for mine, theirs in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


def test_a_critic_learns_the_score_that_was_to_be_expected(policy: Policy, words: PreTrainedTokenizerBase) -> None:
    """One answer each to two prompts: its value is its score, and then there is no advantage left."""
    rows = [{"prompt": p, "completion": c, "score": s} for p, c, s in (("say a:", " a", 2.0), ("count:", " one", -1.0))]
    options = {"baseline": "critic", "standardise": False, "max_steps": 40, "rows_per_step": 2}
    run = fit("awr", policy, words, rows, critic_learning_rate=1e-2, **options)
    losses = [row["loss/critic"] for row in run.history]
    assert losses[0] == pytest.approx(1.25, abs=0.4) and losses[-1] < 0.05 * losses[0], losses
    assert run.history[-1]["weight"] == pytest.approx(1.0, abs=0.1)


def test_without_its_auxiliary_part_hpo_is_kto(policy: Policy, words: PreTrainedTokenizerBase) -> None:
    rows = [{**row, "label": row["score"] > 0} for row in CHOICES]
    plain, whole = (fit("hpo", policy, words, rows, weight=w, max_steps=2) for w in (0.0, 1.0))
    kto = fit("kto", policy, words, rows, max_steps=2)
    assert weights_hash(plain.policy) == weights_hash(kto.policy) != weights_hash(whole.policy)
    with pytest.raises(UsageError, match="credit ReturnAbove reads a number in the column 'score'"):
        fit("hpo", policy, words, [{k: v for k, v in row.items() if k != "score"} for row in rows], max_steps=1)


def test_q_learned_from_scores_steers_a_policy_that_imitates(
    policy: Policy, words: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The data's answers are even, and so is what was imitated; by its advantages the better one is written. A plain
    loader sees the imitation; another control has the scores exchanged."""
    share = {}
    for name, sign in (("right", 1), ("exchanged", -1)):
        rows = [{**row, "score": sign * row["score"]} for row in CHOICES]
        options = {"gamma": 1.0, "polyak": 0.2, "cql": 0.01, "beta": 8.0, "max_steps": 80}
        run = fit("ilql", policy, words, rows, output_dir=tmp_path / name, **options)
        assert abs(preference(run.model, words)) < 0.2
        for plain in (False, True):
            answers = prefzoo.generate(tmp_path / name, ["say:"], n=40, max_new_tokens=4, plain=plain)[0]
            share[name, plain] = sum(a == " a" for a in answers) / 40
    assert share["right", False] > 0.9 and share["exchanged", False] < 0.1, share
    assert all(0.25 < share[name, True] < 0.75 for name in ("right", "exchanged")), share


def test_heads_come_back_from_a_checkpoint(policy: Policy, words: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Their slow Q too, which no optimizer moves: a run that was stopped goes on as if it had not."""
    options: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "rows_per_step": 3, "polyak": 0.3}
    whole = fit("ilql", policy, words, output_dir=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        fit("ilql", policy, words, output_dir=tmp_path / "stopped", callback=stop_at_3, **options)
    again = fit("ilql", policy, words, output_dir=tmp_path / "stopped", resume=True, **options)
    assert weights_hash(again.policy) == weights_hash(whole.policy)
    first, second = (load_heads(tmp_path / name / "final" / "heads") for name in ("whole", "stopped"))
    assert weights_hash(first) == weights_hash(second)
    assert not torch.equal(first.head["q1"][2].weight, first.head["slow_q1"][2].weight)


def stop_at_3(step: int, *_: Any) -> None:
    if step == 3:
        raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------------ the optimal value


def test_the_optimal_value_is_that_of_the_references_completions() -> None:
    """Of two prompts, each with one completion of the policy's and two of the reference's, whose rewards are huge."""
    made = pack_rows([([5], [[8, 9], [10], [11]]), ([6], [[8], [9], [10]]), ([7], [[8], [9], [10]])])
    sampler_B = torch.tensor([0, 1, 1] * 3)
    samples = Samples("completions", made.prompts, made.completions, made.prompt_B, {"sampler": sampler_B})
    nan = float("nan")
    scores_B = torch.tensor([1.0, 3.0, 1.0, nan, 0.0, 0.0, 2.0, 900.0, nan])
    kept = OptimalAdvantage(temperature=2.0)(samples, scores_B)
    value = 2.0 * math.log((math.exp(3 / 2) + math.exp(1 / 2)) / 2)
    assert kept.completions.lengths.tolist() == [2, 1] and kept.prompt_B.tolist() == [0, 1]
    torch.testing.assert_close(kept.tokens["advantages"], torch.tensor([1 - value, 1 - value, 2.0 - 900.0]))
    shifted = OptimalAdvantage(temperature=2.0)(samples, scores_B + 7).tokens["advantages"]
    torch.testing.assert_close(shifted, kept.tokens["advantages"])
    silent = OptimalAdvantage()(samples, torch.tensor([1.0, nan, nan] * 3))
    assert len(silent) == 0, "a prompt without any reward of the reference's has no advantage"
