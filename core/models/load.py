"""Loading and saving models: ordinary Hugging Face folders in, ordinary Hugging Face folders out."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from prefzoo.models.adapters import Adapter, add_adapter, check_same, merge_into, merged, open_adapter
from prefzoo.models.causal import (
    Note,
    Size,
    check_packing,
    grow,
    is_quantised,
    load_causal,
    prepare,
    set_checkpointing,
    settle,
    silent,
    tiny_model,
)
from prefzoo.models.folders import adapter_facts, find, no_bars
from prefzoo.models.reference import clone
from prefzoo.models.roles import Policy, is_adapter
from prefzoo.models.scorers import critic_of, load_scorer, new_critic, new_scorer, save_scorer
from prefzoo.models.tokenizer import (
    end_ids,
    learn_tokenizer,
    load_tokenizer,
    open_tokenizer,
    prepare_tokenizer,
    vocabulary_size,
)
from prefzoo.registry import UsageError


@no_bars()
def load_policy(
    source: str | Path | PreTrainedModel | Policy | Any,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapter: Adapter | None = None,
    load_in_4bit: bool = False,
    note: Note = silent,
) -> Policy:
    """A policy whose batches give the log-probabilities of single sequences: packed, or else padded, with a note.

    Args:
        source: a model's folder, a hub id, a model in memory (copied), a policy, or an adapter: a folder with
            ``adapter_config.json``, a hub id of one, a ``PeftModel``.
        tokenizer: where it knows more tokens than the model, the embeddings grow.
        adapter: train this adapter and nothing else. Where the source is an adapter, that one is trained on.

    Without ``adapter=``, an adapter that the source has is merged into its base, and all weights are trained.
    """
    if load_in_4bit and adapter is None:
        raise UsageError("4-bit weights cannot be trained; load_in_4bit needs an adapter over them (lora).")
    options: dict[str, Any] = {"dtype": dtype, "load_in_4bit": load_in_4bit, "trust_remote_code": trust_remote_code}
    found = _with_adapter(source, revision, options, note)
    if found is not None:
        if adapter is None:
            note("the adapter was merged into its base; all weights are trained (with lora it would be trained on).")
            model = merge_into(found.adapter).to(dtype)
            grow(model, tokenizer, note)
            return settle(Policy(prepare(model)), note)
        check_same(adapter, found.adapter, source if isinstance(source, str | Path) else "in memory")
        if tokenizer is not None and vocabulary_size(tokenizer) > found.model.get_input_embeddings().weight.shape[0]:
            raise UsageError(
                "a found adapter is trained on as it is, so no tokens can be added; leave lora out, or them."
            )
        return settle(found, note)
    if isinstance(source, Policy):
        source = source.model
    if isinstance(source, PreTrainedModel) and any(is_adapter(n) for n, _ in source.named_parameters()):
        raise UsageError("this model holds an adapter; give the policy or PeftModel around it, or merge it first.")
    model = load_causal(source, revision=revision, **options)
    rows = model.get_input_embeddings().weight.shape[0]
    grow(model, tokenizer, note)
    if adapter is None:
        if is_quantised(model):
            raise UsageError("the weights of this model are quantised and cannot be trained; train an adapter (lora).")
        return settle(Policy(model), note)
    base = None
    if isinstance(source, PreTrainedModel):
        note("the model is in memory, so an adapter could not say what it belongs to: the result is written merged.")
    else:
        base = str(Path(source).resolve()) if Path(source).is_dir() else str(source)
    new_ids = _new_ids(source, revision, trust_remote_code, tokenizer, rows)
    settle(Policy(model), note)
    return Policy(model, add_adapter(model, adapter, new_ids=new_ids, revision=revision), base=base)


def _new_ids(
    source: Any, revision: str | None, trust: bool, tokenizer: PreTrainedTokenizerBase | None, rows: int
) -> list[int]:
    """Ids that the model has not seen: beyond its embeddings, or, where these were larger, beyond its tokenizer's."""
    if tokenizer is None:
        return []
    known: Iterable[int] = range(rows)
    if not isinstance(source, PreTrainedModel) and find(source, "tokenizer_config.json", revision) is not None:
        known = open_tokenizer(source, revision=revision, trust_remote_code=trust).get_vocab().values()
    return sorted(set(tokenizer.get_vocab().values()) - set(known))


def _with_adapter(source: Any, revision: str | None, options: dict[str, Any], note: Note) -> Policy | None:
    """The policy of a source that is an adapter, the adapter trainable; None if it is not."""
    if isinstance(source, Policy):
        return copy.deepcopy(source) if source.adapter is not None else None
    if hasattr(source, "peft_config") and hasattr(source, "get_base_model"):  # a PeftModel
        adapter = copy.deepcopy(source)
        note("the model is in memory, so its adapter could not say what it belongs to: the result is written merged.")
        return Policy(prepare(adapter.get_base_model()), adapter)
    if not isinstance(source, str | Path):
        return None
    facts = adapter_facts(source, revision)
    if facts is None:
        return None
    base = facts.get("base_model_name_or_path")
    if not base:
        raise UsageError(f"adapter {str(source)!r} does not say which model it belongs to (base_model_name_or_path).")
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": options["trust_remote_code"]}
    model = load_causal(
        base, revision=facts.get("revision"), tokenizer=load_tokenizer(source, **where), note=note, **options
    )
    return Policy(model, open_adapter(model, source, revision), base=base)


@no_bars()
def save_policy(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: str | Path, *, merge: bool = False) -> Path:
    """An ordinary folder: ``AutoModelForCausalLM`` loads it, or, of an adapter, ``AutoPeftModelForCausalLM``.

    ``merge`` writes the whole model with the adapter in it; so is written what has no base that a file could name.
    """
    if policy.adapter is not None and policy.base is not None and not merge:
        policy.adapter.active_peft_config.base_model_name_or_path = policy.base
        policy.adapter.save_pretrained(str(folder), save_embedding_layers=False)  # new tokens have rows of their own
    else:
        model = policy.model if policy.adapter is None else merged(policy).model
        _stop_where_answers_end(model, tokenizer)
        model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return Path(folder)


def _stop_where_answers_end(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The library's ``generate`` stops where the model was trained to stop; and its settings can be written."""
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    ends = end_ids(tokenizer, model)
    settings.eos_token_id = ends[0] if len(ends) == 1 else list(ends)
    if not _valid(settings):
        settings.do_sample = True  # many published folders have a temperature without sampling
    if not _valid(settings):  # flags that contradict each other: the ids are what matters
        model.generation_config = GenerationConfig(
            bos_token_id=settings.bos_token_id, eos_token_id=settings.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )


def _valid(settings: GenerationConfig) -> bool:
    try:
        settings.validate(strict=True)
    except ValueError:
        return False
    return True


__all__ = [
    "Adapter",
    "Size",
    "check_packing",
    "clone",
    "critic_of",
    "end_ids",
    "learn_tokenizer",
    "load_causal",
    "load_policy",
    "load_scorer",
    "load_tokenizer",
    "merged",
    "new_critic",
    "new_scorer",
    "prepare_tokenizer",
    "save_policy",
    "save_scorer",
    "set_checkpointing",
    "settle",
    "tiny_model",
]
