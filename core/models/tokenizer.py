"""Tokenizers: loading them ready for training, learning one, and the ids that end an answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from prefzoo.models.folders import adapter_facts, check_source, find, first_line, in_words, told
from prefzoo.registry import UsageError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def load_tokenizer(
    source: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
    added_tokens: Sequence[str] = (),
) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or a hub id, with an end-of-sequence token and a padding token.

    Args:
        source: of an adapter without tokenizer, the base model's is taken.
        chat_template: ``"chatml"``, which adds its two tokens, or a Jinja file; it replaces the tokenizer's own.
        added_tokens: words that become tokens; the model's embeddings must grow with them
            (``load_policy(..., tokenizer=...)``).

    A tokenizer without padding token pads with EOS: padding is masked by position, never by value, so EOS is still
    learned.
    """
    tokenizer = open_tokenizer(source, revision=revision, trust_remote_code=trust_remote_code)
    name = f"of {str(source)!r} "
    return prepare_tokenizer(tokenizer, chat_template=chat_template, added_tokens=added_tokens, name=name)


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: str | None = None,
    added_tokens: Sequence[str] = (),
    name: str = "",
) -> PreTrainedTokenizerBase:
    """A tokenizer with a padding token, a template and more tokens where they are wanted; in place."""
    if tokenizer.eos_token_id is None:
        raise UsageError(
            f"tokenizer {name}has no EOS token, so no answer would ever end; set tokenizer.eos_token and save it, or "
            "load it yourself and give tokenizer=."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template == "chatml":
        tokenizer.chat_template = CHATML
        tokenizer.add_special_tokens({"additional_special_tokens": list(CHATML_TOKENS)}, False)
    elif chat_template is not None:
        tokenizer.chat_template = _template_file(chat_template)
    if added_tokens:
        tokenizer.add_tokens(list(added_tokens))
    if chat_template is not None:
        try:
            _render(tokenizer)
        except Exception as error:  # a template is a program
            raise UsageError(
                f"chat_template {chat_template!r} cannot render a question and an answer ({first_line(error)})."
            ) from error
    return tokenizer


def open_tokenizer(
    source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """A tokenizer as it is."""
    check_source(source)
    facts = adapter_facts(source, revision)
    if facts is not None and find(source, "tokenizer_config.json", revision) is None:
        adapter, base = source, facts.get("base_model_name_or_path")
        if not base:
            raise UsageError(
                f"adapter {str(adapter)!r} does not say which model it belongs to (base_model_name_or_path)."
            )
        source, revision = base, facts.get("revision")
        check_source(source)
    if Path(source).is_dir() and not any(Path(source).glob("*token*")):
        raise UsageError(
            f"model {str(source)!r}: no tokenizer could be loaded from it, it holds no tokenizer.json; save it there, "
            "or give tokenizer=."
        )
    with in_words(f"{told(source)}no tokenizer could be loaded from it"):
        return AutoTokenizer.from_pretrained(str(source), revision=revision, trust_remote_code=trust_remote_code)


def _template_file(name: str) -> str:
    file = Path(name)
    if not file.is_file():
        raise UsageError(f"chat_template: {name!r} is neither 'chatml' nor a Jinja file that exists.")
    return file.read_text(encoding="utf-8")


def end_ids(tokenizer: PreTrainedTokenizerBase, model: Any = None) -> tuple[int, ...]:
    """Every id that ends an answer, the tokenizer's EOS first.

    Beside it: the ids of the model's generation configuration, and the special token that the chat template writes
    after an assistant's turn.
    """
    ids = [tokenizer.eos_token_id]
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids += known if isinstance(known, list | tuple) else [known]
    if tokenizer.chat_template is not None:
        ids.append(_end_of_turn(tokenizer))
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that follows the assistant's words."""
    try:
        after = _render(tokenizer).rpartition(_ANSWER)[2].strip()
    except Exception:  # a template of another kind of conversation, or one that needs more than messages
        return None
    first = tokenizer(after, add_special_tokens=False)["input_ids"][:1] if after else []
    special = tokenizer.added_tokens_decoder
    return first[0] if first and first[0] in special and special[first[0]].special else None


_ANSWER = "Forty-two it is"


def _render(tokenizer: PreTrainedTokenizerBase) -> str:
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": _ANSWER}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id; ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def same_tokens(mine: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> bool:
    """Whether every token of ``mine`` has the same id in ``theirs``, which may know more (a padding token)."""
    other = theirs.get_vocab()
    return all(other.get(token) == number for token, number in mine.get_vocab().items())


def learn_tokenizer(texts: Iterable[str], vocabulary: int = 2048) -> PreTrainedTokenizerBase:
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
