"""AI feedback: a judge's labels, and the stages that lead from them to a policy."""

from typing import Any, Literal

from prefzoo.algorithm import Algorithm, Stage, Term, algorithm_entry, create_algorithm, register_algorithm
from prefzoo.feedback.sources import read_call
from prefzoo.losses import create_loss
from prefzoo.parts.feedback import Reward
from prefzoo.parts.judged import AILabels, Judged
from prefzoo.parts.options import SAMPLING, sampled
from prefzoo.parts.pairs import TopAgainstBottom
from prefzoo.parts.preference import compared, loss_named
from prefzoo.parts.revision import Revised, principles_of
from prefzoo.parts.schedule import Schedule
from prefzoo.parts.source import Rollouts
from prefzoo.records import Pairs
from prefzoo.registry import Positive, UsageError
from prefzoo.rollout import Sampling

ROLLED = {k: v for k, v in SAMPLING.items() if k not in ("missing_eos_penalty", "mask_truncated")}
EACH = {k: SAMPLING[k] for k in ("prompts_per_step", "temperature", "max_new_tokens")}  # of every stage
SLOWLY = {"learning_rate": 1e-6, "critic_learning_rate": 5e-6}
Labels = Literal["soft", "hard"]


def reinforced(text: str, **options: Any) -> tuple[Stage, ...]:
    """The stages of the on-policy algorithm that a text names, ``ppo(kl=0.1)``; ``options``: what it leaves open."""
    name, bracket, _ = text.partition("(")
    values, own = read_call(text) if bracket else ([], {})
    if values:
        raise UsageError(f"rl={text!r}: write each option as option=value; {values[0]!r} has no name.")
    known = algorithm_entry(name.strip()).options
    stages = create_algorithm(name.strip(), **{k: v for k, v in options.items() if k in known} | own).stages
    if not stages or not stages[0].on_policy or type(stages[0].feedback) is not Reward:
        raise UsageError(f"rl={text!r} does not learn from rewards of its samples; take 'ppo', 'rloo' or 'grpo', say.")
    return stages


def judged_rewards(labels: Labels, largest: float, steps: int | None, rate: float, each: dict[str, Any]) -> Stage:
    """A reward model from a judge's labels of two samples to each prompt; the policy stays as it is."""
    return Stage(
        source=Rollouts(2, temperature=each["temperature"], max_new_tokens=each["max_new_tokens"]),
        feedback=Judged(),
        credit=AILabels(TopAgainstBottom("win_rates"), soft=labels == "soft", largest=largest),
        terms=(Term(create_loss("bradley_terry"), trains="reward"),),
        schedule=Schedule(each["prompts_per_step"], steps=steps, rate=rate),
    )


@register_algorithm(paper="arXiv:2309.00267", recommended={"learning_rate": 5e-7}, shared={**ROLLED, "group_size": 2})
def rlaif(
    *, loss: str = "dpo", beta: Positive | None = None, pairs: Literal["extremes", "all"] = "extremes",
    labels: Labels | None = None, samples_of: Literal["policy", "start"] = "policy", **sampling: Any,
) -> Algorithm:  # fmt: skip
    """AI feedback without a reward model: a judge labels samples, and a preference loss is trained on its labels.

        y, y' ~ π or ref;   (y_w, y_l) = the one that the judge finds better, and the other;   loss = dpo, ipo, ...

    Args:
        loss: any loss of pairs, labelled completions or rankings, with its options: ``"simpo(beta=2)"``.
        beta: of the loss; None: its own default.
        labels: ``soft``: a pair counts in both orders, by the judge's probabilities p and 1 - p; ``hard``: the better
            one is chosen. None: soft for losses of pairs, and hard for others, which know no other.
        pairs: with more than two completions, the best against the worst, or all that differ.
        samples_of: who writes what is judged: the policy as it is, or its start.

    KL: to the start, in the loss, as an implicit reward β log π/ref; losses without reference have none.

    Ties and missing verdicts give no pair; their shares are logged. ``reward`` must be a judge.

    Convention: the papers train a reward model on the labels: ``canonical_rlaif`` and ``constitutional``.

    Source: Lee et al., arXiv:2309.00267; Bai et al., arXiv:2212.08073; without a reward model: Guo et al.,
    arXiv:2402.04792.

    Example::

        prefzoo.train("rlaif", model="my-model", dataset="prompts.jsonl", reward="judge(model=my-judge)", loss="ipo")
    """
    by = {"policy": "policy", "start": "reference"}[samples_of]
    parts = sampled({**SAMPLING, **sampling}, by=by) | {"feedback": Judged()}
    chosen = loss_named(loss, beta=beta)
    soft = labels == "soft" or (labels is None and chosen.family is Pairs)
    return Algorithm(**parts, **compared(chosen, pairs, "win_rates" if soft else None))


@register_algorithm(paper="arXiv:2309.00267", recommended=SLOWLY, shared=EACH)
def canonical_rlaif(
    *, rl: str = "a2c(entropy=0, kl=0.05)", labels: Labels = "soft", largest: Positive = 1.0,
    reward_steps: int | None = None, reward_rate: Positive = 10.0, **each: Any,
) -> Algorithm:  # fmt: skip
    """Canonical RLAIF: a judge labels pairs of the start's samples, a reward model learns them, RL raises its reward.

        1. y, y' ~ start;  r ← argmin E[- p log σ(r(y) - r(y')) - (1 - p) log σ(r(y') - r(y))],  p = P(y beats y')
        2. rl with the reward r

    Args:
        rl: the algorithm of the second stage, any that samples and is rewarded, with its options in brackets.
        labels: ``soft``: p is the judge's; ``hard``: 1 for the better one.
        largest: no p of a better completion is above it.
        reward_steps: steps of the first stage, each of ``prompts_per_step`` pairs; None: the run's.
        reward_rate: its learning rate, in multiples of the run's.

    KL: that of ``rl``; by default k1 per token in the reward, weight 0.05, to the start. None in the first stage.

    Convention: the paper's RL is REINFORCE with a learned baseline, here ``a2c`` without its entropy bonus. The reward
    model starts from the policy; a tie gives no pair. Weight of the KL and step sizes are ours.

    Source: Lee et al., arXiv:2309.00267, section 2.2.

    Example::

        prefzoo.train("canonical_rlaif", model="my-model", dataset="prompts.jsonl", reward="judge(model=my-judge)")
    """
    return Algorithm(stages=(judged_rewards(labels, largest, reward_steps, reward_rate, each), *reinforced(rl, **each)))


@register_algorithm(paper="arXiv:2212.08073", recommended=SLOWLY, shared=EACH)
def constitutional(
    *, principles: Any = None, revisions: int = 1, train_on: Literal["all", "last"] = "all", reviser: str = "policy",
    rl: str = "ppo", labels: Labels = "soft", largest: Positive = 1.0, revision_steps: int | None = None,
    reward_steps: int | None = None, revision_rate: Positive = 10.0, reward_rate: Positive = 10.0, **each: Any,
) -> Algorithm:  # fmt: skip
    """Constitutional AI: the model revises its answers by principles and learns that, then RL from AI preferences.

        1. y_0 ~ π, y_r = reviser(x, y_{r-1}, critique by a principle);  loss = - mean over tokens of log π(y_r | x)
        2. a reward model from a judge's labels of two samples, as in ``canonical_rlaif``
        3. rl with that reward, held to the policy of stage 1

    Args:
        principles: a text file, one in each line, or a list; None: nine of our own. One at random for each critique.
        revisions: rounds of critique and revision.
        train_on: the revisions of all rounds, or the last.
        reviser: ``policy``, ``reference`` (the start), ``teacher``, or a function ``my_file.py:name``.
        rl, labels, largest, reward_steps, reward_rate: as in ``canonical_rlaif``; ``largest=0.6`` is the paper's for
            judges that reason first.
        revision_steps, revision_rate: of the first stage.

    KL: that of ``rl``, to the policy that the first stage has made; k1 per token in the reward with ``ppo``.

    Convention: π learns while it revises; the paper samples once and starts anew from the pretrained model. Its helpful
    answers and its human labels of helpfulness are not mixed in. The requests should be those that invite harm.

    Source: Bai et al., arXiv:2212.08073, figure 1; the step sizes are ours.

    Example::

        prefzoo.train("constitutional", model="my-model", dataset="prompts.jsonl", reward="judge(model=my-judge)")
    """
    sampling = Sampling(each["temperature"], max_new_tokens=each["max_new_tokens"])
    first = Stage(
        source=Rollouts(1, temperature=each["temperature"], max_new_tokens=each["max_new_tokens"]),
        feedback=Revised(
            rounds=revisions, principles=principles_of(principles), reviser=reviser, keep=train_on, sampling=sampling
        ),
        terms=(Term(create_loss("sft"), count="token"),),
        schedule=Schedule(each["prompts_per_step"], steps=revision_steps, rate=revision_rate),
    )
    second = judged_rewards(labels, largest, reward_steps, reward_rate, each)
    return Algorithm(stages=(first, second, *reinforced(rl, **each)))
