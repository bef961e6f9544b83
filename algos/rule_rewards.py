"""Rewards from rules beside a reward from preferences."""

from dataclasses import replace

from prefzoo.algorithm import Algorithm, register_algorithm
from prefzoo.algos.ai_feedback import SLOWLY, reinforced
from prefzoo.parts.feedback import Reward
from prefzoo.parts.judged import RuleRewards
from prefzoo.registry import Positive


@register_algorithm(paper="arXiv:2411.01111", aliases=("sparrow",), recommended=SLOWLY)
def rbr(*, rl: str = "ppo", rule_weight: Positive = 1.0) -> Algorithm:
    """Rule-based rewards: graded statements about an answer, added to a reward of helpfulness; then RL.

        R(x, y) = R_help(x, y) + rule_weight Σ_k w_k p_k(x, y);   p_k = probability that statement k is true of y

    ``reward`` is a list: a reward model, then ``rules(FILE.yaml)`` or ``rules(sparrow, model=my-judge)``, which are
    Sparrow's in our words: 20 statements of what an answer must not do, each with w = -1.

    Args:
        rl: the algorithm that learns from R, any that samples and is rewarded, with its options in brackets:
            ``"ppo(kl=0.1, max_new_tokens=64)"``, ``"grpo"``.
        rule_weight: of the rules' sum; 1/n makes it a mean of n statements, as Sparrow has it.

    KL: that of ``rl``; k1 per token in the reward with ``ppo``.

    An answer about which the reward model or a rule says nothing has no reward. Each part is logged:
    ``rewards/NAME/mean``, ``rules/NAME``.

    Convention: weights are fitted before the run (``prefzoo.feedback.Rules.fit``, the paper's hinge loss), not in it.
    The paper centres R_help by completions that refuse; scales are yours to match. Sparrow multiplies
    probabilities only to rerank (``rules(..., combine=product)``), and has rules learned from violations found.

    Source: Mu et al., Rule Based Rewards for Language Model Safety, arXiv:2411.01111, section 4; Glaese et al.,
    Sparrow, arXiv:2209.14375.

    Example::

        prefzoo.train("rbr", model="my-model", dataset="prompts.jsonl",
                      reward=["runs/rm/final", "rules(sparrow, model=my-judge)"], rule_weight=0.05)
    """
    return Algorithm(
        stages=tuple(
            replace(s, feedback=RuleRewards(s.feedback.missing_eos_penalty, weight=rule_weight))
            if isinstance(s.feedback, Reward)
            else s
            for s in reinforced(rl)
        )
    )
