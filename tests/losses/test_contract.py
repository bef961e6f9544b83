"""The loss contract over the whole registry, and proof that each check can fail; relations of the estimators."""

from __future__ import annotations

import doctest
import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prefzoo.losses.advantages import best_of_k, gae, group_relative, leave_one_out, shaped_rewards, whiten
from prefzoo.losses.base import LOSSES, Loss, create_loss, register_loss
from prefzoo.losses.kl import KL_ESTIMATORS, k1, k2, k3, kl_estimator
from prefzoo.losses.numerics import safe_exp
from prefzoo.losses.unpaired import kto_baseline
from prefzoo.parts.controllers import AdaptiveKL, FixedKL
from prefzoo.records import FAMILIES, LossOut, Pairs, PolicyGradient, Record, Unpaired, masked_mean, masked_sum
from prefzoo.registry import UsageError
from prefzoo.testing import CHECKS, Check, ContractError, check_loss, is_trained, loss_checks, random_record

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registrations of a test do not outlive it."""
    LOSSES.names()  # load our own first
    monkeypatch.setattr(LOSSES, "_entries", dict(LOSSES._entries))
    monkeypatch.setattr(LOSSES, "_aliases", dict(LOSSES._aliases))


# -- every registered loss keeps the contract -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "check", [c for n in LOSSES.names() for c in loss_checks(n)], ids=lambda c: f"{c.loss.name}-{c.name}"
)
def test_contract(check: Check) -> None:
    check()


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("dpo", {"beta": 5.0}),
    ("kto", {"undesirable_weight": 1.33}),
    ("bradley_terry", {"label_smoothing": 0.1, "centering": 0.01}),
    ("clipped_surrogate", {"clip_high": 0.28}),
    ("clipped_surrogate", {"dual_clip": 3.0}),
    ("clipped_value", {"clip": None}),
    *[("kl_penalty", {"estimator": k, "importance": i}) for k in KL_ESTIMATORS for i in (False, True)],
]


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_contract_of_variants(name: str, options: dict[str, Any]) -> None:
    check_loss(name, **options)


@pytest.mark.parametrize("name", LOSSES.names())
def test_cards_are_complete(name: str) -> None:
    entry = LOSSES.entry(name)
    card = entry.function.__doc__ or ""
    assert entry.paper and entry.paper.startswith("arXiv:")
    assert [part for part in ("Args:", "Returns:", "Convention:", "Source:", ">>> ") if part not in card] == []
    assert [option for option in entry.own_options if f"{option}:" not in card] == []


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


def test_every_check_has_a_broken_loss() -> None:
    assert set(CHECKS) - {check for check, *_ in BROKEN} == {"wrong_record"}  # by the two tests below


def test_wrong_record_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loss, "__call__", lambda self, batch: LossOut(torch.zeros(5)))
    with pytest.raises(ContractError, match="took a Unpaired for a Pairs"):
        CHECKS["wrong_record"](create_loss("dpo"))


def test_wrong_shape_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Record, "__post_init__", lambda self: None)
    with pytest.raises(ContractError, match="broadcasting would hide it"):
        CHECKS["wrong_record"](create_loss("dpo"))


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


@pytest.mark.usefixtures("sandbox")
def test_whole_batch_is_declared() -> None:
    register_loss(centres_over_batch, whole_batch=True)
    assert check_loss(centres_over_batch)["halves_equal_whole"].startswith("not applicable: declared whole_batch")


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


def test_unknown_kl_estimator_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="k1, k2, k3"):
        kl_estimator("kl3")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_safe_exp_never_overflows(dtype: torch.dtype) -> None:
    x = torch.tensor([-1e4, 0.0, 10.0, 1e4], dtype=dtype, requires_grad=True)
    y = safe_exp(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert bool(y.isfinite().all()) and bool(gradient.isfinite().all())
    assert gradient[[0, 3]].tolist() == [0, 0]
    torch.testing.assert_close(y[1:3], x[1:3].exp())


def test_k3_is_exact_near_zero_in_float32() -> None:
    x = torch.tensor([1e-3, 1e-2, -1e-2, 0.5])
    exact = torch.expm1(x.double()) - x.double()
    torch.testing.assert_close(k3(torch.zeros_like(x), x).double(), exact, rtol=1e-3, atol=1e-10)


# -- KL estimators: exact expectations over a small vocabulary --------------------------------------------------------


@pytest.fixture(params=range(3))
def vocabulary(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the policy, log-probabilities of the reference and of an older policy, over 7 tokens."""
    generator = torch.Generator().manual_seed(request.param)
    logits, ref, old = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), ref.log_softmax(0), old.log_softmax(0)


def gradient_of(value: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


def test_kl_estimators_in_expectation(vocabulary: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, ref, _ = vocabulary
    logps = logits.log_softmax(0)
    weight = logps.exp().detach()  # tokens sampled from the policy: sampling carries no gradient
    kl, reverse = (logps.exp() * (logps - ref)).sum(), (ref.exp() * (ref - logps)).sum()
    value = {name: (weight * f(logps, ref)).sum() for name, f in KL_ESTIMATORS.items()}
    gradient = {name: gradient_of(v, logits) for name, v in value.items()}
    kl_gradient = gradient_of(kl, logits)

    torch.testing.assert_close(value["k1"], kl)
    torch.testing.assert_close(value["k3"], kl)
    assert not torch.isclose(value["k2"], kl)
    assert bool((k3(logps, ref) >= 0).all()) and bool((k2(logps, ref) >= 0).all()) and bool((k1(logps, ref) < 0).any())

    torch.testing.assert_close(gradient["k1"], torch.zeros(7, dtype=torch.float64))
    torch.testing.assert_close(gradient["k2"], kl_gradient)
    torch.testing.assert_close(gradient["k3"], gradient_of(reverse, logits))
    assert not torch.allclose(gradient["k3"], kl_gradient, rtol=0.05)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_importance_makes_value_and_gradient_those_of_the_kl(
    vocabulary: tuple[Tensor, Tensor, Tensor], estimator: str
) -> None:
    """Even for tokens that an older policy sampled."""
    logits, ref, old = vocabulary
    logps = logits.log_softmax(0)
    batch = PolicyGradient(
        logps_BT=logps[None],
        old_logps_BT=old[None],
        ref_logps_BT=ref[None],
        advantages_BT=torch.zeros(1, 7, dtype=torch.float64),
        mask_BT=torch.ones(1, 7, dtype=torch.bool),
    )
    loss_BT = create_loss("kl_penalty", estimator=estimator, importance=True)(batch).loss
    expected, kl = (old.exp() * loss_BT[0]).sum(), (logps.exp() * (logps - ref)).sum()
    torch.testing.assert_close(expected, kl)
    torch.testing.assert_close(gradient_of(expected, logits), gradient_of(kl, logits))


# -- advantages -------------------------------------------------------------------------------------------------------

SEEDS = range(5)


def groups(seed: int, *, missing: bool = False) -> tuple[Tensor, Tensor]:
    """24 rewards in groups of uneven size with arbitrary numbers, in no order."""
    generator = torch.Generator().manual_seed(seed)
    rewards_B = torch.randn(24, generator=generator, dtype=torch.float64)
    group_B = torch.tensor([-40, 7, 7000, 3, 12])[torch.randint(0, 5, (24,), generator=generator)]
    if missing:
        rewards_B[torch.randperm(24, generator=generator)[:5]] = math.nan
    return rewards_B, group_B


def by_group(rewards_B: Tensor, group_B: Tensor) -> Iterator[tuple[list[int], list[float]]]:
    """Rows and rewards of each group, missing ones left out."""
    for group in sorted(set(group_B.tolist())):
        rows = [i for i in range(len(group_B)) if group_B[i] == group and not rewards_B[i].isnan()]
        yield rows, rewards_B[rows].tolist()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("missing", [False, True])
def test_group_relative(seed: int, missing: bool) -> None:
    rewards_B, group_B = groups(seed, missing=missing)
    plain_B, scaled_B = group_relative(rewards_B, group_B, std=False), group_relative(rewards_B, group_B, eps=0.0)
    assert bool((plain_B[rewards_B.isnan()] == 0).all())
    for rows, rewards in by_group(rewards_B, group_B):
        assert float(plain_B[rows].sum()) == pytest.approx(0, abs=1e-12)
        expected = torch.tensor(rewards, dtype=torch.float64) - sum(rewards) / len(rewards)
        torch.testing.assert_close(plain_B[rows], expected)
        if len(rows) > 1:
            assert float(scaled_B[rows].std()) == pytest.approx(1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("missing", [False, True])
def test_leave_one_out(seed: int, missing: bool) -> None:
    rewards_B, group_B = groups(seed, missing=missing)
    advantages_B, centred_B = leave_one_out(rewards_B, group_B), group_relative(rewards_B, group_B, std=False)
    assert bool((advantages_B[rewards_B.isnan()] == 0).all())
    for rows, rewards in by_group(rewards_B, group_B):
        size = len(rows)
        for row, reward in zip(rows, rewards, strict=True):
            others = (sum(rewards) - reward) / (size - 1) if size > 1 else reward
            assert float(advantages_B[row]) == pytest.approx(reward - others, abs=1e-12)
        if size > 1:
            torch.testing.assert_close(advantages_B[rows], centred_B[rows] * size / (size - 1))


def test_groups_without_contrast_get_nothing() -> None:
    """All equal, one alone, all missing: no advantage, and no NaN."""
    rewards_B = torch.tensor([0.25, 0.25, 3.0, math.nan, math.nan, 5.0, math.nan])
    group_B = torch.tensor([0, 0, 1, 2, 2, 3, 3])
    for credit in (group_relative, leave_one_out):
        assert credit(rewards_B, group_B).tolist() == [0.0] * 7


def token_grid(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and a mask with holes and padding; one row is empty."""
    generator = torch.Generator().manual_seed(seed)
    rewards_BT, values_BT = torch.randn(2, 6, 9, generator=generator, dtype=torch.float64)
    mask_BT = torch.rand(6, 9, generator=generator) < 0.7
    mask_BT[2] = False
    return rewards_BT, values_BT, mask_BT


def naive_gae(rewards: list[float], values: list[float], gamma: float, lam: float, bootstrap: float) -> list[float]:
    """A_t = sum_k (γλ)^k δ_{t+k}, written as the sum that it is."""
    following = [*values[1:], bootstrap]
    delta = [r + gamma * n - v for r, v, n in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(delta))) for t in range(len(delta))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (0.99, 1.0)])
def test_gae_equals_the_sum_over_the_masked_tokens_of_each_row(seed: int, gamma: float, lam: float) -> None:
    rewards_BT, values_BT, mask_BT = token_grid(seed)
    bootstrap_B = torch.arange(6, dtype=torch.float64)
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=gamma, lam=lam, bootstrap_B=bootstrap_B)
    for b, mask_T in enumerate(mask_BT):
        rewards, values = rewards_BT[b, mask_T].tolist(), values_BT[b, mask_T].tolist()
        expected = naive_gae(rewards, values, gamma, lam, float(b)) if values else []
        torch.testing.assert_close(advantages_BT[b, mask_T], torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(returns_BT[mask_BT], (advantages_BT + values_BT)[mask_BT])


@pytest.mark.parametrize("seed", SEEDS)
def test_gae_with_lambda_1_is_return_minus_value(seed: int) -> None:
    rewards_BT, values_BT, mask_BT = token_grid(seed)
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=1.0, lam=1.0)
    to_go_BT = torch.where(mask_BT, rewards_BT, 0.0).flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(advantages_BT[mask_BT], (to_go_BT - values_BT)[mask_BT])
    torch.testing.assert_close(returns_BT[mask_BT], to_go_BT[mask_BT])


@pytest.mark.parametrize("poison", [1e9, math.inf, math.nan])
@pytest.mark.parametrize("seed", SEEDS)
def test_token_estimators_do_not_see_masked_cells(seed: int, poison: float) -> None:
    rewards_BT, values_BT, mask_BT = token_grid(seed)
    bad_rewards_BT, bad_values_BT = (torch.where(mask_BT, x, poison) for x in (rewards_BT, values_BT))
    scores_B = torch.arange(6, dtype=torch.float64)
    pairs = [
        (gae(rewards_BT, values_BT, mask_BT), gae(bad_rewards_BT, bad_values_BT, mask_BT)),
        (whiten(values_BT, mask_BT), whiten(bad_values_BT, mask_BT)),
        (
            shaped_rewards(scores_B, rewards_BT, values_BT, mask_BT, estimator="k3"),
            shaped_rewards(scores_B, bad_rewards_BT, bad_values_BT, mask_BT, estimator="k3"),
        ),
    ]
    for clean, poisoned in pairs:
        torch.testing.assert_close(clean, poisoned, rtol=0, atol=0)
    assert all(bool((x[~mask_BT] == 0).all()) for x in (*pairs[0][0], pairs[1][0], pairs[2][0]))


@pytest.mark.parametrize("seed", SEEDS)
def test_whiten(seed: int) -> None:
    _, values_BT, mask_BT = token_grid(seed)
    white_BT, kept_BT = whiten(values_BT, mask_BT), whiten(values_BT, mask_BT, shift_mean=False)
    assert float(white_BT[mask_BT].mean()) == pytest.approx(0, abs=1e-12)
    assert float(white_BT[mask_BT].std()) == pytest.approx(1, abs=1e-6)
    assert float(whiten(values_BT, mask_BT, unbiased=False)[mask_BT].std(correction=0)) == pytest.approx(1, abs=1e-6)
    assert float(kept_BT[mask_BT].mean()) == pytest.approx(float(values_BT[mask_BT].mean()))
    assert bool((whiten(values_BT, torch.zeros_like(mask_BT)) == 0).all())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", [1, 2, 30])
def test_best_of_k(seed: int, k: int) -> None:
    scores_B, group_B = groups(seed, missing=True)
    scores_B = (scores_B * 2).round()  # with ties
    expected = []
    for rows, scores in by_group(scores_B, group_B):
        ranked = sorted(zip(rows, scores, strict=True), key=lambda pair: (-pair[1], pair[0]))
        expected += [row for row, _ in ranked[:k]]
    assert best_of_k(scores_B, group_B, k).tolist() == expected


def test_best_of_k_at_the_edges() -> None:
    scores_B = torch.tensor([math.nan, -math.inf, math.nan])
    assert best_of_k(scores_B, torch.tensor([5, 5, 9])).tolist() == [1]  # minus infinity is a score, NaN is none
    assert best_of_k(torch.empty(0), torch.empty(0, dtype=torch.long)).tolist() == []


@pytest.mark.parametrize("seed", SEEDS)
def test_shaped_rewards_add_up(seed: int) -> None:
    logps_BT, ref_BT, mask_BT = token_grid(seed)
    scores_B = torch.arange(6, dtype=torch.float64)
    rewards_BT = shaped_rewards(scores_B, logps_BT, ref_BT, mask_BT, kl=0.3)
    total_B = scores_B * mask_BT.any(-1) - 0.3 * masked_sum(logps_BT - ref_BT, mask_BT)
    torch.testing.assert_close(rewards_BT.sum(-1), total_B)


def test_advantages_carry_no_gradient() -> None:
    x_BT = torch.randn(4, 3, requires_grad=True)
    mask_BT, group_B, x_B = torch.ones(4, 3, dtype=torch.bool), torch.tensor([0, 0, 1, 1]), x_BT[:, 0]
    made = [
        group_relative(x_B, group_B),
        leave_one_out(x_B, group_B),
        *gae(x_BT, x_BT, mask_BT),
        whiten(x_BT, mask_BT),
        shaped_rewards(x_B, x_BT, x_BT, mask_BT),
    ]
    assert not any(x.requires_grad for x in made)


# -- controllers ------------------------------------------------------------------------------------------------------


def test_adaptive_kl_steers_and_its_step_is_bounded() -> None:
    controller = AdaptiveKL(0.1, target=6.0, horizon=1000)
    controller.update(kl=1e9, n=100)
    assert controller.value == pytest.approx(0.1 * 1.02)
    controller.update(kl=-1e9, n=100)
    assert controller.value == pytest.approx(0.1 * 1.02 * 0.98)
    with pytest.raises(UsageError, match="must be positive"):
        AdaptiveKL(target=0.0)


@pytest.mark.parametrize("controller", [FixedKL(0.3), AdaptiveKL(0.3)])
def test_controllers_resume(controller: FixedKL | AdaptiveKL) -> None:
    controller.update(kl=7.0, n=10)
    resumed = type(controller)()
    resumed.load_state_dict(controller.state_dict())
    assert resumed.value == controller.value


def test_masked_mean_and_counts_agree_on_rows() -> None:
    """Counts are the only place that divides; the row count of a token loss is its masked mean."""
    from prefzoo.parts.count import Count

    batch = random_record(PolicyGradient)
    loss_BT = create_loss("clipped_surrogate")(batch).loss
    torch.testing.assert_close(Count("row").mean(loss_BT, batch.mask_BT), masked_mean(loss_BT, batch.mask_BT).mean())
