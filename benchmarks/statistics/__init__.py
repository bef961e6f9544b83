"""Statistics of the comparison harness: errors that cover prompts *and* training seeds, verdicts that keep their level.

The functions take plain arrays, averaged over samples and judging orders within a prompt, and return small frozen
records. The same functions serve judgements in [0, 1], gold reward, KL and length. The model behind the errors is
crossed and random, `y[s, i] = mean + seed[s] + prompt[i] + cell[s, i]`, because a claim is about the method (other
seeds) on prompts like these (other prompts), not about the runs and prompts at hand.

Legend: **S** training seeds, **N** prompts, **G** clusters of prompts, **K** members of a family of claims, **U** units
that a permutation moves, **R** resamples.

The package needs numpy and scipy only.
"""

from .crossed import difference, mean, two_way_bootstrap_se, win_rate
from .exact import mcnemar, permutation_test, wilson
from .families import benjamini_hochberg, equivalence, holm, holm_lower_bounds, verdict
from .power import prompts_needed, smallest_detectable
from .ratings import BradleyTerry, Elo, bradley_terry, elo
from .records import Difference, Estimate, LowerBounds, McNemar, PermutationTest, Proportion, Record, Verdict
from .samples import best_of_n, kl_best_of_n, pass_at_k
from .tables import Clusters, win

__all__ = [
    "BradleyTerry", "Clusters", "Difference", "Elo", "Estimate", "LowerBounds", "McNemar", "PermutationTest",
    "Proportion", "Record", "Verdict", "benjamini_hochberg", "best_of_n", "bradley_terry", "difference", "elo",
    "equivalence", "holm", "holm_lower_bounds", "kl_best_of_n", "mcnemar", "mean", "pass_at_k", "permutation_test",
    "prompts_needed", "smallest_detectable", "two_way_bootstrap_se", "verdict", "wilson", "win", "win_rate",
]  # fmt: skip
