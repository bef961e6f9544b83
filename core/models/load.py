"""Loading, making and saving models: ordinary Hugging Face folders in, ordinary Hugging Face folders out."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GraniteConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as hf_logging

from prefzoo.models.roles import Policy, Pooling, Scorer
from prefzoo.models.tree import HOOK, TreeBatch, pack_rows
from prefzoo.registry import UsageError


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """The library draws progress bars for loading and saving files; a run has one bar of its own."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


REWARD_FILE = "prefzoo_reward"  # .json and .safetensors of a reward head that no library class can hold

Size = Literal["tiny", "small"]
SIZES: dict[Size, dict[str, int]] = {
    # hidden size, layers, heads, MLP width; parameters without embeddings
    "tiny": dict(hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256),  # 0.33 M
    "small": dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=352),  # 0.8 M
}


def tiny_model(
    tokenizer: PreTrainedTokenizerBase, *, size: Size = "tiny", seed: int = 0, positions: int = 1024
) -> PreTrainedModel:
    """A small decoder with random weights for a given tokenizer: Llama blocks, tied embeddings scaled by sqrt(d).

    The architecture is transformers' Granite with its multipliers set so that it is a plain pre-norm decoder. Weights
    are drawn with standard deviation 1/sqrt(fan in), the projections back into the residual stream divided by
    sqrt(2 layers): at this width the library's constant 0.02 learns more slowly.
    """
    shape = SIZES[size]
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    config = GraniteConfig(
        vocab_size=len(tokenizer), max_position_embeddings=positions, tie_word_embeddings=True,
        embedding_multiplier=math.sqrt(width), attention_multiplier=(width // shape["num_attention_heads"]) ** -0.5,
        logits_scaling=1.0, residual_multiplier=1.0, rms_norm_eps=1e-6, attention_dropout=0.0,
        num_key_value_heads=shape["num_attention_heads"], pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **shape,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() < 2:
                continue
            spread = 1 / math.sqrt(width if "embed" in name else weight.shape[1])
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                spread /= math.sqrt(2 * layers)
            weight.normal_(0.0, spread, generator=generator)
    return _prepare(model)


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or a hub id, with an end-of-sequence token and a padding token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"model {str(source)!r}: no tokenizer could be loaded from it ({_first_line(error)})."
        ) from error
    if tokenizer.eos_token_id is None:
        raise UsageError(
            f"tokenizer of {str(source)!r} has no EOS token; set tokenizer.eos_token, or no answer ever ends."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked by position, so sharing the id is harmless
    return tokenizer


@_no_bars()
def load_causal(source: str | Path | PreTrainedModel, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model from a local folder, a hub id or a loaded model (which is copied)."""
    if isinstance(source, PreTrainedModel):
        return _prepare(copy.deepcopy(source).to(dtype))
    if (Path(source) / f"{REWARD_FILE}.json").exists():
        raise UsageError(f"model {str(source)!r} is a reward model, not a language model; give it as reward=.")
    return _load_causal(source, dtype)


def _load_causal(source: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model = AutoModelForCausalLM.from_pretrained(str(source), dtype=dtype)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"model {str(source)!r}: no causal language model could be loaded from it ({_first_line(error)})."
        ) from error
    if any("SequenceClassification" in name for name in model.config.architectures or ()):
        raise UsageError(f"model {str(source)!r} is a sequence classifier (a reward model?), not a language model.")
    return _prepare(model)


def load_policy(source: str | Path | PreTrainedModel, *, dtype: torch.dtype = torch.float32) -> Policy:
    """A policy that has passed :func:`check_packing`."""
    policy = Policy(load_causal(source, dtype=dtype))
    check_packing(policy)
    return policy


def clone(policy: Policy) -> Policy:
    """A frozen copy: a reference."""
    return Policy(copy.deepcopy(policy.model)).requires_grad_(False).eval()


def new_scorer(policy: Policy, pooling: Pooling = "last") -> Scorer:
    """A reward model or critic with a copy of the policy's trunk and a zero head."""
    trunk = copy.deepcopy(policy.model.base_model)
    weight = next(trunk.parameters())
    head = nn.Linear(trunk.config.get_text_config().hidden_size, 1, device=weight.device, dtype=weight.dtype)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return Scorer(trunk.requires_grad_(True), head, pooling)


def critic_of(reward_model: Scorer) -> Scorer:
    """A critic that starts from a reward model: its copy, the standardisation of rewards folded into the head."""
    head = copy.deepcopy(reward_model.head)
    with torch.no_grad():
        if head.bias is None:
            head.bias = nn.Parameter(torch.zeros_like(head.weight[:, 0]))
        head.weight /= reward_model.scale
        head.bias.sub_(reward_model.offset).div_(reward_model.scale)
    return Scorer(copy.deepcopy(reward_model.trunk).requires_grad_(True), head.requires_grad_(True))


@_no_bars()
def load_scorer(folder: str | Path) -> Scorer:
    """A reward model: a folder that :func:`save_scorer` wrote, or any one-label sequence classifier."""
    folder = Path(folder)
    own = folder / f"{REWARD_FILE}.json"
    try:
        if own.exists():
            facts = json.loads(own.read_text())
            trunk = _load_causal(folder, torch.float32).base_model
            head = nn.Linear(trunk.config.get_text_config().hidden_size, 1)
            head.load_state_dict(load_file(folder / f"{REWARD_FILE}.safetensors"))
        else:
            model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
            facts = {"pooling": "last", **getattr(model.config, "prefzoo_reward", {})}
            trunk, head = _prepare(model).base_model, model.score
            if head.weight.shape[0] != 1:
                raise UsageError(f"reward model {str(folder)!r} has {head.weight.shape[0]} labels; one is needed.")
    except (OSError, ValueError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"{str(folder)!r} holds no reward model that could be loaded ({_first_line(error)})."
        ) from error
    scorer = Scorer(trunk, head, facts["pooling"])
    scorer.offset.fill_(facts.get("offset", 0.0))
    scorer.scale.fill_(facts.get("scale", 1.0))
    return scorer


@_no_bars()
def save_policy(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> Path:
    """An ordinary Hugging Face folder: ``AutoModelForCausalLM.from_pretrained(folder)`` loads it."""
    policy.model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return Path(folder)


@_no_bars()
def save_scorer(scorer: Scorer, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> Path:
    """A causal folder with the reward head beside it (``prefzoo_reward.safetensors``); :func:`load_scorer` reads it."""
    folder = Path(folder)
    causal = AutoModelForCausalLM.from_config(scorer.trunk.config, dtype=scorer.head.weight.dtype)
    causal.base_model.load_state_dict(scorer.trunk.state_dict())
    causal.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    save_file({k: v.contiguous() for k, v in scorer.head.state_dict().items()}, folder / f"{REWARD_FILE}.safetensors")
    facts = {"pooling": scorer.pooling, "offset": float(scorer.offset), "scale": float(scorer.scale)}
    (folder / f"{REWARD_FILE}.json").write_text(json.dumps(facts))
    return folder


def check_packing(policy: Policy, tolerance: float = 2e-3) -> float:
    """Packed log-probabilities of two prompts against ``model(...).logits`` one by one; the largest difference.

    Log-probabilities, not hidden states: some architectures scale or cap their logits.
    """
    model = policy.model
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(vocabulary, (n,), generator=generator).tolist()  # noqa: E731
    rows = [(draw(5), [draw(4), draw(7)]), (draw(9), [draw(3)])]
    device = next(model.parameters()).device
    tree = TreeBatch.of(pack_rows(rows), device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed, chunked = policy(tree).logps_C, policy.chunked(tree, 4).logps_C
            assert packed is not None and chunked is not None
            model.set_attn_implementation("eager")
            single = torch.cat([_plain_logps(model, p, c, device) for p, cs in rows for c in cs])
    except (NotImplementedError, TypeError, AttributeError, RuntimeError) as error:
        raise UsageError(
            f"models of type {model.config.model_type!r} cannot run on packed batches ({_first_line(error)})."
        ) from error
    finally:
        model.set_attn_implementation(HOOK)
        model.train(was_training)
    difference = max(float((found - single).abs().max()) for found in (packed, chunked))
    if not difference <= tolerance * (1 if model.dtype == torch.float32 else 50):
        raise UsageError(
            f"models of type {model.config.model_type!r} give other log-probabilities on packed batches than one by "
            f"one (largest difference {difference:.3g}): their attention is not plain causal attention, or their head "
            "does more than prefzoo knows of."
        )
    return difference


def _plain_logps(model: PreTrainedModel, prompt: list[int], completion: list[int], device: Any) -> Tensor:
    ids = torch.tensor([prompt + completion], device=device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]


def _prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Packed attention, and no dropout: a loss compares log-probabilities of two passes, which must agree."""
    model.set_attn_implementation(HOOK)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def learn_tokenizer(texts: Sequence[str], vocabulary: int = 2048) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer learned from texts, with ``<pad>``, ``<bos>`` and ``<eos>``; BOS starts every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
