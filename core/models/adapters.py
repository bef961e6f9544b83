"""Adapters through peft: LoRA, DoRA and rsLoRA; found, added, switched off, merged."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from prefzoo.models.causal import is_quantised, prepare
from prefzoo.models.folders import first_line, in_words
from prefzoo.models.roles import Policy
from prefzoo.registry import UsageError, suggest

Variant = Literal["lora", "dora", "rslora"]


@dataclass(frozen=True)
class Adapter:
    """W + s B A with frozen W: s = alpha / rank (rsLoRA: alpha / sqrt(rank)); DoRA learns the columns' lengths besides.

    None means what a found adapter has, or else rank 16, alpha 32, all linear layers but the output. There is no
    dropout on it: a loss compares log-probabilities of two passes, which must agree.

    Source: Hu et al. (LoRA), arXiv:2106.09685; Kalajdzievski (rsLoRA), arXiv:2312.03732; Liu et al. (DoRA),
    arXiv:2402.09353.
    """

    variant: Variant = "lora"
    rank: int | None = None
    alpha: float | None = None
    targets: str | Sequence[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.variant not in ("lora", "dora", "rslora"):
            known = ["lora", "dora", "rslora"]
            raise UsageError(f"no adapter {self.variant!r}{suggest(str(self.variant), known)}")
        for name, value in (("rank", self.rank), ("alpha", self.alpha)):
            if value is not None and not value > 0:
                raise UsageError(f"an adapter's {name} is above 0; got {value!r}.")


def add_adapter(
    model: PreTrainedModel, adapter: Adapter, *, new_ids: Sequence[int] = (), revision: str | None = None
) -> Any:
    """peft's object around a model that now holds a fresh adapter. The embeddings of ``new_ids`` learn with it: new
    tokens that cannot would all stay alike."""
    import peft

    if is_quantised(model):
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    targets = adapter.targets if adapter.targets is not None else "all-linear"
    alpha = 32.0 if adapter.alpha is None else adapter.alpha
    config = peft.LoraConfig(
        task_type="CAUSAL_LM" if model.get_output_embeddings() is not None else None,
        r=adapter.rank or 16, lora_alpha=int(alpha) if alpha == int(alpha) else alpha, lora_dropout=0.0,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_dora=adapter.variant == "dora", use_rslora=adapter.variant == "rslora", revision=revision,
        trainable_token_indices=_new_rows(model, new_ids) if new_ids else None,
    )  # fmt: skip
    apart = UsageError(
        f"new tokens have embeddings of their own to train; leave those out of lora_targets {targets!r}."
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Conv1D is transposed, and names of the library that were renamed
        torch.manual_seed(adapter.seed)
        try:
            made = peft.get_peft_model(model, config)
        except (ValueError, TypeError) as error:
            if "trainable_token_indices" in str(error):
                raise apart from error
            linear = {n.rpartition(".")[2] for n, m in model.named_modules() if "Linear" in type(m).__name__}
            names = linear or {n.rpartition(".")[2] for n, m in model.named_modules() if type(m).__name__ == "Conv1D"}
            raise UsageError(
                f"no adapter on {targets!r}: {first_line(error)}. Linear layers: {', '.join(sorted(names))}."
            ) from error
    embeddings = [e for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e is not None]
    if new_ids and any("lora_" in name for layer in embeddings for name, _ in layer.named_parameters()):
        raise apart
    return made


def _new_rows(model: PreTrainedModel, ids: Sequence[int]) -> dict[str, list[int]]:
    """The embeddings with rows of their own for new tokens: the input's, and the output's unless it is the same."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    if layers[1] is not None and layers[1].weight is layers[0].weight:
        layers.pop()
    names = {id(m): n.rpartition(".")[2] for n, m in model.named_modules()}
    return {names[id(layer)]: list(ids) for layer in layers if layer is not None}


def open_adapter(model: PreTrainedModel, source: str | Path, revision: str | None = None) -> Any:
    """The adapter of a folder or hub id on its base model, ready to be trained on."""
    import peft

    if Path(source).is_dir() and not any(Path(source).glob("adapter_model.*")):
        raise UsageError(f"adapter {str(source)!r} could not be loaded: it holds no adapter_model.safetensors.")
    with in_words(f"adapter {str(source)!r} could not be loaded"), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = peft.PeftModel.from_pretrained(model, str(source), is_trainable=True, revision=revision)
    missing = [str(w.message) for w in told if "missing adapter keys" in str(w.message)]
    if missing:
        raise UsageError(f"adapter {str(source)!r} lacks weights, or belongs to another model ({missing[0][:160]}...).")
    prepare(model)  # its dropout
    return found


def check_same(asked: Adapter, found: Any, source: Any) -> None:
    """An adapter is trained on as it is; what is asked for besides must not contradict it."""
    config = found.active_peft_config
    if config.peft_type.value != "LORA":
        raise UsageError(
            f"adapter {str(source)!r} is of type {config.peft_type.value}, which is not trained on here; leave lora "
            "out, and it is merged into its base where peft can do that."
        )
    in_order = lambda t: t if t is None or isinstance(t, str) else sorted(t)  # noqa: E731
    facts = {
        "variant": "dora" if config.use_dora else "rslora" if config.use_rslora else "lora",
        "rank": config.r,
        "alpha": config.lora_alpha,
        "targets": in_order(config.target_modules),
    }
    for name, value in facts.items():
        wanted = in_order(getattr(asked, name)) if name == "targets" else getattr(asked, name)
        if wanted in (None, value) or wanted == "all-linear":
            continue
        raise UsageError(
            f"adapter {str(source)!r} has {name} {value!r}, not {wanted!r}; it is trained on as it is: leave the "
            "option out or give its own value."
        )


def merged(policy: Policy) -> Policy:
    """A copy with the adapter added to the weights: W + s B A."""
    if policy.adapter is None:
        return copy.deepcopy(policy)
    if is_quantised(policy.model):
        raise UsageError(
            "an adapter over 4-bit weights is not merged: the sum would be rounded to 4 bits. Save the adapter "
            "(merge=False), and merge it into the model in full precision: load its folder without lora and save that."
        )
    return Policy(merge_into(copy.deepcopy(policy).adapter), fp32_head=policy.fp32_head)


def _untie(model: PreTrainedModel) -> None:
    """An adapter on one of two tied embeddings is added to that one alone, so they part."""
    layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    if layers[1] is None or layers[0].weight is not layers[1].weight:
        return
    if any("lora_" in name for layer in layers for name, _ in layer.named_parameters()):
        head = getattr(layers[1], "base_layer", layers[1])
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def merge_into(adapter: Any) -> Any:
    """Add an adapter to the weights under it, in place; the model without it."""
    _untie(adapter.get_base_model())
    with in_words("this kind of adapter cannot be merged"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = adapter.merge_and_unload(safe_merge=True)
    return model.requires_grad_(True)
