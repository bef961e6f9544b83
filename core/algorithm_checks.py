"""What is proved of an algorithm: each check a small function of a ``Subject``; ``prefzoo.testing`` runs them.

Runs are on the language model whose responses can be enumerated (:mod:`prefzoo.theory.enumerable_lm`), through the
same engine as any other. A check passes, perhaps with a word on what was seen; or it raises ``ContractError`` with the
likely cause and the cure, or ``NotApplicable`` with the reason.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prefzoo.algorithm import Algorithm, Stage, create_algorithm
from prefzoo.contract import ContractError, NotApplicable
from prefzoo.data.convert import can_become
from prefzoo.data.tokens import KIND_TO_TYPE
from prefzoo.losses import Loss
from prefzoo.models.load import new_scorer
from prefzoo.models.reference import weights_hash
from prefzoo.models.roles import Policy, Scorer
from prefzoo.parts.feedback import Objectives, Verifier
from prefzoo.parts.reference import Start
from prefzoo.parts.roles import CRITIC, POLICY, REFERENCE, REWARD, TEACHER
from prefzoo.parts.source import Rollouts
from prefzoo.records import LossOut, Record, side_of
from prefzoo.registry import Entry, UsageError
from prefzoo.theory.enumerable_lm import EnumerableWorld
from prefzoo.theory.runs import Claim, Ended, claim_of, fit, prove, sized, with_stages
from prefzoo.training.config import TrainConfig
from prefzoo.training.engine import Engine, NonFiniteError
from prefzoo.training.record import describe

# Of the runs that prove relations: plain gradient steps, so that weights show gradients.
QUICK: dict[str, Any] = {
    "optimizer": "sgd", "learning_rate": 0.5, "schedule": "constant", "max_steps": 2, "logging_steps": 1,
}  # fmt: skip
CRITIC_RATE = 0.05
ROWS = 12  # of an optimizer step, where rows come from data
SPLIT = 1e-3  # largest relative difference of the change of the weights when the batch is cut otherwise
EQUAL = 8.0  # of all samples: so large that the rounding of a KL to the start, 1e-8 nats, is nothing beside it
SHIFT = 4.0  # added to all rewards; a power of two, so that nothing is rounded
RISING: dict[str, Any] = {"words": "more reward", "target": None, "share": 0.2, "options": {}}


@dataclass(frozen=True)
class Subject:
    """An algorithm under proof: how it is made, the options that it knows, and what its registration says."""

    name: str
    make: Callable[..., Algorithm]
    known: tuple[str, ...] = ()
    entry: Entry | None = None
    given: tuple[str, ...] = ()  # options that are bound
    world: EnumerableWorld = field(default_factory=EnumerableWorld.make)

    @property
    def tags(self) -> Mapping[str, Any]:
        return {} if self.entry is None else self.entry.tags

    @cached_property
    def claim(self) -> Claim:
        """Of options that a claim chooses otherwise it says nothing; then the reward must rise."""
        claim = claim_of(self.algorithm, self.tags)
        return replace(claim, **RISING) if set(claim.options) & set(self.given) else claim

    @cached_property
    def algorithm(self) -> Algorithm:
        return self.make()

    @cached_property
    def small(self) -> Algorithm:
        """With rollouts that a relation can afford."""
        if not self.algorithm.stages:
            raise NotApplicable("it trains nothing")
        return sized(self.algorithm, samples=24, group=6)

    def run(self, algorithm: Algorithm | None = None, world: EnumerableWorld | None = None, **settings: Any) -> Ended:
        """Two steps, the same for every call with the same arguments."""
        algorithm, world = algorithm or self.small, world or self.world
        given = {k: v for k, v in self.claim.settings.items() if callable(v)}  # models
        claim = replace(self.claim, settings=given)
        sizes: dict[str, Any] = {} if algorithm.on_policy else {"rows_per_step": ROWS}
        if any(stage.critics for stage in algorithm.stages):
            sizes["critic_learning_rate"] = 0.0 if settings.get("learning_rate") == 0 else CRITIC_RATE
        if algorithm.data == "rankings" and (claim.rows is not None or self.few):
            sizes |= {"rows_per_step": 1, "max_steps": 3}  # lists of all: one of each prompt
        return fit(world, algorithm, claim, **{**QUICK, **sizes, **settings})

    @cached_property
    def few(self) -> bool:
        return len(self.world.rows_for(self.algorithm)) < ROWS

    @cached_property
    def base(self) -> Ended:
        return self.run()

    @cached_property
    def fault(self) -> str | None:
        """What a plain run raises, if it does."""
        try:
            self.base  # noqa: B018
        except NotApplicable:
            return None
        except Exception as error:
            return type(error).__name__
        return None

    @cached_property
    def still(self) -> Ended:
        """The run with a learning rate of 0: its weights are those that all runs start with."""
        return self.run(learning_rate=0.0)

    @property
    def stages(self) -> Iterator[tuple[Stage, Engine]]:
        return zip(self.small.stages, self.base.engines, strict=True)


def weights(ended: Ended) -> dict[str, str]:
    """Hashes of everything that the stages train."""
    return {
        f"stage {i} {role}": weights_hash(trained.module)
        for i, engine in enumerate(ended.engines)
        for role, trained in engine.trained.items()
    }


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def metrics(ended: Ended) -> list[dict[str, float]]:
    """What was logged, without the times."""
    return [{k: v for k, v in row.items() if k != "time"} for row in ended.run.history]


FIRST = "roles_loaded"  # the check without which the others have no run to look at

# ------------------------------------------------------------------------------------------------ the checks


def builds(subject: Subject) -> str | None:
    """It can be made with its defaults, and what it recommends are settings of a training."""
    algorithm = subject.algorithm
    if not isinstance(algorithm, Algorithm):
        raise ContractError(f"it gives {type(algorithm).__name__}, expected an Algorithm: return Algorithm(...).")
    TrainConfig.of(algorithm.recommended)
    if subject.entry is not None and not subject.entry.line:
        raise ContractError("it has no docstring: the first line is what lists and cards show.")
    return None


def spec_round_trip(subject: Subject) -> str | None:
    """Its name and options, as a run's record writes them, make the same composition again."""
    if subject.entry is None:
        raise NotApplicable("it is not registered, so no record can name it")
    first = _record(subject.algorithm)
    again = _record(create_algorithm(first["algorithm"], **first["options"]))
    for place in ("algorithm", "options", "parts"):
        if first[place] != again[place]:
            raise ContractError(
                f"made again from its record it has another {place}: {again[place]} instead of {first[place]}. An "
                "option is read otherwise when it comes from JSON, or the function keeps state."
            )
    return None


def _record(algorithm: Algorithm) -> dict[str, Any]:
    """What a run writes of it, and all its parts with every option said."""

    def said(loss: Loss) -> Loss:
        return Loss(loss.entry, {**loss.entry.options, **loss.options})

    spelled = with_stages(
        algorithm, lambda s: replace(s, terms=tuple(replace(t, loss=said(t.loss)) for t in s.terms))
    )  # fmt: skip
    record = json.loads(json.dumps(describe(spelled, TrainConfig.of(), None, None, {})))
    return record | {"parts": record["fingerprints"]["composition"]}  # type: ignore[no-any-return]


def roles_loaded(subject: Subject) -> str | None:
    """Exactly the roles that its parts declare are loaded, and a run works with them."""
    for stage, engine in subject.stages:
        held = {
            REFERENCE: engine.reference is not None,
            TEACHER: engine.teacher is not None,
            REWARD: engine.reward is not None or engine.scorer is not None,
            CRITIC: bool(engine.critics),
        }
        for role, there in held.items():
            declared = role in stage.needs or (role == CRITIC and bool(stage.critics))
            if there and not declared and not (role == REWARD and _judges(subject)):
                raise ContractError(f"{role} is loaded, though no part of the stage declares it in its needs.")
            if declared and not there:
                raise ContractError(f"{role} is declared by a part, and not loaded.")
    return None


def _judges(subject: Subject) -> bool:
    """Whether some stage is judged: the run's reward is then there in all of them."""
    return subject.algorithm.asks_for_reward or any(REWARD in s.trains for s in subject.small.stages)


def roles_used(subject: Subject) -> str | None:
    """Another model or reward in a role changes the run where the role is declared, and nothing where it is not."""
    world, base, needs = subject.world, weights(subject.base), subject.small.needs
    others: dict[str, dict[str, Any]] = {
        REFERENCE: {"reference": world.other},
        TEACHER: {"teacher": world.other},
        REWARD: {"reward": subject.claim.reward(world.control())},
    }
    ignored: dict[str, Any] = {}
    for role, other in others.items():
        asked = subject.small.asks_for_reward if role == REWARD else role in needs
        if role == REFERENCE and any(not isinstance(s.reference, Start) for s in subject.small.stages):
            continue  # it is a copy of the policy, and not given
        if not asked:
            ignored |= other if role != TEACHER else {}
        elif weights(subject.run(**other)) == base:
            raise ContractError(
                f"another {role} gives the same weights: no part uses it. Take it out of the needs, or use it."
            )
    if ignored and weights(subject.run(**ignored)) != base:
        raise ContractError(f"{' and '.join(ignored)} change the run, though no part declares the need of it.")
    if any(stage.critics for stage in subject.small.stages):
        asleep = subject.run(critic_learning_rate=0.0, max_steps=3)
        awake = subject.run(max_steps=3)
        if _of(asleep, POLICY) == _of(awake, POLICY):
            raise ContractError("a critic that learns nothing gives the same policy: its values are not used.")
    return None


def _of(ended: Ended, role: str) -> dict[str, str]:
    return {name: value for name, value in weights(ended).items() if name.endswith(f" {role}")}


def only_trained_roles_move(subject: Subject) -> str | None:
    """What the terms train moves; the reference, the teacher, the reward model and the given model do not."""
    world = subject.world
    given: dict[str, Any] = {}
    anchored = all(isinstance(s.reference, Start) for s in subject.small.stages)
    if REFERENCE in subject.small.needs and anchored:
        given["reference"] = world.other
    judge = _judge(world) if subject.small.asks_for_reward and not _verifies(subject.small) else None
    if judge is not None:
        given["reward"] = judge
    watched: dict[str, nn.Module] = {
        "the given model": world.start, "the teacher": world.teacher, "the reference": world.other
    }  # fmt: skip
    if judge is not None:
        watched["the reward model"] = judge
    before = {name: weights_hash(module) for name, module in watched.items()}
    ended = subject.run(**given)
    for name, module in watched.items():
        if weights_hash(module) != before[name]:
            raise ContractError(f"{name} has moved, which no term trains.")
    for stage, engine in zip(subject.small.stages, ended.engines, strict=True):
        for role, frozen in ((REFERENCE, engine.reference), (TEACHER, engine.teacher)):
            if frozen is None or frozen is engine.policy:
                continue
            if any(p.requires_grad or p.grad is not None for p in frozen.parameters()):
                raise ContractError(f"the {role} gets gradients.")
            if role == TEACHER or (role == REFERENCE and "reference" in given):
                kept = world.teacher if role == TEACHER else world.other
                if not torch.equal(flat(frozen), flat(kept)):
                    raise ContractError(f"the {role} has moved, which no term trains.")
        if set(engine.trained) != set(stage.trains):
            raise ContractError(f"{sorted(engine.trained)} are trained, the terms say {sorted(stage.trains)}.")
    moved, start = weights(subject.base), weights(subject.still)
    still = [name for name in moved if moved[name] == start[name]]
    if still and all(s.update is None for s in subject.small.stages) and not subject.claim.settings.get("reference"):
        raise ContractError(f"{', '.join(still)} did not move in two steps: its terms have no gradient.")
    return None


def _judge(world: EnumerableWorld) -> Scorer:
    """A reward model that says something of every text."""
    scorer = new_scorer(Policy(world.start))
    nn.init.normal_(scorer.head.weight, generator=torch.Generator().manual_seed(0))
    return scorer


def _verifies(algorithm: Algorithm) -> bool:
    """Whether a reward model is refused: some feedback wants a function, or has a check of its own."""
    asked = [s.feedback for s in algorithm.stages if REWARD in s.feedback.needs]
    return any(isinstance(f, Verifier | Objectives) or hasattr(f, "check") for f in asked)


def same_seed_same_run(subject: Subject) -> str | None:
    """A run is a function of its seed: the same weights and metrics to the bit, whatever the global random state."""
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        torch.manual_seed(1234)
        np.random.seed(1234)
        random.seed(1234)
        again = subject.run()
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
    if weights(again) != weights(subject.base) or metrics(again) != metrics(subject.base):
        raise ContractError("the same seed gives another run: some part draws from a global random stream.")
    sources = [stage.source for stage in subject.small.stages]
    if all(isinstance(source, Rollouts) and source.temperature == 0 for source in sources):
        return "its samples are the likeliest ones, whatever the seed"
    if all(weights(subject.run(seed=seed)) == weights(subject.base) for seed in (1, 2, 3)):
        raise ContractError("another seed gives the same run: neither the rows' order nor a sample depends on it.")
    return None


def micro_batches(subject: Subject) -> str | None:
    """1 × 8, 2 × 4 and 8 × 1 micro-batches give the same step; what couples rows refuses to be cut, in words."""
    coupled = [t.loss.name for s in subject.small.stages for t in s.terms if t.loss.whole_batch]
    if coupled:
        _refused(lambda: subject.run(tokens_per_batch=40), "couples the rows of a batch", "a cut batch")
        return f"{coupled[0]} couples rows, and refuses a cut batch"
    largest = 0.0
    whole = subject.base
    for budget in (40, 1):
        cut = subject.run(tokens_per_batch=budget)
        for mine, theirs, start in zip(cut.engines, whole.engines, subject.still.engines, strict=True):
            for role, trained in theirs.trained.items():
                moved = flat(trained.module) - _start(subject, role, start)
                apart = float((flat(mine.trained[role].module) - flat(trained.module)).norm())
                largest = max(largest, apart / max(float(moved.norm()), 1e-12))
    if largest > SPLIT:
        raise ContractError(
            f"cut into smaller micro-batches the step differs by {largest:.2g} of itself: something is averaged before "
            "the engine divides, or a part looks at a micro-batch where it should at the batch (a prelude does)."
        )
    return f"largest difference {largest:.1g} of the step"


def _start(subject: Subject, role: str, engine: Engine) -> Tensor:
    """The weights that a run starts with, as one vector."""
    return flat(Policy(subject.world.start) if role == POLICY else engine.trained[role].module)


def poisoned_masks(subject: Subject) -> str | None:
    """NaN in every masked cell of every record: the same weights to the bit."""
    poisoned = _Cells()

    def stage(stage: Stage) -> Stage:
        terms = [replace(t, loss=_Poisoned(t.loss.entry, t.loss.options, poisoned)) for t in stage.terms]
        return replace(stage, terms=tuple(terms))

    try:
        dirty = weights(subject.run(with_stages(subject.small, stage)))
    except NonFiniteError:
        dirty = {}
    if not poisoned.count:
        raise NotApplicable("its records have no masked cells")
    if dirty != weights(subject.base):
        raise ContractError("what stands in masked cells changes the run: a loss or a part reads beyond the mask.")
    return f"{poisoned.count} cells"


@dataclass
class _Cells:
    """Counts over all copies of a stage."""

    count: int = 0

    def __deepcopy__(self, memo: Any) -> _Cells:
        return self


@dataclass(frozen=True)
class _Poisoned(Loss):
    """A loss whose records hold NaN wherever they say that nothing is."""

    cells: _Cells = field(default_factory=_Cells, compare=False)

    def __call__(self, batch: Record) -> LossOut:
        fields: dict[str, Tensor] = {}
        for key, value in batch.tensors().items():
            axes = key.rpartition("_")[2]
            mask = getattr(batch, f"{side_of(key)}_mask_BT" if side_of(key) else f"mask_{axes.removesuffix('V')}", None)
            if axes in ("BT", "PKT", "BTV") and value.is_floating_point() and mask is not None:
                here = mask[..., None] if axes == "BTV" else mask
                fields[key] = torch.where(here, value, torch.nan)
                self.cells.count += int((~mask).sum())
        return super().__call__(replace(batch, **fields))


def learning_rate_zero(subject: Subject) -> str | None:
    """With a learning rate of 0 no weight moves, every ratio is 1 and the KL to the start 0."""
    if any(s.update is not None for s in subject.small.stages):
        raise NotApplicable("its step has a length of its own")
    ended = subject.still
    if "reference" in subject.claim.settings:
        raise NotApplicable("its reference is not its start")
    if weights_hash(ended.engines[-1].policy) != weights_hash(Policy(subject.world.start)):
        raise ContractError("the policy moves with a learning rate of 0.")
    for row in ended.run.history:
        if abs(row.get("ratio", 1.0) - 1) > 1e-5 and subject.small.stages[0].source.by == POLICY:  # type: ignore[union-attr]
            raise ContractError(f"the ratio to the sampling policy is {row['ratio']}, expected 1: nothing has moved.")
        if abs(row.get("kl", 0.0)) > 1e-5 and all(s.condition is None for s in subject.small.stages):
            raise ContractError(f"the KL to the start is {row['kl']}, expected 0: nothing has moved.")
    return None


def constant_reward(subject: Subject) -> str | None:
    """Where credit compares the samples of a prompt, equal rewards move nothing, and the log says so in words."""
    _compares(subject)
    gives = {stage.credit.gives for stage in subject.small.stages if stage.credit is not None}
    if gives & {"completions"}:
        raise NotApplicable("the first of equal samples is taken for the best")
    ended = subject.run(world=subject.world.constant(EQUAL))
    if weights_hash(ended.engines[-1].policy) != weights_hash(Policy(subject.world.start)):
        raise ContractError("all samples have the same reward, and yet the policy moves: rounding, or another term.")
    said = [line for line in ended.notes if "gradient" in line or "nothing is left" in line]
    if not said:
        raise ContractError(f"nothing is learned, and the log does not say so. It says: {ended.notes}")
    return f"the log says: {said[0]}"


def shifted_reward(subject: Subject) -> str | None:
    """Where credit compares the samples of a prompt, a number added to all rewards changes nothing."""
    _compares(subject)
    shifted = subject.run(world=subject.world.shifted(SHIFT))
    largest = 0.0
    for mine, theirs, start in zip(shifted.engines, subject.base.engines, subject.still.engines, strict=True):
        moved = (flat(theirs.policy) - _start(subject, POLICY, start)).norm()
        largest = max(largest, float((flat(mine.policy) - flat(theirs.policy)).norm() / moved.clamp(min=1e-12)))
    if largest > SPLIT:
        raise ContractError(f"rewards that are all larger by {SHIFT:g} change the step by {largest:.2g} of itself.")
    return None


def _compares(subject: Subject) -> None:
    """Whether every reward is only compared with others of its prompt."""
    stages = subject.small.stages
    if not subject.small.asks_for_reward or not all(s.on_policy for s in stages):
        raise NotApplicable("no reward is asked for samples")
    alone = [s for s in stages if s.credit is None or s.credit.smallest_group < 2]
    if alone:
        part = type(alone[0].credit).__name__ if alone[0].credit is not None else "no credit"
        raise NotApplicable(f"{part} does not compare the samples of a prompt")


def wrong_data(subject: Subject) -> str | None:
    """Data of a type that it cannot use are refused before a step, with the types that would do."""
    if not subject.algorithm.stages:
        raise NotApplicable("it trains nothing")
    wanted = KIND_TO_TYPE[subject.algorithm.data]
    able = can_become(wanted)
    kind = next((kind for kind in ("prompt", "prompt_completion", "unpaired") if kind not in able), None)
    if kind is None:
        rows: list[dict[str, Any]] = [{"question": "p", "reply": "a"}]
        hints = [wanted.split("_")[0]]
    else:
        rows = [{"prompt": "p", "completion": "a", "label": True}, {"prompt": "q", "completion": "b", "label": False}]
        columns = {"prompt": ("prompt",), "prompt_completion": ("prompt", "completion"), "unpaired": tuple(rows[0])}
        rows, hints = [{k: row[k] for k in columns[kind]} for row in rows], [wanted, *able]
    said = _refused(lambda: subject.run(dataset=rows), hints[0], f"data of type {kind}")
    missing = [hint for hint in hints if hint not in said]
    if missing:
        raise ContractError(f"data of type {kind} are refused without saying that {missing[0]} would do: {said}")
    return None


def _refused(run: Callable[[], Any], words: str, what: str) -> str:
    try:
        run()
    except UsageError as error:
        if words not in str(error):
            raise ContractError(f"{what} is refused, but the error does not say {words!r}: {error}") from error
        return str(error)
    raise ContractError(f"{what} is not refused.")


def learns(subject: Subject) -> str | None:
    """A run ends where its claim says: at a distribution known exactly, or at more reward than permuted feedback."""
    evidence = prove(subject.make, subject.known, subject.claim, subject.world)
    if not evidence.holds:
        raise ContractError(f"it {evidence.words}.")
    return evidence.words


ALGORITHM_CHECKS: dict[str, Callable[[Subject], str | None]] = {
    f.__name__: f
    for f in (
        builds,
        spec_round_trip,
        wrong_data,
        roles_loaded,
        roles_used,
        only_trained_roles_move,
        same_seed_same_run,
        micro_batches,
        poisoned_masks,
        learning_rate_zero,
        constant_reward,
        shifted_reward,
        learns,
    )
}
