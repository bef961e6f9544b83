"""Statistics of the comparison harness: errors that cover prompts *and* training seeds, verdicts that keep their level.

The functions take plain arrays, averaged over samples and judging orders within a prompt, or data frames, and return
small frozen records. The same functions serve judgements in [0, 1], gold reward, KL and length. The model behind the
errors is crossed and random, `y[s, i] = mean + seed[s] + prompt[i] + cell[s, i]`, because a claim is about the method
(other seeds) on prompts like these (other prompts), not about the runs and prompts at hand.

Legend: **S** training seeds, **N** prompts, **G** clusters of prompts, **K** members of a family of claims, **U** units
that a permutation moves, **R** resamples.

The package needs numpy and scipy only.
"""

from .aggregates import iqm, performance_profile, probability_of_improvement
from .agreement import Agreement, JudgeQuality, agreement, judge_quality
from .crossed import difference, mean, sensitivity, two_way_bootstrap_se, win_rate
from .exact import cochran_q, mcnemar, permutation_test, sign_flip, sign_test, wilcoxon, wilson
from .families import benjamini_hochberg, equivalence, holm, holm_lower_bounds, verdict
from .length_control import AlpacaEval, Gamed, LengthControlled, alpaca_eval, length_controlled, prompt_difficulty
from .overoptimisation import KL, Frontier, FrontierArea, GaoFit, Peak, frontier, frontier_area, gao_fit, kl
from .power import (
    noise_of,
    plan_study,
    power,
    prompts_needed,
    prompts_needed_mcnemar,
    prompts_needed_paired,
    smallest_detectable,
)
from .ratings import BradleyTerry, Elo, bradley_terry, elo
from .records import (
    Aggregate,
    BestOfNKL,
    CochranQ,
    Difference,
    Equivalence,
    Estimate,
    LowerBounds,
    MaxT,
    McNemar,
    Noise,
    PermutationTest,
    Plan,
    Power,
    Profile,
    Proportion,
    Record,
    SampleEstimate,
    Sensitivity,
    SignTest,
    Verdict,
    Wilcoxon,
)
from .samples import best_of_n, kl_best_of_n, pass_at_k
from .simultaneous import max_t
from .tables import Clusters, win
from .text import AlignmentTax, Diversity, alignment_tax, distinct_n, diversity, entropy, self_bleu

__all__ = [
    "KL",
    "Aggregate",
    "Agreement",
    "AlignmentTax",
    "AlpacaEval",
    "BestOfNKL",
    "BradleyTerry",
    "Clusters",
    "CochranQ",
    "Difference",
    "Diversity",
    "Elo",
    "Equivalence",
    "Estimate",
    "Frontier",
    "FrontierArea",
    "Gamed",
    "GaoFit",
    "JudgeQuality",
    "LengthControlled",
    "LowerBounds",
    "MaxT",
    "McNemar",
    "Noise",
    "Peak",
    "PermutationTest",
    "Plan",
    "Power",
    "Profile",
    "Proportion",
    "Record",
    "SampleEstimate",
    "Sensitivity",
    "SignTest",
    "Verdict",
    "Wilcoxon",
    "agreement",
    "alignment_tax",
    "alpaca_eval",
    "benjamini_hochberg",
    "best_of_n",
    "bradley_terry",
    "cochran_q",
    "difference",
    "distinct_n",
    "diversity",
    "elo",
    "entropy",
    "equivalence",
    "frontier",
    "frontier_area",
    "gao_fit",
    "holm",
    "holm_lower_bounds",
    "iqm",
    "judge_quality",
    "kl",
    "kl_best_of_n",
    "length_controlled",
    "max_t",
    "mcnemar",
    "mean",
    "noise_of",
    "pass_at_k",
    "performance_profile",
    "permutation_test",
    "plan_study",
    "power",
    "probability_of_improvement",
    "prompt_difficulty",
    "prompts_needed",
    "prompts_needed_mcnemar",
    "prompts_needed_paired",
    "self_bleu",
    "sensitivity",
    "sign_flip",
    "sign_test",
    "smallest_detectable",
    "two_way_bootstrap_se",
    "verdict",
    "wilcoxon",
    "wilson",
    "win",
    "win_rate",
]
