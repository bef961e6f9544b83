"""Distillation: the record of two distributions, teachers that fit, and what MiniLLM's parts add up to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prefzoo.data.samples import Ragged, Samples
from prefzoo.losses import create_loss
from prefzoo.models.load import learn_tokenizer, tiny_model
from prefzoo.models.roles import Policy, Want
from prefzoo.models.teacher import check_vocabulary, with_teacher
from prefzoo.models.tree import TreeBatch, pack_rows
from prefzoo.parts.teacher import TeacherReturn
from prefzoo.records import Distribution, PolicyGradient, masked_sum
from prefzoo.registry import UsageError
from prefzoo.theory.expectations import difference, kl, moved
from prefzoo.theory.policies import Tabular
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
    with pytest.raises(UsageError, match="gamma is from 0 to 1"):
        TeacherReturn(gamma=1.5)
