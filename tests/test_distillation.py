"""Distillation: the record of two distributions, teachers that fit, and what MiniLLM's parts add up to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import prefzoo
from prefzoo.data.samples import Ragged, Samples
from prefzoo.losses import create_loss
from prefzoo.models.load import learn_tokenizer, tiny_model
from prefzoo.models.roles import Policy, Want
from prefzoo.models.teacher import check_vocabulary, with_teacher
from prefzoo.models.tree import TreeBatch, pack_rows
from prefzoo.parts.teacher import TeacherReturn
from prefzoo.records import Distribution, PolicyGradient, masked_sum
from prefzoo.registry import UsageError
from prefzoo.rollout.loop import LoopEngine
from prefzoo.theory.expectations import difference, kl, moved
from prefzoo.theory.policies import Tabular
from prefzoo.training import Run
from prefzoo.training.records import build_record, wanted


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    return learn_tokenizer(["say a: a b c d one two three"], 270)


@pytest.fixture(scope="module")
def policy(words: PreTrainedTokenizerBase) -> Policy:
    return Policy(tiny_model(words))


@pytest.fixture(scope="module")
def teacher(words: PreTrainedTokenizerBase) -> Policy:
    return Policy(tiny_model(words, seed=1)).requires_grad_(False)


SAMPLES = pack_rows([([5, 6, 7], [[8, 9, 10], [11]]), ([12, 13], [[14, 15]])])
LOGITS = frozenset[Want]({"logits"})


def record_of(policy: Policy, teacher: Policy, samples: Samples = SAMPLES) -> Distribution:
    tree = TreeBatch.of(samples)
    record = build_record(Distribution, samples, with_teacher(policy(tree, want=LOGITS), teacher, tree), tree, {})
    assert isinstance(record, Distribution)
    return record


def test_the_record_holds_both_distributions_at_every_token(policy: Policy, teacher: Policy) -> None:
    record = record_of(policy, teacher)
    assert record.logits_BTV.shape == (3, 3, 270) and record.mask_BT.tolist() == SAMPLES.mask_BT().tolist()
    for model, logits_BTV in ((policy, record.logits_BTV), (teacher, record.teacher_logits_BTV)):
        targets = torch.tensor([[8, 9, 10], [11, 0, 0], [14, 15, 0]])
        logps_BT = logits_BTV.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        torch.testing.assert_close(logps_BT[record.mask_BT], model(TreeBatch.of(SAMPLES)).logps_C)
    assert record.logits_BTV.requires_grad and not record.teacher_logits_BTV.requires_grad


def test_the_logits_are_those_before_any_temperature(policy: Policy) -> None:
    tree = TreeBatch.of(SAMPLES)
    hot, plain = (policy(tree, temperature=t, want=LOGITS) for t in (2.0, 1.0))
    assert hot.logits_CV is not None and plain.logits_CV is not None
    torch.testing.assert_close(hot.logits_CV, plain.logits_CV)
    assert not torch.allclose(hot.logps_C, plain.logps_C)  # type: ignore[arg-type]


def test_distillation_asks_for_logits_and_other_losses_do_not() -> None:
    assert wanted([create_loss("gkd")]) == LOGITS and wanted([create_loss("dpo"), create_loss("sft")]) == frozenset()
    assert wanted([create_loss("reverse_kl"), create_loss("a2c")]) == LOGITS | {"entropy"}


def test_a_teacher_with_padded_rows_is_cut_and_one_with_too_few_is_refused(
    policy: Policy, words: PreTrainedTokenizerBase
) -> None:
    wide = Policy(tiny_model(words, seed=1)).requires_grad_(False)
    wide.model.resize_token_embeddings(288, mean_resizing=False)
    check_vocabulary(policy, wide, words)
    record = record_of(policy, wide)
    assert record.logits_BTV.shape == record.teacher_logits_BTV.shape == (3, 3, 270)
    small = Policy(tiny_model(words, seed=1))
    small.model.resize_token_embeddings(200, mean_resizing=False)
    with pytest.raises(UsageError, match="its vocabulary has 200 entries, the tokenizer 270; "):
        check_vocabulary(policy, small, words)


def all_completions(policy: Tabular, teacher: Tabular) -> Samples:
    """Every completion there is, with its log-probabilities under both."""
    ids = [list(s) for s in policy.strings]
    both = {name: model.logps()[0].detach()[policy.mask_RT] for name, model in
            (("old_logps", policy), ("teacher_logps", teacher))}  # fmt: skip
    samples = pack_rows([([1], ids)])
    return replace(samples, completions=Ragged.of(ids), tokens=both)


@pytest.mark.parametrize("own", [False, True])
def test_minillms_parts_add_up_to_the_kl_of_whole_completions(own: bool) -> None:
    """Its single step, exact over the vocabulary, and its long part: together the exact gradient of KL(π ‖ P). With
    the token's own reward in the long part, that part alone is."""
    policy = Tabular(vocabulary=3, length=3, seed=1)
    teacher = moved(policy, 0.7, seed=2)
    samples = TeacherReturn(own=own, normalise=False)(all_completions(policy, teacher), torch.zeros(15))
    logps_RT, mask_RT = policy.logps()
    weight_R = policy.log_probs().detach().exp()
    record = PolicyGradient(
        logps_BT=logps_RT, old_logps_BT=logps_RT.detach(), mask_BT=mask_RT,
        advantages_BT=samples.padded(samples.tokens["advantages"]),
    )  # fmt: skip
    loss_R = masked_sum(create_loss("clipped_surrogate")(record).loss, mask_RT)
    if not own:
        step = Distribution(logits_BTV=policy.logits(), teacher_logits_BTV=teacher.logits(), mask_BT=mask_RT)
        loss_R = loss_R + masked_sum(create_loss("reverse_kl")(step).loss, mask_RT)
    found = policy.gradient((weight_R * loss_R).sum())
    assert difference(found, policy.gradient(kl(policy, teacher))) < 1e-9


def returns(gain: list[list[float]], **options: object) -> list[Tensor]:
    samples = pack_rows([([1], [[2] * len(g) for g in gain])])
    flat = torch.tensor([x for g in gain for x in g])
    samples = samples.with_tokens(old_logps=torch.zeros_like(flat), teacher_logps=flat)
    advantages = TeacherReturn(**options)(samples, torch.zeros(len(gain))).tokens["advantages"]  # type: ignore[arg-type]
    return list(advantages.split([len(g) for g in gain]))


def test_returns_are_of_what_follows_discounted_and_per_token() -> None:
    gain = [[1.0, 2.0, 4.0], [8.0]]
    assert [a.tolist() for a in returns(gain, normalise=False)] == [[6, 4, 0], [0]]
    assert [a.tolist() for a in returns(gain)] == [[3, 4, 0], [0]]
    assert [a.tolist() for a in returns(gain, normalise=False, gamma=0.5)] == [[4, 4, 0], [0]]
    assert [a.tolist() for a in returns(gain, normalise=False, own=True)] == [[7, 6, 4], [8]]
    own = {"normalise": False, "own": True, "gamma": 0.0}
    assert [a.tolist() for a in returns(gain, **own)] == gain
    early = returns([[1.0, -2.0, 1.0], [8.0]], **own, early=0.5)
    torch.testing.assert_close(early[0], torch.tensor([1 * 1.5, -2 * (1 + 0.5 * 3 / 4), 1 * (1 + 0.5 / 4)]))
    torch.testing.assert_close(early[1], torch.tensor([12.0]))
    with pytest.raises(UsageError, match="gamma is from 0 to 1"):
        TeacherReturn(gamma=1.5)


# ------------------------------------------------------------------------------------------------ runs

TEXTS = [
    {"prompt": "say a:", "completion": " a a"}, {"prompt": "say b:", "completion": " b"},
    {"prompt": "count:", "completion": " one two three"}, {"prompt": "say d:", "completion": " d c"},
]  # fmt: skip
PROMPTS = [row["prompt"] for row in TEXTS]
QUICK: dict[str, Any] = {
    "learning_rate": 1e-2, "schedule": "constant", "warmup_steps": 0, "logging_steps": 1, "quiet": True,
}  # fmt: skip
OF_DATA = {"rows_per_step": 4}
SAMPLED = {"prompts_per_step": 4, "minibatches": 1, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def learned(words: PreTrainedTokenizerBase) -> Any:
    """A teacher that ends its answers."""
    start = tiny_model(words, seed=1)
    options = {**QUICK, "rows_per_step": 4, "max_steps": 30, "learning_rate": 3e-3}
    return prefzoo.train("sft", model=start, tokenizer=words, dataset=TEXTS, **options).model


@pytest.fixture(scope="module")
def student(words: PreTrainedTokenizerBase) -> Any:
    """A policy that has read a little, and something else: it ends its answers."""
    rows = [{**row, "completion": row["completion"] + " d"} for row in TEXTS]
    options = {**QUICK, "rows_per_step": 4, "max_steps": 12, "learning_rate": 3e-3}
    return prefzoo.train("sft", model=tiny_model(words), tokenizer=words, dataset=rows, **options).model


def fit(algorithm: str, model: Any, teacher: Any, words: PreTrainedTokenizerBase, **options: Any) -> Run:
    return prefzoo.train(
        algorithm, model=model, tokenizer=words, teacher=teacher, dataset=TEXTS, **{**QUICK, **options}
    )  # fmt: skip


def divergence(model: Any, teacher: Any, words: PreTrainedTokenizerBase) -> float:
    """KL(teacher ‖ policy) on the data's answers, per token, in nats."""
    run = fit("forward_kl", model, teacher, words, learning_rate=0.0, max_steps=1, **OF_DATA)
    return run.history[0]["loss"]


@pytest.mark.long  # on the enumerable model check_algorithm proves it, at once
@pytest.mark.parametrize(("name", "options"), [
    ("forward_kl", OF_DATA), ("reverse_kl", OF_DATA), ("gkd", {**SAMPLED, "on_policy": 0.5}),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_the_policy_comes_nearer_to_the_teacher(
    name: str, options: dict[str, Any], student: Any, learned: Any, words: PreTrainedTokenizerBase
) -> None:
    run = fit(name, student, learned, words, max_steps=25, **{**options, "learning_rate": 3e-3})
    before, after = divergence(student, learned, words), divergence(run.model, learned, words)
    assert after < 0.7 * before, (before, after)


@pytest.mark.long
def test_minillm_lowers_the_reverse_kl_of_its_own_answers(
    student: Any, learned: Any, words: PreTrainedTokenizerBase
) -> None:
    """It seeks the teacher's likeliest answers: of the data's it may know less than before."""
    run = fit("minillm", student, learned, words, max_steps=25, **{**SAMPLED, "learning_rate": 3e-3})
    kl = [row["loss/reverse_kl"] for row in run.history]
    assert sum(kl[-5:]) < 0.8 * sum(kl[:5]), kl


@pytest.mark.parametrize("name", ["gkd", "minillm", "reverse_kl"])
def test_at_the_teacher_nothing_moves(name: str, learned: Any, words: PreTrainedTokenizerBase) -> None:
    """P = π: every divergence and every reward r_t is 0."""
    options = OF_DATA if name == "reverse_kl" else SAMPLED
    run = fit(name, learned, learned, words, max_steps=2, optimizer="sgd", **options)
    assert all(abs(row["loss"]) < 1e-6 and row["grad_norm"] < 1e-4 for row in run.history), run.history


@pytest.mark.parametrize(("share", "steps", "least", "most"), [(0.0, 3, 0, 0), (1.0, 3, 3, 3), (0.5, 8, 1, 7)])
def test_the_share_of_steps_that_the_policy_writes(
    share: float, steps: int, least: int, most: int, student: Any, learned: Any, words: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked: list[int] = []
    original = LoopEngine.generate

    def counted(self: LoopEngine, prompts: Samples, *rest: Any, **options: Any) -> Samples:
        asked.append(len(prompts))
        return original(self, prompts, *rest, **options)

    monkeypatch.setattr(LoopEngine, "generate", counted)
    run = fit("gkd", student, learned, words, on_policy=share, max_steps=steps, **SAMPLED)
    assert least <= len(asked) <= most and asked == [4] * len(asked)
    data = [row for row in run.history if row["completions/mean_length"] == pytest.approx(mean_length(words))]
    assert len(data) >= steps - len(asked)  # the others trained on the four answers of the data


def mean_length(words: PreTrainedTokenizerBase) -> float:
    """Of the data's answers, with their end."""
    return sum(len(words(row["completion"])["input_ids"]) for row in TEXTS) / len(TEXTS)


@pytest.mark.long
def test_the_policy_learns_to_write_what_the_teacher_wrote(
    student: Any, learned: Any, words: PreTrainedTokenizerBase
) -> None:
    options = {"prompts_per_round": 4, "rows_per_update": 4, "epochs_per_round": 60, "max_steps": 1}
    run = fit("seqkd", student, learned, words, max_new_tokens=8, **{**options, "learning_rate": 3e-3})
    says = [prefzoo.generate(m, PROMPTS, tokenizer=words, temperature=0, max_new_tokens=8)
            for m in (student, learned, run.model)]  # fmt: skip
    assert says[2] == says[1] != says[0]


def test_who_has_no_teacher_is_told_which_would_do(student: Any, words: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UsageError, match="needs a teacher: give teacher=, a model with the policy's tokenizer"):
        fit("gkd", student, None, words, max_steps=1, **SAMPLED)
    small = tiny_model(words, seed=1)
    small.resize_token_embeddings(200, mean_resizing=False)
    with pytest.raises(UsageError, match=r"200 entries.* let it write answers \(prefzoo generate\)"):
        fit("gkd", student, small, words, max_steps=1, **SAMPLED)
