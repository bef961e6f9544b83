"""Relations of the pairwise modifiers, and of the losses that have their like inside."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from prefzoo.losses import modifiers
from prefzoo.losses.base import LOSSES, MODIFIERS, Loss, LossEntry, create_loss
from prefzoo.losses.modifiers import ScoredPairs, divergence_score, pair_weight
from prefzoo.losses.numerics import deformed
from prefzoo.losses.pairwise_free import log_odds
from prefzoo.parts.count import Count
from prefzoo.records import LossOut, Pairs, masked_sum
from prefzoo.registry import UsageError
from prefzoo.testing import CHECKS, ContractError, check_loss, random_record

SEEDS = range(3)
PAIRWISE = [n for n in LOSSES.names() if LOSSES.entry(n).tags["family"] is Pairs]
OFF = {"label_smoothing": 0.0, "nll": 0.0, "ld_alpha": 1.0, "divergence": "reverse_kl"}
ON: dict[str, dict[str, Any]] = {
    "wpo": {"wpo": True},
    "nll": {"nll": 0.3},
    "label_smoothing": {"label_smoothing": 0.1},
    "length_desensitised": {"ld_alpha": 0.4},
    "divergence": {"divergence": "js"},
}


def taking(modifier: str) -> list[str]:
    """The pairwise losses that a modifier applies to."""
    return [n for n in PAIRWISE if modifier in [m.name for m in entry_of(n).modifiers]]


def entry_of(name: str) -> LossEntry:
    entry = LOSSES.entry(name)
    assert isinstance(entry, LossEntry)
    return entry


def pairs(seed: int = 0, rows: int = 6, **options: Any) -> Pairs:
    return random_record(Pairs, seed, rows=rows, **options)


def values_and_gradients(loss: Any, batch: Pairs) -> tuple[LossOut, list[Tensor]]:
    names = ("chosen_logps_BT", "rejected_logps_BT", "chosen_log_sq_BT", "rejected_log_sq_BT")
    leaves = {name: batch.tensors()[name].clone().requires_grad_() for name in names}
    out = loss(dataclasses.replace(batch, **leaves))
    found = torch.autograd.grad(out.loss.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return out, list(found)


def same(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# -- where they apply -------------------------------------------------------------------------------------------------


def test_the_modifiers_of_pairs_are_those_named_here() -> None:
    assert {n for n in MODIFIERS.names() if MODIFIERS.entry(n).tags["family"] is Pairs} == set(ON)


def test_each_modifier_takes_what_it_should() -> None:
    """Whole columns of the table, so that a tag that is set by mistake is seen."""
    sorts, tokens = {"aot", "aot_unpaired"}, {"chosen_nll", "prompt_chosen_nll"}
    of_kl, of_steps = {"tdpo1", "tdpo2"}, {"step_dpo"}
    own_nll = {"cpo", "cpo_hinge", "cpo_ipo", "cpo_simpo", "orpo", "rpo_nll", "slic_hf", "xpo"}
    own_smoothing = {"cdpo", "robust_dpo", "exo_pair", "simpo", "cpo_simpo", "alphapo"}
    soft_labels = {"sppo_soft", "reward_aware_rpo", "xpo"}
    free = {n for n in PAIRWISE if not LOSSES.entry(n).tags["reference"]}
    assert set(taking("wpo")) == set(PAIRWISE) - sorts - tokens
    assert set(taking("nll")) == set(PAIRWISE) - own_nll - tokens
    assert set(taking("label_smoothing")) == set(PAIRWISE) - own_smoothing - soft_labels - tokens
    assert set(taking("length_desensitised")) == set(PAIRWISE) - free - own_nll - of_kl - of_steps
    assert {"dpo", "cdpo", "robust_dpo", "hinge", "ipo", "ipo_sum", "exo_pair", "discopop", "dpo_norm"} <= set(
        taking("divergence")
    )  # TRL's list
    anchored = {"nca_pair", "bco_pair", "sppo_hard", "sppo_soft", "apo_zero", "apo_down", "dpop"}
    assert not set(taking("divergence")) & (anchored | sorts | of_kl | of_steps | free)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("aot", {"wpo": True}, "'wpo' does not apply, because it couples the pairs of a batch"),
        ("chosen_nll", {"wpo": True}, "one value per token"),
        ("chosen_nll", {"nll": 0.1}, "one value per token"),
        ("chosen_nll", {"label_smoothing": 0.1}, "one value per token"),
        ("simpo", {"ld_alpha": 0.5}, "the loss has no reference"),
        ("xpo", {"ld_alpha": 0.5}, "exploration bonus would be desensitised"),
        ("xpo", {"nll": 0.1}, "what the policy wrote, the better one or not"),
        ("simpo", {"divergence": "js"}, "the loss has no reference"),
        ("tdpo1", {"ld_alpha": 0.5}, "it reads tokens by chosen_kl_BT as well"),
        ("step_dpo", {"ld_alpha": 0.5}, "it reads tokens by chosen_step_BT as well"),
        ("rpo_nll", {"ld_alpha": 0.5}, "its likelihood term would be desensitised"),
        ("tdpo2", {"divergence": "js"}, "derived for the reverse KL"),
        ("step_dpo", {"divergence": "js"}, "that of a step"),
        ("bco_pair", {"divergence": "js"}, "in which the constant of the divergence would cancel"),
        ("dpo", {"ld_alpha": 1.5}, "'ld_alpha': expected float from 0 to 1"),
        ("dpo", {"nll": -1.0}, "'nll': expected float of at least 0"),
        ("dpo", {"divergence": "kl"}, "'divergence': expected"),
    ],
)
def test_refused_in_words(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as error:
        create_loss(name, **options)
    assert words in str(error.value) and repr(name) in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"divergence_alpha": 0.3}, "divergence_alpha has no effect with divergence='reverse_kl'"),
        ({"divergence": "js", "divergence_alpha": 0.3}, "divergence_alpha has no effect with divergence='js'"),
        ({"divergence": "forward_kl", "alpha_convention": "trl"}, "alpha_convention has no effect"),
    ],
)
def test_idle_options_are_told(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        create_loss("dpo", **options)(pairs())


@pytest.mark.parametrize("name", ["dpo", "hinge", "simpo"])
def test_wpo_says_which_field_it_misses(name: str) -> None:
    loss = create_loss(name, wpo=True)
    assert loss.extras == ("chosen_log_sq_BT", "rejected_log_sq_BT")
    with pytest.raises(UsageError, match="rejected_log_sq_BT"):
        loss(dataclasses.replace(pairs(), rejected_log_sq_BT=None))


# -- all losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRWISE)
def test_off_is_the_identity_bit_for_bit(name: str) -> None:
    """As options of the loss, and as functions around it."""
    options = {k: v for m in entry_of(name).modifiers for k, v in m.options.items()}
    batch, plain = pairs(), create_loss(name)
    expected, gradients = values_and_gradients(plain, batch)
    around = [lambda b, f=f, o=o: f.function(plain, b, **o) for f, o in switched(name, OFF)]
    for loss in (create_loss(name, **options), *around):
        out, found = values_and_gradients(loss, batch)
        assert torch.equal(out.loss, expected.loss)
        assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))
        assert all(torch.equal(v, out.metrics[k]) for k, v in expected.metrics.items())


def switched(name: str, values: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """The modifiers of a loss whose option has a value here."""
    found = [(m, {k: values[k] for k in m.options if k in values}) for m in entry_of(name).modifiers]
    return [(modifier, given) for modifier, given in found if given]


@pytest.mark.parametrize("name", PAIRWISE)
def test_contract_with_all_modifiers_at_once(name: str) -> None:
    """One at a time they are tried by the contract itself (``modifiers_keep_contract``)."""
    options = {k: v for m in entry_of(name).modifiers for k, v in ON[m.name].items()}
    assert len(create_loss(name, **options).modifiers) == len(entry_of(name).modifiers)
    check_loss(name, **options)


ALONE: list[tuple[str, dict[str, Any]]] = [
    ("dpo", {"wpo": True}),
    ("hinge", {"wpo": True}),  # TRL 1.16 fails in its backward pass
    ("ipo", {"wpo": True}),
    ("simpo", {"wpo": True}),
    ("dpo", {"divergence": "forward_kl"}),
    ("dpo", {"divergence": "alpha", "divergence_alpha": 0.3}),
    ("dpo", {"divergence": "alpha", "divergence_alpha": 1.5, "alpha_convention": "trl"}),
    ("ipo_sum", {"divergence": "forward_kl"}),  # the square of the score must stay finite
    ("ipo", {"divergence": "alpha", "divergence_alpha": 2.0}),
    ("discopop", {"divergence": "forward_kl"}),
    ("dpo", {"ld_alpha": 0.0}),
    ("cpo", {"nll": 0.0}),
    ("orpo", {"likelihood": "all"}),
    ("alphapo", {"alpha": -0.5, "label_smoothing": 0.1}),
    ("tdpo2", {"alpha": 2.0}),
]


@pytest.mark.parametrize(("name", "options"), ALONE)
def test_contract_of_variants(name: str, options: dict[str, Any]) -> None:
    check_loss(name, **options)


@pytest.mark.parametrize(
    ("check", "options"),
    [
        ("reference_shift", {"nll": 0.3}),
        ("side_shift", {"nll": 0.3}),
        ("reference_shift", {"wpo": True}),
        ("side_shift", {"wpo": True}),
        ("side_shift", {"divergence": "js"}),
    ],
)
def test_what_a_modifier_may_break_it_breaks(check: str, options: dict[str, Any]) -> None:
    with pytest.raises(ContractError):
        CHECKS[check](create_loss("dpo", **options))


# -- label smoothing --------------------------------------------------------------------------------------------------

SPLITS = [n for n in taking("label_smoothing") if not LOSSES.entry(n).tags["whole_batch"]]


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("epsilon", [0.5, 0.2, 1.0])
def test_smoothing_is_symmetric_in_the_sides(name: str, epsilon: float) -> None:
    """At ½ nobody knows which side is better; a smoothing of ε is one of 1 - ε on exchanged sides."""
    batch = pairs()
    loss = create_loss(name, label_smoothing=epsilon)
    mirrored = create_loss(name, label_smoothing=1 - epsilon)
    same(loss(batch).loss, mirrored(batch.swapped()).loss)


def test_smoothing_of_a_margin_keeps_the_margin() -> None:
    """SimPO's own smoothing acts on the logit; where the margin is 0 it is that of the exchanged sides."""
    batch = pairs()
    for name in ("simpo", "alphapo"):
        plain = create_loss(name, gamma=0.0)
        mixed = 0.9 * plain(batch).loss + 0.1 * plain(batch.swapped()).loss
        same(create_loss(name, gamma=0.0, label_smoothing=0.1)(batch).loss, mixed)
        half = create_loss(name, gamma=0.7, label_smoothing=0.5)
        assert not torch.allclose(half(batch).loss, half(batch.swapped()).loss)


# -- likelihood -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", taking("nll"))
def test_nll_adds_the_likelihood_of_the_chosen_side_and_nothing_else(name: str) -> None:
    batch = pairs()
    out, gradients = values_and_gradients(create_loss(name, nll=0.3), batch)
    plain, plain_gradients = values_and_gradients(create_loss(name), batch)
    mean_B = masked_sum(-batch.chosen_logps_BT, batch.chosen_mask_BT) / batch.chosen_len_B
    same(out.loss, plain.loss + 0.3 * mean_B)
    pull_BT = torch.where(batch.chosen_mask_BT, -0.3 / batch.chosen_len_B[:, None].double(), 0.0)
    same(gradients[0], plain_gradients[0] + pull_BT)
    same(gradients[1], plain_gradients[1])


def test_nll_is_the_term_chosen_nll_by_rows_and_not_by_tokens() -> None:
    batch = pairs(rows=7)
    out, plain, term = (create_loss(n, **o)(batch).loss for n, o in [("dpo", {"nll": 0.3}), ("dpo", {}), (TERM, {})])
    added = (out - plain).mean()
    same(added, 0.3 * Count("row").mean(term, batch.chosen_mask_BT))
    assert not torch.allclose(added, 0.3 * Count("token").mean(term, batch.chosen_mask_BT), rtol=1e-3)


TERM = "chosen_nll"


@pytest.mark.parametrize(
    ("name", "plain", "options"),
    [
        ("rpo_nll", "dpo", {"beta": 0.3}),
        ("cpo_simpo", "simpo", {"beta": 1.5, "gamma": 0.4}),
    ],
)
def test_names_of_losses_with_a_likelihood_term(name: str, plain: str, options: dict[str, Any]) -> None:
    batch = pairs()
    for weight in (0.0, 0.7):
        same(
            create_loss(name, nll=weight, **options)(batch).loss, create_loss(plain, nll=weight, **options)(batch).loss
        )


@pytest.mark.parametrize(("name", "unit"), [("cpo", "row_sum"), ("cpo_hinge", "row_sum"), ("slic_hf", "row_sum"),
                                            ("cpo_ipo", "row"), ("cpo_simpo", "row"), ("orpo", "row")])  # fmt: skip
def test_own_likelihood_terms_are_sums_or_means(name: str, unit: Any) -> None:
    """By which count of ``chosen_nll`` the term inside the loss would be written beside it."""
    batch = pairs(rows=7)
    inside = (create_loss(name, nll=0.7)(batch).loss - create_loss(name, nll=0.0)(batch).loss).mean()
    same(inside, 0.7 * Count(unit).mean(create_loss("chosen_nll")(batch).loss, batch.chosen_mask_BT))


# -- length desensitisation -------------------------------------------------------------------------------------------


def longer_than_the_other(batch: Pairs) -> dict[str, Tensor]:
    """The tokens beyond the length of the shorter side, counted one by one."""
    found = {}
    for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
        mask_BT, other_BT = batch.tensors()[f"{side}_mask_BT"], batch.tensors()[f"{other}_mask_BT"]
        beyond = [
            [inside and sum(row[: t + 1]) > sum(shorter) for t, inside in enumerate(row)]
            for row, shorter in zip(mask_BT.tolist(), other_BT.tolist(), strict=True)
        ]
        found[side] = torch.tensor(beyond)
    return found


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["dpo", "ipo_sum", "nca_pair", "apo_down"])
def test_ld_alpha_0_is_the_loss_of_the_common_length(name: str, seed: int) -> None:
    batch = pairs(seed, rows=8)
    beyond = longer_than_the_other(batch)
    assert all(bool(b.any()) for b in beyond.values()), "the record shows both cases"
    cut = {f"{side}_mask_BT": batch.tensors()[f"{side}_mask_BT"] & ~beyond[side] for side in beyond}
    expected, gradients = values_and_gradients(create_loss(name), dataclasses.replace(batch, **cut))
    out, found = values_and_gradients(create_loss(name, ld_alpha=0.0), batch)
    same(out.loss, expected.loss)
    for side, gradient_BT, expected_BT in zip(("chosen", "rejected"), found, gradients, strict=False):
        same(gradient_BT, expected_BT)
        assert bool((gradient_BT[beyond[side]] == 0).all())


@pytest.mark.parametrize("seed", SEEDS)
def test_the_log_ratio_is_linear_in_ld_alpha_and_lengths_stay(seed: int) -> None:
    batch = pairs(seed, rows=8)
    ratio = lambda b: LossOut(torch.stack([b.chosen_ratio_B, b.rejected_ratio_B]))  # noqa: E731
    lengths = lambda b: LossOut(torch.stack([b.chosen_len_B, b.rejected_len_B]))  # noqa: E731
    none, some, all_ = (modifiers.length_desensitised(ratio, batch, ld_alpha=alpha).loss for alpha in (0.0, 0.3, 1.0))
    same(some, 0.7 * none + 0.3 * all_)
    same(all_, ratio(batch).loss)
    assert torch.equal(modifiers.length_desensitised(lengths, batch, ld_alpha=0.3).loss, lengths(batch).loss)


# -- WPO --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", taking("wpo"))
def test_wpo_multiplies_loss_and_gradient_by_a_constant(name: str) -> None:
    batch = pairs()
    out, gradients = values_and_gradients(create_loss(name, wpo=True), batch)
    plain, plain_gradients = values_and_gradients(create_loss(name), batch)
    weight_B = out.metrics["wpo/weight"]
    same(out.loss, weight_B * plain.loss)
    for gradient_BT, expected_BT in zip(gradients, plain_gradients, strict=True):
        same(gradient_BT, weight_B[:, None] * expected_BT)
    assert not bool(gradients[2].any() or gradients[3].any()), "log Σ p² is a constant"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_token_that_the_policy_samples_has_weight_1_on_average(seed: int) -> None:
    """E[p / Σ p²] = 1; a policy that is certain or uniform gives weight 1 to each token that it samples."""
    generator = torch.Generator().manual_seed(seed)
    for logits in (torch.randn(7, generator=generator, dtype=torch.float64), torch.zeros(7).double()):
        logp_V = logits.log_softmax(0)
        weight_V = weights_of_single_tokens(logp_V)
        same((logp_V.exp() * weight_V).sum(), torch.tensor(1.0).double())
    same(weight_V, torch.ones(7).double())  # the uniform one
    certain = torch.tensor([0.0, -40.0]).double().log_softmax(0)
    same(weights_of_single_tokens(certain)[0], torch.tensor(1.0).double())


def weights_of_single_tokens(logp_V: Tensor) -> Tensor:
    """The weight of pairs whose chosen side is one token, once for every token; the rejected side is empty."""
    x_BT = logp_V[:, None]
    mask_BT = torch.ones_like(x_BT, dtype=torch.bool)
    log_sq_BT = (2 * logp_V).logsumexp(0).expand_as(x_BT)
    batch = Pairs(
        chosen_logps_BT=x_BT, chosen_mask_BT=mask_BT, chosen_log_sq_BT=log_sq_BT,
        rejected_logps_BT=x_BT, rejected_mask_BT=~mask_BT, rejected_log_sq_BT=log_sq_BT,
    )  # fmt: skip
    return pair_weight(batch)


def test_the_weight_of_a_pair_is_that_of_its_sides_and_knows_no_order() -> None:
    batch = pairs()
    same(pair_weight(batch), pair_weight(batch.swapped()))
    empty = {"chosen": torch.zeros_like(batch.chosen_mask_BT), "rejected": torch.zeros_like(batch.rejected_mask_BT)}
    sides = [pair_weight(dataclasses.replace(batch, **{f"{s}_mask_BT": m})) for s, m in empty.items()]
    same(pair_weight(batch), sides[0] * sides[1])


# -- divergences ------------------------------------------------------------------------------------------------------

GENERATORS: dict[str, Any] = {  # f of D_f(π ‖ ref) = E_ref f(π / ref)
    "reverse_kl": lambda u, a: u * u.log(),
    "forward_kl": lambda u, a: -u.log(),
    "js": lambda u, a: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
    "alpha": lambda u, a: (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1)),
}


@pytest.mark.parametrize("divergence", GENERATORS)
@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8, -0.5, 2.0])
def test_the_score_is_the_derivative_of_the_generator(divergence: Any, alpha: float) -> None:
    """f'(π/ref) as a function of log π/ref, less its value at 1."""
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    u = torch.cat([x.exp(), torch.ones(1).double()]).requires_grad_()
    (slope,) = torch.autograd.grad(GENERATORS[divergence](u, alpha).sum(), u)
    same(divergence_score(x, divergence, alpha), slope[:-1] - slope[-1])


@pytest.mark.parametrize(("divergence", "slope"), [("reverse_kl", 1), ("forward_kl", 1), ("js", 0.5), ("alpha", 1)])
@pytest.mark.parametrize("alpha", [0.3, 0.7, -0.5])
def test_divergences_agree_near_the_reference(divergence: Any, slope: float, alpha: float) -> None:
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    score = divergence_score(x, divergence, alpha)
    assert score.item() == 0
    assert float(torch.autograd.grad(score, x)[0]) == pytest.approx(slope)


def test_alpha_joins_reverse_and_forward_kl() -> None:
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    for alpha, limit in ((0.0, "reverse_kl"), (1.0, "forward_kl")):
        assert torch.equal(divergence_score(x, "alpha", alpha), divergence_score(x, limit))  # type: ignore[arg-type]
        near = divergence_score(x, "alpha", alpha + 1e-7)
        torch.testing.assert_close(near, divergence_score(x, limit), rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", taking("divergence"))
@pytest.mark.parametrize("alpha", [0.25, 1.5])
def test_the_two_conventions_of_alpha_are_mirrored(name: str, alpha: float) -> None:
    batch = pairs()
    trl = create_loss(name, divergence="alpha", divergence_alpha=alpha, alpha_convention="trl")
    same(trl(batch).loss, create_loss(name, divergence="alpha", divergence_alpha=1 - alpha)(batch).loss)
    middle = [create_loss(name, divergence="alpha", alpha_convention=c)(batch).loss for c in ("paper", "trl")]
    same(*middle)


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
@pytest.mark.parametrize("seed", SEEDS)
def test_dpo_rests_at_the_optimum_of_its_divergence(divergence: Any, seed: int) -> None:
    """At max E r - β D_f(π ‖ ref) over four answers, the gradient of DPO over all Bradley-Terry pairs is 0.

    There f'(π/ref) = (r - λ) / β, whose λ makes π sum to 1; the answers are rows of one token.
    """
    generator = torch.Generator().manual_seed(seed)
    rewards, ref = torch.randn(4, generator=generator).double(), torch.randn(4, generator=generator).double()
    ref, beta = ref.log_softmax(0), 1.0
    inverse = {  # of f', as log π/ref; for alpha at its default, 1/2
        "forward_kl": lambda s: -torch.log(-s),
        "js": lambda s: torch.log(s.exp() / (2 - s.exp())),
        "alpha": lambda s: -2 * torch.log(-s / 2),
    }[divergence]
    top = math.log(2.0) if divergence == "js" else 0.0  # scores stay below it
    low, high = float(rewards.max()) - beta * top, float(rewards.max()) + 100.0
    for _ in range(200):
        multiplier = (low + high) / 2
        mass = float((ref + inverse((rewards - multiplier) / beta)).exp().sum())
        low, high = (multiplier, high) if not mass < 1 else (low, multiplier)
    policy = (ref + inverse((rewards - high) / beta)).detach()
    assert float(policy.exp().sum()) == pytest.approx(1, abs=1e-9)

    w, l = (index.flatten() for index in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))  # noqa: E741
    logits = policy.clone().requires_grad_()
    logp, mask_BT = logits.log_softmax(0), torch.ones(16, 1, dtype=torch.bool)
    batch = Pairs(
        chosen_logps_BT=logp[w, None], ref_chosen_logps_BT=ref[w, None], chosen_mask_BT=mask_BT,
        rejected_logps_BT=logp[l, None], ref_rejected_logps_BT=ref[l, None], rejected_mask_BT=mask_BT,
    )  # fmt: skip
    loss_B = create_loss("dpo", beta=beta, divergence=divergence)(batch).loss
    prefers_B = torch.sigmoid(rewards[w] - rewards[l])
    (gradient,) = torch.autograd.grad((prefers_B * loss_B).sum(), logits)
    same(gradient, torch.zeros(4).double(), 1e-8)


def test_scored_pairs_carry_everything_and_can_be_exchanged() -> None:
    batch = pairs()
    scored = ScoredPairs.of(batch, "forward_kl", 0.5)
    assert all(torch.equal(v, scored.tensors()[k]) for k, v in batch.tensors().items())
    other = scored.swapped()
    assert isinstance(other, ScoredPairs)
    same(other.chosen_ratio_B, scored.rejected_ratio_B)
    same(other.chosen_ratio_B, ScoredPairs.of(batch.swapped(), "forward_kl", 0.5).chosen_ratio_B)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", taking("divergence"))
def test_scores_of_very_unlikely_completions_stay_finite(name: str, dtype: torch.dtype) -> None:
    batch = pairs(dtype=dtype)
    far = dataclasses.replace(batch, ref_rejected_logps_BT=batch.rejected_logps_BT + 500)
    for divergence in ("forward_kl", "alpha", "js"):
        out, gradients = values_and_gradients(create_loss(name, divergence=divergence), far)
        assert bool(out.loss.isfinite().all()) and all(bool(g.isfinite().all()) for g in gradients)


# -- which lies outside -----------------------------------------------------------------------------------------------


def test_from_outside_in() -> None:
    names = ["wpo", "nll", "label_smoothing", "length_desensitised", "divergence"]
    assert [m.name for m in entry_of("dpo").modifiers] == names


def test_what_the_order_means() -> None:
    batch = pairs()

    def loss(**options: Any) -> Tensor:
        return create_loss("dpo", beta=0.5, **options)(batch).loss

    nll_B = loss(nll=1.0) - loss()
    inner = {"label_smoothing": 0.2, "ld_alpha": 0.4, "divergence": "js"}
    same(loss(nll=0.3, **inner), loss(**inner) + 0.3 * nll_B)  # neither smoothed, nor cut, nor bent
    same(loss(wpo=True, nll=0.3), pair_weight(batch) * loss(nll=0.3))  # weighted with the pair
    both = modifiers.length_desensitised(lambda b: LossOut(b.chosen_ratio_B), batch, ld_alpha=0.4).loss
    bent = create_loss("dpo", beta=0.5, ld_alpha=0.4, divergence="js")(batch).metrics["rewards/chosen"]
    same(bent, 0.5 * divergence_score(both, "js"))  # the score of the weighted log-ratio


# -- reference-free losses and those of tokens ------------------------------------------------------------------------


def test_limits_of_alphapo_and_of_its_shape() -> None:
    batch = pairs()
    assert torch.equal(create_loss("alphapo", alpha=0.0)(batch).loss, create_loss("simpo")(batch).loss)
    near = create_loss("alphapo", alpha=1e-6)(batch).loss
    torch.testing.assert_close(near, create_loss("simpo")(batch).loss, rtol=1e-4, atol=1e-4)
    p = torch.tensor([0.9, 0.5, 0.01], dtype=torch.float64)
    for alpha in (0.25, -0.5, 1.0):
        same(deformed(p.log(), alpha), (1 - p**-alpha) / alpha)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_odds_near_certainty(dtype: torch.dtype) -> None:
    """log(p / (1 - p)) = log p - log(-expm1(log p)), its slope 1 / (1 - p); both finite up to p = 1 itself."""
    values = [-500.0, -30.0, -0.7, -1e-3, -1e-9, -1e-30, 0.0]
    x = torch.tensor(values, dtype=dtype, requires_grad=True)
    odds = log_odds(x)
    (slope,) = torch.autograd.grad(odds.sum(), x)
    odds = odds.detach()
    assert bool(odds.isfinite().all() and slope.isfinite().all()) and bool((odds.diff() > 0)[:-1].all())
    assert bool(slope.square().isfinite().all())  # as the norm of a gradient and Adam take it
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for i, value in enumerate(x.tolist()[:5]):
        assert float(odds[i]) == pytest.approx(value - math.log(-math.expm1(value)), rel=tolerance, abs=tolerance)
        assert float(slope[i]) == pytest.approx(-1 / math.expm1(value), rel=tolerance)


def test_orpo_without_an_effect_or_a_prompt_says_so() -> None:
    batch = pairs()
    with pytest.raises(UsageError, match="no effect with nll=0"):
        create_loss("orpo", likelihood="all", nll=0.0)(batch)
    loss = create_loss("orpo", likelihood="all")
    assert loss.extras == ("prompt_logps_BT", "prompt_mask_BT") and create_loss("orpo").extras == ()
    with pytest.raises(UsageError, match="prompt_mask_BT"):
        loss(dataclasses.replace(batch, prompt_mask_BT=None))
    none = dataclasses.replace(batch, prompt_mask_BT=torch.zeros_like(batch.prompt_mask_BT))
    same(loss(none).loss, create_loss("orpo")(none).loss)  # an empty prompt


def test_hinges_are_one_loss_in_two_units() -> None:
    """cpo_hinge is slic_hf divided by its margin."""
    batch = pairs(rows=12)
    for margin in (1.0, 4.0):
        slic, hinge = create_loss("slic_hf", delta=margin, nll=0.0), create_loss("cpo_hinge", beta=1 / margin, nll=0.0)
        same(slic(batch).loss, margin * hinge(batch).loss)


def test_cpo_is_dpo_with_a_uniform_reference() -> None:
    """A reference that gives every token the same probability, for sides of one length."""
    batch = pairs()
    mask_BT = batch.chosen_mask_BT
    wide_BT = torch.cat([mask_BT, torch.zeros_like(mask_BT[:, :1])], 1)
    flat = {
        f"ref_{s}_logps_BT": torch.full_like(batch.tensors()[f"{s}_logps_BT"], -1.3) for s in ("chosen", "rejected")
    }
    even = dataclasses.replace(batch, rejected_mask_BT=wide_BT, **flat)
    same(create_loss("cpo", beta=0.3, nll=0.0)(even).loss, create_loss("dpo", beta=0.3)(even).loss)


@pytest.mark.parametrize("seed", SEEDS)
def test_tdpo_and_its_stop_gradient(seed: int) -> None:
    """tdpo2 at α = 1 has the value of tdpo1 and no gradient in the chosen side's KL; at α = 0 it is DPO."""
    batch = pairs(seed)
    same(create_loss("tdpo2", alpha=1.0)(batch).loss, create_loss("tdpo1")(batch).loss)
    assert torch.equal(create_loss("tdpo2", alpha=0.0)(batch).loss, create_loss("dpo")(batch).loss)
    none = {f"{side}_kl_BT": torch.zeros_like(batch.tensors()[f"{side}_kl_BT"]) for side in ("chosen", "rejected")}
    same(create_loss("tdpo1")(dataclasses.replace(batch, **none)).loss, create_loss("dpo")(batch).loss)
    pulls = {}
    for name in ("tdpo1", "tdpo2"):
        leaves = {k: batch.tensors()[k].clone().requires_grad_() for k in none}
        total = create_loss(name)(dataclasses.replace(batch, **leaves)).loss.sum()
        pulls[name] = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    assert bool((pulls["tdpo1"][0][batch.chosen_mask_BT] < 0).all())  # rewards leaving the reference
    assert not bool(pulls["tdpo2"][0].any())
    for name in pulls:
        assert bool((pulls[name][1][batch.rejected_mask_BT] > 0).all())


def test_step_dpo_sees_the_step_alone() -> None:
    batch = pairs()
    masks = {f"{s}_mask_BT": batch.tensors()[f"{s}_step_BT"] & batch.tensors()[f"{s}_mask_BT"] for s in
             ("chosen", "rejected")}  # fmt: skip
    same(create_loss("step_dpo")(batch).loss, create_loss("dpo")(dataclasses.replace(batch, **masks)).loss)
    everything = {k.replace("mask", "step"): torch.ones_like(v) for k, v in masks.items()}
    same(create_loss("step_dpo")(dataclasses.replace(batch, **everything)).loss, create_loss("dpo")(batch).loss)
    with pytest.raises(UsageError, match="rejected_step_BT"):
        create_loss("step_dpo")(dataclasses.replace(batch, rejected_step_BT=None))


def test_tpo_adds_the_gold_completion() -> None:
    batch = pairs()
    loss: Loss = create_loss("tpo", beta=0.3, alpha=0.7)
    gold = dataclasses.replace(
        batch, chosen_logps_BT=batch.gold_logps_BT, chosen_mask_BT=batch.gold_mask_BT, chosen_step_BT=None,
        chosen_log_sq_BT=None, chosen_kl_BT=None, ref_chosen_logps_BT=None,
    )  # fmt: skip
    comparison = create_loss("cpo", beta=0.3, nll=0.0)(batch).loss
    same(loss(batch).loss, comparison + 0.7 * modifiers.mean_nll(gold))
    with pytest.raises(UsageError, match="gold_logps_BT"):
        loss(dataclasses.replace(batch, gold_logps_BT=None))
