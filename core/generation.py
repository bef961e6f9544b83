"""Answers to prompts: what ``prefzoo generate``, ``prefzoo chat`` and the comparisons sample with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefzoo.data.formats import prompt_only
from prefzoo.data.samples import Samples
from prefzoo.data.tokens import tokenise
from prefzoo.models.load import load_policy, load_tokenizer
from prefzoo.models.roles import Policy
from prefzoo.parts.product import BestOfN, Draw
from prefzoo.registry import UsageError
from prefzoo.rollout import Sampling
from prefzoo.training import Run, load_run_policy


def generate(
    model: str | Path | PreTrainedModel | Policy | Run,
    prompts: Sequence[Any],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    n: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    reward: Any = None,
    plain: bool = False,
) -> list[list[str]]:
    """``n`` answers to each prompt, without special tokens, made as the run makes them.

    Args:
        model: a model or run folder, a hub id, an adapter's folder, a loaded model (with ``tokenizer``), or a
            :class:`prefzoo.Run`.
        prompts: strings, or lists of messages for the tokenizer's chat template.
        temperature: 0 takes the likeliest token.
        seed: an answer depends on it, on the model and on its prompt's place in the list.
        reward: what chooses, where the run's way of answering is to choose (``best_of_n``); by default what it was
            trained with.
        plain: sample from the weights alone, although the run answers otherwise (``final/decode.json``).

    Raises:
        UsageError: a prompt that leaves no room for ``max_new_tokens`` in the model's positions.

    Example::

        prefzoo.generate("runs/dpo", ["What is a prime number?"], n=4, temperature=0.7)
    """
    if isinstance(prompts, str):
        raise UsageError("prompts is one string; give a list of prompts.")
    if n < 1:
        raise UsageError(f"n={n}: give at least one answer per prompt.")
    policy, words = resolve_policy(model, tokenizer)
    rows = [{"prompt": p} for p in prompts]
    sampling = Sampling(temperature, top_p, max_new_tokens)
    answers = texts(sample(policy, words, rows, n, sampling, seed, reward=reward, plain=plain), words)
    return [answers[i * n : (i + 1) * n] for i in range(len(rows))]


def resolve_policy(
    model: Any, tokenizer: PreTrainedTokenizerBase | None = None, *, device: str | None = None, **loading: Any
) -> tuple[Policy, PreTrainedTokenizerBase]:
    """A policy ready to sample from, and its tokenizer."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(model, Run):
        if model.policy is None:
            raise UsageError(f"run {model.algorithm!r} made a reward model, which writes no answers.")
        return model.policy, model.tokenizer
    if isinstance(model, str | Path):
        policy, words = load_run_policy(model, **loading)
        return policy.to(device), tokenizer or words
    if not isinstance(model, PreTrainedModel | Policy) and not hasattr(model, "peft_config"):
        raise UsageError(f"model: expected a folder, a hub id or a loaded model, got {type(model).__name__}.")
    if tokenizer is None:
        where = getattr(getattr(model, "config", None), "_name_or_path", None)
        if not where:
            raise UsageError("a model in memory needs its tokenizer: give tokenizer=.")
        tokenizer = load_tokenizer(where)
    policy = model if isinstance(model, Policy) else load_policy(model)
    return policy.to(device), tokenizer


def sample(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    n: int,
    sampling: Sampling,
    seed: int,
    *,
    reward: Any = None,
    plain: bool = False,
) -> Samples:
    """``n`` answers to each row's prompt, made as ``policy.product`` says; the same seed gives the same uniform numbers
    whatever the policy. ``reward`` and ``plain`` as in :func:`generate`."""
    product = policy.product
    if reward is not None and (plain or not isinstance(product, BestOfN)):
        how = "its weights alone" if plain or product is None else type(product).__name__
        raise UsageError(f"reward: nothing chooses among answers here, the model answers by {how}; leave it out.")
    prompts, report = tokenise([prompt_only(dict(r)) for r in rows], tokenizer, "prompts", max_length=10**6)
    if len(prompts) != len(rows):
        raise UsageError("\n".join(["some prompts cannot be answered:", *report.lines()[1:]]))
    draw = Draw(policy, tokenizer, sampling, seed)
    if product is None or plain:
        return draw(prompts, n)
    if reward is not None:
        product = replace(product, reward=reward, reward_weights=None)
    return product.answer(draw, prompts, n)


def texts(samples: Samples, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Completions as text, without special tokens."""
    ids = [samples.completions[i].tolist() for i in range(len(samples.completions))]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)
