"""Trust region policy optimization."""

from typing import Any

from prefzoo.algorithm import Algorithm, Term, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.parts.credit import LeaveOneOut
from prefzoo.parts.options import SAMPLING, sampled
from prefzoo.parts.update import TrustRegion
from prefzoo.registry import NotNegative, Positive, UsageError

UNCLIPPED = 1e9  # of the surrogate: the region holds the ratio


@register_algorithm(paper="arXiv:1502.05477", shared=SAMPLING)
def trpo(
    *,
    max_kl: Positive = 0.01,
    cg_iterations: int = 10,
    damping: NotNegative = 0.1,
    backtracks: int = 10,
    kl: NotNegative = 0.05,
    **sampling: Any,
) -> Algorithm:
    """TRPO: the natural gradient of the surrogate, as far as the policy changes by ``max_kl`` and no farther.

        R'_i = R_i - kl log pi(y_i)/ref(y_i),   A_i = R'_i - mean of the others' R' of its prompt
        maximise mean over tokens of rho_t A_i,   subject to mean over tokens of KL(pi_old ‖ pi) <= max_kl
        direction (F + damping)^-1 g by conjugate gradients; length by a line search on both

    Args:
        max_kl: largest mean KL of a step, nats per token, exact over the vocabulary.
        cg_iterations: of the conjugate gradients.
        damping: added to the diagonal of the Fisher matrix F.
        backtracks: step lengths that are tried, each 0.8 of the one before.
        kl: weight of the log-ratio to the reference, summed over the completion, in its reward; 0: no reference.

    Cost: 2 ``cg_iterations`` + 1 forward and backward passes over the samples of a step, and a forward pass for each
    length tried: some 25 times that of one step of GRPO, beside the same sampling. Memory: another copy of the trained
    parameters. F x is a difference of gradients, so no kernel needs second derivatives; float32 only.

    KL: k1 to the reference, in the reward; the one of the region is to the policy of this step.

    Convention: the paper's vine, several rollouts of one state and the differences between them, with prompts as the
    states; no critic. One step for each sampling. ``learning_rate`` and its schedule have no effect.

    Defaults: max_kl and iterations are the paper's, damping and backtracks those of Spinning Up.

    Source: Schulman et al., arXiv:1502.05477, sections 5 and 6, appendix C.

    Example::

        prefzoo.train("trpo", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final", max_steps=20)
    """
    if sampling["inner_epochs"] > 1 or sampling["minibatches"] > 1:
        raise UsageError("trpo: a step uses all samples once; leave inner_epochs and minibatches at 1.")
    region = TrustRegion(max_kl=max_kl, cg_iterations=cg_iterations, damping=damping, backtracks=backtracks)
    surrogate = Term(create_loss("clipped_surrogate", clip=UNCLIPPED), count="token")
    return Algorithm(**sampled(sampling), credit=LeaveOneOut(kl=kl), terms=(surrogate,), update=region)
