"""Reward models that read text: scores of the library's forward, one text at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    pipeline,
)
from transformers.utils import logging as hf_logging

from prefzoo.data.samples import Ragged, Samples
from prefzoo.feedback import ModelReward, TextReward, resolve_reward
from prefzoo.models.load import learn_tokenizer, load_policy, new_scorer, save_scorer, tiny_model
from prefzoo.models.roles import Policy
from prefzoo.registry import UsageError

hf_logging.disable_progress_bar()
PROMPTS = ["one two ", "three four five six seven "]
ANSWERS = ["one", "two three four", "five", "six six six six six six six six", "seven"]
OWNERS = [1, 0, 1, 1, 0]
TEXTS = [PROMPTS[p] + a for p, a in zip(OWNERS, ANSWERS, strict=True)]


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    """The policy's."""
    return learn_tokenizer(PROMPTS + ANSWERS, 280)


@pytest.fixture(scope="module")
def samples(words: PreTrainedTokenizerBase) -> Samples:
    ids = [[*words(a, add_special_tokens=False)["input_ids"], words.eos_token_id] for a in ANSWERS]
    return Samples("completions", Ragged.of(words(PROMPTS)["input_ids"]), Ragged.of(ids), np.array(OWNERS),
                   extra={"prompt": PROMPTS})  # fmt: skip


def encoder(folder: Path, limit: int = 64) -> Path:
    """A tiny BERT with words of its own, [CLS] and [SEP], and no EOS."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "one", "two", "three", "four", "five", "six", "seven"]
    tokenizer = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, "[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=limit,
    ).save_pretrained(folder)  # fmt: skip
    config = BertConfig(
        vocab_size=len(names), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_labels=1, max_position_embeddings=64, initializer_range=0.5, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


def decoder(folder: Path, pad: bool) -> tuple[Path, PreTrainedTokenizerBase]:
    """A classifier on a decoder with another tokenizer; without a padding token the library takes single rows only."""
    other = learn_tokenizer(["quite other words, and none of those"], 270)
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(vocab_size=270, num_labels=1, initializer_range=0.3, bos_token_id=1, eos_token_id=2)
    config = (
        LlamaConfig(**shape, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    pad_token_id=0)
        if pad
        else GPT2Config(**shape, n_embd=32, n_layer=2, n_head=4, n_positions=99, pad_token_id=None)
    )  # fmt: skip
    if not pad:
        other.pad_token = None
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    other.save_pretrained(folder)
    return folder, other


def one_by_one(folder: Path, texts: list[str], **options: Any) -> torch.Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, truncation_side="left")
    with torch.no_grad():
        return torch.cat([model(**tokenizer(t, return_tensors="pt", **options)).logits[:, 0] for t in texts])


@pytest.mark.parametrize("budget", [1, 20, 10_000])
@pytest.mark.parametrize("kind", ["encoder", "decoder", "decoder without padding"])
def test_scores_are_the_librarys_one_by_one(
    kind: str, budget: int, samples: Samples, words: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = encoder(tmp_path) if kind == "encoder" else decoder(tmp_path, pad=kind == "decoder")[0]
    source = resolve_reward(folder, words)
    assert isinstance(source, TextReward) and not source.verifies and source.name == tmp_path.name
    source.token_budget = budget
    scores = source(samples)
    torch.testing.assert_close(scores, one_by_one(folder, TEXTS), atol=1e-5, rtol=1e-5)
    assert scores.std() > 1e-3 and source.drain() == ({"rewards/truncated": 0.0}, {})


def test_and_those_of_its_pipeline(samples: Samples, words: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    folder = encoder(tmp_path)
    judge = pipeline("text-classification", model=str(folder), function_to_apply="none", device="cpu")
    expected = torch.tensor([found["score"] for found in judge(TEXTS)])
    torch.testing.assert_close(resolve_reward(folder, words)(samples), expected, atol=1e-5, rtol=1e-5)


def test_long_texts_lose_their_beginning(samples: Samples, words: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Not the answer, which is what is judged; and the special tokens stay."""
    folder = encoder(tmp_path, limit=8)
    source = resolve_reward(folder, words)
    torch.testing.assert_close(
        source(samples), one_by_one(folder, TEXTS, truncation=True, max_length=8), atol=1e-5, rtol=1e-5
    )
    assert source._encode(samples)[3] == [2, *[9] * 6, 3]  # type: ignore[attr-defined]
    over = sum(len(t.split()) + 2 > 8 for t in TEXTS)
    source.drain()
    source(samples)
    assert 0 < over < 5 and source.drain()[0] == {"rewards/truncated": over / 5}


def test_messages_go_through_its_own_template(words: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    folder, other = decoder(tmp_path, pad=True)
    chat = Samples("completions", Ragged.of([[5]]), Ragged.of([words(ANSWERS[1])["input_ids"]]), np.zeros(1, int),
                   extra={"prompt": [[{"role": "user", "content": "one"}]]})  # fmt: skip
    with pytest.raises(UsageError, match="has no chat template"):
        resolve_reward(folder, words)(chat)
    other.chat_template = "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    other.save_pretrained(folder)
    text = f"<bos>user: one<eos><bos>assistant: {ANSWERS[1]}<eos>"
    torch.testing.assert_close(
        resolve_reward(folder, words)(chat), one_by_one(folder, [text], add_special_tokens=False)
    )


def test_a_continued_turn_is_judged_as_one(words: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The same dialogue, wherever the prompt ends in it."""
    folder, other = decoder(tmp_path, pad=True)
    other.chat_template = "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    other.save_pretrained(folder)
    source, ask = resolve_reward(folder, words), {"role": "user", "content": "one"}

    def encoded(prompt: list[dict[str, str]], answer: str) -> list[list[int]]:
        ids = words(answer, add_special_tokens=False)["input_ids"]
        samples = Samples(
            "completions", Ragged.of([[5]]), Ragged.of([ids]), np.zeros(1, int), extra={"prompt": [prompt]}
        )
        return source._encode(samples)  # type: ignore[attr-defined, no-any-return]

    begun = [ask, {"role": "assistant", "content": "two "}]
    assert encoded(begun, "three four") == encoded([ask], "two three four")
    assert encoded([*begun, ask], "three four") != encoded([ask], "two three four")


def test_positions_that_are_counted_from_behind_the_padding_are_fewer(words: PreTrainedTokenizerBase) -> None:
    """RoBERTa has two positions that no token gets: longer texts lose their beginning, and are scored."""
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=280, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1,
                           intermediate_size=16, max_position_embeddings=14, pad_token_id=1)  # fmt: skip
    other = learn_tokenizer(PROMPTS + ANSWERS, 280)
    source = TextReward(AutoModelForSequenceClassification.from_config(config), other, words)
    answers = [[*words(" ".join(["six"] * n), add_special_tokens=False)["input_ids"]] for n in (1, 9, 30)]
    samples = Samples("completions", Ragged.of([[5]]), Ragged.of(answers), np.zeros(3, int), extra={"prompt": ["one "]})
    assert source.limit == 12 and max(map(len, source._encode(samples))) == 12
    assert source(samples).isfinite().all()


def test_what_we_wrote_reads_finished_answers_with_their_end(
    samples: Samples, words: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """A reward model of ours scores alike through its own ids and as text for a policy with another tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=280, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, initializer_range=0.3)  # fmt: skip
    scorer = new_scorer(load_policy(AutoModelForCausalLM.from_config(config)))
    torch.nn.init.normal_(scorer.head.weight)
    scorer.offset.fill_(0.7)
    scorer.scale.fill_(2.0)
    folder = save_scorer(scorer, words, tmp_path)
    by_ids = resolve_reward(folder, words)
    assert isinstance(by_ids, ModelReward)
    stranger = learn_tokenizer(["quite other words, and none of those"], 270)
    ids = [[*stranger(a, add_special_tokens=False)["input_ids"], stranger.eos_token_id] for a in ANSWERS]
    theirs = Samples("completions", Ragged.of(stranger(PROMPTS)["input_ids"]), Ragged.of(ids), np.array(OWNERS),
                     extra={"prompt": PROMPTS})  # fmt: skip
    by_text = resolve_reward(folder, stranger)
    assert isinstance(by_text, TextReward)
    whole = [[*words(t)["input_ids"], words.eos_token_id] for t in TEXTS]
    assert by_text._encode(theirs) == whole
    one = Samples("completions", Ragged.of([w[:1] for w in whole]), Ragged.of([w[1:] for w in whole]), np.arange(5),
                  extra={"prompt": TEXTS})  # fmt: skip
    torch.testing.assert_close(by_text(theirs), by_ids(one), atol=1e-4, rtol=1e-4)


def test_what_cannot_read_text_is_refused(words: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    save_scorer(new_scorer(Policy(tiny_model(words))), words, tmp_path)
    with pytest.raises(UsageError, match="has another tokenizer than the policy"):
        resolve_reward(tmp_path, learn_tokenizer(["quite other words, and none of those"], 270))
