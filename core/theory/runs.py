"""What the run of every algorithm ends at, on the language model whose responses can be enumerated.

A *claim* says where a run must end: at a distribution, known in closed form or computed without the engine, or at a
higher expected reward, where a run with permuted feedback does not go. ``CLAIMS`` holds them by name; an algorithm that
is not there gets the claim of its parts (:func:`claim_of`), and a registration may bring its own
(``@register_algorithm(claim=Claim(...))``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import prefzoo.training.run as training
from prefzoo.algorithm import Algorithm, Stage, Term
from prefzoo.data.rows import Row
from prefzoo.data.tokens import tokenise
from prefzoo.losses import Loss
from prefzoo.models.roles import Scorer
from prefzoo.parts.product import Draw
from prefzoo.parts.roles import REFERENCE, TEACHER
from prefzoo.parts.source import Rollouts
from prefzoo.records import Likelihood, Pairs, Ranked, Ratings, Record, StepScores, Unpaired
from prefzoo.rollout import Sampling
from prefzoo.theory.enumerable_lm import PROMPTS, RESPONSES, EnumerableWorld, laboratory_policy
from prefzoo.theory.policies import EnumerablePolicy
from prefzoo.theory.populations import minimise, pairs_of, unfrozen
from prefzoo.theory.ranked import lists_of
from prefzoo.theory.unpaired import singles_of
from prefzoo.training.engine import Engine

Target = Callable[[EnumerableWorld, Algorithm], Tensor]
Rows = Callable[[EnumerableWorld], Sequence[Row]]

BETA = 0.5
# Of every run; a claim may change them. Learning rates this large are for a table.
OFFLINE: dict[str, Any] = {"max_steps": 120, "learning_rate": 0.3, "rows_per_step": 10_000}
SAMPLED: dict[str, Any] = {"max_steps": 80, "learning_rate": 0.15}
ALWAYS: dict[str, Any] = {
    "schedule": "linear", "final_learning_rate": 0.0, "warmup_steps": 0, "max_grad_norm": None,
    "optimizer": "adamw", "logging_steps": 1_000, "quiet": True, "stuck_minutes": None, "device": "cpu",
}  # fmt: skip
SAMPLES = 64  # of a rollout step


@dataclass(frozen=True)
class Claim:
    """Where a run ends.

    Args:
        words: where, for people.
        target: log-probabilities of the responses, (P, R); None: the expected reward rises. Of a reward model: scores.
        within: largest total variation to the target, over the prompts; of a reward model the largest error.
        share: without target, the least share of the way from the start's expected reward to the best response's; a
            run with permuted feedback must not go a third of it.
        options: of the algorithm, where its defaults do not show the claim; those that it does not have are left out.
        settings: of the training.
        rows: the data, where they are not simply everything of the algorithm's kind.
        reward: of the run, where it needs one.
    """

    words: str
    target: Target | None = None
    within: float = 0.02
    share: float = 0.5
    options: Mapping[str, Any] = field(default_factory=lambda: {"beta": BETA})
    settings: Mapping[str, Any] = field(default_factory=dict)
    rows: Rows | None = None
    reward: Callable[[EnumerableWorld], Any] = lambda world: world.reward


# ------------------------------------------------------------------------------------------------ targets


def kl_optimum(world: EnumerableWorld, algorithm: Algorithm) -> Tensor:
    """ref exp(r / beta), beta the algorithm's option of that name, or its ``kl``."""
    return world.optimum(algorithm.options.get("beta", algorithm.options.get("kl", BETA)))


def demonstrations(world: EnumerableWorld, algorithm: Algorithm) -> Tensor:
    """The distribution that the demonstrations were drawn from."""
    return world.optimum(BETA)


def best_response(world: EnumerableWorld, algorithm: Algorithm) -> Tensor:
    """All probability on the best response."""
    return world.optimum(1e-3)


def minimum(world: EnumerableWorld, algorithm: Algorithm) -> Tensor:
    """The minimum of the loss over the whole population, prompt by prompt, in float64 and without the engine."""
    (term,) = algorithm.stages[-1].terms
    return torch.stack([_minimum(world, term, prompt) for prompt in range(len(PROMPTS))])


def _minimum(world: EnumerableWorld, term: Term, prompt: int) -> Tensor:
    start = laboratory_policy(world.log_probs()[prompt])
    policy = unfrozen(start)
    record = RECORDS[term.loss.family](world, term.loss, prompt)

    def objective() -> Tensor:
        batch = record(policy, start)
        out = term.loss(batch)
        return term.counted.total(out.loss, batch.loss_mask_BT if out.mask_BT is None else out.mask_BT, batch.weights)

    minimise(policy.parameters(), objective)
    return policy.log_probs().detach()


Make = Callable[[EnumerablePolicy, EnumerablePolicy], Record]


def _pairs(world: EnumerableWorld, loss: Loss, prompt: int) -> Make:
    wins_RR, told_R = world.wins()[prompt], world.told_PR[prompt]
    chosen_B, rejected_B = (~torch.eye(len(told_R), dtype=torch.bool)).nonzero().T
    given = {
        "margin_B": told_R[chosen_B] - told_R[rejected_B],
        "probability_B": wins_RR[chosen_B, rejected_B],
        "weight_B": wins_RR[chosen_B, rejected_B],
    }
    fields = {k: v for k, v in given.items() if k in (*loss.extras, "weight_B")}
    return lambda policy, start: pairs_of(policy, start, chosen_B, rejected_B, **fields)


def _unpaired(world: EnumerableWorld, loss: Loss, prompt: int) -> Make:
    rate_R = world.win_rate()[prompt]
    weight_B = torch.cat([rate_R, 1 - rate_R])
    return lambda policy, start: replace(singles_of(policy, start), weight_B=weight_B)


def _ranked(world: EnumerableWorld, loss: Loss, prompt: int) -> Make:
    order = tuple(world.told_PR[prompt].argsort(descending=True).tolist())
    return lambda policy, start: lists_of(policy, start, [order], world.told_PR[prompt])


def _likelihood(world: EnumerableWorld, loss: Loss, prompt: int) -> Make:
    def record(policy: EnumerablePolicy, start: EnumerablePolicy) -> Record:
        logps_RT, mask_RT = policy.logps()
        return Likelihood(logps_BT=logps_RT, mask_BT=mask_RT, scores_B=world.told_PR[prompt])

    return record


RECORDS: dict[type[Record], Callable[[EnumerableWorld, Loss, int], Make]] = {
    Pairs: _pairs, Unpaired: _unpaired, Ranked: _ranked, Likelihood: _likelihood,
}  # fmt: skip


def chosen(world: EnumerableWorld, algorithm: Algorithm) -> Tensor:
    """The distribution of the chosen responses."""
    return world.win_rate().log().log_softmax(-1)


def odds(world: EnumerableWorld, algorithm: Algorithm) -> Tensor:
    """ref (P(desirable) / P(undesirable))^(1/beta)."""
    return (world.log_probs() + torch.logit(world.win_rate()) / BETA).log_softmax(-1)


def even(world: EnumerableWorld, algorithm: Algorithm) -> Tensor:
    """All responses alike."""
    return torch.zeros_like(world.rewards_PR).log_softmax(-1)


def best_of(n: int) -> Target:
    """The best of n samples of the start, by the order statistics of its rewards."""

    def target(world: EnumerableWorld, algorithm: Algorithm) -> Tensor:
        probs_PR = world.log_probs().exp()
        below_PRR = (world.rewards_PR[:, None] < world.rewards_PR[:, :, None]).double()
        below_PR = (below_PRR * probs_PR[:, None]).sum(-1)
        return ((below_PR + probs_PR) ** n - below_PR**n).log()

    return target


def of_scores(world: EnumerableWorld, algorithm: Algorithm) -> Tensor:
    """exp(score / beta), of data that hold every response once."""
    return (world.told_PR / algorithm.options["beta"]).log_softmax(-1)


def steered(world: EnumerableWorld, algorithm: Algorithm) -> Tensor:
    """data(v | text) exp(beta Q(text, v)) at every token, Q being the mean score of the data that go on so."""
    texts, beta = [f"{response}." for response in RESPONSES], algorithm.options["beta"]

    def log_prob(told: Mapping[str, float], text: str) -> float:
        total = 0.0
        for t in range(len(text)):
            through: dict[str, list[float]] = {}
            for other in texts:
                if other.startswith(text[:t]):
                    through.setdefault(other[t], []).append(told[other])
            logits = {v: math.log(len(s)) + beta * sum(s) / len(s) for v, s in through.items()}
            total += logits[text[t]] - math.log(sum(map(math.exp, logits.values())))
        return total

    rows = [dict(zip(texts, told_R, strict=True)) for told_R in world.told_PR.tolist()]
    return torch.tensor([[log_prob(told, text) for text in texts] for told in rows], dtype=torch.float64)


def truth(world: EnumerableWorld, algorithm: Algorithm) -> Tensor:
    """The rewards themselves, of a reward model."""
    return world.rewards_PR


def rest_against_mixture(world: EnumerableWorld, algorithm: Algorithm) -> Tensor:
    """ref exp(P(y beats the mixture) / kl): where nash_md rests, by damped iteration of that equation."""
    kl, share, tau = (algorithm.options[name] for name in ("kl", "mixture", "tau"))
    reference_PR, wins_PRR = world.log_probs(), (world.rewards_PR[:, :, None] - world.rewards_PR[:, None]) / tau
    log_PR = reference_PR
    for _ in range(500):
        other_PR = ((1 - share) * log_PR + share * reference_PR).softmax(-1)
        rate_PR = (wins_PRR.sigmoid() @ other_PR[..., None])[..., 0]
        log_PR = (0.8 * log_PR + 0.2 * (reference_PR + rate_PR / kl).log_softmax(-1)).log_softmax(-1)
    return log_PR


# ------------------------------------------------------------------------------------------------ claims


def drawn_demonstrations(world: EnumerableWorld) -> list[Row]:
    """About a hundred of each prompt, each response as often as it is likely: for what samples rows of the data."""
    rows = world.rows("completions")
    return [{k: row[k] for k in ("prompt", "completion")} for row in rows for _ in range(round(11 * row["weight"]))]


def worse_half(world: EnumerableWorld) -> list[Row]:
    """Pairs of the five worst responses: the policy is better than its data."""
    worst = world.told_PR.sort(-1).values[:, 4]
    told = {(p, r): world.told_PR[i, j] <= worst[i] for i, p in enumerate(PROMPTS) for j, r in enumerate(RESPONSES)}
    rows = world.rows("pairs", weighted=False)
    return [row for row in rows if told[row["prompt"], row["chosen"]] and told[row["prompt"], row["rejected"]]]


SOFT = {"beta": BETA, "soft_labels": "rewards"}  # labels by Bradley and Terry: with hard ones there is no optimum
OPTIMUM = Claim("the KL-regularised optimum ref exp(r/β)", kl_optimum)
MINIMUM = Claim("the minimum of its population loss, computed without the engine", minimum)
RISES = Claim("more reward")
TAUGHT = Claim("the teacher", demonstrations, 0.03, options={})
CONSTANT = {"learning_rate": 0.1, "schedule": "constant"}
BEST = Claim("the best response", best_response, within=0.05, settings=CONSTANT)
QUICKLY = {"inner_epochs": 1, "minibatches": 1}
WITH_CRITIC = replace(
    OPTIMUM, within=0.04, options={"kl": BETA, **QUICKLY},
    words="the KL-regularised optimum ref exp(r/β), but for the bias of λ and of a critic that learns",
)  # fmt: skip
SCORES = Claim("the true rewards of Bradley-Terry labels", truth, within=0.02)
SCALED = Claim("the true rewards up to a factor, as the data hold no ties", truth, within=0.02)

CLAIMS: dict[str, Claim] = {
    **dict.fromkeys(("dpo", "pl_dpo", "all_pairs_dpo", "reward_aware_rpo"), OPTIMUM),
    "exo": replace(OPTIMUM, options={"beta": BETA, "reward_beta": 1.0}, rows=lambda world: world.rows("rankings")),
    "sft": Claim("the policy that wrote the demonstrations", demonstrations),
    **dict.fromkeys(
        ("cdpo", "robust_dpo", "ipo", "ipo_sum", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "sppo_soft",
         "length_dpo", "odpo", "rpo_nll", "tdpo1", "tdpo2", "cpo", "cpo_hinge", "cpo_ipo", "simpo",
         "cpo_simpo", "alphapo", "orpo", "dpo_norm", "dpop", "slic_hf", "apo_zero", "apo_zero_unpaired",
         "weighted_sft", "filtered_sft"), MINIMUM),
    "discopop": replace(MINIMUM, settings={"learning_rate": 0.1}),  # it has several
    "reward_regression": Claim("the ratings", truth, within=0.03, settings={"learning_rate": 0.1}),
    "nca": replace(MINIMUM, options={"beta": BETA, "alpha": BETA}, rows=lambda world: world.rows("rankings")),
    **dict.fromkeys(("chosen_nll", "prompt_chosen_nll"), Claim("the distribution of the chosen responses", chosen)),
    "bco": Claim("ref (P(desirable) / P(undesirable))^(1/β), but for the shift that all prompts share", odds, 0.12),
    "kto": replace(RISES, words="what the majority calls desirable", share=0.6),
    "hinge": replace(RISES, words="wider margins, and then nothing more", share=0.4),
    "aot": replace(RISES, share=0.6),
    "aot_unpaired": replace(RISES, share=0.6),
    "apo_down": Claim("what the data do not hold, as the start is better than they are", share=0.3, rows=worse_half),
    "lipo": replace(RISES, words="the order of the scores, without an optimum", share=0.7),
    "dft": replace(RISES, words="the likeliest demonstrations alone", share=0.3),
    "rloo": replace(OPTIMUM, options={"kl": BETA}),
    **dict.fromkeys(("reinforce", "remax", "reinforce_pp"), replace(OPTIMUM, options={"kl": BETA}, within=0.04)),
    "a2c": replace(OPTIMUM, options={"kl": BETA, "entropy": 0.0}),
    "trpo": replace(OPTIMUM, options={"kl": BETA}, within=0.06, settings={"max_steps": 30}),  # steps of one size
    "ppo": WITH_CRITIC,
    "ma_ppo": replace(WITH_CRITIC, options={**WITH_CRITIC.options, "value": "first", "temperature": 1.0}),
    "ppo_max": replace(RISES, share=0.3, options=QUICKLY, settings={"max_steps": 50}),  # rewards / deviation
    "nlpo": replace(RISES, share=0.3, options=QUICKLY, settings={"max_steps": 50}),  # its KL is to its own past
    "gmpo": replace(BEST, options={"minibatches": 4}),
    **dict.fromkeys(
        ("dapo", "cispo"), replace(BEST, options={"minibatches": 2, "resamplings": 1}, settings={"max_steps": 60})
    ),
    "kl_penalty": Claim(
        "the reference", demonstrations, options={}, settings={"reference": lambda world: world.teacher}
    ),
    "best_of_n": Claim(
        "the best of 4 samples, by order statistics", best_of(4), within=0.03, options={"n": 4}
    ),
    "rest": replace(RISES, settings={"max_steps": 30, "learning_rate": 0.05}),  # it may settle on the second best
    "csft": Claim("the distribution of the desirable answers", chosen, 0.05, options={}),
    "quark": replace(RISES, share=0.3, options={"capacity": 256}, settings={"max_steps": 20}),
    "hpo": replace(RISES, share=0.3),
    "a2po": replace(OPTIMUM, options={"beta": BETA, "value_temperature": BETA, "value_samples": 7}, within=0.05),
    "entropy_bonus": Claim("the even policy", even),
    "online_dpo": replace(OPTIMUM, options=SOFT, within=0.05),
    "xpo": replace(OPTIMUM, options=SOFT, within=0.05),
    "iterative_dpo": replace(
        OPTIMUM, options={**SOFT, "reference": "start"}, within=0.06, settings={"max_steps": 60}
    ),
    "rso": replace(OPTIMUM, options={**SOFT, "pairs": "all"}, within=0.05, settings={"max_steps": 60}),
    "rs_dpo": replace(
        RISES, options={"beta": BETA, "threshold": 0.6, "epochs_per_round": 1}, settings={"max_steps": 20}
    ),
    "sppo_iterative": replace(RISES, options={"epochs_per_round": 4}, settings={"max_steps": 12}),
    "spin": Claim(
        "the policy that wrote the demonstrations", demonstrations, 0.08, options={}, settings={"max_steps": 50},
        rows=drawn_demonstrations,
    ),
    "nash_md": Claim(
        "its rest point ref exp(P(y beats the mixture)/kl)", rest_against_mixture, 0.08, options={"kl": 0.2}
    ),
    **dict.fromkeys(("forward_kl", "reverse_kl", "iw_opd"), TAUGHT),
    "gkd": replace(TAUGHT, rows=drawn_demonstrations),
    "minillm": replace(TAUGHT, options={"normalise": False, "count": "row_sum", "minibatches": 1}),
    "seqkd": replace(
        TAUGHT, within=0.06, options={"temperature": 1.0, "epochs_per_round": 1},
        settings={"max_steps": 60, "learning_rate": 0.1}, words="the teacher, who writes at temperature 1",
    ),
    "awr": Claim(
        "exp(score/β), as the data are even", of_scores, options={"beta": BETA, "standardise": False, "cap": 1e6}
    ),
    "fdpo": MINIMUM,
    "bema_dpo": replace(RISES, share=0.3, options={"beta": BETA, "every": 5}),
    "ilql": Claim(
        "the policy of its data, steered by their exact Q", steered, 0.06,
        options={"beta": 2.0, "expectile": 0.5, "gamma": 1.0, "cql": 0.0, "polyak": 1.0},
        settings={"learning_rate": 0.03, "max_steps": 200},
    ),
    **dict.fromkeys(("davidson", "rao_kupper"), SCALED),
    **dict.fromkeys(
        ("process_reward", "process_reward_model"),
        Claim("the probability that the last step is right", lambda world, algorithm: world.win_rate(), 0.02),
    ),
    "dr_grpo": replace(BEST, within=0.15),
    "rlaif": replace(
        OPTIMUM, options={"beta": BETA, "labels": "soft"}, within=0.05, reward=lambda world: world.judge
    ),
    "canonical_rlaif": replace(RISES, reward=lambda world: world.judge, share=0.3),
    "constitutional": replace(
        RISES, reward=lambda world: world.judge, share=0.2, settings={"max_steps": 25}, options={"rl": "rloo"}
    ),
    "rbr": replace(
        RISES, reward=lambda world: [world.reward, world.rules], share=0.3, settings={"max_steps": 40},
        options=QUICKLY,
    ),
    "safe_rlhf": replace(
        RISES, reward=lambda world: [world.reward, world.cost], share=0.2, settings={"max_steps": 40},
        options=QUICKLY,
    ),
}  # fmt: skip


def claim_of(algorithm: Algorithm, tags: Mapping[str, Any]) -> Claim:
    """The claim of an algorithm: by its name, by its registration, or by its parts."""
    if algorithm.name in CLAIMS:
        return CLAIMS[algorithm.name]
    if isinstance(tags.get("claim"), Claim):
        return tags["claim"]
    if algorithm.trains_reward:
        return SCORES
    if algorithm.on_policy and REFERENCE not in algorithm.needs:
        return BEST
    return replace(RISES, share=0.3)


@dataclass(frozen=True)
class Evidence:
    """What a run showed of a claim."""

    holds: bool
    words: str


def prove(make: Callable[..., Algorithm], known: Container[str], claim: Claim, world: EnumerableWorld) -> Evidence:
    """Train on the world, and compare where it ends.

    Args:
        make: the algorithm of some options.
        known: the options that it has.
    """
    algorithm = sized(make(**{k: v for k, v in claim.options.items() if k in known}))
    ended = fit(world, algorithm, claim).run
    if ended.scorer is not None:
        assert claim.target is not None
        return _scored(world, algorithm, ended.scorer, claim)
    end_PR, start_PR = answers(world, ended), world.log_probs()
    if claim.target is not None:
        target_PR = claim.target(world, algorithm)
        before, after = (total_variation(x, target_PR) for x in (start_PR, end_PR))
        words = f"ends at {claim.words}: total variation {before:.2f} at the start, {after:.4f} at the end"
        return Evidence(after <= claim.within, f"{words} (at most {claim.within:g})")
    gained, control = (world.gained(x) for x in (end_PR, answers(world, fit(world.control(), algorithm, claim).run)))
    words = f"goes {gained:.2f} of the way to the best reward (at least {claim.share:g}), {claim.words}"
    holds = gained >= claim.share and control <= claim.share / 3
    return Evidence(holds, f"{words}; with permuted feedback {control:.2f} (at most {claim.share / 3:.2f})")


def _scored(world: EnumerableWorld, algorithm: Algorithm, scorer: Scorer, claim: Claim) -> Evidence:
    assert claim.target is not None
    target_PR = claim.target(world, algorithm)
    if any(t.loss.family is StepScores for s in algorithm.stages for t in s.terms):
        scores_PR = world.step_scores(scorer)
    else:
        scores_PR = world.scores(scorer)
        if all(t.loss.family is not Ratings for s in algorithm.stages for t in s.terms):  # comparisons know no zero
            scores_PR, target_PR = (x - x.mean(-1, keepdim=True) for x in (scores_PR, target_PR))
    scale = 1.0
    if claim is SCALED:
        scale = float((scores_PR * target_PR).sum() / scores_PR.square().sum().clamp(min=1e-30))
        scores_PR = scale * scores_PR
    error = float((scores_PR - target_PR).abs().max())
    words = f"scores are {claim.words}: largest error {error:.4f} (at most {claim.within:g})"
    return Evidence(error <= claim.within and scale > 0, words)


DRAWN = 4000  # answers of each prompt, where the product is more than weights


def answers(world: EnumerableWorld, ended: training.Run) -> Tensor:
    """Log-probabilities of the answers that the run's product gives; exact, but where it decodes in its own way."""
    assert ended.policy is not None
    product = ended.policy.product
    if product is None:
        return world.log_probs(ended.policy)
    prompts, _ = tokenise([{"prompt": p} for p in PROMPTS], world.words, "prompts")
    draw = Draw(ended.policy, world.words, Sampling(max_new_tokens=4), seed=0)
    samples = product.answer(draw, prompts, DRAWN)
    texts = world.words.batch_decode([ids.tolist() for ids in samples.completions], skip_special_tokens=True)
    counts_PR = torch.full((len(PROMPTS), len(RESPONSES)), 1e-9, dtype=torch.float64)
    place = {response: j for j, response in enumerate(RESPONSES)}
    for prompt, text in zip(samples.prompt_B.tolist(), texts, strict=True):
        if text in place:
            counts_PR[prompt, place[text]] += 1
    return (counts_PR / DRAWN).log()


def total_variation(mine_PR: Tensor, theirs_PR: Tensor) -> float:
    """The larger one of the prompts."""
    return float((mine_PR.exp() - theirs_PR.exp()).abs().sum(-1).max() / 2)


# ------------------------------------------------------------------------------------------------ runs


@dataclass(frozen=True)
class Ended:
    """A finished run, the engines of its stages, and what the log said."""

    run: training.Run
    engines: tuple[Engine, ...]
    notes: tuple[str, ...]


def fit(world: EnumerableWorld, algorithm: Algorithm, claim: Claim, **settings: Any) -> Ended:
    """A run on the world, with the data and the roles that the algorithm needs; ``settings`` are over the claim's."""
    given = {k: v(world) if callable(v) else v for k, v in claim.settings.items()}
    if algorithm.asks_for_reward:
        given["reward"] = claim.reward(world)
    if TEACHER in algorithm.needs:
        given["teacher"] = world.teacher
    arguments = {**ALWAYS, **(SAMPLED if algorithm.on_policy else OFFLINE), **given, **settings}
    if any(s.critics for s in algorithm.stages):
        arguments.setdefault("critic_learning_rate", arguments["learning_rate"])
    rows = arguments.pop("dataset", None) or (claim.rows and claim.rows(world))
    if arguments["schedule"] == "constant":
        arguments.pop("final_learning_rate")
    data = world.rows_for(algorithm) if rows is None else rows
    steps = training.Steps(algorithm, model=world.start, tokenizer=world.words, dataset=data, **arguments)
    engines, notes = dict[int, Engine](), list[str]()
    steps.log.note = notes.append  # type: ignore[method-assign, assignment]
    with steps.stopping, steps:
        for step in steps:
            if steps.engine is not None:
                engines[step.stage] = steps.engine
        return Ended(steps.finish(), tuple(engines.values()), tuple(notes))


def sized(algorithm: Algorithm, samples: int = SAMPLES, group: int | None = None) -> Algorithm:
    """The algorithm with rollouts as short as the responses, so many at a time, in groups of at most ``group``."""

    def stage(stage: Stage) -> Stage:
        source = stage.source
        if not isinstance(source, Rollouts):
            return stage
        size = source.group_size if group is None else min(source.group_size, group)
        prompts = max(2, samples // size)
        schedule = replace(stage.schedule, prompts=min(stage.schedule.prompts, prompts))
        return replace(stage, source=replace(source, max_new_tokens=4, group_size=size), schedule=schedule)

    return with_stages(algorithm, stage)


def with_stages(algorithm: Algorithm, change: Callable[[Stage], Stage]) -> Algorithm:
    """The same algorithm with its stages changed."""
    changed = copy.copy(algorithm)
    changed.stages = tuple(map(change, algorithm.stages))
    return changed
