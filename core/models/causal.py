"""Causal language models: opened from a folder, a hub id or memory, made ready for packed batches, and checked."""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GraniteConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from prefzoo.models.folders import REWARD_FILE, check_source, first_line, in_words, no_bars
from prefzoo.models.roles import Policy, run_trunk
from prefzoo.models.tokenizer import vocabulary_size
from prefzoo.models.tree import HOOK, TreeBatch, pack_rows
from prefzoo.registry import UsageError

Note = Callable[[str], None]
Size = Literal["tiny", "small"]
SIZES: dict[Size, dict[str, int]] = {
    # hidden size, layers, heads, MLP width; parameters without embeddings
    "tiny": dict(hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256),  # 0.33 M
    "small": dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=352),  # 0.8 M
}


def silent(line: str) -> None:
    """Where nobody listens to notes."""


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
    return prepare(model)


@no_bars()
def load_causal(
    source: str | Path | PreTrainedModel,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    load_in_4bit: bool = False,
    note: Note = silent,
) -> PreTrainedModel:
    """A causal language model from a local folder, a hub id or a loaded model (which is copied).

    Args:
        tokenizer: where it knows more tokens than the model, the embeddings grow: the library draws the new rows around
            the mean of the old ones.
        note: gets a line for everything that was changed.
    """
    if isinstance(source, PreTrainedModel):
        if load_in_4bit or revision is not None:
            option = "load_in_4bit" if load_in_4bit else "revision"
            raise UsageError(f"{option} has no effect on a model in memory; give the folder or hub id of the model.")
        if is_quantised(source):
            raise UsageError(
                "a quantised model in memory cannot be trained; give its folder, and load_in_4bit with lora."
            )
        model = copy.deepcopy(source).to(dtype)
    else:
        if (Path(source) / f"{REWARD_FILE}.json").exists():
            raise UsageError(f"model {str(source)!r} is a reward model, not a language model; give it as reward=.")
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        if load_in_4bit:
            options |= _four_bits()
        model = open_causal(source, dtype, **options)
    grow(model, tokenizer, note)
    return prepare(model)


def open_causal(source: str | Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """What the library loads, after a look at what the folder says it is."""
    check_source(source)
    config = open_config(source, **{k: v for k, v in options.items() if k in ("revision", "trust_remote_code")})
    if any("ForSequenceClassification" in name for name in config.architectures or ()):
        raise UsageError(
            f"model {str(source)!r} is a sequence classifier (a reward model?), not a language model; give it as "
            "reward=, or as model= the language model it was made from."
        )
    if any(name.endswith("ForMaskedLM") for name in config.architectures or ()):
        raise UsageError(
            f"model {str(source)!r} is a {config.architectures[0]}, no causal language model: it fills gaps, and does "
            "not answer."
        )
    with in_words(f"model {str(source)!r}: no causal language model could be loaded from it"):
        model, found = AutoModelForCausalLM.from_pretrained(
            str(source), dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    check_complete(source, found)
    return model


def open_config(source: str | Path, **options: Any) -> Any:
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UsageError(f"model {str(source)!r} holds no config.json, so it is not a model's folder.")
    with in_words(f"model {str(source)!r}: its configuration could not be read"):
        return AutoConfig.from_pretrained(str(source), **options)


def check_complete(source: str | Path, found: Any) -> None:
    """The library fills weights that a folder lacks with random numbers; a run must not start from these."""
    bad = sorted([*found["missing_keys"], *(m[0] for m in found["mismatched_keys"])])
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UsageError(
            f"model {str(source)!r} lacks weights of its architecture, or has them in another shape: "
            f"{', '.join(bad[:3])}{more}."
        )


def _four_bits() -> dict[str, Any]:
    """Weights in 4-bit normal floats, computed with in bfloat16 (Dettmers et al., arXiv:2305.14314)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError("load_in_4bit needs the package bitsandbytes: pip install bitsandbytes, or leave it out.")
    if not torch.cuda.is_available():
        raise UsageError("load_in_4bit needs a CUDA device, and there is none; leave it out.")
    from transformers import BitsAndBytesConfig

    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    return {"quantization_config": quantised, "device_map": {"": torch.cuda.current_device()}}


def grow(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, note: Note) -> None:
    """Embeddings for every id of the tokenizer, or the first unknown id would be an assertion on the device."""
    if tokenizer is None:
        return
    rows, needed = model.get_input_embeddings().weight.shape[0], vocabulary_size(tokenizer)
    if needed > rows:
        add_rows(model, needed)
        note(f"the tokenizer has {needed} ids, the model {rows} embeddings: {needed - rows} rows were added.")


def add_rows(model: PreTrainedModel, rows: int) -> None:
    """Embeddings of so many ids; the new ones are drawn around the mean of the old, alike in every run."""
    told = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # it explains at length how it draws
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model.resize_token_embeddings(rows)
    finally:
        hf_logging.set_verbosity(told)


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Packed attention, and nothing random: a loss compares log-probabilities of two passes, which must agree."""
    model.set_attn_implementation(HOOK)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):  # attention_dropout, layerdrop, ...
                setattr(module, name, 0.0)
    return model


def is_quantised(model: PreTrainedModel) -> bool:
    return getattr(model, "quantization_method", None) is not None


# ------------------------------------------------------------------------------------------------ the check at load

_TOLERANCE = 2e-3


class NotFinite(UsageError):
    """No way of running such a model helps."""


def settle(policy: Policy, note: Note = silent) -> Policy:
    """Packed batches where they give the library's log-probabilities, else padded ones; what still differs is refused.

    The library's fast attention is tried before its plain one, which alone knows of soft caps and sinks.
    """
    name = policy.model.config.model_type
    try:
        check_packing(policy)
        if policy.packed:
            return policy
        packed = f"models of type {name!r} do not let their attention be replaced."
    except NotFinite:
        raise
    except UsageError as error:
        packed = str(error)
    for attention in ("sdpa", "eager"):
        try:
            policy.model.set_attn_implementation(attention)
            check_packing(policy)
        except (UsageError, ValueError, ImportError):
            continue
        note(f"{packed} Batches are padded instead, and each completion repeats its prompt: slower, the same numbers.")
        return policy
    raise UsageError(
        f"models of type {name!r} cannot be trained here: neither packed nor padded batches give the "
        f"log-probabilities of single sequences. {packed}"
    )


def check_packing(policy: Policy, tolerance: float = _TOLERANCE) -> float:
    """Log-probabilities of batches against ``model(...).logits`` one by one; the largest difference.

    Log-probabilities, not hidden states: some architectures scale or cap their logits. The batches run as the model's
    attention says: packed with the hook, else padded.
    """

    def batched(tree: TreeBatch) -> list[Tensor]:
        found = policy(tree).logps_C, policy.chunked(tree, 4).logps_C
        return [f for f in found if f is not None]

    return _compare(policy.model, batched, _plain_logps, tolerance, "log-probabilities")


def check_trunk(trunk: PreTrainedModel, note: Note = silent) -> None:
    """The same for a model without a language-model head, by its hidden states."""
    hidden = lambda tree: [run_trunk(trunk, tree)[tree.own_C]]  # noqa: E731
    tried = []
    for attention in (HOOK, "sdpa", "eager"):
        try:
            trunk.set_attn_implementation(attention)
            _compare(trunk, hidden, _plain_hidden, _TOLERANCE, "hidden states")
        except (UsageError, ValueError, ImportError) as error:
            tried.append(error)
            continue
        if tried:
            note(f"{tried[0]} Batches are padded instead.")
        return
    raise UsageError(str(tried[0]))


def _compare(
    model: PreTrainedModel, batched: Callable[[TreeBatch], list[Tensor]], plain: Callable[..., Tensor],
    tolerance: float, what: str,
) -> float:  # fmt: skip
    attention = model.config.get_text_config()._attn_implementation
    way = "packed" if attention == HOOK else "padded"
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    draw = lambda n: torch.randint(vocabulary, (n,), generator=generator).tolist()  # noqa: E731
    rows = [(draw(5), [draw(4), draw(7)]), (draw(9), [draw(3)])]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            found = batched(TreeBatch.of(pack_rows(rows), device))
            model.set_attn_implementation("eager")
            single = torch.cat([plain(model, p, c, device) for p, cs in rows for c in cs])
    except (NotImplementedError, TypeError, AttributeError, RuntimeError, ValueError, IndexError) as error:
        raise UsageError(
            f"models of type {model.config.model_type!r} cannot run on {way} batches ({first_line(error)})."
        ) from error
    finally:
        model.set_attn_implementation(attention)
        model.train(was_training)
    if not torch.isfinite(single).all():
        raise NotFinite(
            f"the model's own {what} are not finite: its weights are damaged, or too large for {model.dtype}."
        )
    difference = max(float((f.float() - single.float()).abs().max()) for f in found)
    loose = model.dtype != torch.float32 or is_quantised(model)
    if not difference <= tolerance * (50 if loose else 1):
        raise UsageError(
            f"models of type {model.config.model_type!r} give other {what} on {way} batches than one by one (largest "
            f"difference {difference:.3g}): their attention is not plain causal attention, or their head does more "
            "than prefzoo knows of."
        )
    return difference


def _plain_logps(model: PreTrainedModel, prompt: list[int], completion: list[int], device: Any) -> Tensor:
    ids = torch.tensor([prompt + completion], device=device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]


def _plain_hidden(trunk: PreTrainedModel, prompt: list[int], completion: list[int], device: Any) -> Tensor:
    ids = torch.tensor([prompt + completion], device=device)
    return trunk(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) :].float()


def set_checkpointing(module: nn.Module) -> None:
    """Keep the activations between layers only and compute the rest again in the backward pass.

    Departure: only the layers' own variant that needs no gradient at its input, so that adapters learn as well.
    """
    model: Any = module.model if isinstance(module, Policy) else module.trunk
    # transformers 5.23 renamed it; both take the arguments of torch.utils.checkpoint first.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except (ValueError, AttributeError) as error:
        raise UsageError(
            f"models of type {model.config.model_type!r} cannot run with gradient_checkpointing ({first_line(error)}); "
            "leave it out, and lower tokens_per_batch if memory is short."
        ) from error
