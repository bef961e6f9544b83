"""Compositions: parts that do not fit fail where they are put together, with the cure in the message."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import prefzoo
from prefzoo.algorithm import ALGORITHMS, Algorithm, Schedule, Stage, Term, create_algorithm, list_algorithms
from prefzoo.data.samples import Ragged, Samples
from prefzoo.losses import LOSSES, create_loss, register_loss
from prefzoo.parts.controllers import AdaptiveKL, FixedKL
from prefzoo.parts.count import Count
from prefzoo.parts.credit import GAE, BestOfK, GroupRelative, LeaveOneOut
from prefzoo.parts.feedback import Finished, Labels, MaskTruncated, Reward, Verifier
from prefzoo.parts.prelude import RotatedBaseline
from prefzoo.parts.source import DatasetRows, Rollouts
from prefzoo.records import LossOut, Pairs
from prefzoo.registry import Registry, UsageError
from prefzoo.training import TrainConfig

PAIRS = [{"prompt": "say a:", "chosen": " a", "rejected": " b"}]
SAMPLED: dict[str, Any] = {"source": Rollouts(4), "feedback": Reward()}
VALUE = Term(create_loss("clipped_value"), trains="critic")


def compose(**parts: Any) -> Callable[[], Algorithm]:
    return lambda: Algorithm(**parts)


def critic(kl: Any, **parts: Any) -> Callable[[], Algorithm]:
    terms = (Term(create_loss("clipped_surrogate")), VALUE)
    return lambda: Algorithm(**SAMPLED, credit=GAE(kl=kl), terms=terms, **parts)


# Construction -> a part of the message that names the fault, and one that names the cure.
MISFITS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "policy gradient without credit": (
        compose(**SAMPLED, loss=create_loss("clipped_surrogate")),
        "takes advantages, but source Rollouts gives rollouts", "give a credit: GroupRelative()",
    ),
    "likelihood of rollouts": (
        compose(**SAMPLED, loss=create_loss("sft")), "takes completions", "give the credit BestOfK()",
    ),
    "likelihood of advantages": (
        compose(**SAMPLED, credit=GroupRelative(), loss=create_loss("sft")), "credit GroupRelative gives", "BestOfK()",
    ),
    "pairs from rollouts": (
        compose(**SAMPLED, credit=GroupRelative(), loss=create_loss("dpo")), "takes pairs", "DatasetRows('pairs')",
    ),
    "policy gradient on pairs": (
        compose(source=DatasetRows("pairs"), loss=create_loss("clipped_surrogate")), "advantages", "Rollouts()",
    ),
    "pairwise on unpaired rows": (
        compose(source=DatasetRows("unpaired"), loss=create_loss("dpo")), "takes pairs", "parts that give 'pairs'",
    ),
    "KTO without baseline": (
        compose(source=DatasetRows("unpaired"), loss=create_loss("kto")), "needs a baseline", "RotatedBaseline()",
    ),
    "critic's loss on the policy": (
        compose(**SAMPLED, credit=GAE(), loss=create_loss("clipped_value")), "trains the critic", "trains='critic'",
    ),
    "a critic that nobody trains": (
        compose(**SAMPLED, credit=GAE(), loss=create_loss("clipped_surrogate")), "critic that learns", "clipped_value",
    ),
    "rollouts judged by labels": (
        compose(source=Rollouts(4), credit=GroupRelative(), loss=create_loss("clipped_surrogate")),
        "rollouts have no labels", "feedback=Reward()",
    ),
    "a group of one": (
        compose(source=Rollouts(1), feedback=Reward(), credit=LeaveOneOut(), loss=create_loss("clipped_surrogate")),
        "compares samples of one prompt", "at least 2, got 1",
    ),
    "reward for rows of a data set": (
        compose(source=DatasetRows("pairs"), feedback=Reward(), loss=create_loss("dpo")), "carry their labels",
        "Rollouts()",
    ),
    "filter for rows of a data set": (
        compose(source=DatasetRows("pairs"), keep=Finished(), loss=create_loss("dpo")), "carry their labels",
        "Rollouts()",
    ),
    "credit for rows of a data set": (
        compose(source=DatasetRows("completions"), credit=BestOfK(), loss=create_loss("sft")), "carry their labels",
        "Rollouts()",
    ),
    "no term": (compose(source=DatasetRows("pairs"), terms=()), "at least one term", "term"),
    "stages and parts": (
        compose(stages=create_algorithm("dpo").stages, loss=create_loss("dpo")), "not both", "stages",
    ),
    "unknown part": (compose(sauce=DatasetRows("pairs")), "no part 'sauce'", "did you mean 'source'?"),
    "adaptive KL that nobody updates": (critic(AdaptiveKL(0.1)), "nobody updates", "controllers={'kl'"),
    "adaptive KL of another": (
        critic(AdaptiveKL(0.1), controllers={"kl": AdaptiveKL(0.1)}), "nobody updates", "controllers={'kl'",
    ),
    "controller without reference": (
        compose(**SAMPLED, credit=LeaveOneOut(), loss=create_loss("clipped_surrogate"), controllers={"kl": FixedKL()}),
        "no part of this stage has one", "reference",
    ),
    "both kinds of minibatches": (lambda: Schedule(minibatches=2, minibatch_rows=8), "not both", "minibatch_rows"),
    "no prompts": (lambda: Schedule(prompts=0), "at least 1", "prompts=0"),
    "no samples": (lambda: Rollouts(0), "at least 1", "0"),
    "greedy rollouts": (lambda: Rollouts(4, temperature=0), "temperature > 0", "all the same"),
    "best of none": (lambda: BestOfK(0), "k >= 1", "0"),
    "unknown count": (lambda: Count("tokne"), "no count 'tokne'", "did you mean 'token'?"),
    "constant without a number": (lambda: Count("constant"), "number of tokens", "constant"),
    "number without constant": (lambda: Count("row", constant=3.0), "only for it", "constant"),
    "adaptive KL to zero": (lambda: AdaptiveKL(target=0.0), "must be positive", "target"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_parts_that_do_not_fit_say_how_they_would(name: str) -> None:
    construct, fault, cure = MISFITS[name]
    with pytest.raises(UsageError) as caught:
        construct()
    assert fault in str(caught.value) and cure in str(caught.value)


@pytest.mark.parametrize("name", list_algorithms())
def test_every_algorithm_constructs_and_describes_itself(name: str) -> None:
    algorithm = create_algorithm(name)
    text = repr(algorithm)
    assert text.startswith(f"<algorithm {name}(")
    assert all(type(stage.source).__name__ in text for stage in algorithm.stages)
    terms = [term for stage in algorithm.stages for term in stage.terms]
    assert terms or algorithm.product is not None
    for term in terms:
        assert f"{term.loss.name}/{term.counted.unit}->{term.trains}" in text
    for key, value in algorithm.options.items():
        assert f"{key}={value!r}" in text
    roles = {"policy", "reference", "reward", "teacher", "heads"}
    assert {role for role in algorithm.needs if not role.startswith("critic")} <= roles
    assert set(algorithm.recommended) <= set(TrainConfig.model_fields)
    made_of = {name} | {f"loss:{t.loss.name}" for t in terms}
    assert algorithm.sources.keys() == made_of | {f"modifier:{m.name}" for t in terms for m, _ in t.loss.modifiers}


# Functions to call: no source of rows gives their records.
TO_CALL = tuple(n for n in ("step_dpo", "tpo") if n not in list_algorithms())
TERMS = ("clipped_value", "ilql_q", "ilql_v", "ilql_cql")  # of a critic, of heads


@pytest.mark.parametrize("name", [n for n in LOSSES.names() if n not in (*TERMS, *TO_CALL)])
def test_a_loss_is_an_algorithm_of_its_name(name: str) -> None:
    algorithm = create_algorithm(name)
    assert name in list_algorithms() and algorithm.stages
    assert name in ALGORITHMS or name in {t.loss.name for t in algorithm.stages[0].terms}


@pytest.mark.parametrize("name", TO_CALL)
def test_a_loss_whose_records_nobody_makes_is_no_algorithm(name: str) -> None:
    assert name not in list_algorithms()
    with pytest.raises(UsageError, match=r"(no source gives|does not fill in) yet.*can be called with records"):
        create_algorithm(name)


@pytest.mark.parametrize("name", TERMS)
def test_a_critics_loss_and_that_of_heads_alone_are_no_algorithms(name: str) -> None:
    assert name not in list_algorithms()
    with pytest.raises(
        UsageError, match=rf"term of an algorithm \(see {name.partition('_')[0].replace('clipped', 'ppo')}\)"
    ):
        create_algorithm(name)


def test_stages_hold_what_was_given() -> None:
    terms = (Term(create_loss("clipped_surrogate")),)
    stage = Stage(**SAMPLED, credit=GroupRelative(), keep=MaskTruncated(), terms=terms)
    algorithm = Algorithm(stages=(stage,))
    assert algorithm.stages == (stage,) and algorithm.needs == {"policy", "reward"} and algorithm.data == "prompts"
    assert stage.on_policy and stage.critics == () and stage.trains == ("policy",)
    assert not algorithm.trains_reward and create_algorithm("reward_model").trains_reward


def test_a_term_counts_as_its_loss_unless_told() -> None:
    loss = create_loss("clipped_surrogate")
    assert Term(loss).counted == Count("token") and Term(loss, count="row").counted == Count("row")
    assert Term(loss, count=Count("constant", constant=7)).counted.constant == 7


# ------------------------------------------------------------------------------------------------ names and options

WRONG_WORDS: dict[str, tuple[Callable[[], Any], str]] = {
    "algorithm": (lambda: create_algorithm("gpro"), "did you mean 'grpo'?"),
    "algorithm, far off": (lambda: create_algorithm("xyzzy"), "Registered: "),
    "option of an algorithm": (lambda: create_algorithm("dpo", betta=0.1), "did you mean 'beta'?"),
    "option of a loss": (lambda: create_loss("clipped_surrogate", clipp=0.1), "did you mean 'clip'?"),
    "loss": (lambda: create_loss("bradly_terry"), "did you mean 'bradley_terry'?"),
    "estimator of the KL": (lambda: prefzoo.losses.kl.kl_estimator("k9"), "no KL estimator 'k9'"),
    "training option": (lambda: TrainConfig.of({"learning_rat": 1.0}), "did you mean 'learning_rate'?"),
    "value of a training option": (lambda: TrainConfig.of({"optimizer": "adam"}), "training option 'optimizer'"),
    "negative learning rate": (lambda: TrainConfig.of({"learning_rate": -1.0}), "training option 'learning_rate'"),
    "option of train": (lambda: fit("dpo", betta=0.1), "did you mean 'beta'?"),
    "field of train": (lambda: fit("dpo", learning_rat=0.1), "did you mean 'learning_rate'?"),
    "reward": (lambda: fit("grpo", reward="numerc"), "did you mean 'numeric'?"),
    "horizon without target": (lambda: create_algorithm("ppo", kl_horizon=9), "no effect without kl_target"),
    "critic that is not there": (lambda: fit("dpo", critic_learning_rate=0.1), "it has no critic"),
    "betas of sgd": (lambda: fit("dpo", optimizer="sgd", betas=(0.1, 0.2)), "the optimizer is sgd"),
    "estimator of rlvr": (lambda: create_algorithm("rlvr", estimator="best"), "expected 'group_relative' or "),
    "attribute": (lambda: prefzoo.trian, "no attribute 'trian'"),
}


def fit(name: str, **options: Any) -> Any:
    return prefzoo.train(name, model="tiny", dataset=PAIRS, quiet=True, **options)


@pytest.mark.parametrize("name", WRONG_WORDS)
def test_wrong_words_get_the_nearest(name: str) -> None:
    call, words = WRONG_WORDS[name]
    with pytest.raises((UsageError, AttributeError)) as caught:
        call()
    assert words in str(caught.value)


NO_EFFECT: dict[str, tuple[Callable[[], Any], str]] = {
    "rows of rollouts": (lambda: fit("grpo", reward="exact", rows_per_step=8), "no effect on 'grpo'.*prompts_per_step"),
    "in a configuration": (
        lambda: fit("grpo", reward="exact", config=TrainConfig(rows_per_step=8)), "no effect on 'grpo'",
    ),
    "std of leave-one-out": (
        lambda: create_algorithm("rlvr", estimator="leave_one_out", std=False), "std has no effect.*never divides",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_EFFECT)
def test_an_option_without_effect_is_refused(name: str) -> None:
    call, words = NO_EFFECT[name]
    with pytest.raises(UsageError, match=words):
        call()


@pytest.mark.parametrize("name", ["ppo", "rejection_sampling", "grpo", "rlvr"])
def test_without_a_reward_the_cure_is_told(name: str) -> None:
    with pytest.raises(UsageError, match=r"needs a reward: give reward= .*'exact', 'numeric'.*train reward_model"):
        fit(name)


def test_a_reward_that_nobody_needs_is_ignored_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    prefzoo.train("sft", model="tiny", dataset=PAIRS, reward="exact", max_steps=1)
    assert "sft learns from the data's labels; reward= is ignored" in "".join(capsys.readouterr())


def test_a_reward_model_does_not_verify() -> None:
    from prefzoo.models.load import new_scorer

    run = fit("sft", max_steps=1)
    with pytest.raises(UsageError, match=r"needs a verifier.*use 'grpo'"):
        prefzoo.train("rlvr", model=run.model, tokenizer=run.tokenizer, dataset=PAIRS, reward=new_scorer(run.policy))


def test_train_without_data_or_tokenizer_says_so() -> None:
    with pytest.raises(UsageError, match=r"give dataset=.*of type pairs"):
        prefzoo.train("dpo", model="tiny")
    run = fit("sft", max_steps=1)
    run.model.config._name_or_path = ""
    with pytest.raises(UsageError, match=r"give tokenizer="):
        prefzoo.train("dpo", model=run.model, dataset=PAIRS)


def test_settings_come_in_layers() -> None:
    """The recommended value is over the default, the user's over both, and a keyword over the file."""
    plain = {"max_steps": 1, "logging_steps": 1, "warmup_steps": 0, "schedule": "constant"}
    file = {**plain, "learning_rate": 0.5}
    layers: list[dict[str, Any]] = [plain, {"config": file}, {"config": file, "learning_rate": 0.25}]
    rates = [fit("sft", **{**plain, **layer}).history[0]["learning_rate"] for layer in layers]
    assert rates == [create_algorithm("sft").recommended["learning_rate"], 0.5, 0.25] and rates[0] == 2e-5


# ------------------------------------------------------------------------------------------------ the registry


@pytest.fixture
def clean() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    kept = [(r, dict(r._entries), dict(r._aliases)) for r in (LOSSES, ALGORITHMS)]
    yield
    for registry, entries, aliases in kept:
        registry._entries, registry._aliases = entries, aliases


@pytest.mark.parametrize("alias", [a for n in ALGORITHMS.names() for a in ALGORITHMS.entry(n).aliases])
def test_aliases_lead_to_their_entry(alias: str) -> None:
    algorithm = create_algorithm(alias)
    assert algorithm.name != alias and alias not in list_algorithms() and algorithm.name in list_algorithms()
    assert repr(algorithm) == repr(create_algorithm(algorithm.name))


def test_ppo_rlhf_is_ppo() -> None:
    assert create_algorithm("ppo_rlhf").name == "ppo"


def test_a_name_is_taken_once() -> None:
    shapes = Registry("shape")

    def square(*, side: float = 1.0) -> float:
        "A square's area."
        return side * side

    shapes.register(square, aliases=("quad",))
    shapes.register(square, aliases=("quad",))  # the same definition again is no conflict
    with pytest.raises(UsageError, match=r"'square' is already registered by .*choose another name"):
        shapes.register(namesake("square"))
    with pytest.raises(UsageError, match=r"'quad' is already registered"):
        shapes.register(namesake("quad"))  # a name may not hide an alias
    with pytest.raises(UsageError, match=r"'quad' is already registered"):
        shapes.register(namesake("circle"), aliases=("quad",))
    assert shapes.names() == ["square"] and shapes.names("z*") == [] and "quad" in shapes and "circle" not in shapes
    assert shapes.entry("quad").options == {"side": 1.0} and shapes.entry("square").line == "A square's area."


def namesake(name: str) -> Callable[[], None]:
    def other() -> None:
        """Another."""

    other.__name__ = other.__qualname__ = name
    return other


def test_a_users_loss_is_an_algorithm_at_once(clean: None) -> None:
    import torch.nn.functional as F

    @register_loss(paper="arXiv:2305.10425", aliases=("slack",))
    def users_hinge(batch: Pairs, *, delta: float = 1.0) -> LossOut:
        """A hinge on the log-ratio."""
        return LossOut(F.relu(delta - (batch.chosen_ratio_B - batch.rejected_ratio_B)))

    assert "users_hinge" in list_algorithms("users*") and create_algorithm("slack", delta=2.0).name == "users_hinge"
    run = fit("users_hinge", delta=3.0, max_steps=1, logging_steps=1)
    assert run.history[0]["loss"] == pytest.approx(3.0, abs=1e-4), "policy and reference are one at the start"
    with pytest.raises(UsageError, match=r"already registered"):
        register_loss(same_name := _second_hinge())
    assert same_name.__name__ == "users_hinge"


def _second_hinge() -> Any:
    def users_hinge(batch: Pairs) -> LossOut:
        """Another one."""
        return LossOut(batch.chosen_B)

    return users_hinge


def test_a_users_algorithm_is_registered(clean: None) -> None:
    @prefzoo.register_algorithm(recommended={"learning_rate": 0.125})
    def users_dpo(*, beta: float = 0.3) -> Algorithm:
        """DPO with another default."""
        return Algorithm(source=DatasetRows("pairs"), loss=create_loss("dpo", beta=beta))

    algorithm = create_algorithm("users_dpo")
    assert algorithm.options == {"beta": 0.3} and algorithm.recommended == {"learning_rate": 0.125}
    assert algorithm.sources.keys() == {"users_dpo", "loss:dpo"}


@pytest.mark.parametrize("bad", ["no arguments", "no record", "positional", "no default"])
def test_losses_that_break_the_signature_are_refused(bad: str, clean: None) -> None:
    def nothing() -> LossOut: ...
    def untyped(batch) -> LossOut: ...
    def positional(batch: Pairs, beta: float = 0.1) -> LossOut: ...
    def undefined(batch: Pairs, *, beta: float) -> LossOut: ...

    function = {"no arguments": nothing, "no record": untyped, "positional": positional, "no default": undefined}[bad]
    with pytest.raises(UsageError, match=r"must be a record|annotate its argument|keyword-only with a default"):
        register_loss(function)


# ------------------------------------------------------------------------------------------------ state


def test_two_algorithms_share_no_controller() -> None:
    first, second = (create_algorithm("ppo", kl_target=1.0) for _ in range(2))
    first.stages[0].controllers["kl"].update(kl=9.0, n=100)
    assert first.stages[0].controllers["kl"].value != second.stages[0].controllers["kl"].value == 0.05
    twin = copy.deepcopy(first)
    twin.stages[0].controllers["kl"].update(kl=9.0, n=100)
    assert twin.stages[0].controllers["kl"].value > first.stages[0].controllers["kl"].value
    assert twin.stages[0].credit.kl is twin.stages[0].controllers["kl"], "still one object in the copy"


@pytest.mark.parametrize(
    "controller", [FixedKL(0.3), AdaptiveKL(0.3, target=2.0, horizon=50)], ids=["fixed", "adaptive"]
)
def test_controllers_can_be_stored(controller: Any) -> None:
    controller.update(kl=5.0, n=10)
    fresh = type(controller)()
    fresh.load_state_dict(controller.state_dict())
    assert fresh.value == controller.value == pytest.approx(0.3 if isinstance(controller, FixedKL) else 0.3 * 1.04)


def test_parts_declare_what_they_need() -> None:
    assert Labels().needs == frozenset() and Verifier().needs == {"reward"} == Reward(0.5).needs
    assert GAE().needs == {"critic", "reference"} and GroupRelative().needs == LeaveOneOut().needs == frozenset()
    assert RotatedBaseline().needs == {"reference"}
    assert LeaveOneOut(kl=0.1).needs == {"reference"}


def test_leave_one_out_of_clipped_and_penalised_rewards() -> None:
    """By hand: the range first, then the KL of the whole completion, the others' mean, one standard deviation."""
    g = torch.Generator().manual_seed(0)
    lengths, prompts = [2, 3, 1, 2, 4, 1, 2, 2], [0, 0, 0, 0, 1, 1, 1, 2]
    samples = Samples(
        "completions", Ragged.of([[1], [2], [3]]), Ragged.of([[5] * n for n in lengths]), np.array(prompts)
    ).with_tokens(old_logps=torch.randn(17, generator=g), ref_logps=torch.randn(17, generator=g))
    scores = [3.0, -3.0, 0.5, math.nan, 0.2, 0.1, math.nan, 1.0]
    log_ratios = (samples.tokens["old_logps"] - samples.tokens["ref_logps"]).split(lengths)
    rewards = [min(max(r, -1.0), 1.0) - 0.1 * float(k.sum()) for r, k in zip(scores, log_ratios, strict=True)]
    wanted = [0.0] * 8
    compared = [0, 1, 2, 4, 5]  # the fourth and the seventh have no reward, the last has no other
    for i in compared:
        others = [rewards[j] for j in compared if prompts[j] == prompts[i] and j != i]
        wanted[i] = rewards[i] - sum(others) / len(others)
    first = [0, 2, 5, 6, 8, 12, 13, 15]  # token of each completion
    plain = LeaveOneOut(0.1, reward_clip=(-1.0, 1.0))(samples, torch.tensor(scores)).tokens["advantages"]
    assert plain[first].tolist() == pytest.approx(wanted, abs=1e-5)
    known = torch.tensor([wanted[i] for i in compared])
    scaled = torch.zeros(8)
    scaled[compared] = (known - known.mean()) / (known.std() + 1e-4)
    white = LeaveOneOut(0.1, normalise=True, reward_clip=(-1.0, 1.0))(samples, torch.tensor(scores))
    torch.testing.assert_close(white.tokens["advantages"][first], scaled, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="kl is a weight of at least 0"):
        LeaveOneOut(-0.1)
    with pytest.raises(UsageError, match="a least and a largest reward"):
        LeaveOneOut(reward_clip=(1.0, 0.0))


def test_a_policy_gradient_loss_takes_the_options_of_its_sampling() -> None:
    algorithm = create_algorithm("cispo", clip_high=2.0, group_size=4, prompts_per_step=2, max_new_tokens=16)
    (stage,) = algorithm.stages
    assert (stage.source.group_size, stage.source.max_new_tokens, stage.schedule.prompts) == (4, 16, 2)
    assert stage.terms[0].loss.options["clip_high"] == 2.0
    assert algorithm.options["temperature"] == 1.0 and algorithm.options["group_size"] == 4
    with pytest.raises(UsageError, match=r"expected int, got 2\.5"):
        create_algorithm("cispo", group_size=2.5)
    with pytest.raises(UsageError, match="no option 'group_size'"):
        create_loss("cispo", group_size=4)


def test_a_modifier_that_does_not_apply_is_refused_with_its_reason_before_training() -> None:
    with pytest.raises(UsageError, match=r"'simpo' does not take 'divergence'.*no reference"):
        prefzoo.train("simpo", model="tiny", dataset=[{"prompt": "a", "chosen": "b", "rejected": "c"}], divergence="js")
