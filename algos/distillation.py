"""Distillation: a teacher's distributions, its rewards, or its answers."""

from typing import Any, Literal

from prefzoo.algorithm import Algorithm, Term, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.parts.feedback import Unjudged
from prefzoo.parts.options import ROUNDS, SAMPLING, in_rounds, sampled
from prefzoo.parts.teacher import TeacherReturn
from prefzoo.registry import NotNegative, Positive, Share

JUDGED = ("group_size", "missing_eos_penalty")  # options of sampling that need a reward
UNJUDGED = {k: v for k, v in SAMPLING.items() if k not in JUDGED}


def _unjudged(sampling: dict[str, Any], **source: Any) -> dict[str, Any]:
    return sampled({**SAMPLING, **sampling, "group_size": 1}, **source) | {"feedback": Unjudged()}


@register_algorithm(paper="arXiv:2306.13649", recommended={"learning_rate": 1e-5}, shared=UNJUDGED)
def gkd(*, beta: Share = 0.5, on_policy: Share = 0.5, softness: Positive = 1.0, **sampling: Any) -> Algorithm:
    """Generalised knowledge distillation: the teacher's distribution at every token, also of the policy's own answers.

        loss = mean_t  β KL(P ‖ M) + (1 - β) KL(π ‖ M),   M = β P + (1 - β) π,   P the teacher

    Args:
        beta: β, from covering all that the teacher does (0: forward KL) to seeking what it does most (1: reverse KL).
        on_policy: the paper's λ, the share of steps whose answers the policy writes; the other steps take those of the
            data. 0 and 1 are purely one or the other.
        softness: a temperature that divides the logits of both in the loss, not in the sampling.

    Needs ``teacher=``, with the policy's tokenizer. No reward, and no gradient through the sampling.

    Memory: logits of both and what the divergence makes of them, about 10 numbers of 4 bytes for every token of a
    micro-batch and entry of the vocabulary; lower ``tokens_per_batch`` where that is too much.

    Convention: a step is of one kind, by a coin of the run's seed, as in the paper; TRL, too, draws for each batch. The
    means are over all completion tokens of the optimizer batch. TRL's ``seq_kd``, where the teacher writes the answers
    of the other steps, is ``seqkd`` before it. β = λ = 0.5 as in TRL; the paper has no one choice.

    Source: Agarwal et al., On-Policy Distillation of Language Models, arXiv:2306.13649, algorithm 1.

    Example::

        prefzoo.train("gkd", model="my-model", teacher="large-model", dataset="demonstrations.jsonl", max_steps=100)
    """
    loss = create_loss("gkd", beta=beta, temperature=softness)
    return Algorithm(**_unjudged(sampling, share=on_policy), loss=loss, count="token")


@register_algorithm(
    paper="arXiv:2306.08543", recommended={"learning_rate": 5e-6}, shared={**UNJUDGED, "minibatches": 4}
)  # fmt: skip
def minillm(
    *,
    clip: NotNegative = 0.2,
    gamma: Share = 1.0,
    normalise: bool = True,
    count: Literal["token", "row_sum"] = "token",
    ptx: NotNegative = 0.0,
    **sampling: Any,
) -> Algorithm:
    """MiniLLM: the reverse KL of whole answers by policy gradient, with the teacher's log-probability as the reward.

        r_t = log P(y_t) - log π(y_t)
        loss = mean_t [ KL(π ‖ P)_t - min(ρ_t A_t, clip(ρ_t, 1 - clip, 1 + clip) A_t) ] + ptx (- log π(demonstrations))
        A_t = (Σ_{s>t} γ^{s-t-1} r_s) / (number of tokens after t)

    Args:
        clip: range of the ratio ρ_t = π/π_old; binds only from the second optimizer step on a batch on.
        gamma: γ, discount per token.
        normalise: the paper's length normalisation of A_t.
        count: ``"token"``, a mean over all tokens; with ``"row_sum"``, γ = 1 and ``normalise=False`` the gradient is,
            in expectation, exactly that of KL(π ‖ P) of whole answers.
        ptx: weight of the likelihood of demonstrations (``ptx_dataset=``), the paper's text of pretraining.

    KL enters as the objective itself: exact over the vocabulary for a token's own part (the single-step
    decomposition), by samples (k1) for what follows it; both of the distributions at ``temperature``. There is no
    reference. Needs ``teacher=``, with the policy's tokenizer. Memory as ``gkd``.

    Convention: of the paper's three stabilisers the single-step decomposition and the length normalisation are here;
    sampling from a mixture of teacher and policy with importance weights is not: the policy samples alone. Four
    optimizer steps on each batch, as in its code; ptx is off until there is something to learn.

    Source: Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, arXiv:2306.08543.

    Example::

        prefzoo.train("minillm", model="my-model", teacher="large-model", dataset="prompts.jsonl", max_steps=100)
    """
    softness = sampling["temperature"] or 1.0  # of greedy samples log-probabilities are the model's own
    terms = [Term(create_loss("reverse_kl", temperature=softness), count=count)]
    terms.append(Term(create_loss("clipped_surrogate", clip=clip), count=count))
    if ptx:
        terms.append(Term(create_loss("sft"), rows="ptx", count="token", weight=ptx))
    credit = TeacherReturn(gamma=gamma, normalise=normalise)
    return Algorithm(**_unjudged(sampling), credit=credit, terms=tuple(terms))


@register_algorithm(paper="arXiv:2606.22600", recommended={"learning_rate": 1e-5}, shared=UNJUDGED)
def iw_opd(*, early: NotNegative = 0.5, clip: NotNegative = 0.2, **sampling: Any) -> Algorithm:
    """Importance-weighted on-policy distillation: tokens earn the teacher's log-ratio, early ones count more.

        r_t = log P(y_t) - log π_old(y_t);   A_t = r_t (1 + early (1 - Σ_{s<t} |r_s| / Σ_s |r_s|))
        loss = mean_t - min(ρ_t A_t, clip(ρ_t, 1 - clip, 1 + clip) A_t),   ρ_t = π/π_old

    Args:
        early: the paper's γ. 0: plain on-policy distillation (OPD), the reverse KL by its k1 samples.
        clip: range of the ratio; binds only from the second optimizer step on a batch on.

    Needs ``teacher=``, with the policy's tokenizer. Only the log-probabilities of the tokens taken are read, so memory
    is that of any policy gradient: ``minillm`` and ``gkd`` read whole distributions.

    Convention: weights are between 1 and 1 + early, so they also raise the learning rate. A token is not credited with
    what comes after it, as in the paper. The clip is the paper's; TRL's trainer has neither ratio nor clip, which is
    the same for one step on each batch.

    Source: Xie et al., On the Position Bias of On-Policy Distillation, arXiv:2606.22600, algorithm 1.

    Example::

        prefzoo.train("iw_opd", model="my-model", teacher="large-model", dataset="prompts.jsonl", max_steps=100)
    """
    credit = TeacherReturn(gamma=0.0, own=True, normalise=False, early=early)
    return Algorithm(
        **_unjudged(sampling), credit=credit, loss=create_loss("clipped_surrogate", clip=clip), count="token"
    )


@register_algorithm(
    paper="arXiv:1606.07947", recommended={"learning_rate": 1e-5, "max_steps": 1},
    shared={**ROUNDS, "samples_per_prompt": 1, "temperature": 0.0},
)  # fmt: skip
def seqkd(**rounds: Any) -> Algorithm:
    """Sequence-level knowledge distillation: the teacher writes an answer to every prompt, the policy learns it.

        ŷ = argmax_y P(y | x), greedily;   loss = - mean over tokens of log π(ŷ)

    Needs ``teacher=``, with the policy's tokenizer. A round (``max_steps``) asks the teacher ``prompts_per_round``
    prompts.

    Convention: the paper's beam search becomes the teacher's likeliest tokens (``temperature=0``); with a temperature,
    and several ``samples_per_prompt``, the loss is an estimate of KL(P ‖ π) of whole answers, but for a constant. The
    policy's log-probabilities are at temperature 1 in any case. Answers cut at the limit are learned too. The teacher
    does not change, so a second round differs by its prompts alone.

    Source: Kim and Rush, Sequence-Level Knowledge Distillation, arXiv:1606.07947.

    Example::

        prefzoo.train("seqkd", model="my-model", teacher="large-model", dataset="prompts.jsonl", max_steps=2)
    """
    return Algorithm(**in_rounds(rounds, by="teacher") | {"feedback": Unjudged()}, loss=create_loss("sft"))
