"""Reward models and critics: made from a policy, loaded, and exported as the library's sequence classifiers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from prefzoo.models.adapters import Adapter, add_adapter, merge_into
from prefzoo.models.causal import (
    Note,
    add_rows,
    check_complete,
    check_trunk,
    open_causal,
    open_config,
    prepare,
    silent,
)
from prefzoo.models.folders import REWARD_FILE, check_source, first_line, in_words, no_bars
from prefzoo.models.roles import Policy, Pooling, Scorer, trunk_of
from prefzoo.models.tokenizer import end_ids, vocabulary_size
from prefzoo.models.tree import TreeBatch, pack_rows
from prefzoo.registry import UsageError


def new_scorer(policy: Policy, pooling: Pooling = "last") -> Scorer:
    """A reward model with a copy of the policy's trunk, its adapter if it has one, and a zero head.

    Read at the last token the head has no bias: preferences do not depend on one, and the library's classifiers have
    none.
    """
    return _with_head(policy, pooling, bias=pooling == "mean")


def new_critic(policy: Policy) -> Scorer:
    """A critic with a copy of the policy's trunk, its adapter if it has one, and a zero head."""
    return _with_head(policy, "last", bias=True)


def _with_head(policy: Policy, pooling: Pooling, bias: bool) -> Scorer:
    if policy.adapter is None:
        trunk, adapter = copy.deepcopy(trunk_of(policy.model)), None
    else:
        copied = copy.deepcopy(policy)
        trunk, adapter = trunk_of(copied.model), copied.adapter
    head = _head(trunk, bias)
    nn.init.zeros_(head.weight)
    if bias:
        nn.init.zeros_(head.bias)
    return Scorer(trunk, head, pooling, adapter).requires_grad_(True)


def _head(trunk: PreTrainedModel, bias: bool) -> nn.Linear:
    """In float32 at least: scores are compared by differences, and small steps vanish in fewer bits."""
    weight = next(trunk.parameters())
    dtype = torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
    return nn.Linear(trunk.config.get_text_config().hidden_size, 1, bias=bias, device=weight.device, dtype=dtype)


def critic_of(reward_model: Scorer, adapter: Adapter | None = None) -> Scorer:
    """A critic that starts from a reward model: its copy, the standardisation of rewards folded into the head.

    ``adapter``: train this on it, where the reward model has none, and not its whole trunk.
    """
    critic = copy.deepcopy(reward_model)
    head = critic.head
    with torch.no_grad():
        if head.bias is None:
            head.bias = nn.Parameter(torch.zeros(1, dtype=head.weight.dtype, device=head.weight.device))
        head.weight /= critic.scale
        head.bias.sub_(critic.offset).div_(critic.scale)
        critic.offset.zero_()
        critic.scale.fill_(1.0)
    critic.pooling = "last"
    if adapter is not None and critic.adapter is None:
        critic = Scorer(critic.trunk, head, "last", add_adapter(critic.trunk, adapter))
    return critic.requires_grad_(True)


@no_bars()
def load_scorer(
    source: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    note: Note = silent,
) -> Scorer:
    """A reward model: a folder that :func:`save_scorer` wrote, or any one-label sequence classifier with a causal
    trunk, by folder or hub id."""
    check_source(source)
    head: Any
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    own = Path(source) / f"{REWARD_FILE}.json"
    if own.exists():
        with in_words(f"{str(source)!r} holds no reward model that could be loaded"):
            facts = json.loads(own.read_text())
            weights = load_file(Path(source) / f"{REWARD_FILE}.safetensors")
            trunk = trunk_of(prepare(open_causal(source, torch.float32, **options)))
            head = _head(trunk, bias="bias" in weights)
            head.load_state_dict(weights)
    else:
        model = open_classifier(source, **options)
        facts = {"pooling": "last", **(getattr(model.config, REWARD_FILE, None) or {})}
        trunk, head = prepare(model).base_model, getattr(model, "score", None)
        if not isinstance(head, nn.Linear) or trunk is model:
            raise UsageError(
                f"{str(source)!r} holds no reward model that could be loaded: a {type(model).__name__} does not score "
                "the last token of a causal model."
            )
    check_trunk(trunk, note)
    scorer = Scorer(trunk, head, facts["pooling"])
    scorer.offset.fill_(facts.get("offset", 0.0))
    scorer.scale.fill_(facts.get("scale", 1.0))
    return scorer


def open_classifier(source: str | Path, **options: Any) -> PreTrainedModel:
    """A one-label sequence classifier of any kind, as the library loads it, in float32."""
    check_source(source)
    what = f"{str(source)!r} holds no reward model that could be loaded"
    with in_words(what):
        config = open_config(source, **options)
        if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ()):
            raise UsageError(
                f"{what}: it is a language model, which gives no scores; make one of it with 'prefzoo train "
                "reward_model'."
            )
        labels = config.num_labels
        if labels != 1:
            raise UsageError(f"reward model {str(source)!r} has {labels} labels; one is needed.")
        model, found = AutoModelForSequenceClassification.from_pretrained(
            str(source), dtype=torch.float32, output_loading_info=True, **options
        )
        check_complete(source, found)
    return model


@no_bars()
def save_scorer(scorer: Scorer, tokenizer: PreTrainedTokenizerBase, folder: str | Path, *, note: Note = silent) -> Path:
    """A folder that ``AutoModelForSequenceClassification`` loads, and whose forward gives the same scores.

    The scale is in the weights; the library's head has no bias, so an offset is in the configuration
    (``prefzoo_reward``) and is to be subtracted. The padding token is none that ends an answer, or the library would
    read the token before the end. Where the library has no such class for the architecture, or the scores are means
    over tokens, the folder is a causal model with the head beside it (``prefzoo_reward.safetensors``), with a note;
    :func:`load_scorer` reads both.
    """
    folder = Path(folder)
    scorer = _without_adapter(scorer)
    why = _save_classifier(scorer, tokenizer, folder)
    if why is not None:
        note(f"{why}: the reward model is written in prefzoo's own format, a causal model with its head beside it.")
        _save_own(scorer, tokenizer, folder)
    return folder


def _without_adapter(scorer: Scorer) -> Scorer:
    if scorer.adapter is None:
        return scorer
    copied = copy.deepcopy(scorer)
    merge_into(copied.adapter)  # changes the layers in place
    whole = Scorer(copied.trunk, copied.head, copied.pooling)
    whole.load_state_dict({k: v for k, v in copied.state_dict().items() if k in ("offset", "scale")}, strict=False)
    return whole


def _save_classifier(scorer: Scorer, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str | None:
    """Write the library's own format; or why it cannot hold this reward model."""
    kind = type(scorer.trunk.config)
    if scorer.pooling != "last":
        return "the library's sequence classifiers read the last token, not a mean over tokens"
    if kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return f"the library has no sequence classifier of type {scorer.trunk.config.model_type!r}"
    tokenizer, trunk = copy.deepcopy(tokenizer), scorer.trunk
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in end_ids(tokenizer):
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.padding_side = "right"
    if vocabulary_size(tokenizer) > trunk.get_input_embeddings().weight.shape[0]:
        trunk = copy.deepcopy(trunk)
        add_rows(trunk, vocabulary_size(tokenizer))
    bias = 0.0 if scorer.head.bias is None else float(scorer.head.bias.detach())
    offset = (float(scorer.offset) - bias) / float(scorer.scale)
    config = copy.deepcopy(trunk.config)
    config.num_labels, config.problem_type, config.id2label = 1, "regression", {0: "reward"}
    config.label2id = {"reward": 0}
    config.get_text_config().pad_token_id = config.pad_token_id = tokenizer.pad_token_id
    setattr(config, REWARD_FILE, {"pooling": "last", "offset": offset})
    try:
        with torch.device("meta"):  # its random weights are not wanted
            classifier = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[kind](config)
        assert isinstance(classifier.score, nn.Linear) and classifier.score.bias is None
        setattr(classifier, classifier.base_model_prefix, trunk)
        weight = (scorer.head.weight / scorer.scale).detach()
        classifier.score = nn.Linear(weight.shape[1], 1, bias=False, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            classifier.score.weight.copy_(weight)
        difference = _difference(classifier, scorer, offset)
    except (AttributeError, AssertionError, TypeError, RuntimeError, NotImplementedError) as error:
        return f"the library's {kind.__name__} classifier has another form ({first_line(error)})"
    if not difference <= (1e-3 if trunk.dtype == torch.float32 else 0.1):
        return f"the library's classifier would give other scores (by {difference:.3g})"
    classifier.to(trunk.dtype).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return None


@torch.no_grad()
def _difference(classifier: Any, scorer: Scorer, offset: float) -> float:
    """The library's scores of a right-padded batch against ours, relative to their size."""
    trunk, device, pad = scorer.trunk, scorer.head.weight.device, classifier.config.pad_token_id
    generator = torch.Generator().manual_seed(0)
    sizes = [(5, 4), (3, 7), (9, 3)]
    rows = [[torch.randint(1, 200, (n,), generator=generator).tolist() for n in size] for size in sizes]
    rows = [[[i if i != pad else 0 for i in ids] for ids in row] for row in rows]
    was_training, attention = trunk.training, trunk.config.get_text_config()._attn_implementation
    shared = classifier.base_model
    try:
        trunk.eval()
        ours = scorer(TreeBatch.of(pack_rows([(p, [c]) for p, c in rows]), device)).rewards_B
        assert ours is not None
        shared.eval()
        shared.set_attn_implementation("eager")  # of the trunk itself: older versions do not pass it on
        width = max(sum(size) for size in sizes)
        ids = torch.tensor([p + c + [pad] * (width - len(p + c)) for p, c in rows], device=device)
        found = classifier(input_ids=ids, attention_mask=(ids != pad).long(), use_cache=False).logits[:, 0]
    finally:
        trunk.set_attn_implementation(attention)
        trunk.train(was_training)
    return float((found.float() - offset - ours.float()).abs().max() / ours.float().abs().max().clamp(min=1.0))


def _save_own(scorer: Scorer, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    causal = AutoModelForCausalLM.from_config(scorer.trunk.config, dtype=scorer.trunk.dtype)
    trunk_of(causal).load_state_dict(scorer.trunk.state_dict())
    causal.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    save_file({k: v.contiguous() for k, v in scorer.head.state_dict().items()}, folder / f"{REWARD_FILE}.safetensors")
    facts = {"pooling": scorer.pooling, "offset": float(scorer.offset), "scale": float(scorer.scale)}
    (folder / f"{REWARD_FILE}.json").write_text(json.dumps(facts))
