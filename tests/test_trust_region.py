"""The trust region: its step against the exact natural gradient, its bound, and the trpo algorithm."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from prefzoo.algorithm import Algorithm, create_algorithm
from prefzoo.models.reference import weights_hash
from prefzoo.parts.update import TrustRegion
from prefzoo.registry import UsageError
from prefzoo.theory.enumerable_lm import EnumerableWorld
from prefzoo.theory.policies import EnumerablePolicy, Tabular, TinyTransformer
from prefzoo.theory.runs import claim_of, fit, sized
from prefzoo.training.updates import Fisher, Landscape, conjugate_gradients, dot, flat, natural_step, put

EXACT = TrustRegion(max_kl=1e-3, cg_iterations=200, damping=1e-6)


class World:
    """All responses of a policy with their rewards: surrogate and KL as sums over them, per token."""

    def __init__(self, policy: EnumerablePolicy, seed: int = 0) -> None:
        self.policy, self.parameters = policy, list(policy.parameters())
        generator = torch.Generator().manual_seed(seed)
        self.reward_R = torch.randn(len(policy.strings), generator=generator, dtype=torch.float64)
        with torch.no_grad():
            self.old_RTV = policy.distributions()
            self.old_R = policy.log_probs()
        self.passes = 0
        self.land = Landscape(
            self.parameters,
            gradient=lambda: self._gradient(self.loss()),
            kl_gradient=lambda: self._gradient(self.kl()),
            loss_and_kl=lambda: (self.loss().item(), self.kl().item()),
        )

    def loss(self) -> Tensor:
        self.passes += 1
        advantage_R = self.reward_R - (self.old_R.exp() * self.reward_R).sum()
        return -(self.policy.log_probs().exp() * advantage_R).sum()

    def kl(self) -> Tensor:
        self.passes += 1
        kl_RT = (self.old_RTV.exp() * (self.old_RTV - self.policy.distributions())).sum(-1)
        per_R = torch.where(self.policy.mask_RT, kl_RT, 0.0).sum(-1)
        tokens = (self.old_R.exp() * self.policy.mask_RT.sum(-1)).sum()
        return (self.old_R.exp() * per_R).sum() / tokens

    def _gradient(self, value: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(value, self.parameters, allow_unused=True, materialize_grads=True))

    def fisher(self) -> Tensor:
        """The exact Hessian of the KL where the policy is, by second derivatives."""
        first = torch.cat([
            g.flatten()
            for g in torch.autograd.grad(
                self.kl(), self.parameters, create_graph=True, allow_unused=True, materialize_grads=True
            )
        ])  # fmt: skip
        rows = [
            torch.autograd.grad(g, self.parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
            for g in first
        ]
        return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def take(region: TrustRegion, land: Landscape) -> dict[str, float]:
    """The step, taken."""
    before = flat(land.parameters)
    there, found = natural_step(region, land)
    assert torch.equal(flat(land.parameters), before), "it only says where to go"
    with torch.no_grad():
        put(land.parameters, there)
    return found


def worlds() -> list[World]:
    return [World(Tabular(3, 2, seed=1)), World(TinyTransformer(3, 2, seed=1, width=3))]


@pytest.mark.parametrize(("place", "damping"), [(0, 1e-6), (1, 1e-2)], ids=["table", "transformer"])
def test_the_step_is_the_natural_gradient_scaled_to_the_bound(place: int, damping: float) -> None:
    world, region = worlds()[place], replace(EXACT, damping=damping)
    origin, fisher = flat(world.parameters), world.fisher()
    damped = fisher + damping * torch.eye(len(origin), dtype=torch.float64)
    wanted = -torch.linalg.solve(damped, flat(world.land.gradient()))
    wanted *= math.sqrt(2 * region.max_kl / float(wanted @ damped @ wanted))
    found = take(region, world.land)
    step = flat(world.parameters) - origin
    assert found["trust/accepted"] == 1 and found["trust/improvement"] > 0
    wanted *= region.shrink ** found["trust/backtracks"]
    assert torch.linalg.norm(step - wanted) < 2e-2 * torch.linalg.norm(wanted)
    assert 0 < found["trust/kl"] <= region.max_kl
    # In the limit of small steps the KL is the quadratic form that the step was scaled by.
    assert found["trust/kl"] == pytest.approx(float(wanted @ fisher @ wanted) / 2, rel=0.1)


@pytest.mark.parametrize("place", [0, 1], ids=["table", "transformer"])
def test_fisher_vector_products_are_those_of_second_derivatives(place: int) -> None:
    world = worlds()[place]
    exact, operator = world.fisher(), Fisher(replace(EXACT, damping=0.0), world.land, flat(world.parameters))
    generator = torch.Generator().manual_seed(2)
    for scale in (1e-3, 1.0, 1e3):  # a direction has no length
        vector = scale * torch.randn(len(exact), generator=generator, dtype=torch.float64)
        assert torch.linalg.norm(operator(vector) - exact @ vector) < 2e-3 * torch.linalg.norm(exact @ vector)


def test_the_step_does_not_depend_on_how_the_policy_is_written() -> None:
    """What a natural gradient is for: logits in other units give the same distributions."""
    plain, stretched = World(Tabular(3, 2, seed=1)), World(Stretched(3, 2, seed=1))
    assert torch.allclose(plain.old_R, stretched.old_R)
    assert not torch.allclose(flat(plain.land.gradient()), flat(stretched.land.gradient()))
    for world in (plain, stretched):
        take(replace(EXACT, damping=1e-9), world.land)
    assert torch.allclose(plain.policy.log_probs(), stretched.policy.log_probs(), atol=2e-4)
    assert not torch.allclose(plain.policy.log_probs(), plain.old_R, atol=2e-3)


class Stretched(Tabular):
    """A table that is read with other units for every prefix."""

    def __init__(self, vocabulary: int, length: int, seed: int) -> None:
        super().__init__(vocabulary, length, seed)
        with torch.no_grad():
            self.table /= self.unit()

    def unit(self) -> Tensor:
        return torch.linspace(0.5, 5.0, len(self.table), dtype=torch.float64)[:, None]

    def prefix_logits(self) -> Tensor:
        return self.table * self.unit()


def test_a_step_never_leaves_the_region_nor_makes_the_loss_worse() -> None:
    for max_kl in (1e-4, 1e-2, 1.0):
        for damping in (0.0, 0.1, 10.0):
            world = World(TinyTransformer(3, 2, seed=3, width=3), seed=4)
            before = world.loss().item()
            found = take(TrustRegion(max_kl=max_kl, damping=damping), world.land)
            assert world.kl().item() == pytest.approx(found["trust/kl"], abs=1e-12)
            assert found["trust/kl"] <= max_kl
            assert before - world.loss().item() == pytest.approx(found["trust/improvement"], abs=1e-12)
            assert found["trust/improvement"] >= 0 and found["trust/accepted"] == 1


def test_repeated_steps_find_the_best_response() -> None:
    policy = Tabular(3, 2, seed=1)
    for _ in range(25):
        world = World(policy)
        take(TrustRegion(max_kl=0.05), world.land)
    best = policy.log_probs().exp()[world.reward_R.argmax()]
    assert best > 0.9


def test_where_no_step_is_good_the_policy_stays() -> None:
    world = World(Tabular(3, 2, seed=1))
    before = flat(world.parameters)
    worse = replace(world.land, loss_and_kl=lambda: (1.0, 0.0))  # nothing improves
    assert take(EXACT, worse) == {"trust/kl": 0.0, "trust/improvement": 0.0, "trust/accepted": 0.0}
    assert torch.equal(flat(world.parameters), before)
    flat_world = World(Tabular(3, 2, seed=1))
    flat_world.reward_R = torch.zeros_like(flat_world.reward_R)
    assert take(EXACT, flat_world.land)["trust/accepted"] == 0
    assert torch.equal(flat(flat_world.parameters), before)


def test_a_step_that_is_broken_off_leaves_the_policy_as_it_was() -> None:
    world = World(Tabular(3, 2, seed=1))
    before = flat(world.parameters)
    calls = iter(range(5))

    def until_stopped() -> list[Tensor]:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return list(world.land.kl_gradient())

    with pytest.raises(KeyboardInterrupt):
        natural_step(EXACT, replace(world.land, kl_gradient=until_stopped))
    assert torch.equal(flat(world.parameters), before)


def test_numbers_that_are_none_are_no_step() -> None:
    world = World(Tabular(3, 2, seed=1))
    before = flat(world.parameters)
    unreal = replace(world.land, loss_and_kl=lambda: (math.nan, math.nan))
    assert take(EXACT, unreal)["trust/accepted"] == 0
    assert torch.equal(flat(world.parameters), before)


def test_the_cost_is_the_one_that_is_stated() -> None:
    world = World(TinyTransformer(3, 2, seed=1, width=3))
    region = TrustRegion(cg_iterations=6)
    found = take(region, world.land)
    lines = 2 * (2 + found["trust/backtracks"])  # loss and KL, at the start and at each length
    assert world.passes <= 1 + 2 * region.cg_iterations + lines + 2 * 6
    assert world.passes >= 1 + 2 * region.cg_iterations


def test_float32_is_enough() -> None:
    exact = World(TinyTransformer(3, 2, seed=1, width=3))
    rough = World(TinyTransformer(3, 2, seed=1, width=3).float())
    rough.reward_R, rough.old_R, rough.old_RTV = exact.reward_R.float(), exact.old_R.float(), exact.old_RTV.float()
    region = TrustRegion()
    for world in (exact, rough):
        assert take(region, world.land)["trust/accepted"] == 1
    assert torch.allclose(exact.policy.log_probs(), rough.policy.log_probs().double(), atol=5e-3)


def test_conjugate_gradients_solve_and_measure() -> None:
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    matrix, target = half @ half.T + torch.eye(8), torch.randn(8, generator=generator, dtype=torch.float64)
    for iterations in (2, 8):  # x'Ax is that of the x found, solved or not
        x, curvature = conjugate_gradients(lambda v: matrix @ v, target, iterations)
        assert curvature == pytest.approx(dot(x, matrix @ x), rel=1e-8)
    assert torch.allclose(matrix @ x, target, atol=1e-8)


@pytest.mark.parametrize(
    ("given", "says"),
    [({"max_kl": 0.0}, "max_kl"), ({"damping": -1.0}, "damping"), ({"cg_iterations": 0}, "cg_iterations"),
     ({"backtracks": 0}, "backtracks"), ({"shrink": 1.0}, "shrink")],
)  # fmt: skip
def test_wrong_settings_are_named(given: dict[str, float], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        TrustRegion(**given)  # type: ignore[arg-type]


# -- the algorithm, on the language model whose responses can be enumerated -------------------------------------------


@pytest.fixture(scope="module")
def enumerable() -> EnumerableWorld:
    return EnumerableWorld.make()


def trained(world: EnumerableWorld, algorithm: Algorithm, **settings: Any) -> Any:
    claim = replace(claim_of(algorithm, {}), settings={})
    return fit(world, sized(algorithm, samples=32), claim, **{"logging_steps": 1, "max_steps": 3, **settings})


def test_every_step_of_a_run_stays_in_its_region_and_uses_it(enumerable: EnumerableWorld) -> None:
    ended = trained(enumerable, create_algorithm("trpo", max_kl=0.02, damping=1e-3))
    for row in ended.run.history:
        assert 0.004 < row["trust/kl"] <= 0.02 and row["trust/improvement"] > 0 and row["trust/accepted"] == 1
    engine = ended.engines[0]
    assert not engine.trained["policy"].optimizer.state, "no optimizer has moved it"
    assert not any(p.requires_grad for p in engine.before.parameters())


def test_the_learning_rate_means_nothing_to_a_trust_region(enumerable: EnumerableWorld) -> None:
    one, other = (
        weights_hash(trained(enumerable, create_algorithm("trpo"), learning_rate=rate).run.model) for rate in (0.0, 9.0)
    )
    assert one == other != weights_hash(enumerable.start)


def test_without_a_gradient_there_is_no_step(enumerable: EnumerableWorld) -> None:
    algorithm = create_algorithm("trpo", kl=0.0)
    claim = replace(
        claim_of(algorithm, {}), settings={}, reward=lambda world: lambda completions: [1.0] * len(completions)
    )
    ended = fit(enumerable, sized(algorithm, samples=32), claim, max_steps=1, logging_steps=1)
    assert ended.run.history[0]["trust/accepted"] == 0
    assert weights_hash(ended.run.model) == weights_hash(enumerable.start)


def test_what_a_trust_region_cannot_do_is_said(enumerable: EnumerableWorld) -> None:
    with pytest.raises(UsageError, match="precision='float32'"):
        trained(enumerable, create_algorithm("trpo"), precision="bfloat16")
    for option in ("inner_epochs", "minibatches"):
        with pytest.raises(UsageError, match="leave inner_epochs and minibatches at 1"):
            create_algorithm("trpo", **{option: 2})
