"""TRL's names of losses: which of our entries each of them means, and why; and the names that are not here.

The tables from which the entries ``trl:hinge``, ``trl:cispo``, ... are made (:mod:`prefzoo.spellings.trl`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Of each trainer: TRL's loss_type -> our loss.
LOSS_TYPES: dict[str, dict[str, str]] = {
    "sft": {"nll": "sft", "dft": "dft"},
    "dpo": {
        "sigmoid": "dpo", "hinge": "hinge", "ipo": "ipo", "exo_pair": "exo_pair", "nca_pair": "nca_pair",
        "robust": "robust_dpo", "bco_pair": "bco_pair", "sppo_hard": "sppo_hard", "aot": "aot",
        "aot_unpaired": "aot_unpaired", "apo_zero": "apo_zero", "apo_down": "apo_down", "discopop": "discopop",
        "sft": "chosen_nll", "sigmoid_norm": "dpo_norm",
    },
    "cpo": {"sigmoid": "cpo", "hinge": "cpo_hinge", "ipo": "cpo_ipo", "simpo": "simpo", "alphapo": "alphapo"},
    "kto": {"kto": "kto", "apo_zero_unpaired": "apo_zero_unpaired"},
    "grpo": {
        "grpo": "clipped_surrogate", "dapo": "clipped_surrogate", "bnpo": "clipped_surrogate",
        "dr_grpo": "clipped_surrogate", "cispo": "cispo", "sapo": "sapo", "luspo": "luspo", "vespo": "vespo",
    },
}  # fmt: skip

# Of each trainer: the options that only some of its losses read, by our names of these.
_PAIRS = tuple(ours for ours in LOSS_TYPES["dpo"].values() if ours != "chosen_nll")
_DIFFERENCES = ("dpo", "hinge", "ipo", "exo_pair", "robust_dpo", "discopop", "dpo_norm")
READ_BY: dict[str, dict[str, tuple[str, ...]]] = {
    "dpo": {
        "beta": _PAIRS,
        "label_smoothing": ("robust_dpo", "exo_pair", "aot", "aot_unpaired"),
        "f_divergence_type": _DIFFERENCES,
        "f_alpha_divergence_coef": _DIFFERENCES,
        "ld_alpha": _PAIRS,
        "use_weighting": tuple(ours for ours in _PAIRS if not ours.startswith("aot")),
        "discopop_tau": ("discopop",),
    },
    "cpo": {
        "cpo_alpha": ("cpo", "cpo_hinge", "cpo_ipo", "simpo"),
        "simpo_gamma": ("simpo", "alphapo"),
        "alpha": ("simpo", "alphapo"),
        "label_smoothing": ("cpo", "simpo", "alphapo"),
    },
    "grpo": {
        "epsilon": ("clipped_surrogate", "gspo", "luspo"),
        "epsilon_high": ("clipped_surrogate", "gspo", "luspo", "cispo"),
        "delta": ("clipped_surrogate",),
        "importance_sampling_level": ("clipped_surrogate", "gspo", "luspo"),
        **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos"), ("sapo",)),
        **dict.fromkeys(("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), ("vespo",)),
    },
}


@dataclass(frozen=True)
class Spelling:
    """A loss of TRL's as an entry of its own: the entry of its trainer with some options fixed."""

    trainer: str
    loss: str  # ours
    fixed: Mapping[str, Any]  # options of the trainer's entry
    why: str  # why it is this loss, and where TRL's and ours differ
    defaults: Mapping[str, Any] = field(default_factory=dict)  # where TRL's default is not the loss of that name

    @property
    def hidden(self) -> set[str]:
        """Options of the trainer's entry that this one does not have: fixed, or not read by its loss."""
        unread = {k for k, losses in READ_BY.get(self.trainer, {}).items() if self.loss not in losses}
        return {*self.fixed, *unread, *(("loss_weights",) if self.trainer == "dpo" else ())}


def _of(trainer: str, name: str, why: str, **more: Any) -> Spelling:
    return Spelling(trainer, LOSS_TYPES[trainer][name], {"loss_type": name, **more.pop("fixed", {})}, why, **more)


ANCHORED = "it judges each side by itself, so TRL and we both refuse f-divergences for it."
SORTED = (
    "TRL sorts each micro-batch of each device, so its ranks depend on how the batch is cut; here they are those of "
    "the whole optimizer batch, and a batch that does not fit at once is refused. label_smoothing is read, as in TRL."
)

SPELLINGS: dict[str, Spelling] = {
    "hinge": _of("dpo", "hinge", "the hinge is on log-ratios, without the likelihood term of SLiC-HF (``slic_hf``). "
                 "With use_weighting TRL fails in its backward pass; here it works."),
    "ipo": _of("dpo", "ipo", "TRL divides each side by its length, as ``ipo`` does; the paper's sums are ``ipo_sum``, "
               "on another scale of beta."),
    "exo_pair": _of("dpo", "exo_pair", "the reverse KL to the smoothed label. TRL raises at its default "
                    "label_smoothing of 0, as we do; the default under this name is the paper's 1e-3.",
                    defaults={"label_smoothing": 1e-3}),
    "nca_pair": _of("dpo", "nca_pair", f"the same three logistic terms; {ANCHORED}"),
    "robust": _of("dpo", "robust", "label_smoothing is the share of flipped labels, which is taken out of the loss. At "
                  "TRL's default of 0 it is ``dpo``. From 0.5 on TRL warns; here it is refused."),
    "bco_pair": _of("dpo", "bco_pair", f"TRL 1.x has no shift any more, as ``bco_pair``; {ANCHORED}"),
    "sppo_hard": _of("dpo", "sppo_hard", "the square of nats, with the target 1 / (2 beta). TRL's beta of 0.1 asks for "
                     f"5 nats, the paper's 0.001 for 500; {ANCHORED}"),
    "aot": _of("dpo", "aot", SORTED),
    "aot_unpaired": _of("dpo", "aot_unpaired", SORTED),
    "apo_zero": _of("dpo", "apo_zero", f"the same two sigmoids; {ANCHORED}"),
    "apo_down": _of("dpo", "apo_down", f"the same two sigmoids; {ANCHORED}"),
    "discopop": _of("dpo", "discopop", "the same blend; far on the wrong side TRL multiplies infinity by 0, here the "
                    "product is taken in logarithms."),
    "sigmoid_norm": _of("dpo", "sigmoid_norm", "each log-ratio is divided by its length. TRL's beta is 0.1, that of "
                        "the paper is 5."),
    "simpo": _of("cpo", "simpo", "simpo_gamma is the margin itself. Of the trainer it is SimPO with cpo_alpha=0, which "
                 "is the default under this name; TRL's default of 1 adds a likelihood term (CPO-SimPO).",
                 defaults={"cpo_alpha": 0.0}),
    "alphapo": _of("cpo", "alphapo", "SimPO with a bent reward and, as in TRL, no likelihood term. At TRL's default, "
                   "alpha=0, nothing is bent; under this name it is 0.25. TRL raises probabilities that may be 0 to "
                   "a negative power; here the logarithms are multiplied.", defaults={"alpha": 0.25}),
    "apo_zero_unpaired": _of("kto", "apo_zero_unpaired", "KTO with the anchor at 0 in place of the estimated KL."),
    "dft": _of("sft", "dft", "the mean is over the tokens of the optimizer batch in both."),
    "bnpo": _of("grpo", "bnpo", "TRL takes the token mean of each micro-batch, which depends on how the batch is cut; "
                "here it is that of the optimizer batch, which is ``dapo``."),
    "dr_grpo": _of("grpo", "dr_grpo", "the sum over tokens, divided by completions times max_completion_length. Dr. "
                   "GRPO does not scale rewards either: scale_rewards=\"none\"."),
    "gspo": Spelling("grpo", "gspo", {"loss_type": "grpo", "importance_sampling_level": "sequence"},
                     "TRL has no loss_type of this name: it is importance_sampling_level=\"sequence\". At TRL's "
                     "default epsilon of 0.2 a mean of log-ratios is never clipped; the defaults here are the paper's.",
                     {"epsilon": 3e-4, "epsilon_high": 4e-4}),
    "cispo": _of("grpo", "cispo", "TRL's epsilon_high is the cap of the ratio itself, so our clip_high is one less. "
                 "Its default of 0.2 would scale every token down without a word, and is refused; under this name it "
                 "is 5.", defaults={"epsilon_high": 5.0}),
    "sapo": _of("grpo", "sapo", "the same gate and temperatures, averaged over completions."),
    "luspo": _of("grpo", "luspo", "the sequence ratio, summed over the tokens of a completion. With token ratios TRL "
                 "only warns; here that is refused.", fixed={"importance_sampling_level": "sequence"}),
    "vespo": _of("grpo", "vespo", "the same kernel and clamps."),
}  # fmt: skip

_UNTRANSLATED = "its options are not translated to ours"
_SERVED = "its options are not translated to ours, and a teacher is a model of the run, not a server beside it"
_OTHER_PROMPT = "its teacher is the policy itself, which reads {} in its prompt; here both read the same prompt"

# What TRL has under a name and we do not: why, and the nearest that is here.
ABSENT: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("tpo", "TPOTrainer"), ("rows have no third completion, TRL's column 'reference'", "trl:cpo")),
    **dict.fromkeys(("online_dpo", "OnlineDPOTrainer"), (_UNTRANSLATED, "online_dpo")),
    **dict.fromkeys(("xpo", "XPOTrainer"), (_UNTRANSLATED, "xpo")),
    **dict.fromkeys(("nash_md", "NashMDTrainer"), (_UNTRANSLATED, "nash_md")),
    **dict.fromkeys(("gkd", "GKDTrainer"), (_UNTRANSLATED, "gkd")),
    **dict.fromkeys(("gold", "GOLDTrainer"), ("its teacher may have another tokenizer; here both share one", "gkd")),
    **dict.fromkeys(
        ("distillation", "server_distillation", "async_distillation", "DistillationTrainer",
         "ServerDistillationTrainer", "AsyncDistillationTrainer"),
        (_SERVED, "gkd"),
    ),
    **dict.fromkeys(("sdft", "SDFTTrainer"), (_OTHER_PROMPT.format("a demonstration"), "gkd")),
    **dict.fromkeys(("sdpo", "SDPOTrainer"), (_OTHER_PROMPT.format("feedback on its answer"), "gkd")),
    **dict.fromkeys(("iw_opd", "IWOPDTrainer"), (_UNTRANSLATED, "iw_opd")),
    **dict.fromkeys(("prm", "PRMTrainer"), (_UNTRANSLATED, "process_reward_model")),
    **dict.fromkeys(("ppo", "PPOTrainer"), ("until 1.10 it moved policy and critic by one optimizer", "ppo")),
    **dict.fromkeys(("a2po", "A2POTrainer"), (_UNTRANSLATED, "a2po")),
    **dict.fromkeys(("async_grpo", "AsyncGRPOTrainer"), ("sampling does not run beside the training", "trl:grpo")),
}  # fmt: skip
