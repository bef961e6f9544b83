"""Options that many algorithms share, said once: how completions are sampled, and how rounds are walked through.

    @register_algorithm(paper="arXiv:2402.14740", shared={**SAMPLING, "group_size": 4})
    def rloo(*, kl: float = 0.05, **sampling: Any) -> Algorithm:
        return Algorithm(**sampled(sampling), credit=LeaveOneOut(kl=kl), loss=create_loss("sequence_surrogate"))

The entry has the options of both; the function is always given all of the shared ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefzoo.parts.feedback import MaskTruncated, Reward
from prefzoo.parts.schedule import Schedule
from prefzoo.parts.source import Rollouts

# Each step samples anew, and is over after few passes.
SAMPLING: dict[str, Any] = {
    "group_size": 8, "prompts_per_step": 32, "inner_epochs": 1, "minibatches": 1, "temperature": 1.0,
    "max_new_tokens": 256, "missing_eos_penalty": 0.0, "mask_truncated": False,
}  # fmt: skip
# A round samples much, and is then trained on as a data set would be.
ROUNDS: dict[str, Any] = {
    "samples_per_prompt": 8, "prompts_per_round": 512, "epochs_per_round": 2, "rows_per_update": 64, "temperature": 1.0,
    "max_new_tokens": 256,
}  # fmt: skip
DOC: dict[str, str] = {
    "group_size": "completions sampled per prompt.",
    "prompts_per_step": "prompts sampled from before each step; max_steps is the number of these steps.",
    "inner_epochs": "passes over the samples of a step.",
    "minibatches": "optimizer steps of each pass.",
    "temperature": "of the sampling, and of the log-probabilities that are trained.",
    "max_new_tokens": "tokens after which a completion is cut.",
    "missing_eos_penalty": "subtracted from the reward of completions cut at the limit.",
    "mask_truncated": "no gradient from completions cut at the limit; they count as rows and in the baseline.",
    "kl": "weight of the KL to the reference (k3, in the loss, counted as it is); 0: no reference is loaded.",
    "samples_per_prompt": "completions sampled per prompt.",
    "prompts_per_round": "prompts sampled from before each round of training; max_steps is the number of rounds.",
    "epochs_per_round": "passes over the rows of a round.",
    "rows_per_update": "rows per optimizer step.",
}


def sampled(options: Mapping[str, Any], **source: Any) -> dict[str, Any]:
    """The parts of an algorithm that the options of ``SAMPLING`` decide; ``source``: more about the rollouts."""
    s = dict(options)
    return {
        "source": Rollouts(
            s["group_size"], temperature=s["temperature"], max_new_tokens=s["max_new_tokens"], **source
        ),
        "feedback": Reward(s["missing_eos_penalty"]),
        "keep": MaskTruncated() if s["mask_truncated"] else None,
        "schedule": Schedule(s["prompts_per_step"], s["inner_epochs"], s["minibatches"]),
    }  # fmt: skip


def in_rounds(options: Mapping[str, Any], **source: Any) -> dict[str, Any]:
    """The parts of an algorithm that the options of ``ROUNDS`` decide; ``source``: more about the rollouts."""
    r = dict(options)
    return {
        "source": Rollouts(
            r["samples_per_prompt"], temperature=r["temperature"], max_new_tokens=r["max_new_tokens"], **source
        ),
        "feedback": Reward(),
        "schedule": Schedule(r["prompts_per_round"], r["epochs_per_round"], minibatch_rows=r["rows_per_update"]),
    }  # fmt: skip
