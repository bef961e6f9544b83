"""Reward models in and out: the library's classifier gives our scores, or the folder says why it is no classifier."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerBase,
    Qwen3Config,
)
from transformers.utils import logging as hf_logging

from prefzoo.models.load import (
    learn_tokenizer,
    load_policy,
    load_scorer,
    new_critic,
    new_scorer,
    save_scorer,
    tiny_model,
)
from prefzoo.models.roles import Policy, Scorer
from prefzoo.models.tree import TreeBatch, pack_rows
from prefzoo.registry import UsageError

hf_logging.disable_progress_bar()
VOCABULARY = 262
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=8),
    "gemma": lambda: GemmaConfig(**SHAPE, head_dim=8),
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=8, sliding_window=6),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=5),
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128,
                               initializer_range=0.2, bos_token_id=1, eos_token_id=2),
}  # fmt: skip
ROWS = [([5, 6, 7], [8, 9, 10, 2]), ([13, 14], [15, 16, 2]), ([20] * 9, [21, 22, 23, 24, 25, 2]), ([30], [31])]


@pytest.fixture
def words() -> PreTrainedTokenizerBase:
    return learn_tokenizer(["a b c d e f"], VOCABULARY)


def scorer_of(kind: str, **changes: Any) -> Scorer:
    torch.manual_seed(0)
    scorer = new_scorer(load_policy(AutoModelForCausalLM.from_config(CONFIGS[kind]())), **changes)
    torch.nn.init.normal_(scorer.head.weight)
    return scorer


def ours(scorer: Scorer) -> torch.Tensor:
    with torch.no_grad():
        rewards = scorer.eval()(TreeBatch.of(pack_rows([(p, [c]) for p, c in ROWS]))).rewards_B
        assert rewards is not None
        return rewards


def librarys(folder: Path, side: str) -> torch.Tensor:
    """The library's scores of a padded batch, by nothing but its own classes."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    tokenizer.padding_side = side
    batch = tokenizer.pad({"input_ids": [p + c for p, c in ROWS]}, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
    assert logits.shape == (len(ROWS), 1)
    return logits[:, 0]


@pytest.mark.parametrize("pad", ["its own", "eos", "none"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_librarys_classifier_gives_our_scores(
    kind: str, pad: str, words: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The head has no bias, so the scores are equal, not equal up to a constant."""
    if pad != "its own":
        words.pad_token = None if pad == "none" else words.eos_token
    scorer = scorer_of(kind)
    weights = {k: v.clone() for k, v in scorer.state_dict().items()}
    notes: list[str] = []
    save_scorer(scorer, words, tmp_path, note=notes.append)
    assert not notes
    expected = ours(scorer)
    torch.testing.assert_close(librarys(tmp_path, "right"), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours(load_scorer(tmp_path)), expected, atol=1e-5, rtol=1e-5)
    facts = json.loads((tmp_path / "config.json").read_text())
    assert facts["problem_type"] == "regression" and facts["id2label"] == {"0": "reward"}
    assert facts["prefzoo_reward"] == {"pooling": "last", "offset": 0.0}
    assert "attn_implementation" not in json.dumps(facts)
    assert weights.keys() == scorer.state_dict().keys()
    assert all(torch.equal(v, weights[k]) for k, v in scorer.state_dict().items()), "saving changes nothing"


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_padding_may_stand_on_either_side(kind: str, words: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    scorer = scorer_of(kind)
    save_scorer(scorer, words, tmp_path)
    torch.testing.assert_close(librarys(tmp_path, "left"), ours(scorer), atol=1e-4, rtol=1e-4)


def test_offset_and_scale(words: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The scale is in the weight; the offset, and a head's bias, in the configuration."""
    scorer = new_critic(load_policy(AutoModelForCausalLM.from_config(CONFIGS["llama"]())))
    torch.nn.init.normal_(scorer.head.weight)
    scorer.head.bias.data.fill_(0.4)
    scorer.offset.fill_(3.0)
    scorer.scale.fill_(0.5)
    save_scorer(scorer, words, tmp_path)
    offset = json.loads((tmp_path / "config.json").read_text())["prefzoo_reward"]["offset"]
    assert offset == pytest.approx((3.0 - 0.4) / 0.5)
    torch.testing.assert_close(librarys(tmp_path, "right") - offset, ours(scorer), atol=1e-4, rtol=1e-4)
    again = load_scorer(tmp_path)
    torch.testing.assert_close(ours(again), ours(scorer), atol=1e-4, rtol=1e-4)
    save_scorer(again, words, tmp_path / "again")
    torch.testing.assert_close(ours(load_scorer(tmp_path / "again")), ours(scorer), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"early_stopping": True}, {"pad_token_id": -1}, {"temperature": 0.7}], ids=str)
def test_settings_of_generation_that_contradict_each_other_lose_no_reward_model(
    settings: dict[str, Any], words: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """In the own format too, whose causal model has such settings."""
    AutoModelForCausalLM.from_config(CONFIGS["llama"]()).save_pretrained(tmp_path / "base")
    (tmp_path / "base/generation_config.json").write_text(json.dumps(settings))
    for pooling in ("last", "mean"):
        scorer = new_scorer(load_policy(tmp_path / "base"), pooling)
        save_scorer(scorer, words, tmp_path / pooling)
        torch.testing.assert_close(ours(load_scorer(tmp_path / pooling)), ours(scorer))


def test_what_a_classifier_cannot_hold_is_our_own_format_and_says_so(
    words: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    cases = {
        "mean over tokens": scorer_of("llama", pooling="mean"),
        "no sequence classifier of type 'granite'": new_scorer(Policy(tiny_model(words))),
    }
    for reason, scorer in cases.items():
        scorer.offset.fill_(0.3)
        scorer.scale.fill_(2.0)
        notes: list[str] = []
        folder = save_scorer(scorer, words, tmp_path / reason[:4], note=notes.append)
        assert len(notes) == 1 and reason in notes[0] and "prefzoo's own format" in notes[0]
        loaded = load_scorer(folder)
        assert loaded.pooling == scorer.pooling
        torch.testing.assert_close(ours(loaded), ours(scorer), atol=1e-5, rtol=1e-5)


def test_a_bfloat16_reward_model(words: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Its head is in float32 while it learns, and its folder of one type."""
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    scorer = new_scorer(load_policy(model, dtype=torch.bfloat16))
    torch.nn.init.normal_(scorer.head.weight)
    assert scorer.head.weight.dtype == torch.float32 and scorer.trunk.dtype == torch.bfloat16
    save_scorer(scorer, words, tmp_path)
    assert scorer.head.weight.dtype == torch.float32 and scorer.trunk.dtype == torch.bfloat16
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(ours(load_scorer(tmp_path)), ours(scorer).float(), atol=0.2, rtol=0.1)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_classifier_made_elsewhere(kind: str, words: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Without a word of prefzoo in its configuration."""
    config = CONFIGS[kind]()
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    torch.testing.assert_close(ours(load_scorer(tmp_path)), librarys(tmp_path, "right"), atol=1e-4, rtol=1e-4)


def test_what_is_no_reward_model_is_told_in_words(words: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    def three(folder: Path) -> None:
        AutoModelForSequenceClassification.from_config(LlamaConfig(**SHAPE, num_labels=3)).save_pretrained(folder)

    def causal(folder: Path) -> None:
        config = LlamaConfig(**SHAPE)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        facts = json.loads((folder / "config.json").read_text())
        facts |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
        (folder / "config.json").write_text(json.dumps(facts))

    def encoder(folder: Path) -> None:
        plain = {k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}
        AutoModelForSequenceClassification.from_config(BertConfig(**plain, num_labels=1)).save_pretrained(folder)

    def damaged(folder: Path) -> None:
        save_scorer(scorer_of("llama", pooling="mean"), words, folder)
        (folder / "prefzoo_reward.safetensors").write_bytes(b"x")

    for make, message in (
        (three, "has 3 labels; one is needed"), (causal, "is a language model"),
        (encoder, "does not score the last token"), (damaged, "holds no reward model that could be loaded"),
    ):  # fmt: skip
        folder = tmp_path / make.__name__
        make(folder)
        with pytest.raises(UsageError, match=message):
            load_scorer(folder)
    with pytest.raises(UsageError, match="there is no such folder"):
        load_scorer(tmp_path / "none")
