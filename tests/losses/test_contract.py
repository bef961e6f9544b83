"""The loss contract over the whole registry, and proof that each check can fail."""

from __future__ import annotations

import doctest
import importlib.util
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prefzoo.contract import UNDECLARED_CONTRAST, modes
from prefzoo.losses.base import LOSSES, MODIFIERS, Loss, create_loss, register_loss, register_modifier
from prefzoo.losses.kl import KL_ESTIMATORS
from prefzoo.losses.numerics import safe_exp
from prefzoo.losses.unpaired import kto_baseline
from prefzoo.parts.count import Count
from prefzoo.records import (
    FAMILIES,
    Distribution,
    Likelihood,
    LossOut,
    Pairs,
    PolicyGradient,
    Ranked,
    RankedScores,
    Ratings,
    Record,
    Scores,
    StepScores,
    Unpaired,
    Values,
    masked_mean,
    masked_sum,
)
from prefzoo.registry import UsageError
from prefzoo.testing import CHECKS, ContractError, check_loss, is_trained, loss_checks, random_record

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registrations of a test do not outlive it."""
    for registry in (LOSSES, MODIFIERS):
        registry.names()  # load our own first
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
        monkeypatch.setattr(registry, "_aliases", dict(registry._aliases))


# -- every registered loss keeps the contract -------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES.names())
def test_contract(name: str) -> None:
    results = check_loss(name)
    assert set(results) == set(CHECKS)
    assert UNDECLARED_CONTRAST not in results["side_shift"]


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("dpo", {"beta": 5.0}),
    ("kto", {"undesirable_weight": 1.33}),
    ("bradley_terry", {"label_smoothing": 0.1, "centering": 0.01}),
    ("clipped_surrogate", {"clip_high": 0.28}),
    ("clipped_surrogate", {"dual_clip": 3.0}),
    ("clipped_value", {"clip": None}),
    *[("kl_penalty", {"estimator": k}) for k in KL_ESTIMATORS],
    *[("kl_penalty", {"estimator": k, "importance": True}) for k in ("k1", "k2", "k3", "abs")],
]


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_contract_of_variants(name: str, options: dict[str, Any]) -> None:
    check_loss(name, **options)


@pytest.mark.parametrize("name", LOSSES.names())
def test_contract_of_every_mode(name: str) -> None:
    """Every other name of a choice, every switch turned, every number where the default is none."""
    loss = create_loss(name)
    for option, default in loss.entry.own_options.items():
        if not isinstance(default, float | int) or isinstance(default, bool):
            for mode in itertools.islice(modes(loss, option), None if isinstance(default, str) else 1):
                for check in loss_checks(mode):
                    if check.name != "modifiers_keep_contract":
                        check()


# -- each check can fail: one deliberately broken loss or more per check ----------------------------------------------

BROKEN: list[tuple[str, str, Callable[..., LossOut], dict[str, Any]]] = []


def breaks(check: str, words: str, **tags: Any) -> Callable[[Callable[..., LossOut]], Callable[..., LossOut]]:
    """The decorated loss must be caught by that check, with those words in the message."""

    def keep(function: Callable[..., LossOut]) -> Callable[..., LossOut]:
        BROKEN.append((check, words, function, tags))
        return function

    return keep


def margin(batch: Pairs) -> Tensor:
    return batch.chosen_ratio_B - batch.rejected_ratio_B


@breaks("unreduced", "Was it averaged")
def reduced(batch: Pairs) -> LossOut:
    return LossOut(-F.logsigmoid(margin(batch)).mean())


@breaks("unreduced", "return LossOut")
def bare_tensor(batch: Pairs) -> LossOut:
    return -F.logsigmoid(margin(batch))  # type: ignore[return-value]


@breaks("unreduced", "expected (5, 4)")
def token_loss_summed(batch: PolicyGradient) -> LossOut:
    return LossOut(-masked_sum(batch.logps_BT * batch.advantages_BT.detach(), batch.mask_BT))


@breaks("unreduced", "float32 tensor")
def float32_constant(batch: Pairs) -> LossOut:
    return LossOut(-F.logsigmoid(margin(batch).float()))


@breaks("metrics_detached", "Add .detach()")
def live_metric(batch: Pairs) -> LossOut:
    return LossOut(-F.logsigmoid(margin(batch)), {"margins": margin(batch)})


@breaks("metrics_detached", "one value per row")
def reduced_metric(batch: Pairs) -> LossOut:
    return LossOut(-F.logsigmoid(margin(batch)), {"margins": margin(batch).detach().mean()})


@breaks("metrics_detached", "one value per row")
def number_metric(batch: Pairs) -> LossOut:
    return LossOut(-F.logsigmoid(margin(batch)), {"margins": 0.0})  # type: ignore[dict-item]


@breaks("pure", "wrote into its input")
def writes_input(batch: Pairs) -> LossOut:
    assert batch.margin_B is not None
    return LossOut(-F.logsigmoid(margin(batch) - batch.margin_B.mul_(0.5)))


@breaks("pure", "two calls")
def draws_noise(batch: Pairs) -> LossOut:
    return LossOut(-F.logsigmoid(margin(batch)) + torch.rand(len(batch.chosen_B)))


@breaks("gradient_reaches_policy", "no gradient reaches")
def all_detached(batch: Pairs) -> LossOut:
    return LossOut(-F.logsigmoid(margin(batch).detach()))


@breaks("gradient_stays_in_policy", "ref_chosen_logps_BT.detach()")
def leaks_to_reference(batch: Pairs) -> LossOut:
    assert batch.ref_chosen_logps_BT is not None
    ratio_B = masked_sum(batch.chosen_logps_BT - batch.ref_chosen_logps_BT, batch.chosen_mask_BT)
    return LossOut(-F.logsigmoid(ratio_B))


@breaks("gradient_stays_in_policy", "advantages_BT.detach()", reference=False)
def leaks_to_advantages(batch: PolicyGradient) -> LossOut:
    return LossOut(-batch.logps_BT * batch.advantages_BT)


@breaks("gradient_stays_in_policy", "baseline.detach()")
def leaks_to_baseline(batch: Unpaired) -> LossOut:
    assert batch.baseline is not None
    return LossOut(torch.sigmoid(batch.baseline - batch.ratio_B))


@breaks("row_permutation", "permuting")
def rolls_rows(batch: Pairs) -> LossOut:
    return LossOut(-F.logsigmoid(batch.chosen_ratio_B - batch.rejected_ratio_B.roll(1)))


@breaks("halves_equal_whole", "rows are coupled")
def centres_over_batch(batch: Pairs) -> LossOut:
    return LossOut(-F.logsigmoid(margin(batch) - margin(batch).mean()))


@breaks("halves_equal_whole", "rows are coupled")
def gradient_couples_rows(batch: Pairs) -> LossOut:
    """Its value is right; its gradient is that of another row's mean."""
    mean = margin(batch).mean()
    return LossOut(-F.logsigmoid(margin(batch)) + mean - mean.detach())


@breaks("masked_cells", "changes the loss")
def sums_padding(batch: Unpaired) -> LossOut:
    return LossOut(-batch.logps_BT.sum(-1), {"rewards": batch.ratio_B.detach()})


@breaks("masked_cells", "changes the gradient")
def masks_too_late(batch: PolicyGradient) -> LossOut:
    ratio_BT = (batch.logps_BT - batch.old_logps_BT.detach()).exp()
    return LossOut(torch.where(batch.mask_BT, -ratio_BT * batch.advantages_BT.detach(), 0.0))


@breaks("padding", "divides by T")
def divides_by_width(batch: Unpaired) -> LossOut:
    return LossOut(-torch.where(batch.mask_BT, batch.logps_BT, 0.0).mean(-1))


@breaks("empty_row", "NaN or infinity")
def divides_by_nothing(batch: Unpaired) -> LossOut:
    return LossOut(-masked_sum(batch.logps_BT, batch.mask_BT) / batch.mask_BT.sum(-1))


@breaks("zero_advantage", "added, not multiplied")
def adds_advantage(batch: PolicyGradient) -> LossOut:
    return LossOut(-batch.logps_BT - batch.advantages_BT.detach())


@breaks("on_policy", "Is a sign wrong")
def wrong_sign(batch: PolicyGradient) -> LossOut:
    return LossOut(batch.logps_BT * batch.advantages_BT.detach())


@breaks("on_policy", "Is a sign wrong")
def only_first_token(batch: PolicyGradient) -> LossOut:
    weight_T = torch.arange(batch.logps_BT.shape[1]) + 1
    return LossOut(-weight_T * batch.logps_BT * batch.advantages_BT.detach())


@breaks("reference_shift", "likelihood term")
def with_likelihood(batch: Pairs) -> LossOut:
    return LossOut(-F.logsigmoid(margin(batch)) - batch.chosen_B)


@breaks("finite_at_extremes", "logsigmoid")
def log_of_sigmoid(batch: Pairs) -> LossOut:
    return LossOut(-torch.log(torch.sigmoid(margin(batch))))


@breaks("finite_at_extremes", "safe_exp")
def plain_exp(batch: Pairs) -> LossOut:
    return LossOut((-margin(batch)).exp())


@breaks("finite_at_extremes", "the gradient of")
def infinite_branch(batch: Pairs) -> LossOut:
    """Its value is finite: the gradient of the branch not taken is 0 * infinity."""
    x_B = margin(batch)
    return LossOut(torch.where(x_B > 50, x_B, x_B.exp().log1p()))


@breaks("low_precision", "rounded to float32")
def where_of_two_numbers(batch: Pairs) -> LossOut:
    return LossOut(-F.logsigmoid(margin(batch)) * torch.where(margin(batch) > 0, 0.7, 0.3))


@breaks("low_precision", "rounded to float32")
def share_of_counts(batch: Pairs) -> LossOut:
    share_B = batch.chosen_len_B / (batch.chosen_len_B + batch.rejected_len_B)
    return LossOut(-F.logsigmoid(margin(batch)) * share_B)


@breaks("low_precision", "cancel")
def cancels(batch: Pairs) -> LossOut:
    return LossOut((margin(batch) + 1e4) - 1e4)


@breaks("needs_are_told", "Declare the need")
def needs_margin(batch: Pairs) -> LossOut:
    return LossOut(-F.logsigmoid(margin(batch) - batch.margin_B))  # type: ignore[operator]


@breaks("needs_are_told", "reference=True", reference=False)
def hides_reference(batch: PolicyGradient) -> LossOut:
    return LossOut(0.5 * (batch.logps_BT - batch.ref_logps_BT.detach()).square())  # type: ignore[union-attr]


@breaks("needs_are_used", "reference=False")
def idle_reference(batch: Pairs) -> LossOut:
    return LossOut(-F.logsigmoid(batch.chosen_B - batch.rejected_B))


@breaks("options_have_effect", "option 'gamma' changes nothing")
def ignores_option(batch: Pairs, *, beta: float = 0.1, gamma: float = 0.5) -> LossOut:
    return LossOut(-F.logsigmoid(beta * margin(batch)))


@breaks("options_have_effect", "option 'clip' changes nothing")
def ignores_none(batch: Pairs, *, clip: float | None = None) -> LossOut:
    return LossOut(-F.logsigmoid(margin(batch)))


@breaks("options_have_effect", "option 'clip' changes nothing")
def refuses_some_ignores_rest(batch: Pairs, *, clip: float | None = None) -> LossOut:
    if clip is not None and clip < 1:
        raise UsageError("clip must be at least 1")
    return LossOut(-F.logsigmoid(margin(batch)))


# -- the symmetries that a family promises


@breaks("masked_cells", "not valid")
def counts_absent_completions(batch: Ranked) -> LossOut:
    sum_PK = masked_sum(batch.logps_PKT, batch.mask_PKT)
    return LossOut(-sum_PK[:, 0] + sum_PK.logsumexp(-1), {"rewards": batch.ratio_PK[:, 0].detach()})


@breaks("padding", "valid_PK.sum")
def divides_by_places(batch: Ranked) -> LossOut:
    return LossOut((batch.ratio_PK[:, 1:].sum(-1) - batch.ratio_PK[:, 0]) / batch.ratio_PK.shape[1])


@breaks("empty_row", "NaN or infinity", reference=False)
def divides_by_nobody(batch: RankedScores) -> LossOut:
    rewards_PK = torch.where(batch.valid_PK, batch.rewards_PK, 0.0)
    return LossOut(-(rewards_PK[:, 0] - rewards_PK[:, 1]) / (batch.valid_PK.sum(-1) - 1))


@breaks("advantage_scale", "Multiply by it", reference=False)
def bounded_advantage(batch: PolicyGradient) -> LossOut:
    return LossOut(-batch.logps_BT * batch.advantages_BT.detach().clamp(-0.5, 0.5))


@breaks("advantage_scale", "Multiply by it", reference=False)
def squared_advantage(batch: PolicyGradient) -> LossOut:
    advantages_BT = batch.advantages_BT.detach()
    return LossOut(-batch.logps_BT * advantages_BT * advantages_BT.abs())


@breaks("ratio_shift", "missing in an exponent", reference=False)
def probability_for_ratio(batch: PolicyGradient) -> LossOut:
    return LossOut(-safe_exp(batch.logps_BT) * batch.advantages_BT.detach())


@breaks("side_shift", "Is a side scaled", contrast=True)
def halves_one_side(batch: Pairs) -> LossOut:
    return LossOut(-F.logsigmoid(batch.chosen_ratio_B - 0.5 * batch.rejected_ratio_B))


@breaks("side_shift", "Is a side scaled", contrast=True)
def live_baseline(batch: Pairs) -> LossOut:
    """Its value is that of a contrast; its gradient is not."""
    extra_B = batch.chosen_ratio_B * batch.rejected_ratio_B
    return LossOut(-F.logsigmoid(margin(batch)) + extra_B - extra_B.detach())


@breaks("swap", "which answer was written first", contrast=True, extras=("probability_B",))
def weighs_one_side(batch: Pairs) -> LossOut:
    assert batch.probability_B is not None
    return LossOut(-batch.probability_B * F.logsigmoid(margin(batch)))


@breaks("swap", "which answer was written first", extras=("probability_B",))
def weighs_one_score(batch: Scores) -> LossOut:
    assert batch.probability_B is not None
    return LossOut(-batch.probability_B * F.logsigmoid(batch.chosen_B - batch.rejected_B))


@breaks("reward_shift", "chosen_B and rejected_B")
def ratio_of_rewards(batch: Scores) -> LossOut:
    return LossOut(-F.logsigmoid(batch.chosen_B - 0.9 * batch.rejected_B))


@breaks("reward_shift", "rewards_PK")
def squared_rewards(batch: RankedScores) -> LossOut:
    rewards_PK = torch.where(batch.valid_PK, batch.rewards_PK, 0.0)
    return LossOut(rewards_PK.square().sum(-1) - rewards_PK[:, 0])


@breaks("reward_shift", "log_softmax")
def distance_of_logits(batch: Distribution) -> LossOut:
    distance_BTV = batch.logits_BTV - batch.teacher_logits_BTV.detach()
    return LossOut(torch.where(batch.mask_BT[..., None], distance_BTV, 0.0).square().sum(-1))


@breaks("reward_shift", "Subtract before you square")
def relative_error(batch: Values) -> LossOut:
    values_BT, returns_BT = (torch.where(batch.mask_BT, x, 0.0) for x in (batch.values_BT, batch.returns_BT.detach()))
    return LossOut((values_BT - returns_BT).square() / (1 + returns_BT.square()))


@breaks("prefers_chosen", "Are the sides exchanged", contrast=True)
def sides_exchanged(batch: Pairs) -> LossOut:
    return LossOut(-F.logsigmoid(-margin(batch)))


@breaks("prefers_chosen", "Are the sides exchanged")
def labels_exchanged(batch: Unpaired) -> LossOut:
    return LossOut(torch.where(batch.desirable_B, 1.0, -1.0) * torch.sigmoid(batch.ratio_B))


@breaks("prefers_chosen", "Are the sides exchanged")
def worst_first(batch: Ranked) -> LossOut:
    valid_PK = batch.valid_PK
    return LossOut(batch.ratio_PK[:, 0] - torch.where(valid_PK, batch.ratio_PK, -1e4).logsumexp(-1) * valid_PK.any(-1))


@breaks("prefers_chosen", "Are the sides exchanged")
def scores_exchanged(batch: Scores) -> LossOut:
    return LossOut(-F.logsigmoid(batch.rejected_B - batch.chosen_B))


@breaks("moves_to_target", "away from its target")
def flees_its_return(batch: Values) -> LossOut:
    values_BT, returns_BT = (torch.where(batch.mask_BT, x, 0.0) for x in (batch.values_BT, batch.returns_BT.detach()))
    return LossOut(-(values_BT - returns_BT).square())


@breaks("moves_to_target", "prediction and target exchanged")
def labels_for_right(batch: StepScores) -> LossOut:
    return LossOut(batch.scores_BT * batch.labels_BT)


@breaks("moves_to_target", "Is a sign wrong")
def unlikelihood(batch: Likelihood) -> LossOut:
    return LossOut(batch.logps_BT)


@breaks("moves_to_target", "Is a sign wrong")
def flees_its_rating(batch: Ratings) -> LossOut:
    return LossOut(-(batch.rewards_B - batch.targets_B).square())


@breaks("moves_to_target", "Is a sign wrong")
def flees_its_teacher(batch: Distribution) -> LossOut:
    p_BTV, q_BTV = (
        torch.where(batch.mask_BT[..., None], x, 0.0).log_softmax(-1)
        for x in (batch.logits_BTV, batch.teacher_logits_BTV.detach())
    )
    return LossOut((q_BTV.exp() * p_BTV).sum(-1))


@breaks("needs_are_used", "drop it from extras", extras=("margin_B",))
def idle_extra(batch: Pairs) -> LossOut:
    return LossOut(-F.logsigmoid(margin(batch)))


@breaks("needs_are_used", "no field of Pairs", extras=("margins_B",))
def misspelt_extra(batch: Pairs) -> LossOut:
    return LossOut(-F.logsigmoid(margin(batch)))


@breaks("options_have_effect", "is refused at every value")
def refuses_all(batch: Pairs, *, mode: Literal["a", "b"] = "a", weight: float = 0.0) -> LossOut:
    if weight:
        raise UsageError("weight has no effect here")
    return LossOut(-F.logsigmoid(margin(batch)) * (2 if mode == "b" else 1))


@breaks("options_have_effect", "option 'weight' changes nothing")
def silent_without_its_mode(batch: Pairs, *, mode: Literal["a", "b"] = "a", weight: float = 0.5) -> LossOut:
    return LossOut(-F.logsigmoid(margin(batch)) * (weight if mode == "b" else 1))


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize(
    ("check", "words", "function", "tags"), BROKEN, ids=[f"{b[0]}-{b[2].__name__}" for b in BROKEN]
)
def test_check_can_fail(check: str, words: str, function: Callable[..., LossOut], tags: dict[str, Any]) -> None:
    register_loss(function, **tags)
    found = {c.name: c for c in loss_checks(function)}
    with pytest.raises(ContractError) as error:
        found[check]()
    assert words in str(error.value) and function.__name__ in str(error.value)
    with pytest.raises(ContractError, match=check):
        check_loss(function)


@pytest.mark.usefixtures("sandbox")
def test_one_fault_is_told_once() -> None:
    """Not by every check that trips over it, and not again with every modifier; the line of the fault is told."""

    @register_loss
    def averaged(batch: Pairs, *, beta: float = 0.1) -> LossOut:
        return LossOut(-F.logsigmoid(beta * margin(batch)).mean())

    @register_loss
    def bare(batch: Pairs) -> LossOut:
        return -F.logsigmoid(margin(batch))  # type: ignore[return-value]

    @register_loss
    def misspelt(batch: Pairs) -> LossOut:
        return LossOut(-F.logsigmoid(batch.chosen_ratios_B - batch.rejected_ratio_B))  # type: ignore[attr-defined]

    @register_loss
    def deep(batch: Pairs) -> LossOut:
        return LossOut(-F.logsigmoid(margin(batch))[:, None])

    @register_loss
    def exchanged(batch: Pairs) -> LossOut:
        return LossOut(-F.logsigmoid(-margin(batch)))

    found = {}
    for loss in (averaged, bare, misspelt, deep, exchanged):
        with pytest.raises(ContractError) as error:
            check_loss(loss)
        found[loss.__name__] = re.findall(r"breaks '(\w+)'", str(error.value))
    assert found == {
        "averaged": ["unreduced"],
        "bare": ["unreduced"],
        "misspelt": ["unreduced"],
        "deep": ["unreduced"],
        "exchanged": ["prefers_chosen"],
    }
    with pytest.raises(ContractError, match=r"did you mean 'chosen_ratio_B'\? \(test_contract.py, line \d+\)"):
        check_loss(misspelt)


@pytest.mark.usefixtures("sandbox")
def test_what_is_no_loss_of_rows_is_refused_in_training_too() -> None:
    def bare(batch: Pairs) -> LossOut:
        return margin(batch)  # type: ignore[return-value]

    register_loss(bare)
    with pytest.raises(UsageError, match="loss 'bare' returned Tensor; return LossOut"):
        create_loss("bare")(random_record(Pairs))
    for shape in ((), (2, 1, 1)):
        with pytest.raises(UsageError, match="Return it unreduced"):
            Count("row").total(torch.zeros(shape), torch.ones(2, 1, dtype=torch.bool))


@pytest.mark.usefixtures("sandbox")
def test_a_flat_loss_is_told_how_to_say_so() -> None:
    def flat(batch: Scores) -> LossOut:
        return LossOut(F.relu(0.1 - batch.chosen_B + batch.rejected_B))

    with pytest.raises(ContractError, match="flat there on purpose"):
        check_loss(register_loss(flat))
    check_loss(register_loss(flat, exceptions={"prefers_chosen": "flat beyond its margin"}))


@pytest.mark.usefixtures("sandbox")
def test_a_count_that_is_none_is_refused() -> None:
    def counted(batch: Scores) -> LossOut:
        return LossOut(F.softplus(batch.rejected_B - batch.chosen_B))

    with pytest.raises(UsageError, match="loss 'counted': no count 'rows'; did you mean 'row'"):
        check_loss(register_loss(counted, count="rows"))


def test_every_check_has_a_broken_loss() -> None:
    # "wrong_record" and "modifiers_keep_contract" have tests of their own below.
    assert set(CHECKS) - {check for check, *_ in BROKEN} == {"wrong_record", "modifiers_keep_contract"}


def test_wrong_record_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loss, "__call__", lambda self, batch: LossOut(torch.zeros(5)))
    with pytest.raises(ContractError, match="took a Unpaired for a Pairs"):
        CHECKS["wrong_record"](create_loss("dpo"))


def test_wrong_shape_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Record, "__post_init__", lambda self: None)
    with pytest.raises(ContractError, match="broadcasting would hide it"):
        CHECKS["wrong_record"](create_loss("dpo"))


# -- modifiers are held to the contract of what they modify


@pytest.mark.usefixtures("sandbox")
def test_a_modifier_that_breaks_the_contract_is_caught() -> None:
    def leaky(loss: Callable[[Pairs], LossOut], batch: Pairs, *, leak: float = 0.0) -> LossOut:
        return LossOut(loss(batch).loss - leak * batch.chosen_logps_BT.sum(-1))

    register_modifier(leaky)
    with pytest.raises(ContractError, match=r"with leak=0.05 it breaks 'masked_cells'[^$]*it breaks 'side_shift'"):
        check_loss("dpo")
    excused = ("masked_cells", "padding", "empty_row", "reference_shift", "side_shift")
    register_modifier(leaky, exceptions=dict.fromkeys(excused, "leaks on purpose"))
    assert check_loss("dpo")["modifiers_keep_contract"] == "passed"
    assert check_loss("dpo", leak=0.1)["masked_cells"] == "exception: leaks on purpose"
    assert check_loss("dpo", leak=0.1)["modifiers_keep_contract"] == "not applicable: a modifier is on already"


@pytest.mark.usefixtures("sandbox")
def test_a_modifier_with_an_idle_option_is_caught() -> None:
    @register_modifier
    def doubled(loss: Callable[[Pairs], LossOut], batch: Pairs, *, double: bool = False, by: float = 2.0) -> LossOut:
        out = loss(batch)
        return LossOut(by * out.loss if double else out.loss, out.metrics)

    with pytest.raises(ContractError, match="option 'by' changes nothing"):
        check_loss("dpo")


@pytest.mark.usefixtures("sandbox")
def test_a_modifier_that_refuses_everything_is_caught() -> None:
    @register_modifier
    def stubborn(loss: Callable[[Pairs], LossOut], batch: Pairs, *, stubborn: bool = False) -> LossOut:
        raise UsageError("not this one")

    with pytest.raises(ContractError, match="modifier 'stubborn' applies, but every value of its options is refused"):
        check_loss("dpo")


@pytest.mark.usefixtures("sandbox")
def test_an_exception_may_be_of_an_option() -> None:
    def centred(batch: Scores, *, centering: float = 0.0) -> LossOut:
        difference_B = batch.chosen_B - batch.rejected_B
        return LossOut(-F.logsigmoid(difference_B) + centering * (batch.chosen_B + batch.rejected_B).square())

    register_loss(centred)
    check_loss(centred)
    with pytest.raises(ContractError, match="reward_shift"):
        check_loss(centred, centering=0.1)
    register_loss(centred, exceptions={"reward_shift@centering": "the mean is pulled to 0"})
    assert check_loss(centred)["reward_shift"] == "passed"
    assert check_loss(centred, centering=0.1)["reward_shift"] == "exception: the mean is pulled to 0"
    register_loss(centred, exceptions={"reward_shift@centring": "misspelt"})
    with pytest.raises(UsageError, match="did you mean 'centering'"):
        check_loss(centred)


@pytest.mark.usefixtures("sandbox")
def test_an_undeclared_contrast_is_told() -> None:
    def difference(batch: Pairs) -> LossOut:
        return LossOut(-F.logsigmoid(margin(batch)))

    register_loss(difference)
    assert "contrast=True would say so" in check_loss(difference)["side_shift"]
    register_loss(difference, contrast=True)
    assert check_loss(difference)["side_shift"] == "passed"


# -- correct losses of users pass; exceptions are declared and kept honest --------------------------------------------


@pytest.mark.usefixtures("sandbox")
def test_exception_is_honoured_and_kept_honest() -> None:
    register_loss(with_likelihood, exceptions={"reference_shift": "has a likelihood term"})
    assert check_loss(with_likelihood)["reference_shift"] == "exception: has a likelihood term"
    register_loss(wrong_sign, reference=False, exceptions={"padding": "none really"})
    with pytest.raises(ContractError, match="remove the exception"):
        dict((c.name, c) for c in loss_checks(wrong_sign))["padding"]()
    register_loss(reduced, exceptions={"paddings": "misspelt"})
    with pytest.raises(UsageError, match="no check 'paddings'"):
        list(loss_checks(reduced))
    register_loss(with_likelihood, refuses={"wop": "misspelt"})
    with pytest.raises(UsageError, match="refuses 'wop': no modifier; did you mean 'wpo'"):
        list(loss_checks(with_likelihood))


@pytest.mark.usefixtures("sandbox")
def test_whole_batch_is_declared() -> None:
    register_loss(centres_over_batch, whole_batch=True)
    found = {c.name: c for c in loss_checks(centres_over_batch)}
    assert found["halves_equal_whole"]().startswith("not applicable: declared whole_batch")


@pytest.mark.usefixtures("sandbox")
def test_loss_in_a_users_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch.nn.functional as F\n"
        "from prefzoo.losses import register_loss\n"
        "from prefzoo.records import LossOut, Pairs\n"
        "@register_loss\n"
        "def hinge_of_mine(batch: Pairs, *, beta: float = 0.1) -> LossOut:\n"
        "    return LossOut(F.relu(1 - beta * (batch.chosen_ratio_B - batch.rejected_ratio_B)))\n"
    )
    spec = importlib.util.spec_from_file_location("mine", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(check_loss(module.hinge_of_mine)) == set(CHECKS)
    assert check_loss("hinge_of_mine", beta=0.5) == check_loss(create_loss("hinge_of_mine", beta=0.5))


def test_unregistered_function_is_refused() -> None:
    with pytest.raises(UsageError, match="@register_loss"):
        check_loss(reduced)


@pytest.mark.usefixtures("sandbox")
def test_the_page_of_the_losses_runs() -> None:
    assert doctest.testfile(str(ROOT / "docs" / "losses.md"), module_relative=False).failed == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_random_record(family: type[Record]) -> None:
    one, same, other = (random_record(family, seed) for seed in (3, 3, 4))
    assert all(torch.equal(v, same.tensors()[k]) for k, v in one.tensors().items())
    assert any(not torch.equal(v, other.tensors()[k]) for k, v in one.tensors().items())
    assert any(is_trained(k) for k in one.tensors())
    for name, mask_BT in one.tensors().items():
        if name.endswith("mask_BT"):
            assert bool(mask_BT.any(-1).all()) and not bool(mask_BT.all(-1).any())


# -- the losses themselves: relations that no golden number shows -----------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_ipo_is_ipo_sum_at_another_beta_for_equal_lengths(seed: int) -> None:
    pairs = random_record(Pairs, seed, tokens=6)
    mask_BT = torch.arange(6).expand(5, 6) < 4
    fields = {**pairs.tensors(), "chosen_mask_BT": mask_BT, "rejected_mask_BT": F.pad(mask_BT, (0, 1))}
    batch = Pairs(**fields)
    per_token, summed = create_loss("ipo", beta=0.2)(batch).loss, create_loss("ipo_sum", beta=0.2 / 4)(batch).loss
    torch.testing.assert_close(per_token, summed / 16)


def test_dpo_starts_at_log_2() -> None:
    batch = random_record(Pairs, spread=0.0)
    out = create_loss("dpo")(batch)
    torch.testing.assert_close(out.loss, torch.full_like(out.loss, math.log(2)))
    assert float(out.metrics["rewards/margins"].abs().max()) == 0


def test_kto_without_baseline_says_so() -> None:
    batch = random_record(Unpaired)
    fields = {k: v for k, v in batch.tensors().items() if k != "baseline"}
    with pytest.raises(UsageError, match="kto_baseline"):
        create_loss("kto")(Unpaired(**fields))
    assert float(kto_baseline(torch.tensor([-2.0, 1.0]))) == 0.0
    assert not kto_baseline(torch.ones(2, requires_grad=True)).requires_grad


def test_dual_clip_bounds_bad_tokens() -> None:
    batch = random_record(PolicyGradient, 1, rows=64, spread=3.0)
    loss_BT = create_loss("clipped_surrogate", dual_clip=3.0)(batch).loss
    assert bool((loss_BT <= (3.0 * batch.advantages_BT.abs()).where(batch.mask_BT, 0.0) + 1e-12).all())
    with pytest.raises(UsageError, match=r"must exceed 1 \+ clip_high = 1.2"):
        create_loss("clipped_surrogate", dual_clip=1.1)(batch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_safe_exp_never_overflows(dtype: torch.dtype) -> None:
    x = torch.tensor([-1e4, 0.0, 10.0, 1e4], dtype=dtype, requires_grad=True)
    y = safe_exp(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert bool(y.isfinite().all()) and bool(gradient.isfinite().all())
    assert gradient[[0, 3]].tolist() == [0, 0]
    torch.testing.assert_close(y[1:3], x[1:3].exp())


def test_masked_mean_and_counts_agree_on_rows() -> None:
    """Counts are the only place that divides; the row count of a token loss is its masked mean."""
    from prefzoo.parts.count import Count

    batch = random_record(PolicyGradient)
    loss_BT = create_loss("clipped_surrogate")(batch).loss
    torch.testing.assert_close(Count("row").mean(loss_BT, batch.mask_BT), masked_mean(loss_BT, batch.mask_BT).mean())
