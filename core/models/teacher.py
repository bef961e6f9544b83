"""Teachers: models whose distributions the policy is to learn."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from prefzoo.models.roles import Policy, Scores
from prefzoo.models.tree import TreeBatch
from prefzoo.registry import UsageError

OTHER_TEACHER = "; or let it write answers (prefzoo generate) and learn from their text with sft"


@torch.no_grad()
def with_teacher(scores: Scores, teacher: Policy, tree: TreeBatch) -> Scores:
    """Scores with the teacher's logits at the same positions, without gradient, both cut to the entries they share.

    Models of one family pad the rows of their vocabularies to different numbers; no token has the rows left over.
    """
    assert scores.logits_CV is not None
    theirs = teacher.frozen_logits(tree, tree.predict_C)
    shared = min(theirs.shape[-1], scores.logits_CV.shape[-1])
    with torch.enable_grad():
        mine = scores.logits_CV[:, :shared]
    return replace(scores, logits_CV=mine, teacher_logits_CV=theirs[:, :shared])


def check_vocabulary(policy: Policy, teacher: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a teacher whose entries are not the policy's."""
    sizes = [m.model.config.get_text_config().vocab_size for m in (policy, teacher)]
    if min(sizes) < len(tokenizer):
        raise UsageError(
            f"teacher: its vocabulary has {sizes[1]} entries, the tokenizer {len(tokenizer)}; distributions over "
            f"different vocabularies cannot be compared. Give a teacher with the policy's tokenizer{OTHER_TEACHER}."
        )
